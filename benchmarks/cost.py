"""How well the cost model predicts: `python -m benchmarks.cost`, some minutes, 2 GB.

The layers of benchmarks/shapes.py with random weights, dense torch and ours run in turn; of each
the fastest round counts, as in the calibration, which is measured first, on other layers (but for
the dense SqueezeNet one). Prints Markdown: times dense, measured and predicted, and how far the
second is from the first.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import placekern as pk
from placekern import QuantSparseWeight
from placekern.compress.cost import predict
from placekern.nn import COMPRESSED_KINDS

from .shapes import BITS, CONVOLUTIONS, WHITENING

DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BATCHES = (1, 16)
"""Of linear layers; convolutions run at batch 1."""

_ROUNDS, _LEAST_ROUNDS, _SECONDS = 40, 5, 0.4
_CLEAR = 1.1  # times dense from which a side of 1 counts as taken


class Result(NamedTuple):
    """Times dense of one layer, measured and predicted."""

    layer: str
    bits: int
    density: float
    measured: float
    predicted: float
    ms: float
    dense_ms: float


def layers() -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Dense modules, and their inputs by the name under which they are shown."""
    for shape in WHITENING:
        inputs = {f"{shape.name}, batch {n}": torch.randn(n, shape.K) for n in BATCHES}
        yield nn.Linear(shape.K, shape.M, bias=False), inputs
    for shape in CONVOLUTIONS:
        module = nn.Conv2d(
            shape.channels,
            shape.M,
            shape.kernel,
            shape.stride,
            shape.padding,
            groups=shape.groups,
            bias=False,
        )
        yield module, {shape.name: torch.randn(1, shape.channels, shape.size, shape.size)}


def random_weight(M: int, K: int, density: float, bits: int) -> QuantSparseWeight:
    """Random positions and codes."""
    mask = torch.rand(M, K) < density
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    return QuantSparseWeight.from_mask(mask, codes, torch.randn(1 << bits))


def measure(
    module: nn.Module, inputs: dict[str, Tensor], density: float, bits: int
) -> Iterator[Result]:
    """Times a layer on each of its inputs and predicts it."""
    M, K = module.weight.shape[0], module.weight[0].numel()
    layer = COMPRESSED_KINDS[type(module)].from_weight(random_weight(M, K, density, bits), module)
    for name, x in inputs.items():
        predicted = predict(nn.Sequential(layer), x).layers[0].ratio
        dense_ms, ms = fastest(module, layer, x)
        yield Result(name, bits, density, dense_ms / ms, predicted, ms, dense_ms)


@torch.inference_mode()
def fastest(dense: nn.Module, layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """Milliseconds of both, each the least of some rounds in which they take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    dense(x), layer(x)
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < _LEAST_ROUNDS or (time.perf_counter() < end and len(times[0]) < _ROUNDS):
        for run, seen in zip((dense, layer), times, strict=True):
            start = time.perf_counter()
            run(x)
            seen.append(1e3 * (time.perf_counter() - start))
    return min(times[0]), min(times[1])


def grid(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown: measured / predicted times dense, a row a layer, a column a density."""
    yield "| layer | bits | " + " | ".join(f"{density:g}" for density in DENSITIES) + " |"
    yield "| --- | ---: |" + " ---: |" * len(DENSITIES)
    for name, bits in dict.fromkeys((r.layer, r.bits) for r in results):
        row = {r.density: r for r in results if (r.layer, r.bits) == (name, bits)}
        cells = (f"{row[d].measured:.2f} / {row[d].predicted:.2f}" for d in DENSITIES)
        yield f"| {name} | {bits} | {' | '.join(cells)} |"


def errors(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown: how far predictions are from measurements, and on the wrong side of 1."""
    yield "| layers | cases | typical error | nine in ten below | largest | wrong side of 1 |"
    yield "| --- |" + " ---: |" * 5
    groups: dict[str, Callable[[Result], bool]] = {
        "linear, batch 1": lambda r: r.layer.endswith("batch 1"),
        "linear, batch 16": lambda r: r.layer.endswith("batch 16"),
        "convolutions": lambda r: "batch" not in r.layer,
        "all": lambda r: True,
    }
    for name, belongs in groups.items():
        rows = [r for r in results if belongs(r)]
        off = np.array([abs(math.log(r.predicted / r.measured)) for r in rows])
        clear = [r for r in rows if not 1 / _CLEAR < r.measured < _CLEAR]
        wrong = sum((r.measured > 1) != (r.predicted > 1) for r in clear)
        cells = (math.exp(q) - 1 for q in (np.median(off), np.quantile(off, 0.9), off.max()))
        shares = " | ".join(f"{cell:.0%}" for cell in cells)
        yield f"| {name} | {len(rows)} | {shares} | {wrong} of {len(clear)} |"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    for batch in BATCHES:
        convolutions = [pk.QuantSparseConv2d(4, 4, 1, bits=bits) for bits in BITS]
        linears = [pk.QuantSparseLinear(4, 4, bits=bits) for bits in BITS]
        predict(nn.Sequential(*convolutions, nn.Flatten(), *linears), torch.ones(batch, 4, 1, 1))
    print(f"CPU at {pk.get_isa()}, {chosen.threads} threads, torch {torch.__version__}; ", end="")
    print(f"calibrated in {time.perf_counter() - begin:.1f} s\n")
    results = [
        result
        for module, inputs in layers()
        for bits in BITS
        for density in DENSITIES
        for result in measure(module, inputs, density, bits)
    ]
    for lines in (grid(results), errors(results)):
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
