"""`conv2d`: whatever nn.Conv2d takes (groups, strides, paddings, dilations), on compressed weights.

The output takes x's memory format. Neither format is copied into the other, but on a GPU where
that of the filters is the other one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, device, device_backward
from ..memory_format import memory_format_of
from ..packing import DEVICE_LAYOUTS
from ..weight import QuantSparseWeight
from . import common

_SIZES = "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups"


def conv2d(
    x: Tensor,
    weight: QuantSparseWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | tuple[int, int, int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """2-D convolution straight from the compressed weight.

    Args:
        x: floating [batch, C, height, width], contiguous or channels_last; the output follows it.
        weight: [M, C / groups * kernel_h * kernel_w], k = (channel * kernel_h + ky) * kernel_w
            + kx; or with taps = kernel_h * kernel_w.
        bias: floating [M] or None.
        kernel_size: (height, width) in pixels.
        stride: (vertical, horizontal) in pixels.
        padding: zeros around the image in pixels, (vertical, horizontal) or (top, bottom, left,
            right).
        dilation: (vertical, horizontal) in pixels.
        groups: of channels; M and C are divisible by it.
        relu: applies ReLU to y in the same pass.

    Returns:
        y [batch, M, out_height, out_width] in x's dtype. Sums are float32 (float64 for float64 x).

    Raises:
        ValueError: a size, a dtype or a device does not fit.
    """
    if len(padding) == 2:
        padding = (padding[0], padding[0], padding[1], padding[1])
    return conv2d_op(
        x, *common.arrays(weight), bias, kernel_size, stride, padding, dilation, groups, relu
    )


def _out_size(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _conv2d_shape(
    x: Tensor,
    weight: _native.Weight,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> _native.ConvShape:
    if x.dim() != 4:
        raise ValueError(
            f"conv2d: x has shape {tuple(x.shape)}, expected [batch, C, height, width]"
        )
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", (groups,), 1),
    ):
        if min(values) < least:
            raise ValueError(f"conv2d: {name} is {tuple(values)}, expected at least {least}")
    batch, channels, height, width = x.shape
    taps = kernel_size[0] * kernel_size[1]
    if weight.K % taps or channels != weight.K // taps * groups:
        raise ValueError(
            f"conv2d: x has {channels} channels, expected groups * K / (kernel_h * kernel_w) = "
            f"{groups} * {weight.K} / {taps}"
        )
    if weight.taps not in (1, taps):
        raise ValueError(
            f"conv2d: the weight's columns lie by {weight.taps} taps, but kernel_size "
            f"{tuple(kernel_size)} has {taps}"
        )
    if weight.M % groups:
        raise ValueError(
            f"conv2d: M = {weight.M} output channels do not divide into {groups} groups"
        )
    top, bottom, left, right = padding
    out_height = _out_size(height, top, bottom, kernel_size[0], stride[0], dilation[0])
    out_width = _out_size(width, left, right, kernel_size[1], stride[1], dilation[1])
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"conv2d: kernel {tuple(kernel_size)} with dilation {tuple(dilation)} does not fit "
            f"into the padded image of {height + top + bottom} x {width + left + right} pixels"
        )
    return _native.ConvShape(
        batch,
        groups,
        weight.K // taps,
        height,
        width,
        out_height,
        out_width,
        *kernel_size,
        *stride,
        padding_top=top,
        padding_left=left,
        dilation_h=dilation[0],
        dilation_w=dilation[1],
    )


def _memory_format(x: Tensor, weight: _native.Weight) -> torch.memory_format:
    """That of y: of x, or of the filters where x is in both, as an image of one channel is."""
    if weight.taps > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return memory_format_of(x)


def _conv2d_empty(x: Tensor, weight: _native.Weight, shape: _native.ConvShape) -> Tensor:
    size = (shape.batch, weight.M, shape.out_height, shape.out_width)
    if weight.taps == 1 and x.is_contiguous():
        return x.new_empty(size)
    form = _memory_format(x, weight)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)


def _conv2d_fake(x: Tensor, *args: Any) -> Tensor:
    weight, bias, sizes = common.weight(*args[:8]), args[8], args[9:14]
    common.check_weight("conv2d", x, weight, bias)
    return _conv2d_empty(x, weight, _conv2d_shape(x, weight, *sizes))


def _conv2d(x: Tensor, *args: Any) -> Tensor:
    weight, bias, sizes, relu = common.weight(*args[:8]), args[8], args[9:14], args[14]
    common.check_weight("conv2d", x, weight, bias)
    shape = _conv2d_shape(x, weight, *sizes)
    if weight.layout in DEVICE_LAYOUTS:
        y = _conv2d_empty(x, weight, shape)
        y = device.conv2d(weight, shape, sizes[2], x.detach(), bias, y, relu)
        return y.contiguous(memory_format=_memory_format(x, weight))
    dtype = common.compute_dtype(x)
    image = x if x.dtype is dtype else x.to(dtype)
    y = _conv2d_empty(image, weight, shape)
    offset = None if bias is None else common.ready_array(bias, dtype)
    _native.conv2d(common.ready(weight, dtype), shape, image, offset, y, relu)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _conv2d_backward_fake(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    codebook, wanted = args[3], args[13]
    grad_x = torch.empty_like(x, memory_format=memory_format_of(x)) if wanted[0] else x.new_empty(0)
    return grad_x, codebook.new_empty(codebook.shape if wanted[1] else (0,))


def _conv2d_backward(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, sizes, wanted = common.weight(*args[:8]), args[8:13], args[13]
    common.check_weight("conv2d_backward", x, weight, None)
    shape = _conv2d_shape(x, weight, *sizes)
    if weight.layout in DEVICE_LAYOUTS:
        grad_x, sums = device_backward.conv2d_backward(
            weight, shape, sizes[2], x.detach(), grad_y.detach().to(x.dtype), tuple(wanted)
        )
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=memory_format_of(x))
        return (
            x.new_empty(0) if grad_x is None else grad_x,
            common.as_codebook_gradient(weight, sums),
        )
    dtype = common.compute_dtype(x)
    image = x.detach().to(dtype)
    grad_x = torch.zeros_like(image, memory_format=memory_format_of(x)) if wanted[0] else None
    sums = common.codebook_sums(weight) if wanted[1] else None
    _native.conv2d_backward(
        common.ready(weight, dtype), shape, image, grad_y.detach().to(dtype), grad_x, sums
    )
    return (
        x.new_empty(0) if grad_x is None else grad_x.to(x.dtype),
        common.as_codebook_gradient(weight, sums),
    )


common.register(
    f"conv2d(Tensor x, {common.WEIGHT}, Tensor? bias, {_SIZES}, bool relu) -> Tensor",
    _conv2d,
    _conv2d_fake,
    ("CPU", "CUDA"),
)
common.register(
    f"conv2d_backward(Tensor grad_y, Tensor x, {common.WEIGHT}, {_SIZES}, bool[2] wanted) "
    "-> (Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_fake,
    ("CPU", "CUDA"),
)
common.register_gradients("conv2d", channels=1)

conv2d_op = torch.ops.placekern.conv2d.default
"""The op itself: (x, the eight arguments of common.WEIGHT, bias, the five sizes, relu) -> y."""
