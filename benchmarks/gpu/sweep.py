"""Times the alternatives that placekern/device.py chooses between, to set its constants from.

Every alternative is forced in turn, at sizes around the one where they should cross over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.gpu.backward import gradients
from benchmarks.gpu.bench import Bench, randn
from benchmarks.gpu.clock import Run
from benchmarks.gpu.layers import Layer, make_layer
from benchmarks.gpu.sizes import ALEXNET, VGG16
from benchmarks.shapes import ConvShape
from placekern import _native, device, device_backward, ops
from placekern.packing import DEVICE_LAYOUTS, Layout

MANY = 1 << 60


@contextmanager
def forced(way: str, splits: int | None = None) -> Iterator[None]:
    """Holds the choice of device.py: "direct", "matmul" or "slices", with so many splits."""
    settings: dict[str, Any] = {"_DIRECT_COLUMNS": MANY, "_EXACT_COLUMNS": MANY}
    if way != "direct":
        settings = {"_DIRECT_COLUMNS": 0, "_MATMUL_COLUMNS": MANY, "_GATHERED_PRODUCTS": MANY}
        settings["_COPIED_PRODUCTS"] = dict.fromkeys(DEVICE_LAYOUTS, MANY)
    if splits is not None:
        settings |= {name: lambda *_: splits for name in ("_direct_splits", "_matmul_splits")}
    with mock.patch.multiple(device, **settings):
        _native.force_way("decode" if way == "slices" else "auto")
        try:
            yield
        finally:
            _native.force_way("auto")


def held(run: Run, way: str, splits: int | None = None) -> Run:
    """The run with a way held; a graph keeps what was chosen while it was captured."""

    def call() -> Any:
        with forced(way, splits):
            return run()

    return call


def _record(bench: Bench, question: str, case: dict[str, Any], runs: dict[str, Run]) -> None:
    with bench.case(f"sweep: {question} {case}"):
        results = {name: _first(run()) for name, run in runs.items()}
        first = next(iter(results.values()))
        for name, result in results.items():
            bench.check(name, result, first, 2e-2)  # roundings of bfloat16 on either side
        times = bench.clock.measure(runs, min(bench.sizes.rounds, 9))
        us = {name: round(timing.us, 2) for name, timing in times.items()}
        warm = {name: round(timing.warm, 2) for name, timing in times.items()}
        best = min(us, key=lambda name: us[name])
        bench.sweeps.append({"question": question, **case, "us": us, "warm": warm, "best": best})
        print(f"sweep: {question}: {case}: {us}", flush=True)


def sweep(bench: Bench) -> None:
    """All sweeps; each stops when time is up."""
    shape = bench.sizes.linear[0]
    for bits, density in ((8, 0.5), (8, 0.3), (5, 0.3)):
        if not bench.in_time(f"sweep of {bits} bits, density {density}"):
            return
        layer = make_layer(shape.M, shape.K, density, bits, bench.device)
        _ways(bench, layer, {"bits": bits, "density": density})
        _splits(bench, layer, {"bits": bits, "density": density})
    _layouts(bench)
    _convolutions(bench)
    _backward_rows(bench)


def _ways(bench: Bench, layer: Layer, case: dict[str, Any]) -> None:
    """Direct, on tensor cores, or by slices: over the columns of x."""
    K = layer.weight.shape[1]
    dense = layer.dense(torch.bfloat16)
    for N in bench.sizes.sweep_columns:
        x, x32 = randn(bench, N, K, dtype=torch.bfloat16), randn(bench, N, K)
        run, exact = _linear(layer, x), _linear(layer, x32)
        ways = ("direct", "matmul", "slices") if N <= 16 else ("matmul", "slices")
        runs = {way: held(run, way) for way in ways}
        runs["dense"] = lambda x=x: F.linear(x, dense)
        case = {**case, "layout": layer.weight.layout.name.lower(), "columns": N}
        _record(bench, "way of linear, bfloat16", case, runs)
        if N <= 32:
            ways = ("direct", "slices")
            runs = {way: held(exact, way) for way in ways}
            _record(bench, "way of linear, float32", case, runs)


def _splits(bench: Bench, layer: Layer, case: dict[str, Any]) -> None:
    for N, way in ((1, "direct"), (2, "direct"), (16, "matmul"), (64, "matmul")):
        x = randn(bench, N, layer.weight.shape[1], dtype=torch.bfloat16)
        run = _linear(layer, x)
        runs = {"chosen": held(run, way)}
        runs |= {str(n): held(run, way, n) for n in (1, 2, 3, 4, 6, 8, 12, 16)}
        case = {**case, "layout": layer.weight.layout.name.lower(), "columns": N}
        _record(bench, f"splits of {way}", case, runs)


def _layouts(bench: Bench) -> None:
    """Which layout is quicker: over the density."""
    shape = bench.sizes.linear[0]
    for bits, densities in ((8, (0.6, 0.5, 0.45, 0.4, 0.3, 0.2)), (5, (0.4, 0.3, 0.25, 0.2, 0.15))):
        for density in densities:
            if not bench.in_time(f"layouts at {bits} bits, density {density}"):
                return
            pairs = make_layer(shape.M, shape.K, density, bits, bench.device, Layout.PAIRS)
            layers = {"pairs": pairs, "dense": pairs.in_layout(Layout.DENSE)}
            for N in (1, 16, 64):
                x = randn(bench, N, shape.K, dtype=torch.bfloat16)
                runs = {name: _linear(layer, x) for name, layer in layers.items()}
                case = {"bits": bits, "density": density, "columns": N}
                _record(bench, "layout", case, runs)


def _convolutions(bench: Bench) -> None:
    """Tensor cores on windows of the image, or slices for the dense library: over the work."""
    named = ("conv2_1", "conv3_2", "conv4_1", "conv4_2", "conv5_2", "conv2", "conv3")
    shapes = [s for s in (*VGG16, *ALEXNET) if s.name in named]
    if bench.emulated:
        shapes = [bench.sizes.networks["Small"][1]]
    for shape in shapes:
        K = shape.channels // shape.groups * shape.kernel**2
        for bits in (8, 5):  # pairs, and a code for each position
            layer = make_layer(shape.M, K, 0.3, bits, bench.device)
            formats = {"NCHW": layer, "NHWC": layer.by_tap(shape.kernel**2)}
            layout = layer.weight.layout.name.lower()
            for batch in (1, 2):
                if not bench.in_time(f"way of {shape.name}, {bits} bits, batch {batch}"):
                    return
                runs = {}
                for name, own in formats.items():
                    run = _conv2d(bench, own, shape, batch)
                    runs |= {f"{way}, {name}": held(run, way) for way in ("matmul", "slices")}
                products = shape.M * K * batch * shape.size**2
                case = {"layer": shape.name, "layout": layout, "batch": batch}
                case["million products"] = products // 10**6
                _record(bench, "way of conv2d", case, runs)


def _conv2d(bench: Bench, layer: Layer, shape: ConvShape, batch: int) -> Run:
    size = (batch, shape.channels, shape.size, shape.size)
    last = layer.weight.taps > 1
    x = randn(bench, *size, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    sizes = {"kernel_size": (shape.kernel,) * 2, "padding": (shape.padding,) * 2}
    sizes["groups"] = shape.groups
    return lambda: ops.conv2d(x, layer.weight, **sizes)


def _backward_rows(bench: Bench) -> None:
    """Both gradients from one decoding, or one after the other: over the rows of x."""
    shape = bench.sizes.linear[0]
    layer = make_layer(shape.M, shape.K, 0.3, 8, bench.device)
    for N in bench.sizes.sweep_columns:
        if N < 16:
            continue
        if not bench.in_time(f"backward of {N} rows"):
            return
        x = randn(bench, N, shape.K, dtype=torch.bfloat16)
        grad_y = randn(bench, N, shape.M, dtype=torch.bfloat16)

        def run(x: torch.Tensor = x, grad_y: torch.Tensor = grad_y) -> Any:
            return gradients(layer, x, grad_y)

        def fused(run: Run = run) -> Any:
            with mock.patch.object(device_backward, "_FUSED_ROWS", MANY):
                return run()

        runs = {"fused": fused, "apart": held(run, "slices")}
        _record(bench, "way of linear_backward", {"rows": N}, runs)


def _first(result: Any) -> torch.Tensor:
    """Of two gradients, that of x."""
    return result[0] if isinstance(result, tuple) else result


def _linear(layer: Layer, x: torch.Tensor) -> Run:
    return lambda: ops.linear(x, layer.weight)
