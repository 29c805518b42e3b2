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
from ..packing import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    READ_PADDING,
    Layout,
    mask_bytes,
    window_bytes,
)
from ..weight import QuantSparseWeight

library = torch.library.Library("placekern", "DEF")

WEIGHT = (
    "Tensor row_ptr, Tensor positions, Tensor codes, Tensor codebook, int K, int bits, int layout, "
    "int taps"
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
        x, row_ptr, positions, codes, codebook, K, bits, layout, taps, bias, *sizes, relu = inputs
        arrays = (row_ptr, positions, codes, codebook)
        ctx.save_for_backward(x, *arrays, bias, output if relu else None)
        ctx.sizes = (K, bits, layout, taps, *sizes)
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *arrays, bias, output = ctx.saved_tensors
        if output is not None:
            grad_y = torch.ops.aten.threshold_backward(grad_y, output, 0)
        gradients: list[Tensor | None] = [None] * ctx.inputs
        _, *needed = ctx.needs_input_grad  # the first is of the keys
        wanted = [needed[0], needed[4]]
        if any(wanted):
            grad_x, grad_codebook = backward_op(grad_y, x, *arrays, *ctx.sizes, wanted)
            gradients[0] = grad_x if wanted[0] else None
            gradients[4] = grad_codebook if wanted[1] else None
        if needed[9]:
            by_channel = grad_y.transpose(channels, -1)
            gradients[9] = by_channel.sum_to_size(bias.shape).to(bias.dtype)
        return tuple(gradients)

    def twice(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"the gradient of placekern::{name} cannot be differentiated again; for a gradient "
            "penalty use the layer's to_dense()"
        )

    torch.library.register_autograd(f"placekern::{name}_backward", twice, lib=library)
    op = getattr(torch.ops.placekern, name).default
    _register_autograd(op, setup_context, backward)
    library.impl(name, _autocast(op, "cpu", "AutocastCPU"), "AutocastCPU")
    library.impl(name, _autocast(op, "cuda", "AutocastCUDA"), "AutocastCUDA")


def _register_autograd(
    op: torch._ops.OpOverload,
    setup_context: Callable[[Any, tuple[Any, ...], Tensor], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """What `torch.library.register_autograd` does, at a third of its time in every call.

    That one walks the schema each time, and looks for keywords and lists of tensors, which our ops
    do not take.
    """

    def below(keys: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: torch._C.DispatchKeySet, *inputs: Any) -> Tensor:
            output = below(keys, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            return (None, *backward(ctx, grad_output))

    def kernel(keys: torch._C.DispatchKeySet, *inputs: Any) -> Tensor:
        differentiable = (inputs[0], inputs[4], inputs[9])  # x, codebook, bias
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in differentiable
        ):
            return Differentiable.apply(keys, *inputs)
        return below(keys, inputs)

    library.impl(op._opname, kernel, "Autograd", with_keyset=True)


def check_weight(op: str, x: Tensor, weight: _native.Weight, bias: Tensor | None) -> None:
    """Checks the arrays of a weight, x and bias against each other, for op `op`.

    Runs on every call, so what is as usual is seen at a glance.
    """
    if not _is_usual(x, weight, bias):
        _prove_weight(op, x, weight, bias)


def _is_usual(x: Tensor, w: _native.Weight, bias: Tensor | None) -> bool:
    """True for most of what `_prove_weight` lets pass, and for nothing else."""
    device, codebook, positions, codes = x.device, w.codebook, w.positions, w.codes
    return (
        w.layout in (DEVICE_LAYOUTS if x.is_cuda else HOST_LAYOUTS)
        and positions.dtype is codes.dtype is torch.uint8
        and w.row_ptr.dtype is torch.int32
        and x.is_floating_point()
        and codebook.is_floating_point()
        and w.row_ptr.is_contiguous()
        and positions.is_contiguous()
        and codes.is_contiguous()
        and w.row_ptr.device == positions.device == codes.device == codebook.device == device
        and w.M >= 0
        and codebook.shape == (1 << w.bits,)
        and codes.shape[0] >= READ_PADDING
        and positions.shape[0] >= READ_PADDING + _least_position_bytes(w)
        and (
            bias is None
            or (bias.is_floating_point() and bias.device == device and bias.shape == (w.M,))
        )
    )


def _prove_weight(op: str, x: Tensor, weight: _native.Weight, bias: Tensor | None) -> None:
    w = weight
    if w.layout not in HOST_LAYOUTS and w.layout not in DEVICE_LAYOUTS:
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
    taps: int,
) -> _native.Weight:
    """The arrays of a weight as an op receives them, put together; M comes from row_ptr."""
    M = row_ptr.shape[0] - 1
    book = codebook.contiguous()
    return _native.Weight(M, K, bits, layout, taps, row_ptr, positions, codes, book)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What sums are made in: float64 for float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ready(weight: _native.Weight, dtype: torch.dtype) -> _native.Weight:
    """The weight with its codebook in the dtype that the kernel computes in."""
    codebook = ready_array(weight.codebook, dtype)
    return weight if codebook is weight.codebook else weight._replace(codebook=codebook)


def ready_array(array: Tensor, dtype: torch.dtype) -> Tensor:
    """The array contiguous and in a dtype; as it is, where it is so already."""
    if array.dtype is dtype and array.is_contiguous():
        return array
    return array.detach().to(dtype).contiguous()


def codebook_sums(weight: _native.Weight) -> Tensor:
    """Where a backward kernel writes the gradient of the codebook: float64, of its shape."""
    return torch.empty(weight.codebook.shape, dtype=torch.float64, device="cpu")


def as_codebook_gradient(weight: _native.Weight, sums: Tensor | None) -> Tensor:
    """The sums in the codebook's dtype; an empty tensor when there are none."""
    return weight.codebook.new_empty(0) if sums is None else sums.to(weight.codebook.dtype)


def arrays(weight: QuantSparseWeight) -> tuple[Any, ...]:
    """A weight as the eight arguments of common.WEIGHT."""
    w = weight
    return w.row_ptr, w.positions, w.codes, w.codebook, w.shape[1], w.bits, int(w.layout), w.taps


def _autocast(op: Callable[..., Tensor], device: str, key: str) -> Callable[..., Tensor]:
    """x in the autocast dtype; the codebook stays exact, which autocast's own rule would round."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, *args: Any) -> Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(x, *args)

    return kernel
