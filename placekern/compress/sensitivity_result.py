"""Sensitivity: what each setting of each layer does to a metric; CSV, table and plot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tables import as_text
from .sensitivity_rows import (
    BITS,
    SETTINGS,
    SPARSITY,
    THRESHOLD,
    SensitivityRow,
    read_rows,
    write_rows,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Sensitivity:
    """What each setting of each layer does to the metric; `str()` gives a table.

    Attributes:
        rows: the dense network's first, then by layers in the model's order.
    """

    rows: tuple[SensitivityRow, ...]

    @property
    def baseline(self) -> float:
        """The metric of the dense network."""
        return self.rows[0].metric

    @property
    def larger_is_better(self) -> bool:
        """Which way the metric goes."""
        return self.rows[0].larger_is_better

    @property
    def layers(self) -> list[str]:
        """Names of the measured layers, in the order of the rows."""
        return list(dict.fromkeys(row.layer for row in self.rows[1:]))

    def of(self, layer: str, *settings: str) -> list[SensitivityRow]:
        """The rows of a layer, of these settings or of all; mildest first."""
        rows = [
            row
            for row in self.rows[1:]
            if row.layer == layer and row.setting in (settings or SETTINGS)
        ]
        return sorted(rows, key=lambda row: (row.setting, -row.bits, -row.density))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all rows as CSV, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_rows(self.rows, path)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Reads what `to_csv`, or `sensitivity(resume=path)`, wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another kind.
        """
        return cls(tuple(read_rows(path)))

    def plot(
        self,
        path: str | os.PathLike[str],
        title: str = "Each layer alone pruned or quantized",
        metric: str = "metric",
    ) -> None:
        """Draws metric against pruning and against bits, a line a layer.

        Args:
            path: of the picture; its ending gives the format (.png, .svg, .pdf).
            title: above the picture.
            metric: what the metric is called, with its unit, on the axis.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from .sensitivity_plot import draw

        draw(self.rows, path, title, metric)

    def table(self) -> Table:
        """Drops of the metric as a rich table: a row a layer, a column a setting."""
        from rich import box  # here, so that measuring needs no rich
        from rich.markup import escape
        from rich.table import Table

        columns = sorted(
            {(row.setting, row.value) for row in self.rows[1:]},
            key=lambda c: (c[0], -c[1] if c[0] == BITS else c[1]),
        )
        table = Table(
            title=f"Drop of the metric from {self.baseline:.4g}, one layer at a time",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("layer", overflow="fold")
        table.add_column("weights", justify="right")
        for setting, value in columns:
            shown = 100 * value if setting == SPARSITY else value
            words = {BITS: f"{shown:g} bits", SPARSITY: f"{shown:g}%", THRESHOLD: f"< {shown:g}"}
            table.add_column(words[setting], justify="right")
        for layer in self.layers:
            rows = {(row.setting, row.value): row for row in self.of(layer)}
            drops = [f"{rows[c].drop:.2g}" if c in rows else "" for c in columns]
            weights = next(iter(rows.values())).weights
            table.add_row(escape(layer), f"{weights:,}", *drops)
        return table

    def __str__(self) -> str:
        return as_text(self.table(), width=160)
