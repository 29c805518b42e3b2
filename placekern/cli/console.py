"""What every command shows alike: progress bars, tables, JSON, byte counts and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..vpr import Row

out = Console()
err = Console(stderr=True)


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a progress(label, done, total) that draws a bar a label on standard error."""
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            task = tasks.get(label)
            if task is None or bars.tasks[task].finished:
                task = tasks[label] = bars.add_task(label, total=total)
            bars.update(task, completed=done, total=total)

        yield progress


@contextmanager
def told_to_go_on(kept: Path | None) -> Iterator[None]:
    """After Ctrl-C, says that the file `kept` (where it is there) lets the same command go on."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is not None and kept.exists():
            err.print(f"{kept} is kept: run the same command again to go on", markup=False)
        raise


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2))


def size(count: int) -> str:
    """Bytes for people: 12.3 kB, 45.6 MB (1 kB = 1,000 bytes)."""
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """The main job's table: recall, share pruned, bytes and time, a row a network."""
    # Narrow enough for 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("network", no_wrap=True)
    recalls = [f"R@{n}" for n in rows[0].recalls] if rows else []
    for heading in (*recalls, "pruned", "file MB", "RAM MB", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.label,
            *(f"{recall:.3f}" for recall in row.recalls.values()),
            f"{row.pruned:.1%}",
            f"{row.disk_bytes / 1e6:.3f}",
            f"{row.resident_bytes / 1e6:.3f}",
            f"{row.latency_ms:.2f}",
        )
    table.caption = (
        "R@N: share of queries with a right place among the first N. ms: one query at batch 1."
    )
    table.caption_justify = "left"
    return table


def row_values(row: Row) -> dict[str, Any]:
    """A row as JSON values: recalls in [0, 1], bytes, milliseconds."""
    return {
        "label": row.label,
        "recalls": {str(n): recall for n, recall in row.recalls.items()},
        "pruned": row.pruned,
        "disk_bytes": row.disk_bytes,
        "resident_bytes": row.resident_bytes,
        "latency_ms": row.latency_ms,
    }
