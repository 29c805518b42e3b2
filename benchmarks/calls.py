"""What a call costs before and after the kernel: `python -m benchmarks.calls`, beside dense torch.

Layers so small that their arithmetic is nothing. Each result is checked before its time counts.
Times are the least of several runs: what other programs do only ever adds to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import placekern as pk

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "with grad": nullcontext}
CALLS, RUNS = 2000, 9


def microseconds(*runs: Callable[[], Any]) -> list[float]:
    """Of a call of each, in turns; the least mean of several."""
    least = [float("inf")] * len(runs)
    for _ in range(RUNS):
        for i, run in enumerate(runs):
            for _ in range(CALLS // 10):
                run()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            least[i] = min(least[i], 1e6 * (time.perf_counter() - start) / CALLS)
    return least


def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = pk.CompressConfig(bits=8, threshold=0.01)
    table = Table(box=box.SIMPLE, title=f"torch {torch.__version__}, one thread, us a call")
    table.add_column("layer")
    for mode in MODES:
        table.add_column(mode, justify="right")
        table.add_column("dense", justify="right")
    linear, conv = nn.Linear(64, 32), nn.Conv2d(8, 16, 3, padding=1)
    cases = [
        (linear, pk.QuantSparseLinear.from_float(linear, config), torch.randn(1, 64)),
        (conv, pk.QuantSparseConv2d.from_float(conv, config), torch.randn(1, 8, 6, 6)),
    ]
    for dense, ours, x in cases:
        torch.testing.assert_close(ours(x), ours.to_dense()(x))
        cells = []
        for mode in MODES.values():
            with mode():
                times = microseconds(partial(ours, x), partial(dense, x))
            cells += [f"{us:.0f}" for us in times]
        table.add_row(str(dense), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
