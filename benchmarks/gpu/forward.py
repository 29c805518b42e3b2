"""linear and conv2d against the dense libraries in float16 and bfloat16, and what a call costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row, randn
from benchmarks.gpu.clock import Timing
from benchmarks.gpu.layers import Layer, make_layer
from benchmarks.shapes import BITS, DENSITIES, ConvShape, LinearShape
from placekern import ops

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDING = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float32: 2e-6}
CONV_DENSITY = 0.3


def linear_target(batch: int, density: float, bits: int) -> float | None:
    """What the ratio to the dense library should be on an H100."""
    if batch > 1:
        return 2.0 if density == 0.3 else None
    return {0.5: 1.9, 0.3: 2.5, 0.15: 4.5}[density] if bits == 8 else 2.5


def linear(bench: Bench) -> None:
    """Whitening layers, every density and both widths at batch 1, one density at batch 16, 64."""
    for shape in bench.sizes.linear:
        for bits in BITS:
            for density in DENSITIES:
                what = f"linear {shape.name}, {bits} bits, density {density}"
                if bench.in_time(what):
                    with bench.case(what):
                        _linear(bench, shape, density, bits)


def _linear(bench: Bench, shape: LinearShape, density: float, bits: int) -> None:
    layer = make_layer(shape.M, shape.K, density, bits, bench.device)
    dense = {name: layer.dense(dtype) for name, dtype in HALVES.items()}
    exact = layer.dense(torch.float32)
    for batch in (1, 16, 64) if density == 0.3 else (1,):
        ours, peers, errors = {}, {}, []
        for name, dtype in HALVES.items():
            x = randn(bench, batch, shape.K, dtype=dtype)
            expected = F.linear(x.double(), exact.double())
            ours[f"ours, {name}"] = lambda x=x: ops.linear(x, layer.weight)
            peers[f"dense {name}"] = lambda x=x, w=dense[name]: F.linear(x, w)
            errors.append(bench.check(name, ours[f"ours, {name}"](), expected, ROUNDING[dtype]))
        bench.compare(
            "linear",
            {
                "layer": f"{shape.K:,} -> {shape.M:,}",
                "batch": batch,
                "bits": bits,
                "density": density,
                "layout": layer.weight.layout.name.lower(),
            },
            ours,
            peers,
            error=max(errors),
            bytes=layer.weight.nbytes + 2 * batch * (shape.K + shape.M),
            target=linear_target(batch, density, bits),
        )


def conv_target(batch: int) -> float:
    """What the ratio to the dense library should be, summed over the layers of a network."""
    return 1.1 if batch == 1 else 0.95


def conv2d(bench: Bench) -> None:
    """All convolutions of a network in bfloat16, a row a layer and one for their sum.

    In 8 bits, as pairs; at batch 1 in 5 bits too, mostly with a code for every position.
    """
    for network, shapes in bench.sizes.networks.items():
        for bits in BITS:
            layers = [_layer(bench, shape, bits) for shape in shapes]
            for batch in bench.sizes.conv_batches if bits == 8 else (1,):
                what = f"conv2d {network}, {bits} bits, batch {batch}"
                if bench.in_time(what):
                    with bench.case(what):
                        _network(bench, network, shapes, layers, batch)


def _layer(bench: Bench, shape: ConvShape, bits: int) -> Layer:
    K = shape.channels // shape.groups * shape.kernel**2
    return make_layer(shape.M, K, CONV_DENSITY, bits, bench.device)


def _network(
    bench: Bench,
    network: str,
    shapes: tuple[ConvShape, ...],
    layers: list[Layer],
    batch: int,
) -> None:
    rows = [
        _conv2d(bench, network, shape, layer, batch)
        for shape, layer in zip(shapes, layers, strict=True)
    ]
    # A network keeps one memory format from end to end, so formats are compared by their sums.
    times = {
        name: Timing(*map(sum, zip(*(astuple(row.times[name]) for row in rows), strict=True)))
        for name in rows[0].times
    }
    own = min((n for n in times if n.startswith("ours")), key=lambda n: times[n].us)
    peer = min((n for n in times if not n.startswith("ours")), key=lambda n: times[n].us)
    dense_bytes = sum(4 * s.M * (s.channels // s.groups) * s.kernel**2 for s in shapes)
    share = sum(row.case["weight bytes"] for row in rows) / dense_bytes
    bench.rows.append(
        Row(
            "conv2d, all layers",
            {
                "network": network,
                "bits": layers[0].weight.bits,
                "batch": batch,
                "weight memory": f"{share:.3f} of float32",
            },
            times,
            own,
            peer,
            times[peer].us / times[own].us,
            times[peer].warm / times[own].warm,
            conv_target(batch),
            sum(row.bytes for row in rows),
            max(row.error for row in rows),
        )
    )


def _conv2d(bench: Bench, network: str, shape: ConvShape, layer: Layer, batch: int) -> Row:
    filters = layer.dense(torch.float32).view(shape.M, -1, shape.kernel, shape.kernel)
    x = randn(bench, batch, shape.channels, shape.size, shape.size, dtype=torch.bfloat16)
    sizes = {"stride": (shape.stride,) * 2, "padding": (shape.padding,) * 2, "groups": shape.groups}

    def compressed(x: Tensor, form: torch.memory_format) -> Callable[[], Tensor]:
        kernel = (shape.kernel, shape.kernel)
        own = layer.by_tap(shape.kernel**2) if form == torch.channels_last else layer
        return lambda: ops.conv2d(x, own.weight, kernel_size=kernel, **sizes)

    def dense(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        return lambda: F.conv2d(x, w, **sizes)

    expected = dense(x.float(), filters)()
    ours, peers, errors = {}, {}, []
    for name, form in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        formed = x.contiguous(memory_format=form)
        ours[f"ours, {name}"] = compressed(formed, form)
        peers[f"dense {name}"] = dense(formed, filters.bfloat16().contiguous(memory_format=form))
        errors.append(bench.check(name, ours[f"ours, {name}"](), expected, 1.2e-2))
    return bench.compare(
        "conv2d",
        {
            "network": network,
            "layer": shape.name,
            "bits": layer.weight.bits,
            "batch": batch,
            "layout": layer.weight.layout.name.lower(),
            "weight bytes": layer.weight.nbytes,
        },
        ours,
        peers,
        error=max(errors),
        bytes=layer.weight.nbytes + 2 * (x.numel() + expected.numel()),
    )


def calls(bench: Bench) -> None:
    """What a call costs on the host, of layers too small to keep a device busy."""
    with bench.case("calls"):
        layer = make_layer(64, 128, 0.5, 8, bench.device)
        dense = layer.dense(torch.bfloat16)
        runs: dict[str, Callable[[], Tensor]] = {}
        for N in (1, 16):
            x = randn(bench, N, 128, dtype=torch.bfloat16)
            runs[f"linear batch {N}"] = lambda x=x: ops.linear(x, layer.weight)
            runs[f"dense batch {N}"] = lambda x=x: F.linear(x, dense)
        # As a convolution: 64 channels from a kernel of 4 x 4 pixels and 8 channels.
        image, kernel = randn(bench, 1, 8, 6, 6, dtype=torch.bfloat16), dense.view(64, 8, 4, 4)
        runs["conv2d"] = lambda: ops.conv2d(image, layer.weight, kernel_size=(4, 4))
        runs["dense conv2d"] = lambda: F.conv2d(image, kernel)
        bench.check("conv2d", runs["conv2d"](), runs["dense conv2d"](), 2e-2)
        bench.facts["microseconds a call"] = bench.clock.measure_calls(runs)
