"""CompressConfig: what is done to a layer, with exceptions by name, pattern or type."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..weight import QuantSparseWeight, as_matrix
from . import prune, quantize

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

    Raises:
        ValueError: a field is out of range or unknown.
    """

    bits: int = 8
    threshold: float | None = None
    sparsity: float | None = None
    method: str = "kmeans"
    layers: Mapping[str, CompressConfig | Mapping[str, Any] | None] = field(default_factory=dict)
    entropy_lambda: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}, expected an integer from 1 to 8")
        for name in ("threshold", "sparsity"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"{name} is {value!r}, expected a number or None")
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
        if not isinstance(self.layers, Mapping):
            raise ValueError(
                f"layers is {self.layers!r}, expected a mapping from names to settings"
            )
        for name, setting in self.layers.items():
            self._merged(name, setting)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompressConfig:
        """A config from plain values, as they come out of JSON or YAML.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        _check_keys(settings, "config")
        return cls(**settings)

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
            own["entropy_lambda"] = 0.0  # which is k-means' own
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
                f"weight[{row}, {column}] is {matrix[row, column].item()}, expected finite weights"
            )
        mask = self.mask(matrix)
        values = matrix[mask]
        if self.entropy_lambda:
            codebook, boundaries = quantize.fit_entropy_constrained(
                values, 1 << self.bits, self.entropy_lambda
            )
            codes = quantize.assign(values, boundaries)
        else:
            fit = quantize.fit_kmeans if self.method == "kmeans" else quantize.fit_uniform
            codebook = fit(values, 1 << self.bits)
            codes, _, _ = ops.kmeans_assign(values, codebook)
        return QuantSparseWeight.from_mask(mask, codes, codebook.to(weight.device, weight.dtype))


def _check_keys(settings: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(CompressConfig)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(
            f"{where} has the unknown key {unknown[0]!r}, expected one of {', '.join(known)}"
        )
