"""CompressConfig: what is done to a layer, with exceptions by name, pattern or type."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..codebook import codebook_shape, group_size_of
from ..memory_format import is_channels_last
from ..nn import COMPRESSED_KINDS
from ..weight import QuantSparseWeight, as_matrix
from . import prune, quantize
from .kmeans_init import INITS
from .settings_file import read_settings

_METHODS = ("kmeans", "uniform")


@dataclass(frozen=True)
class CompressConfig:
    """How layers are pruned and quantized.

    Args:
        bits: of a code, 1 to 8; a layer's codebook has 2^bits entries.
        threshold: weights with |w| below it are pruned; None prunes only zeros.
        sparsity: share of the weights to prune, 0 to 1, smallest first; instead of a threshold.
        method: "kmeans" (non-uniform) or "uniform" levels.
        layers: exceptions, from a layer's name, a pattern of names ("features.*") or a type
            ("Conv2d", "Linear") to a config, a dict of the fields that differ, or None to leave
            the layer dense. The name goes before a pattern, a pattern before the type, the type
            before the default.
        entropy_lambda: above 0, k-means also counts the length of a code in the file: it minimises
            squared error + entropy_lambda x mean square x bits, which spends some error to save
            bytes. 0.001 is much for 8 bits, and little for 5.
        init: where k-means starts: "optimal" (measures best), "linear", "density" or "kmeans++",
            see `placekern.compress.kmeans_init`.
        group_size: output channels that share a codebook; None: all of the layer. Smaller groups
            leave less error and cost 4 x 2^bits bytes a group: for few bits. A layer of M channels
            has ceil(M / group_size) groups of equal size, but for the last.

    Raises:
        ValueError: a field is out of range or unknown.
    """

    bits: int = 8
    threshold: float | None = None
    sparsity: float | None = None
    method: str = "kmeans"
    layers: Mapping[str, CompressConfig | Mapping[str, Any] | None] = field(default_factory=dict)
    entropy_lambda: float = 0.0
    init: str = "optimal"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}, expected an integer from 1 to 8")
        for name in ("threshold", "sparsity"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(
                    f"{name} is {value!r}, expected a number or None; YAML takes 1e-3 for text, "
                    "write 1.0e-3"
                )
        if self.threshold is not None and self.sparsity is not None:
            raise ValueError(
                f"threshold = {self.threshold} and sparsity = {self.sparsity} are both given; "
                "choose one"
            )
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold is {self.threshold}, expected a finite number >= 0")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity}, expected 0 to 1")
        if self.method not in _METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(_METHODS)}")
        price = self.entropy_lambda
        if isinstance(price, bool) or not isinstance(price, int | float):
            raise ValueError(f"entropy_lambda is {price!r}, expected a number")
        if not 0 <= price < float("inf"):
            raise ValueError(f"entropy_lambda is {price}, expected a finite number >= 0")
        if price and self.method != "kmeans":
            raise ValueError(
                f"entropy_lambda is {price} with method {self.method!r}; it needs 'kmeans'"
            )
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}, expected one of {', '.join(INITS)}")
        if self.init != "optimal" and self.method != "kmeans":
            raise ValueError(
                f"init is {self.init!r} with method {self.method!r}; it is k-means' own"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"group_size is {size!r}, expected an integer >= 1 or None")
        if not isinstance(self.layers, Mapping):
            raise ValueError(
                f"layers is {self.layers!r}, expected a mapping from names to settings"
            )
        for name, setting in self.layers.items():
            if not isinstance(name, str):
                raise ValueError(
                    f"layers has the key {name!r}, expected a name; in YAML, put it in quotes"
                )
            self._merged(name, setting)

    @classmethod
    def of(cls, config: CompressConfig | Mapping[str, Any] | None) -> CompressConfig:
        """A config as it is, one from plain values, or for None the default.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        if isinstance(config, CompressConfig):
            return config
        return cls() if config is None else cls.from_dict(config)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompressConfig:
        """A config from plain values, as they come out of JSON or YAML.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"config is {settings!r}, expected a mapping of names to settings")
        _check_keys(settings, "config")
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> CompressConfig:
        """A config from a .json, .yaml or .yml file.

        Raises:
            ModuleNotFoundError: a YAML file, and PyYAML is not installed.
            ValueError: another ending, a file that does not parse, or values that do not fit.
        """
        return cls.from_dict(read_settings(path))

    def check_names(self, model: nn.Module) -> None:
        """Finds names of layers that are misspelt. A type may be absent, as one config may serve
        many models.

        Raises:
            ValueError: an exception fits no layer of the model that could be compressed.
        """
        kinds = {kind.__name__ for kind in COMPRESSED_KINDS}
        names = [name for name, m in model.named_modules() if type(m) in COMPRESSED_KINDS]
        for key in self.layers:
            if key in kinds or key in names or fnmatch.filter(names, key):
                continue
            raise ValueError(f"layers[{key!r}] fits no layer of the model; check its spelling")

    def for_layer(self, name: str, module: nn.Module) -> CompressConfig | None:
        """The setting of one layer, None when it stays dense."""
        patterns = [key for key in self.layers if fnmatch.fnmatchcase(name, key)]
        for key in (name, *patterns, type(module).__name__):
            if key in self.layers:
                return self._merged(key, self.layers[key])
        return self

    def _merged(
        self, name: str, setting: CompressConfig | Mapping[str, Any] | None
    ) -> CompressConfig | None:
        if setting is None or isinstance(setting, CompressConfig):
            return setting
        if not isinstance(setting, Mapping):
            raise ValueError(
                f"layers[{name!r}] is {setting!r}, expected a CompressConfig, a mapping or None"
            )
        _check_keys(setting, f"layers[{name!r}]")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        if "threshold" in setting or "sparsity" in setting:
            own |= {"threshold": None, "sparsity": None}  # an exception replaces the way to prune
        if setting.get("method", "kmeans") != "kmeans":
            own |= {"entropy_lambda": 0.0, "init": "optimal"}  # which are k-means' own
        return CompressConfig(**(own | dict(setting)))

    def mask(self, weight: Tensor) -> Tensor:
        """True where a weight is kept; bool, of the weight's shape."""
        if self.sparsity is not None:
            return prune.sparsity_mask(weight, self.sparsity)
        return prune.threshold_mask(weight, self.threshold or 0.0)

    def compress_tensor(self, weight: Tensor) -> QuantSparseWeight:
        """Prunes and quantizes one weight [M, ...]; dimensions after the first become K.

        The codebook is fitted in float32 and returned in the weight's dtype.

        Raises:
            ValueError: the weight is not finite.
        """
        matrix = as_matrix(weight.detach().float())
        if not torch.isfinite(matrix).all():
            row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
            raise ValueError(
                f"weight[{row}, {column}] is {matrix[row, column].item()} in float32, expected "
                "finite weights"
            )
        mask = self.mask(matrix)
        M = len(matrix)
        group_size = group_size_of(M, codebook_shape(M, self.bits, self.group_size)) or 1
        books, codes = [], []
        for rows, kept in zip(matrix.split(group_size), mask.split(group_size), strict=True):
            book, code = self._quantize(rows[kept])
            books.append(book)
            codes.append(code)
        codebook = torch.stack(books) if len(books) > 1 else books[0]
        made = QuantSparseWeight.from_mask(
            mask, torch.cat(codes), codebook.to(weight.device, weight.dtype)
        )
        return made.to_layout(made.layout, weight[0, 0].numel() if is_channels_last(weight) else 1)

    def _quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A codebook, float32 [2^bits], and codes, uint8 [n], of the kept weights [n]."""
        clusters = 1 << self.bits
        if self.method == "uniform":
            codebook = quantize.fit_uniform(values, clusters)
        elif not self.entropy_lambda:
            codebook = quantize.fit_kmeans(values, clusters, init=self.init)
        else:
            codebook, boundaries = quantize.fit_entropy_constrained(
                values, clusters, self.entropy_lambda, init=self.init
            )
            return codebook, quantize.assign(values, boundaries)
        return codebook, ops.kmeans_assign(values, codebook)[0]


def _check_keys(settings: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(CompressConfig)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(
            f"{where} has the unknown key {unknown[0]!r}, expected one of {', '.join(known)}"
        )
