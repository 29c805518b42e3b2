"""Loads `_cuda`, where it was built, and hands it tensors.

Weights are in a device layout and tensors on the device. The surprise: tests put an emulation in
the place of `_cuda`, which takes tensors of the CPU.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arrays import ConvShape, Weight, pointer

if find_spec("placekern._cuda") is None:  # built without nvcc: all but CUDA tensors works
    _cuda = None
else:
    from .. import _cuda


def has_cuda() -> bool:
    """Whether `_cuda` was built."""
    return _cuda is not None


def is_emulated() -> bool:
    """Whether `_cuda` is the tests' emulation, which computes on CPU tensors."""
    return _cuda is not None and _cuda.architectures == "emulated"


def cuda_devices() -> int:
    """CUDA devices that `_cuda` can use; 0 when it was not built."""
    return _cuda.device_count() if _cuda is not None else 0


def cuda_architectures() -> str | None:
    """The GPUs that `_cuda` was built for ("75 80 86"), None when it was not built."""
    return _cuda.architectures if _cuda is not None else None


class Output(NamedTuple):
    """Where a product W X goes: y [N, M] or an image [batch, M, out_h, out_w]; see csrc/cuda."""

    y: Tensor
    bias: Tensor | None
    relu: bool
    M: int
    N: int
    pixels: int
    image_stride: int
    pixel_stride: int
    row_stride: int
    partial: Tensor | None
    splits: int


class Source(NamedTuple):
    """The columns X of a product: rows of x [N, K], or windows of an image of this shape."""

    x: Tensor
    stride: int = 0
    shape: ConvShape | None = None


@cache
def device_properties(index: int) -> Any:
    """multiprocessors, shared_memory (bytes of a block) and capability (90 for 9.0) of a device."""
    return _cuda.properties(index)


def device_index(tensor: Tensor) -> int:
    """The CUDA device of a tensor."""
    return tensor.device.index or 0


def device_direct(weight: Weight, source: Source, out: Output) -> None:
    """Fills out.y for a few rows of x, in float32; several codebooks: group_size % 16 == 0."""
    _cuda.direct(_device_weight(weight), _source(source), _output(out), *_queue(source.x))


def device_matmul(weight: Weight, source: Source, out: Output) -> bool:
    """Fills out.y on tensor cores; False, where a block finds no room in shared memory."""
    return _cuda.matmul(_device_weight(weight), _source(source), _output(out), *_queue(source.x))


@lru_cache(4096)
def matmul_splits(
    M: int, K: int, bits: int, layout: int, dtype: torch.dtype, N: int, groups: int, index: int
) -> int:
    """Blocks that should share a sum of `device_matmul`: so many that all run at once.

    Of sizes only, so that it is worked out once for a layer and a batch.

    Args:
        M: rows of the weight.
        K: its columns.
        bits: of a code.
        layout: Layout.DENSE or PAIRS.
        dtype: of x.
        N: columns of the product.
        groups: of the convolution whose windows they are; 0: they are rows.
        index: of the CUDA device.
    """
    return _cuda.matmul_splits(M, K, bits, layout, _DTYPES[dtype], N, groups, index)


def device_decode(weight: Weight, first: int, dense: Tensor, taps: int = 1) -> None:
    """Fills dense [rows, K] with the rows from `first`, a multiple of 16, on; all of it.

    With `taps` of a filter, which only PAIRS takes and only a weight whose own are 1, column k is
    written to (k % taps) * (K / taps) + k / taps: the order of a filter in channels_last.
    """
    _cuda.decode(
        _device_weight(weight),
        first,
        dense.shape[0],
        taps,
        dense.data_ptr(),
        _DTYPES[dense.dtype],
        *_queue(dense),
    )


def device_kmeans_assign(
    points: Tensor, centroids: Tensor, codes: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """Fills codes uint8 [n], sums float64 [C] and counts int64 [C] by centroids [C] in any order.

    All contiguous. Nothing waits for the device, which sorts the centroids itself.
    """
    n, count = points.numel(), centroids.numel()
    size = _cuda.kmeans_assign_workspace(n, count, device_index(points))
    workspace = torch.empty(size, dtype=torch.uint8, device=points.device)
    arrays = (points, centroids, codes, sums, counts, workspace)
    _cuda.kmeans_assign(n, count, *(array.data_ptr() for array in arrays), *_queue(points))


class GradY(NamedTuple):
    """grad_y[n, m] at (n / pixels) image_stride + (n % pixels) pixel_stride + m row_stride."""

    grad_y: Tensor
    pixels: int
    image_stride: int
    pixel_stride: int
    row_stride: int


def device_linear_backward_plan(weight: Weight, x: Tensor, wanted: tuple[bool, bool]) -> Any:
    """How `device_linear_backward` is cut up: warps (0: impossible), columns, chunks, and the
    bytes of its workspace.
    """
    return _cuda.linear_backward_plan(
        _device_weight(weight), _DTYPES[x.dtype], x.shape[0], *wanted, device_index(x)
    )


def device_linear_backward(
    weight: Weight,
    plan: Any,
    x: Tensor,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_codebook: Tensor | None,
) -> None:
    """Fills what is given: grad_x [N, K] contiguous, grad_codebook float64 [2^bits].

    x is [N, K] contiguous, grad_y in the order of csrc/cuda/linear_backward.h; float16 or
    bfloat16, as grad_x.
    """
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device)
    _cuda.linear_backward(
        _device_weight(weight),
        _DTYPES[x.dtype],
        plan,
        x.shape[0],
        x.data_ptr(),
        x.shape[1],
        grad_y.data_ptr(),
        pointer(grad_x),
        pointer(grad_codebook),
        workspace.data_ptr(),
        *_queue(x),
    )


def device_codebook_gradient(
    weight: Weight, source: Source, grad_y: GradY, N: int, first: int, rows: int
) -> Tensor:
    """The gradient of one codebook, float64 [2^bits], from rows first .. first + rows - 1.

    source and grad_y have one dtype; products of float32 are exact to float32.
    """
    x = source.x
    native = _device_weight(weight)
    plan = _cuda.codebook_gradient_plan(native, _DTYPES[x.dtype], first, rows, N, device_index(x))
    partial = x.new_empty((plan.blocks, 1 << weight.bits), dtype=torch.float64)
    _cuda.codebook_gradient(
        native,
        plan,
        first,
        rows,
        N,
        _source(source),
        _cuda.GradYSource(grad_y.grad_y.data_ptr(), *grad_y[1:]),
        partial.data_ptr(),
        *_queue(x),
    )
    return partial.sum(0)


# The private name is what torch's own compiler calls in the code that it writes; the public one
# makes an object each time.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def _queue(tensor: Tensor) -> tuple[int, int]:
    """Device and stream of a call."""
    if not tensor.is_cuda:  # emulated
        return 0, 0
    index = device_index(tensor)
    return index, _raw_stream(index)


_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype in csrc/cuda/args.h


def _device_weight(weight: Weight) -> Any:
    codebook = weight.codebook
    return _cuda.Weight(
        weight.M,
        weight.K,
        weight.bits,
        weight.layout,
        weight.positions.data_ptr(),
        weight.codes.data_ptr(),
        codebook.data_ptr(),
        _DTYPES[codebook.dtype],
        weight.group_size,
        weight.taps,
    )


def _source(source: Source) -> Any:
    x, stride, shape = source
    if shape is None:
        return _cuda.Source(x.data_ptr(), _DTYPES[x.dtype], stride)
    return _cuda.Source(x.data_ptr(), _DTYPES[x.dtype], _cuda.ConvShape(*shape), x.stride())


def _output(out: Output) -> Any:
    y, bias, *sizes, partial, splits = out
    return _cuda.Output(
        y.data_ptr(),
        _DTYPES[y.dtype],
        pointer(bias),
        0 if bias is None else _DTYPES[bias.dtype],
        *sizes,
        splits,
        pointer(partial),
    )
