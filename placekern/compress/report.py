"""What compression did: a row a layer, totals, and a table that prints itself."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


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

    A weight that several layers share counts in the first of them only.
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
    """All compressed layers of a model; `str()` gives a table.

    Attributes:
        layers: a row a layer, in the model's order.
        dense_bytes: of all parameters and buffers of the model before, each counted once.
        resident_bytes: of all parameters and buffers now, each counted once.
        disk_bytes: of all tensors in a file, without the file's header.
    """

    layers: tuple[LayerReport, ...]
    dense_bytes: int
    resident_bytes: int
    disk_bytes: int

    @property
    def pruned(self) -> float:
        """Share of the compressed layers' weights that are gone, 0 to 1."""
        weights = sum(layer.weights for layer in self.layers)
        return 1 - sum(layer.nnz for layer in self.layers) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layers": [asdict(layer) | {"density": layer.density} for layer in self.layers],
            "pruned": self.pruned,
            "dense_bytes": self.dense_bytes,
            "resident_bytes": self.resident_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def table(self) -> Table:
        """The report as a rich table; kB are 1,000 bytes, error is relative_error."""
        from rich import box  # here, so that compressing needs no rich
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"{len(self.layers)} layers compressed, {self.pruned:.1%} pruned",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("layer", overflow="fold")
        table.add_column("weight", no_wrap=True)
        for heading in ("bits", "density", "error", "dense kB", "RAM kB", "disk kB"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                escape(layer.name),
                "x".join(str(extent) for extent in layer.shape),
                str(layer.bits),
                f"{layer.density:.3f}",
                f"{layer.relative_error:.4f}",
                *(_kilo(b) for b in (layer.dense_bytes, layer.resident_bytes, layer.disk_bytes)),
            )
        table.add_section()
        totals = (self.dense_bytes, self.resident_bytes, self.disk_bytes)
        columns = zip(
            *((r.dense_bytes, r.resident_bytes, r.disk_bytes) for r in self.layers), strict=True
        )
        compressed = [sum(column) for column in columns] or [0, 0, 0]
        rest = (_kilo(total - part) for total, part in zip(totals, compressed, strict=True))
        table.add_row("other tensors", "", "", "", "", *rest)
        table.add_row("total", "", "", "", "", *(_kilo(b) for b in totals), style="bold")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=110, color_system=None, force_terminal=False).print(self.table())
        return text.getvalue().rstrip("\n")


def _kilo(size: int) -> str:
    return f"{size / 1000:,.1f}"
