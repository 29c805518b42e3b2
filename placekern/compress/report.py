"""What compression did: a row a layer, every byte by what it is for, and tables that print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..tables import as_text
from .cost import CostReport

if TYPE_CHECKING:
    from rich.table import Table

_MB, _MIB = 1_000_000, 1 << 20


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        name: in the model.
        kind: "Conv2d" or "Linear".
        shape: of the dense weight.
        bits: of a code.
        nnz: non-zeros kept.
        relative_error: |weight - compressed| / |weight|, Frobenius norms.
        dense_bytes: of the dense weight and bias in their dtype.
        resident_bytes: of the compressed weight and bias in memory.
        disk_bytes: of the compressed weight and bias in a file, without the file's header.
        positions_bytes: of the positions in a file.
        codes_bytes: of the codes, which are the values, in a file.
        codebook_bytes: of the codebook, in a file as in memory.
        bias_bytes: of the bias, in a file as in memory.
        positions_bound: the least bytes that order-0 entropy allows the positions.
        codes_bound: the same of the codes.
        resident_positions_bytes: of the positions in memory.
        resident_codes_bytes: of the codes in memory.
        row_ptr_bytes: of the row pointer, which is in memory only.
        read_padding_bytes: behind positions and codes in memory, for vector loads.

    A weight or bias that several layers share counts in the first of them only.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    nnz: int
    relative_error: float
    dense_bytes: int
    resident_bytes: int
    disk_bytes: int
    positions_bytes: int = 0
    codes_bytes: int = 0
    codebook_bytes: int = 0
    bias_bytes: int = 0
    positions_bound: float = 0.0
    codes_bound: float = 0.0
    resident_positions_bytes: int = 0
    resident_codes_bytes: int = 0
    row_ptr_bytes: int = 0
    read_padding_bytes: int = 0

    @property
    def weights(self) -> int:
        """Positions of the dense weight."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def density(self) -> float:
        """Non-zeros / positions."""
        return self.nnz / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class CompressReport:
    """All compressed layers of a model; `str()` gives a table, every byte and the warnings.

    Attributes:
        layers: a row a layer, in the model's order.
        dense_bytes: of all parameters and buffers of the model before, each counted once.
        resident_bytes: of all parameters and buffers now, each counted once.
        disk_bytes: of all tensors in a file, without the file's header.
        float32_bytes: of all parameters and buffers before any compression, those of a floating
            dtype at four bytes each.
        header_bytes: of the header that `save` would write now.
        padding_bytes: behind that header.
        cost: predicted times, when an example was given.
        earlier: sums over the layers that were compressed before and have no row, by the names of
            a `LayerReport`; empty without such layers.
    """

    layers: tuple[LayerReport, ...]
    dense_bytes: int
    resident_bytes: int
    disk_bytes: int
    float32_bytes: int = 0
    header_bytes: int = 0
    padding_bytes: int = 0
    cost: CostReport | None = None
    earlier: Mapping[str, float] = field(default_factory=dict)

    @property
    def pruned(self) -> float:
        """Share of the compressed layers' weights that are gone, 0 to 1."""
        weights = sum(layer.weights for layer in self.layers)
        return 1 - sum(layer.nnz for layer in self.layers) / weights if weights else 0.0

    @property
    def file_bytes(self) -> int:
        """Of the file that `save` would write now, every byte of it."""
        return self.disk_bytes + self.header_bytes + self.padding_bytes

    @property
    def ratio(self) -> float:
        """file_bytes / float32_bytes."""
        return self.file_bytes / self.float32_bytes if self.float32_bytes else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence a layer where a slowdown is expected; none without an example."""
        return self.cost.warnings if self.cost else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layers": [asdict(layer) | {"density": layer.density} for layer in self.layers],
            "pruned": self.pruned,
            "dense_bytes": self.dense_bytes,
            "resident_bytes": self.resident_bytes,
            "disk_bytes": self.disk_bytes,
            "float32_bytes": self.float32_bytes,
            "header_bytes": self.header_bytes,
            "padding_bytes": self.padding_bytes,
            "file_bytes": self.file_bytes,
            "ratio": self.ratio,
            "cost": self.cost.to_dict() if self.cost else None,
            "earlier": dict(self.earlier),
        }

    def summary(self) -> Iterator[str]:
        """Sentences on all bytes, and on time where it was predicted."""

        def total(name: str) -> float:
            return sum(getattr(layer, name) for layer in self.layers) + self.earlier.get(name, 0)

        base, file = self.float32_bytes, self.file_bytes
        yield f"float32 before: {_mega(base)}; file: {_mega(file)}, {self.ratio:.1%} of it."
        other = self.disk_bytes - total("disk_bytes")
        yield (
            f"File, kB: positions {_kilo(total('positions_bytes'))} (entropy "
            f"{_kilo(total('positions_bound'))}), codes {_kilo(total('codes_bytes'))} (entropy "
            f"{_kilo(total('codes_bound'))}), codebooks {_kilo(total('codebook_bytes'))}, biases "
            f"{_kilo(total('bias_bytes'))}, other tensors {_kilo(other)}, header "
            f"{_kilo(self.header_bytes)}, padding {_kilo(self.padding_bytes)}."
        )
        other = self.resident_bytes - total("resident_bytes")
        yield (
            f"RAM, kB: positions {_kilo(total('resident_positions_bytes'))}, codes "
            f"{_kilo(total('resident_codes_bytes'))}, row pointers "
            f"{_kilo(total('row_ptr_bytes'))}, read padding "
            f"{_kilo(total('read_padding_bytes'))}, codebooks "
            f"{_kilo(total('codebook_bytes'))}, biases {_kilo(total('bias_bytes'))}, other tensors "
            f"{_kilo(other)}."
        )
        if self.cost is not None:
            cost = self.cost
            known, rows = sum(row.dense_ms is not None for row in cost.layers), len(cost.layers)
            which = "the layers" if known == rows else f"{known} of {rows} layers"
            if known:
                yield (
                    f"Predicted time of {which}: {cost.compressed_ms:.2f} ms, dense "
                    f"{cost.dense_ms:.2f} ms (CPU at {cost.machine})."
                )
            yield from cost.notes
            yield from cost.warnings

    def table(self) -> Table:
        """The report as a rich table; kB are 1,000 bytes, error is relative_error.

        Below it stands the summary, with the warnings.
        """
        table = self._table(details=False)
        table.caption = _plain("\n".join(self.summary()))
        table.caption_justify = "left"
        return table

    def _table(self, details: bool) -> Table:
        from rich import box  # here, so that compressing needs no rich
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"{len(self.layers)} layers compressed, {self.pruned:.1%} pruned",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        columns = {"dense kB": "dense_bytes", "RAM kB": "resident_bytes"}
        if details:
            columns |= {"positions": "positions_bytes", "codes": "codes_bytes"}
        columns |= {"disk kB": "disk_bytes"}
        table.add_column("layer", overflow="fold")
        table.add_column("weight", no_wrap=True)
        for heading in ("bits", "density", "error", *columns):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                escape(layer.name),
                "x".join(str(extent) for extent in layer.shape),
                str(layer.bits),
                f"{layer.density:.3f}",
                f"{layer.relative_error:.4f}",
                *(_kilo(getattr(layer, name)) for name in columns.values()),
            )
        table.add_section()
        totals, rest, before = [], [], []
        for name in columns.values():
            # What was compressed before came in as it is now.
            as_now = "resident_bytes" if name == "dense_bytes" else name
            earlier = self.earlier.get(as_now, 0)
            part = sum(getattr(layer, name) for layer in self.layers) + earlier
            whole = getattr(self, name, None)
            totals.append(_kilo(part if whole is None else whole))
            rest.append("" if whole is None else _kilo(whole - part))
            before.append(_kilo(earlier))
        if self.earlier:
            table.add_row("compressed before", "", "", "", "", *before)
        table.add_row("other tensors", "", "", "", "", *rest)
        table.add_row("total", "", "", "", "", *totals, style="bold")
        return table

    def __str__(self) -> str:
        times = () if self.cost is None else (self.cost.table(),)
        return as_text(self._table(details=True), *times, *self.summary())


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text, style="not italic not dim")


def _kilo(size: float) -> str:
    return f"{size / 1000:,.1f}"


def _mega(size: int) -> str:
    return f"{size / _MB:,.2f} MB ({size / _MIB:,.2f} MiB)"
