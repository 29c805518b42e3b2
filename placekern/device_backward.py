"""Gradients of the ops on weights in a GPU layout.

The gradient of the codebook never passes through a dense gradient: kernels sum it by code while it
is in registers. With some tens of rows of x, one kernel decodes each tile once for both gradients;
beyond, in float32, or with several codebooks, the gradient of x comes from the dense library on
decoded slices. Each codebook's gradient is a launch of its own, which is not tuned for many.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, device

_FUSED_ROWS = 64


def linear_backward(
    weight: _native.Weight, x: Tensor, grad_y: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [N, K], in x's dtype, and of the codebooks, float64 of their shape.

    Args:
        weight: [M, K].
        x: float32, float16 or bfloat16 [N, K].
        grad_y: [N, M], of x's dtype.
        wanted: which of the two; None is returned for the other.

    Raises:
        NotImplementedError: x is float64.
        RuntimeError: a launch failed; the message has its sizes.
    """
    device.check("linear_backward", x, weight)
    N = x.shape[0]
    fused = x.dtype != torch.float32 and N <= _FUSED_ROWS and _native.way() != "decode"
    fused = fused and weight.codebooks == 1 and N > 0  # torch 2.6 pads no grad_y without rows
    if fused and (plan := _native.device_linear_backward_plan(weight, x, wanted)).warps:
        x = x.contiguous()
        grad_x = torch.empty_like(x) if wanted[0] else None
        sums = x.new_empty(1 << weight.bits, dtype=torch.float64) if wanted[1] else None
        operands = _operands(grad_y, plan.chunks, plan.columns)
        _native.device_linear_backward(weight, plan, x, operands, grad_x, sums)
        return grad_x, sums
    grad_x = _grad_rows(weight, grad_y) if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    x, grad_y = _multipliable(x, grad_y)
    if _copied(weight, x, grad_y):
        rows = grad_y.contiguous()
        strides = _native.GradY(rows, max(N, 1), 0, weight.M, 1)
    else:
        transposed = grad_y.t().contiguous()  # it is read along the rows of x
        strides = _native.GradY(transposed, max(N, 1), 0, 1, N)
    source = device.rows_of(x)
    parts = (
        (codebook, _native.device_codebook_gradient(weight, source, strides, N, first, rows))
        for _, codebook, first, rows in _runs(weight, 1)
    )
    return grad_x, _sums(weight, x, parts)


def _operands(grad_y: Tensor, chunks: int, columns: int) -> Tensor:
    """grad_y [N, M] as operands of tensor cores, in the order of csrc/cuda/linear_backward.h."""
    N, M = grad_y.shape
    blocks = -(-M // 16)
    missing = (0, blocks * 16 - M, 0, chunks * columns - N)
    rows = F.pad(grad_y, missing) if any(missing) else grad_y
    split = rows.reshape(chunks, 4, columns // 16, 2, 2, blocks, 2, 8)
    return split.permute(0, 5, 2, 7, 1, 3, 6, 4).contiguous()


def conv2d_backward(
    weight: _native.Weight,
    shape: _native.ConvShape,
    padding: list[int],
    x: Tensor,
    grad_y: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [batch, C, h, w], in x's dtype, and of the codebooks, float64 of their shape.

    Args:
        weight: [M, C / groups * kernel_h * kernel_w].
        shape: its sizes.
        padding: (top, bottom, left, right) in pixels.
        x: float32, float16 or bfloat16; any strides.
        grad_y: [batch, M, out_h, out_w], of x's dtype.
        wanted: which of the two; None is returned for the other.

    Raises:
        NotImplementedError: x is float64.
        RuntimeError: a launch failed; the message has its sizes.
    """
    device.check("conv2d_backward", x, weight)
    grad_x = _grad_image(weight, shape, padding, x, grad_y) if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    pixels = shape.pixels
    N = shape.batch * pixels
    if not device.addressable(x):
        raise ValueError(
            f"conv2d_backward: x {tuple(x.shape)} with strides {x.stride()} reaches over 2^31 "
            "elements; use a smaller batch"
        )
    x, grad_y = _multipliable(x, grad_y)
    if _copied(weight, x, grad_y) and device.copies_windows(weight, shape, x):
        image = grad_y.contiguous(memory_format=torch.channels_last)
        strides = _native.GradY(image, pixels, pixels * weight.M, weight.M, 1)
    else:
        image = grad_y.contiguous()
        strides = _native.GradY(image, pixels, pixels * weight.M, 1, pixels)

    def part(group: int, first: int, rows: int) -> Tensor:
        channels = slice(group * shape.channels, (group + 1) * shape.channels)
        source = _native.Source(x[:, channels], shape=shape)
        return _native.device_codebook_gradient(weight, source, strides, N, first, rows)

    runs = _runs(weight, shape.groups)
    parts = ((codebook, part(group, first, rows)) for group, codebook, first, rows in runs)
    return grad_x, _sums(weight, x, parts)


def _runs(weight: _native.Weight, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of rows with one group of the convolution and one codebook.

    Yields:
        group, codebook, first row, rows.
    """
    per_group, per_codebook = weight.M // groups, weight.group_size
    first = 0
    while first < weight.M:
        group, codebook = first // per_group, first // per_codebook
        end = min((group + 1) * per_group, (codebook + 1) * per_codebook, weight.M)
        yield group, codebook, first, end - first
        first = end


def _sums(weight: _native.Weight, x: Tensor, parts: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The gradient of the codebooks, float64 of their shape, from parts (codebook, [2^bits])."""
    sums: dict[int, Tensor] = {}
    for codebook, part in parts:
        sums[codebook] = sums[codebook] + part if codebook in sums else part
    if not sums:
        return x.new_zeros(weight.codebook.shape, dtype=torch.float64)
    return torch.stack(list(sums.values())).view(weight.codebook.shape)


def _copied(weight: _native.Weight, x: Tensor, grad_y: Tensor) -> bool:
    """Whether grad_y is to have neighbouring rows of the weight side by side.

    Then kernels copy it by 16 bytes, as x; else elements are gathered along n.
    """
    capability = _native.device_properties(_native.device_index(x)).capability
    fits = weight.M % 8 == 0 and grad_y.numel() < 1 << 31
    return fits and x.dtype != torch.float32 and capability >= 80


def _multipliable(x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """x and grad_y as they are, or in float32 where the GPU has no product of their dtype."""
    if x.dtype != torch.float32 and not device.has_tensor_cores(x, tf32=False):
        return x.float(), grad_y.float()
    return x, grad_y


def _grad_rows(weight: _native.Weight, grad_y: Tensor) -> Tensor:
    """grad_y [N, M] times the weight, by decoded slices; sums of slices are float32."""
    total = None
    for first, dense in device.slices(weight, grad_y):
        part = grad_y[:, first : first + dense.shape[0]] @ dense
        if dense.shape[0] == weight.M:
            return part
        total = part.float() if total is None else total.add_(part)
    if total is None:
        return grad_y.new_zeros(grad_y.shape[0], weight.K)
    return total.to(grad_y.dtype)


def _grad_image(
    weight: _native.Weight,
    shape: _native.ConvShape,
    padding: list[int],
    x: Tensor,
    grad_y: Tensor,
) -> Tensor:
    top, bottom, left, right = padding
    even = top == bottom and left == right
    size = list(x.shape)
    if not even:  # the gradient of the padded image, cut out below
        size[2] += top + bottom
        size[3] += left + right
    stride, dilation = shape.steps
    steps = (stride, (top, left) if even else (0, 0), dilation)
    total = None
    for channels, rows, filters, groups in device.group_slices(weight, shape, grad_y):
        own = [size[0], shape.channels * groups, *size[2:]]
        part = torch.nn.grad.conv2d_input(own, filters, grad_y[:, rows], *steps, groups)
        if filters.shape[0] == weight.M:
            total = part
            break
        if total is None:
            total = x.new_zeros(size, dtype=torch.float32)
        total[:, channels] += part
    if total is None:
        total = x.new_zeros(size)
    if not even:
        total = total[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return total.to(x.dtype)
