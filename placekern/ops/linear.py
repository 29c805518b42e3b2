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
    return torch.ops.placekern.linear(x, *common.arrays(weight), bias, relu)


def _linear_check(x: Tensor, weight: _native.Weight, bias: Tensor | None) -> None:
    common.check_weight("linear", x, weight, bias)
    if x.dim() < 1 or x.shape[-1] != weight.K:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected [..., K = {weight.K}]")


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    weight, (bias, _) = common.weight(*args[:7]), args[7:]
    _linear_check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.M))


def _linear(x: Tensor, *args: Any) -> Tensor:
    weight, (bias, relu) = common.weight(*args[:7]), args[7:]
    _linear_check(x, weight, bias)
    if weight.layout in DEVICE_LAYOUTS:
        flat = x.detach().reshape(x.shape[:-1].numel(), weight.K)
        return device.linear(weight, flat, bias, relu).view(*x.shape[:-1], weight.M)
    dtype = common.compute_dtype(x)
    flat = x.detach().reshape(x.shape[:-1].numel(), weight.K).to(dtype).contiguous()
    # Made in its final shape: autograd refuses in-place changes of an output that is a view.
    y = flat.new_empty((*x.shape[:-1], weight.M))
    offset = None if bias is None else bias.detach().to(dtype).contiguous()
    _native.linear(common.ready(weight, dtype), flat, offset, y, relu)
    return y.to(x.dtype)


def _linear_backward_fake(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    codebook, wanted = args[3], args[7]
    grad_x = x.new_empty(x.shape if wanted[0] else (0,))
    return grad_x, codebook.new_empty(codebook.shape if wanted[1] else (0,))


def _linear_backward(grad_y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, wanted = common.weight(*args[:7]), args[7]
    _linear_check(x, weight, None)
    if weight.layout in DEVICE_LAYOUTS:
        rows = x.detach().reshape(x.shape[:-1].numel(), weight.K)
        grad_rows = grad_y.detach().to(x.dtype).reshape(rows.shape[0], weight.M)
        grad_x, sums = device_backward.linear_backward(weight, rows, grad_rows, tuple(wanted))
        return (
            x.new_empty(0) if grad_x is None else grad_x.view(x.shape),
            common.as_codebook_gradient(weight, sums),
        )
    dtype = common.compute_dtype(x)
    flat = x.detach().reshape(x.shape[:-1].numel(), weight.K).to(dtype).contiguous()
    flat_grad_y = grad_y.detach().reshape(flat.shape[0], weight.M).to(dtype).contiguous()
    grad_x = torch.empty_like(flat) if wanted[0] else None
    sums = common.codebook_sums(weight) if wanted[1] else None
    _native.linear_backward(common.ready(weight, dtype), flat, flat_grad_y, grad_x, sums)
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
