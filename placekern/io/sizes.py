"""Every byte of a file by what it is for, of one that is there or of one that `save` would write.

The surprise: the size of the header depends on the order in which safetensors puts the tensors,
since their offsets are numbers in it. The package is asked for that order with empty tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..tables import as_text
from ..weight import QuantSparseWeight
from . import file, stored, streams
from .entropy import entropy_bytes
from .stored import StoredFile
from .streams import Encoded

if TYPE_CHECKING:
    from rich.table import Table

_PREFIX = 8  # bytes that say how long the header is; it is padded to a multiple of as many


@dataclass(frozen=True)
class LayerSizes:
    """One compressed layer in a file. What it shares with a layer before it counts there.

    Attributes:
        name: in the model.
        kind: "Conv2d" or "Linear".
        shape: (M, K).
        bits: of a code.
        nnz: non-zeros kept.
        positions: bytes of the stream of positions.
        codes: bytes of the streams of codes, which are the layer's values.
        codebook: bytes of the codebook.
        bias: bytes of the bias.
        positions_bound: the least bytes that order-0 entropy allows the positions.
        codes_bound: the same of the codes.
        shares: the layer whose weight this one has; None for one of its own.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bits: int
    nnz: int
    positions: int
    codes: int
    codebook: int
    bias: int
    positions_bound: float
    codes_bound: float
    shares: str | None = None

    @property
    def total(self) -> int:
        """Bytes of the layer's tensors."""
        return self.positions + self.codes + self.codebook + self.bias


@dataclass(frozen=True)
class FileSizes:
    """All bytes of a file; `str()` gives a table.

    Attributes:
        layers: a row a compressed layer, in the model's order.
        other: bytes of all tensors that belong to no compressed layer.
        header: bytes of the header and of its length, without padding.
        padding: spaces behind the header, which align the tensors to eight bytes.
    """

    layers: tuple[LayerSizes, ...]
    other: int
    header: int
    padding: int

    @property
    def positions(self) -> int:
        """Bytes of all positions."""
        return sum(layer.positions for layer in self.layers)

    @property
    def codes(self) -> int:
        """Bytes of all codes."""
        return sum(layer.codes for layer in self.layers)

    @property
    def codebooks(self) -> int:
        """Bytes of all codebooks."""
        return sum(layer.codebook for layer in self.layers)

    @property
    def biases(self) -> int:
        """Bytes of the compressed layers' biases."""
        return sum(layer.bias for layer in self.layers)

    @property
    def bound(self) -> float:
        """The least bytes that order-0 entropy allows positions and codes."""
        return sum(layer.positions_bound + layer.codes_bound for layer in self.layers)

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.total for layer in self.layers) + self.other

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return self.tensors + self.header + self.padding

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = ("positions", "codes", "codebooks", "biases", "other", "header", "padding")
        return {
            "layers": [asdict(layer) | {"total": layer.total} for layer in self.layers],
            **{name: getattr(self, name) for name in names},
            "bound": self.bound,
            "total": self.total,
        }

    def table(self) -> Table:
        """The bytes as a rich table, in kB of 1,000 bytes."""
        from rich import box  # here, so that compressing needs no rich
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"{self.total:,} bytes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("kB", overflow="fold")
        headings = ("positions", "entropy", "codes", "entropy", "codebook", "bias", "total")
        for heading in headings:
            table.add_column(heading, justify="right")
        for layer in self.layers:
            cells = (layer.positions, layer.positions_bound, layer.codes, layer.codes_bound)
            cells = (*cells, layer.codebook, layer.bias, layer.total)
            table.add_row(escape(layer.name), *(f"{cell / 1000:,.1f}" for cell in cells))
        table.add_section()
        for name in ("other", "header", "padding"):
            label = "other tensors" if name == "other" else name
            table.add_row(label, *[""] * 6, f"{getattr(self, name) / 1000:,.1f}")
        bounds = [
            sum(getattr(r, f"{n}_bound") for r in self.layers) for n in ("positions", "codes")
        ]
        cells = (self.positions, bounds[0], self.codes, bounds[1])
        cells = (*cells, self.codebooks, self.biases, self.total)
        table.add_row("total", *(f"{cell / 1000:,.1f}" for cell in cells), style="bold")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


class WeightSizes(NamedTuple):
    """A weight in a file: its streams without their content, and the least they could take.

    Attributes:
        encoded: the streams, on the meta device.
        positions_bound: bytes that order-0 entropy allows the positions.
        codes_bound: the same of the codes.
    """

    encoded: Encoded
    positions_bound: float
    codes_bound: float


def weight_sizes(weight: QuantSparseWeight) -> WeightSizes:
    """Encodes a weight and keeps the sizes only."""
    encoded = streams.encode(weight)
    sizes = (None if t is None else t.to("meta") for t in (encoded.positions, encoded.codes))
    positions, codes = sizes
    rare = None if encoded.rare is None else encoded.rare.to("meta")
    hollow = encoded._replace(positions=positions, codes=codes, rare=rare)
    return WeightSizes(hollow, *entropy_bytes(weight))


def planned_sizes(
    model: nn.Module, known: Callable[[QuantSparseWeight], WeightSizes | None] | None = None
) -> FileSizes:
    """What `save` would write now, to the byte, without writing it.

    Parameters that have no size yet (lazy layers) count nothing.

    Args:
        model: any module, compressed layers or not.
        known: gives the sizes of a weight that was encoded before, or None; spares encoding again.

    Raises:
        ValueError: a compressed layer is on the meta device and has no weight.
    """
    bounds: list[tuple[float, float]] = []

    def encode(weight: QuantSparseWeight) -> Encoded:
        if weight.codes.is_meta:
            raise ValueError("a compressed layer is on the meta device; load its weights first")
        sizes = (known(weight) if known else None) or weight_sizes(weight)
        bounds.append((sizes.positions_bound, sizes.codes_bound))
        return sizes.encoded

    found = file.contents(model, encode)
    tensors = found.streams | {
        name: tensor
        for name, tensor in found.plain.items()
        if isinstance(tensor, Tensor) and not is_lazy(tensor)
    }
    owners = [entry["name"] for entry in found.layers if "shares" not in entry]
    return _by_role(
        found.layers,
        {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()},
        dict(zip(owners, bounds, strict=True)),
        *_header_bytes(tensors, found.text),
    )


def file_sizes(path: str | os.PathLike[str]) -> FileSizes:
    """Every byte of a file that `save` wrote, by what it is for.

    Decodes one layer after the other, since the entropy of the codes is to be known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a placekern file, or is damaged.
    """
    with StoredFile(path) as opened:
        opened.check()
        layers = file.read_header(path)["layers"]
        bounds = {name: entropy_bytes(weight) for name, weight in file.read_weights(opened)}
    with Path(path).open("rb") as raw:
        text = raw.read(int.from_bytes(raw.read(_PREFIX), "little"))
    table = json.loads(text)
    table.pop("__metadata__")
    sizes = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in table.items()
    }
    padding = len(text) - len(text.rstrip(b" "))
    return _by_role(layers, sizes, bounds, _PREFIX + len(text) - padding, padding)


def _header_bytes(tensors: Mapping[str, Tensor], text: str) -> tuple[int, int]:
    """Bytes of a safetensors header for these tensors and our entry, and of its padding."""
    empty = {name: torch.empty(0, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
    raw = safetensors.torch.save(empty, {stored.METADATA: text})
    header = json.loads(raw[_PREFIX : _PREFIX + int.from_bytes(raw[:_PREFIX], "little")])
    end = 0
    for name, entry in header.items():
        if name in tensors:
            tensor = tensors[name]
            start, end = end, end + tensor.numel() * tensor.element_size()
            entry |= {"shape": list(tensor.shape), "data_offsets": [start, end]}
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return _PREFIX + len(written), -len(written) % _PREFIX


def _by_role(
    entries: list[dict[str, Any]],
    sizes: dict[str, int],
    bounds: Mapping[str, tuple[float, float]],
    header: int,
    padding: int,
) -> FileSizes:
    left = dict(sizes)  # by and by without the tensors of compressed layers
    layers = []
    for entry in entries:
        name = entry["name"]
        own = "shares" not in entry

        # Of a layer that shares, only the bias is its own.
        found = {
            role: left.pop(tensor, 0)
            for role, tensor in file.tensor_names(name).items()
            if own or role == "bias"
        }
        layers.append(
            LayerSizes(
                name=name,
                kind=entry["kind"],
                shape=tuple(entry["shape"]),
                bits=entry["bits"],
                nnz=entry["nnz"],
                positions=found.get("positions", 0),
                codes=found.get("codes", 0) + found.get("rare", 0),
                codebook=found.get("codebook", 0),
                bias=found["bias"],
                positions_bound=bounds[name][0] if own else 0.0,
                codes_bound=bounds[name][1] if own else 0.0,
                shares=entry.get("shares"),
            )
        )
    return FileSizes(tuple(layers), sum(left.values()), header, padding)
