"""The `bench` fixture: times an op beside dense torch, and a table of all rows at the end.

Dense torch runs before every timed round of ours, so that both see the same machine; the ratio is
of medians from one run. A benchmark asserts its result before it reports a time.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import placekern as pk


@dataclass(frozen=True)
class Result:
    """One row: times in ms, bytes that must move at least, multiply-adds on non-zeros."""

    op: str
    layer: str
    batch: int
    bits: int
    density: float
    ms: float
    dense_ms: float
    bytes: int
    flops: int

    @property
    def ratio(self) -> float:
        """Time of dense torch over ours: above 1 ours is faster."""
        return self.dense_ms / self.ms

    @property
    def gigabytes(self) -> float:
        """GB/s of weight, input and output."""
        return self.bytes / self.ms / 1e6

    @property
    def gigaflops(self) -> float:
        """GFLOP/s, two a non-zero and output."""
        return self.flops / self.ms / 1e6


RESULTS: list[Result] = []


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def bench(benchmark: Any) -> Callable[..., Any]:
    """bench(ours, dense, op=..., layer=..., ...) times both and returns what ours returns."""

    def run(ours: Callable[[], Any], dense: Callable[[], Any], rounds: int = 15, **row: Any) -> Any:
        times: list[float] = []

        def dense_round() -> None:
            start = time.perf_counter()
            dense()
            times.append(1e3 * (time.perf_counter() - start))

        with torch.inference_mode():
            result = benchmark.pedantic(ours, setup=dense_round, rounds=rounds, warmup_rounds=2)
        mine = Result(ms=1e3 * benchmark.stats.stats.median, dense_ms=median(times[2:]), **row)
        for name in ("ratio", "gigabytes", "gigaflops"):
            benchmark.extra_info[name] = getattr(mine, name)
        RESULTS.append(mine)
        return result

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="also write the rows to this .json file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not RESULTS:
        return
    machine = (
        f"{_processor()}, {torch.get_num_threads()} threads, placekern {pk.__version__} at "
        f"{pk.get_isa()}, torch {torch.__version__}"
    )
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        machine += f" with ONEDNN_MAX_CPU_ISA={limit}"
    table = Table(box=box.SIMPLE, title=machine, title_justify="left", pad_edge=False)
    table.add_column("op and layer")
    for heading in ("batch", "bits", "density", "ms", "dense ms", "x dense", "GB/s", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for row in RESULTS:
        table.add_row(
            f"{row.op}: {row.layer}",
            str(row.batch),
            str(row.bits),
            f"{row.density:.2f}",
            f"{row.ms:.2f}",
            f"{row.dense_ms:.2f}",
            f"{row.ratio:.2f}",
            f"{row.gigabytes:.1f}",
            f"{row.gigaflops:.1f}",
        )
    Console(width=120).print(table)
    if path := config.getoption("--results"):
        rows = [asdict(r) | {"ratio": r.ratio} for r in RESULTS]
        Path(path).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
