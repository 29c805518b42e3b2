"""`linear`: y = x weight^T + bias for any leading dimensions of x.

The codebook is an ordinary differentiable input: its gradient is the sum over all positions that
share a code, and the dense gradient never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, device, device_backward
from ..packing import DEVICE_LAYOUTS
from ..weight import QuantSparseWeight
from . import common


def linear(
    x: Tensor, weight: QuantSparseWeight, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """y = x weight^T + bias, straight from the compressed weight.

    Args:
        x: floating [..., K].
        weight: [M, K].
        bias: floating [M] or None.
        relu: applies ReLU to y in the same pass.

    Returns:
        y [..., M] in x's dtype. Sums are float32 (float64 for float64 x).

    Raises:
        ValueError: a size, a dtype or a device does not fit.
    """
    return linear_op(x, *common.arrays(weight), bias, relu)


def _linear_check(x: Tensor, weight: _native.Weight, bias: Tensor | None) -> None:
    common.check_weight("linear", x, weight, bias)
    if x.dim() < 1 or x.shape[-1] != weight.K:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected [..., K = {weight.K}]")
    if weight.taps != 1:
        raise ValueError(
            f"linear: the weight's columns lie by the {weight.taps} taps of a filter; "
            "use conv2d, or to_layout without taps"
        )


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    weight, (bias, _) = common.weight(*args[:8]), args[8:]
    _linear_check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.M))


def _linear(x: Tensor, *args: Any) -> Tensor:
    weight, (bias, relu) = common.weight(*args[:8]), args[8:]
    _linear_check(x, weight, bias)
    if weight.layout in DEVICE_LAYOUTS:
        if x.dim() == 2:
            return device.linear(weight, x, bias, relu)
        y = device.linear(weight, _rows(x, weight.K), bias, relu)
        return y.view(*x.shape[:-1], weight.M)
    dtype = common.compute_dtype(x)
    rows = common.ready_array(_rows(x, weight.K), dtype)
    # Made in its final shape: autograd refuses in-place changes of an output that is a view.
    y = rows.new_empty((*x.shape[:-1], weight.M))
    offset = None if bias is None else common.ready_array(bias, dtype)
    _native.linear(common.ready(weight, dtype), rows, offset, y, relu)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _rows(x: Tensor, K: int) -> Tensor:
    """x [..., K] as [N, K]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)


def _linear_backward_fake(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    codebook, wanted = args[3], args[8]
    grad_x = x.new_empty(x.shape if wanted[0] else (0,))
    return grad_x, codebook.new_empty(codebook.shape if wanted[1] else (0,))


def _linear_backward(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, wanted = common.weight(*args[:8]), args[8]
    _linear_check(x, weight, None)
    if weight.layout in DEVICE_LAYOUTS:
        rows = _rows(x, weight.K)
        grad_rows = grad_y.detach().to(x.dtype).reshape(rows.shape[0], weight.M)
        grad_x, sums = device_backward.linear_backward(weight, rows, grad_rows, tuple(wanted))
        return (
            x.new_empty(0) if grad_x is None else grad_x.view(x.shape),
            common.as_codebook_gradient(weight, sums),
        )
    dtype = common.compute_dtype(x)
    rows = common.ready_array(_rows(x, weight.K), dtype)
    grad_rows = common.ready_array(grad_y.reshape(rows.shape[0], weight.M), dtype)
    grad_x = torch.empty_like(rows) if wanted[0] else None
    sums = common.codebook_sums(weight) if wanted[1] else None
    _native.linear_backward(common.ready(weight, dtype), rows, grad_rows, grad_x, sums)
    return (
        x.new_empty(0) if grad_x is None else grad_x.reshape(x.shape).to(x.dtype),
        common.as_codebook_gradient(weight, sums),
    )


common.register(
    f"linear(Tensor x, {common.WEIGHT}, Tensor? bias, bool relu) -> Tensor",
    _linear,
    _linear_fake,
    ("CPU", "CUDA"),
)
common.register(
    f"linear_backward(Tensor grad_y, Tensor x, {common.WEIGHT}, bool[2] wanted) "
    "-> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
    ("CPU", "CUDA"),
)
common.register_gradients("linear", channels=-1)

linear_op = torch.ops.placekern.linear.default
"""The op itself: (x, the eight arguments of common.WEIGHT, bias, relu) -> y."""
