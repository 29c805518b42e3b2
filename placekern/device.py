"""The ops on weights in a GPU layout: which kernel serves which sizes, and its scratch memory.

A linear layer follows the rows of x. Up to two: straight from the codes, in float32. Up to some
hundred: decoded on the way to the tensor cores. More: slices of the dense weight are written to a
bounded scratch tensor, and the dense library multiplies. A convolution takes the second or the
third way, by the multiply-adds that it does.
The tensor cores' kernel knows one codebook: a weight with several takes slices in its place.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, device_packing
from .packing import Layout

SCRATCH_BYTES = 32 << 20
"""The largest slice of a decoded weight."""

_DIRECT_COLUMNS = 2
_EXACT_COLUMNS = 8  # float32 without TF32: beyond this the dense library is quicker
_MATMUL_COLUMNS = 64
# Multiply-adds of a convolution that tensor cores take on windows of the image: copied by 16 bytes,
# or gathered by elements. Decoded slices cost a launch, and then cuDNN is the quicker.
_COPIED_PRODUCTS: dict[int, int] = {Layout.DENSE: 2_000_000_000, Layout.PAIRS: 1_000_000_000}
_GATHERED_PRODUCTS = 200_000_000

_DECODED_ROWS = 65_535 * 16  # as many blocks as a grid may have
_COMPUTED = frozenset((torch.float32, torch.float16, torch.bfloat16))


def linear(weight: _native.Weight, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """y [N, M] in x's dtype, from x [N, K]: float32, float16 or bfloat16.

    Raises:
        NotImplementedError: x is float64.
        RuntimeError: a launch failed; the message has its sizes.
    """
    check("linear", x, weight, bias)
    N = x.shape[0]
    way = _native.way()
    tensor_cores = has_tensor_cores(x, x.dtype == torch.float32 and _tf32_matmul())
    direct_columns = _DIRECT_COLUMNS if tensor_cores else _EXACT_COLUMNS
    few = direct_columns >= N
    one = weight.codebooks == 1
    tensor_cores = tensor_cores and one
    # A block of `direct` has one codebook for its 16 rows.
    aligned = one or weight.group_size % device_packing.UNIT_ROWS == 0
    if way != "decode" and aligned and (few or (way == "direct" and not tensor_cores)):
        out = _output_rows(weight, x, bias, relu, _direct_splits(weight, x))
        _native.device_direct(weight, rows_of(x), out)
        return out.y
    if way != "decode" and tensor_cores and (N <= _MATMUL_COLUMNS or way == "direct"):
        out = _output_rows(weight, x, bias, relu, _matmul_splits(weight, x, N, 0))
        if _native.device_matmul(weight, rows_of(x), out):
            return out.y
    y = _linear_by_slices(weight, x, bias)
    return y.relu_() if relu else y


def _linear_by_slices(weight: _native.Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    y = None
    for first, dense in slices(weight, x):
        part = slice(first, first + dense.shape[0])
        result = F.linear(x, dense, None if bias is None else bias[part].to(x.dtype))
        if dense.shape[0] == weight.M:
            return result
        y = x.new_empty(x.shape[0], weight.M) if y is None else y
        y[:, part] = result
    return x.new_empty(x.shape[0], 0) if y is None else y


def conv2d(
    weight: _native.Weight,
    shape: _native.ConvShape,
    padding: list[int],
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    relu: bool,
) -> Tensor:
    """y [batch, M, out_h, out_w] from x [batch, C, h, w], of x's dtype; any strides.

    Args:
        weight: [M, C / groups * kernel_h * kernel_w].
        shape: its sizes.
        padding: (top, bottom, left, right) in pixels.
        x: float32, float16 or bfloat16.
        bias: floating [M] or None.
        y: float32, float16 or bfloat16, as x; may be filled.
        relu: applies ReLU.

    Returns:
        y, or what the dense library made of the whole weight, in a memory format of its choice.

    Raises:
        NotImplementedError: x is float64.
        RuntimeError: a launch failed; the message has its sizes.
    """
    check("conv2d", x, weight, bias)
    way = _native.way()
    tensor_cores = has_tensor_cores(x, x.dtype == torch.float32 and _tf32_conv())
    tensor_cores = tensor_cores and weight.codebooks == 1
    small = way == "direct" or _products(weight, shape, x) <= _most_products(weight, shape, x)
    # A kernel that reads 16 rows at once must not read those of two groups.
    apart = shape.groups == 1 or weight.layout == Layout.PAIRS
    apart = apart or weight.M // shape.groups % device_packing.UNIT_ROWS == 0
    if way != "decode" and small and apart and tensor_cores and addressable(x):
        source = _native.Source(x, shape=shape)
        splits = _matmul_splits(weight, x, shape.batch * shape.pixels, shape.groups)
        while splits <= _steps(weight):
            out = _output_image(weight, shape, y, bias, relu, splits)
            if _native.device_matmul(weight, source, out):
                return y
            splits *= 2
    y = _conv2d_by_slices(weight, shape, padding, x, bias, y)
    return y.relu_() if relu else y


def _products(weight: _native.Weight, shape: _native.ConvShape, x: Tensor) -> int:
    """Multiply-adds that `device_matmul` would do, with those on rows and columns of padding."""
    dense = weight.layout == Layout.DENSE
    N = shape.batch * shape.pixels
    block_rows = 64 if x.element_size() == 4 or (dense and N <= 16) else 128
    rows = shape.groups * -(-weight.M // shape.groups // block_rows) * block_rows
    columns = device_packing.UNIT_COLUMNS if dense else device_packing.PAIRS_WINDOW
    return rows * _steps(weight) * columns * N


def _most_products(weight: _native.Weight, shape: _native.ConvShape, x: Tensor) -> int:
    """Up to how many `device_matmul` is the way to take."""
    if copies_windows(weight, shape, x):
        return _COPIED_PRODUCTS[weight.layout]
    return _GATHERED_PRODUCTS


def copies_windows(weight: _native.Weight, shape: _native.ConvShape, x: Tensor) -> bool:
    """Whether kernels copy windows of x by 16 bytes; nearly what they ask, and by sizes only."""
    by_tap = weight.taps == shape.kernel_h * shape.kernel_w and x.stride(1) == 1
    return by_tap and shape.channels % (16 // x.element_size()) == 0


def _conv2d_by_slices(
    weight: _native.Weight,
    shape: _native.ConvShape,
    padding: list[int],
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> Tensor:
    image, even_padding = padded(x, padding)
    stride, dilation = shape.steps
    steps = (stride, even_padding, dilation)
    for channels, rows, filters, groups in group_slices(weight, shape, x):
        offset = None if bias is None else bias[rows].to(x.dtype)
        result = F.conv2d(image[:, channels], filters, offset, *steps, groups)
        if filters.shape[0] == weight.M:
            return result
        y[:, rows] = result
    return y


def padded(x: Tensor, padding: list[int]) -> tuple[Tensor, tuple[int, int]]:
    """x and the padding left for a convolution to do: (0, 0) where the sides differ."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def group_slices(
    weight: _native.Weight, shape: _native.ConvShape, x: Tensor
) -> Iterator[tuple[slice, slice, Tensor, int]]:
    """Decoded slices of a convolution: channels of x, rows of the weight, the slice, its groups.

    A slice [rows, C, kernel_h, kernel_w] is the whole weight with all its groups, or some rows of
    one group. It is in channels_last where the weight's columns lie tap by tap; and, as cuDNN would
    copy any other each time, for x in channels_last too.
    """
    per_group = weight.M // shape.groups
    by_tap = weight.taps > 1
    reordered = weight.layout == Layout.PAIRS and not by_tap and not x.is_contiguous()
    for first, dense in slices(weight, x, shape.kernel_h * shape.kernel_w if reordered else 1):
        if not (by_tap or reordered):
            filters = dense.view(-1, *shape.kernel)
        else:
            last = dense.view(-1, shape.kernel_h, shape.kernel_w, shape.channels)
            filters = last.permute(0, 3, 1, 2)
        if dense.shape[0] == weight.M:
            yield slice(None), slice(None), filters, shape.groups
            return
        last = first + dense.shape[0]
        start = first
        while start < last:  # a slice may hold the end of one group and the start of the next
            group = start // per_group
            stop = min(last, (group + 1) * per_group)
            channels = slice(group * shape.channels, (group + 1) * shape.channels)
            yield channels, slice(start, stop), filters[start - first : stop - first], 1
            start = stop


def slices(weight: _native.Weight, x: Tensor, taps: int = 1) -> Iterator[tuple[int, Tensor]]:
    """The dense weight in slices of rows: (first row, [rows, K] in x's dtype), one at a time.

    `taps` orders the columns; see `_native.device_decode`.
    """
    per_row = max(weight.K, 1) * x.element_size()
    rows = min(max(16, SCRATCH_BYTES // per_row // 16 * 16), _DECODED_ROWS)
    for first in range(0, weight.M, rows):
        dense = x.new_empty(min(rows, weight.M - first), weight.K)
        _native.device_decode(weight, first, dense, taps)
        yield first, dense


def check(
    op: str, x: Tensor, weight: _native.Weight | None = None, bias: Tensor | None = None
) -> None:
    """Refuses what no CUDA kernel computes.

    Raises:
        NotImplementedError: x, the codebook or the bias is float64, or of eight bits.
        RuntimeError: placekern was built without CUDA.
        ValueError: the weight's arrays do not start on 16 bytes.
    """
    codebook = x if weight is None else weight.codebook
    if weight is not None and not (
        _native.on_16_bytes(weight.positions) and _native.on_16_bytes(weight.codes)
    ):
        raise ValueError(
            f"{op}: positions or codes are a part of another tensor and start between two "
            "multiples of 16 bytes, which a CUDA kernel cannot read; clone() them"
        )
    usual = x.dtype in _COMPUTED and codebook.dtype in _COMPUTED
    if usual and (bias is None or bias.dtype in _COMPUTED) and _native.has_cuda():
        return
    for name, tensor in (("x", x), ("the codebook", codebook), ("the bias", bias)):
        if tensor is not None and tensor.dtype not in _COMPUTED:
            dtype = str(tensor.dtype).removeprefix("torch.")
            where = ", which runs on the CPU only" if tensor.dtype == torch.float64 else ""
            raise NotImplementedError(f"{op}: {name} is {dtype}{where}; use float32 on CUDA")
    if not _native.has_cuda():
        raise RuntimeError(
            f"{op} on a CUDA device, but placekern was built without CUDA; "
            "reinstall it with PLACEKERN_CUDA=on, or move the tensors to the CPU"
        )


def has_tensor_cores(x: Tensor, tf32: bool) -> bool:
    """Whether the device multiplies x's dtype on tensor cores (float32: as TF32, when allowed)."""
    capability = _native.device_properties(_native.device_index(x)).capability
    if x.dtype == torch.float16:
        return capability >= 75
    return capability >= 80 and (x.dtype == torch.bfloat16 or tf32)


def _tf32_matmul() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _tf32_conv() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def rows_of(x: Tensor) -> _native.Source:
    """x [N, K] with rows on 16 bytes and zeros up to a multiple of 64; as it is where it can be."""
    K = x.shape[1]
    if K % 64 or not x.is_contiguous() or not _native.on_16_bytes(x):
        x = F.pad(x, (0, -K % 64)) if K % 64 else x.clone(memory_format=torch.contiguous_format)
    return _native.Source(x, max(x.shape[1], 64))


def addressable(x: Tensor) -> bool:
    """Whether int32 offsets reach every element."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return max(reach, *x.stride()) < 1 << 31


def _output_rows(
    weight: _native.Weight, x: Tensor, bias: Tensor | None, relu: bool, splits: int
) -> _native.Output:
    N = x.shape[0]
    y = x.new_empty(N, weight.M)
    partial = _partial(y, splits, N * weight.M)
    return _native.Output(
        y, _contiguous(bias), relu, weight.M, N, 1, weight.M, 0, 1, partial, splits
    )


def _output_image(
    weight: _native.Weight,
    shape: _native.ConvShape,
    y: Tensor,
    bias: Tensor | None,
    relu: bool,
    splits: int,
) -> _native.Output:
    # y is contiguous or channels_last, so its pixels are a constant stride apart.
    pixels = shape.pixels
    N = shape.batch * pixels
    image_stride, row_stride = pixels * weight.M, y.stride(1)
    pixel_stride = 1 if row_stride != 1 else weight.M
    if weight.M == 1 or pixels == 1:  # strides of a dimension of size 1 say nothing
        row_stride, pixel_stride = (1, 1) if weight.M == 1 else (1, weight.M)
    partial = _partial(y, splits, N * weight.M)
    return _native.Output(
        y,
        _contiguous(bias),
        relu,
        weight.M,
        N,
        pixels,
        image_stride,
        pixel_stride,
        row_stride,
        partial,
        splits,
    )


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()


def _partial(y: Tensor, splits: int, outputs: int) -> Tensor | None:
    return None if splits == 1 else y.new_empty(splits * outputs, dtype=torch.float32)


def _steps(weight: _native.Weight) -> int:
    """Pieces that the columns of a weight are read in: units of 64, or windows of 248."""
    if weight.layout == Layout.DENSE:
        return max(1, device_packing.units(weight.M, weight.K)[1])
    return max(1, device_packing.windows(weight.K))


def _splits(blocks: int, wanted: int, steps: int) -> int:
    """How many blocks share a sum, so that about `wanted` blocks run; each has some steps."""
    return max(1, min(wanted // max(blocks, 1), steps))


def _direct_splits(weight: _native.Weight, x: Tensor) -> int:
    blocks = -(-weight.M // 16) * -(-x.shape[0] // 2)
    multiprocessors = _native.device_properties(_native.device_index(x)).multiprocessors
    # A block has eight warps; with fewer than two units for each, splitting gains nothing.
    return _splits(blocks, 2 * multiprocessors, _steps(weight) // 16)


def _matmul_splits(weight: _native.Weight, x: Tensor, N: int, groups: int) -> int:
    M, K, bits, layout = weight[:4]
    index = _native.device_index(x)
    return _native.matmul_splits(M, K, bits, layout, x.dtype, N, groups, index)
