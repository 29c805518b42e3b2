"""What the ops share: the library that holds them, their checks, and how gradients return.

The checks see sizes, dtypes and devices; what the arrays hold was proven when the weight was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, device_packing
from ..codebook import prove_groups
from ..packing import DEVICE_LAYOUTS, READ_PADDING, Layout, mask_bytes, window_bytes
from ..weight import QuantSparseWeight

library = torch.library.Library("placekern", "DEF")

_LAYOUTS = frozenset(map(int, Layout))

WEIGHT = (
    "Tensor row_ptr, Tensor positions, Tensor codes, Tensor codebook, int K, int bits, int layout"
)
"""Schema of a QuantSparseWeight [M, K]; M comes with row_ptr, K is stated."""


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], devices: tuple[str, ...]
) -> None:
    """Defines an op by its schema, its fake, and one kernel for the dispatch keys `devices`."""
    name = schema.split("(", 1)[0]
    library.define(schema)
    for device in devices:
        library.impl(name, kernel, device)
    torch.library.register_fake(f"placekern::{name}", fake, lib=library)


def register_gradients(name: str, channels: int) -> None:
    """Adds autograd and autocast to a registered op `name` that has an op `name`_backward.

    Args:
        name: of an op (x, WEIGHT, bias, its own sizes, relu) -> y.
        channels: the dimension of y that the bias runs along.
    """
    backward_op = getattr(torch.ops.placekern, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, row_ptr, positions, codes, codebook, K, bits, layout, bias, *sizes, relu = inputs
        arrays = (row_ptr, positions, codes, codebook)
        ctx.save_for_backward(x, *arrays, bias, output if relu else None)
        ctx.sizes = (K, bits, layout, *sizes)
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *arrays, bias, output = ctx.saved_tensors
        if output is not None:
            grad_y = torch.ops.aten.threshold_backward(grad_y, output, 0)
        gradients: list[Tensor | None] = [None] * ctx.inputs
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
        if any(wanted):
            grad_x, grad_codebook = backward_op(grad_y, x, *arrays, *ctx.sizes, wanted)
            gradients[0] = grad_x if wanted[0] else None
            gradients[4] = grad_codebook if wanted[1] else None
        if ctx.needs_input_grad[8]:
            by_channel = grad_y.transpose(channels, -1)
            gradients[8] = by_channel.sum_to_size(bias.shape).to(bias.dtype)
        return tuple(gradients)

    def twice(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"the gradient of placekern::{name} cannot be differentiated again; for a gradient "
            "penalty use the layer's to_dense()"
        )

    torch.library.register_autograd(f"placekern::{name}_backward", twice, lib=library)
    torch.library.register_autograd(
        f"placekern::{name}", backward, setup_context=setup_context, lib=library
    )
    op = getattr(torch.ops.placekern, name).default
    library.impl(name, _autocast(op, "cpu", "AutocastCPU"), "AutocastCPU")
    library.impl(name, _autocast(op, "cuda", "AutocastCUDA"), "AutocastCUDA")


def check_weight(op: str, x: Tensor, weight: _native.Weight, bias: Tensor | None) -> None:
    """Checks the arrays of a weight, x and bias against each other, for op `op`.

    Runs on every call: comparisons first, words only when one fails.
    """
    w = weight
    if w.layout not in _LAYOUTS:
        raise ValueError(f"{op}: layout is {w.layout}, expected {list(map(int, Layout))}")
    if (w.layout in DEVICE_LAYOUTS) != x.is_cuda and not (_native.is_emulated() or x.is_meta):
        raise ValueError(
            f"{op}: the weight is in layout {Layout(w.layout).name}, which is not for {x.device}; "
            f"move the layer with .to({str(x.device)!r})"
        )
    for name, tensor in (("row_ptr", w.row_ptr), ("positions", w.positions), ("codes", w.codes)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected contiguous")
    if w.row_ptr.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: row_ptr has dtype {w.row_ptr.dtype}, expected torch.int32")
    if w.positions.dtype != torch.uint8:
        raise ValueError(f"{op}: positions has dtype {w.positions.dtype}, expected torch.uint8")
    if w.codes.dtype != torch.uint8:
        raise ValueError(f"{op}: codes has dtype {w.codes.dtype}, expected torch.uint8")
    for name, tensor in (("x", x), ("codebook", w.codebook), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating dtype")
    device = x.device
    for name, tensor in (
        ("row_ptr", w.row_ptr),
        ("positions", w.positions),
        ("codes", w.codes),
        ("codebook", w.codebook),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but x is on {device}; "
                "move the layer or x to one device"
            )
    if w.M < 0:
        raise ValueError(f"{op}: the layer has no weight yet; load a state_dict or a file first")
    if w.codebook.shape != (1 << w.bits,):
        try:
            prove_groups(w.M, w.codebook, w.bits)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
    smallest = READ_PADDING + _least_position_bytes(w)
    if w.codes.shape[0] < READ_PADDING:
        raise ValueError(
            f"{op}: codes has {w.codes.shape[0]} bytes, expected {READ_PADDING} bytes of padding"
        )
    if w.positions.shape[0] < smallest:
        raise ValueError(
            f"{op}: positions has {w.positions.shape[0]} bytes, expected at least {smallest} "
            f"for [{w.M}, {w.K}]"
        )
    if bias is not None and bias.shape != (w.M,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({w.M},)")


def _least_position_bytes(w: _native.Weight) -> int:
    if w.layout == Layout.MASK:
        return mask_bytes(w.M, w.K)
    if w.layout == Layout.WINDOW:
        return window_bytes(w.M, w.K, 0)
    return device_packing.least_position_bytes(w.layout, w.M, w.K)


def weight(
    row_ptr: Tensor,
    positions: Tensor,
    codes: Tensor,
    codebook: Tensor,
    K: int,
    bits: int,
    layout: int,
) -> _native.Weight:
    """The arrays of a weight as an op receives them, put together; M comes from row_ptr."""
    M = row_ptr.shape[0] - 1
    return _native.Weight(M, K, bits, layout, row_ptr, positions, codes, codebook)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What sums are made in: float64 for float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ready(weight: _native.Weight, dtype: torch.dtype) -> _native.Weight:
    """The weight with its codebook in the dtype that the kernel computes in."""
    return weight._replace(codebook=weight.codebook.detach().to(dtype).contiguous())


def codebook_sums(weight: _native.Weight) -> Tensor:
    """Where a backward kernel writes the gradient of the codebook: float64, of its shape."""
    return torch.empty(weight.codebook.shape, dtype=torch.float64, device="cpu")


def as_codebook_gradient(weight: _native.Weight, sums: Tensor | None) -> Tensor:
    """The sums in the codebook's dtype; an empty tensor when there are none."""
    return weight.codebook.new_empty(0) if sums is None else sums.to(weight.codebook.dtype)


def arrays(weight: QuantSparseWeight) -> tuple[Any, ...]:
    """A weight as the seven arguments of common.WEIGHT."""
    w = weight
    return w.row_ptr, w.positions, w.codes, w.codebook, w.shape[1], w.bits, int(w.layout)


def _autocast(op: Callable[..., Tensor], device: str, key: str) -> Callable[..., Tensor]:
    """x in the autocast dtype; the codebook stays exact, which autocast's own rule would round."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, *args: Any) -> Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(x, *args)

    return kernel
