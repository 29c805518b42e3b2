"""Gradients against what plain torch does: a dense weight gradient, added up by code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, randn
from benchmarks.gpu.layers import Layer, make_layer
from benchmarks.shapes import ConvShape, LinearShape
from placekern.ops import common

DENSITY, BITS, BATCH, CONV_BATCH = 0.3, 8, 32, 8
TARGET = 4.0


def gradients(layer: Layer, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Ours: of x, and of the codebook."""
    return torch.ops.placekern.linear_backward(
        grad_y, x, *common.arrays(layer.weight), [True, True]
    )


def linear_backward(bench: Bench) -> None:
    """Both gradients of the whitening layers."""
    _in_turn(bench, "linear_backward", bench.sizes.linear, _linear_backward)


def _in_turn(
    bench: Bench, name: str, shapes: Iterable[Any], run: Callable[[Bench, Any], None]
) -> None:
    for shape in shapes:
        what = f"{name} {shape.name}"
        if bench.in_time(what):
            with bench.case(what):
                run(bench, shape)


def _linear_backward(bench: Bench, shape: LinearShape) -> None:
    layer = make_layer(shape.M, shape.K, DENSITY, BITS, bench.device)
    x = randn(bench, BATCH, shape.K, dtype=torch.bfloat16)
    grad_y = randn(bench, BATCH, shape.M, dtype=torch.bfloat16, seed=2)
    dense, indices = layer.dense(torch.bfloat16), layer.indices().flatten()
    sums = torch.zeros((1 << BITS) + 1, device=bench.device)

    def scatter_add() -> tuple[Tensor, Tensor]:
        grad_w = (grad_y.T @ x).flatten().float()
        return grad_y @ dense, sums.zero_().scatter_add_(0, indices, grad_w)

    def index_add() -> tuple[Tensor, Tensor]:
        grad_w = (grad_y.T @ x).flatten().float()
        return grad_y @ dense, sums.zero_().index_add_(0, indices, grad_w)

    kept = (indices < 1 << BITS).nonzero().flatten()
    codes = indices[kept].int()

    def select_and_add() -> tuple[Tensor, Tensor]:
        grad_w = (grad_y.T @ x).flatten().index_select(0, kept).float()
        return grad_y @ dense, sums.zero_().index_add_(0, codes, grad_w)

    # In strips of rows, so that the float64 gradient of the weight stays small.
    wanted = torch.zeros((1 << BITS) + 1, dtype=torch.float64, device=bench.device)
    rows = indices.view(shape.M, shape.K).split(512)
    for of_strip, dy in zip(rows, grad_y.T.split(512), strict=True):
        wanted.scatter_add_(0, of_strip.flatten(), (dy.double() @ x.double()).flatten())
    grad_x, grad_codebook = gradients(layer, x, grad_y)
    # A gradient of the codebook is a sum of millions of terms, most of which cancel: its error is
    # relative to the size that such a sum has.
    errors = [
        bench.check("grad_x", grad_x, grad_y.double() @ layer.dense(torch.float64), 1.2e-2),
        bench.check("grad_codebook", grad_codebook, wanted[:-1], 1e-3),
    ]
    bench.compare(
        "linear_backward",
        {
            "layer": f"{shape.K:,} -> {shape.M:,}",
            "batch": BATCH,
            "bits": BITS,
            "density": DENSITY,
            "layout": layer.weight.layout.name.lower(),
        },
        {"ours, bfloat16": lambda: gradients(layer, x, grad_y)},
        {
            "dense bfloat16 + scatter_add": scatter_add,
            "dense bfloat16 + index_add": index_add,
            "dense bfloat16 + index_add of what is kept": select_and_add,
        },
        error=max(errors),
        bytes=layer.weight.nbytes + 2 * BATCH * (2 * shape.K + shape.M),
        target=TARGET,
        rounds=7,  # plain torch takes some ten milliseconds
    )


def conv2d_backward(bench: Bench) -> None:
    """Both gradients of deep convolutions, in bfloat16 and channels_last, as training has them."""
    _in_turn(bench, "conv2d_backward", bench.sizes.trained, _conv2d_backward)


def _conv2d_backward(bench: Bench, shape: ConvShape) -> None:
    taps = shape.kernel**2
    layer = make_layer(shape.M, shape.channels * taps, DENSITY, BITS, bench.device).by_tap(taps)
    last = torch.channels_last
    image = (CONV_BATCH, shape.channels, shape.size, shape.size)
    x = randn(bench, *image, dtype=torch.bfloat16).contiguous(memory_format=last)
    result = (CONV_BATCH, shape.M, shape.size, shape.size)
    grad_y = randn(bench, *result, dtype=torch.bfloat16, seed=2).contiguous(memory_format=last)
    indices = layer.indices().flatten()
    filters = layer.dense(torch.float32).view(shape.M, shape.channels, shape.kernel, shape.kernel)
    sums = torch.zeros((1 << BITS) + 1, device=bench.device)
    pairs = [(size, size) for size in (shape.kernel, shape.stride, shape.padding, 1)]
    kernel, stride, padding, dilation = pairs

    def dense(x: Tensor, grad_y: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
        steps = (None, stride, padding, dilation, False, (0, 0), 1)
        wanted = (True, True, False)
        return torch.ops.aten.convolution_backward(grad_y, x, filters, *steps, wanted)[:2]

    halves = filters.bfloat16().contiguous(memory_format=last)

    def scatter_add() -> tuple[Tensor, Tensor]:
        grad_x, grad_w = dense(x, grad_y, halves)
        grad_w = grad_w.contiguous().flatten().float()
        return grad_x, sums.zero_().scatter_add_(0, indices, grad_w)

    def ours() -> tuple[Tensor, Tensor]:
        sizes = (kernel, stride, padding * 2, dilation, 1)
        return torch.ops.placekern.conv2d_backward(
            grad_y, x, *common.arrays(layer.weight), *sizes, [True, True]
        )

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted_x, grad_w = dense(x.float(), grad_y.float(), filters)
    wanted = torch.zeros((1 << BITS) + 1, dtype=torch.float64, device=bench.device)
    wanted.scatter_add_(0, indices, grad_w.contiguous().flatten().double())
    grad_x, grad_codebook = ours()
    errors = [
        bench.check("grad_x", grad_x, wanted_x, 1.2e-2),
        bench.check("grad_codebook", grad_codebook, wanted[:-1], 1e-3),
    ]
    bench.compare(
        "conv2d_backward",
        {
            "layer": shape.name,
            "batch": CONV_BATCH,
            "bits": BITS,
            "density": DENSITY,
            "layout": layer.weight.layout.name.lower(),
        },
        {"ours, bfloat16": ours},
        {
            "dense bfloat16, gradient of the weight": lambda: dense(x, grad_y, halves),
            "dense bfloat16 + scatter_add": scatter_add,
        },
        error=max(errors),
        bytes=layer.weight.nbytes + 2 * (2 * x.numel() + grad_y.numel()),
        rounds=7,
    )
