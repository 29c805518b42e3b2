"""Loads `_cpu` and hands it tensors, and packing its arrays.

torch is imported first on purpose: the core then finds torch's OpenMP library already loaded and
both share one pool of threads. Sizes and dtypes are checked by the caller; see `ops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import ConvShape, Weight, pointer

try:
    from .. import _cpu
except ImportError as error:
    raise ImportError(
        f"placekern's native core could not be loaded ({error}); build it with `pip install .`, "
        "or in place with `python setup.py build_ext --inplace`"
    ) from error

_cpu.get_isa()  # a PLACEKERN_ISA that cannot be had is an error at import, not at the first forward


def available_isas() -> list[str]:
    """Levels that this processor runs, lowest first."""
    return _cpu.available_isas()


def get_isa() -> str:
    """The level in use."""
    return _cpu.get_isa()


def set_isa(name: str) -> None:
    """Uses level `name` from now on, in every thread.

    Raises:
        ValueError: the level is unknown, or this processor lacks it.
    """
    _cpu.set_isa(name)


_WAYS = ("auto", "direct", "decode")
_way = "auto"


def way() -> str:
    """What `force_way` asked for last."""
    return _way


def force_way(way: str) -> None:
    """How to compute from now on: "direct", by "decode", or "auto", by the sizes.

    On the CPU this is about convolutions and their density (csrc/cpu/conv2d-inl.h). On a GPU,
    "direct" decodes inside the kernel that multiplies, and "decode" writes slices of the dense
    weight for the dense library.

    Raises:
        ValueError: another word.
    """
    global _way
    if way not in _WAYS:
        raise ValueError(f"way is {way!r}, expected one of {', '.join(_WAYS)}")
    _way = way


def _weight(weight: Weight) -> Any:
    kind = _cpu.WeightDouble if weight.codebook.dtype == torch.float64 else _cpu.WeightFloat
    return kind(
        weight.M,
        weight.K,
        weight.bits,
        weight.layout,
        weight.row_ptr.data_ptr(),
        weight.row_ptr.dtype == torch.int64,
        weight.positions.data_ptr(),
        weight.codes.data_ptr(),
        weight.codebook.data_ptr(),
        weight.group_size,
    )


def linear(weight: Weight, x: Tensor, bias: Tensor | None, y: Tensor, relu: bool) -> None:
    """Fills y, N * M elements, from x [N, K]; all contiguous and of the codebook's dtype."""
    _cpu.linear(
        _weight(weight),
        x.shape[0],
        x.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        relu,
        torch.get_num_threads(),
    )


def linear_backward(
    weight: Weight, x: Tensor, grad_y: Tensor, grad_x: Tensor | None, grad_codebook: Tensor | None
) -> None:
    """Fills grad_x [N, K] and grad_codebook, float64 of the codebook's shape, where given."""
    _cpu.linear_backward(
        _weight(weight),
        N=x.shape[0],
        x=x.data_ptr(),
        grad_y=grad_y.data_ptr(),
        grad_x=pointer(grad_x),
        grad_codebook=pointer(grad_codebook),
        threads=torch.get_num_threads(),
    )


def conv2d(
    weight: Weight, shape: ConvShape, x: Tensor, bias: Tensor | None, y: Tensor, relu: bool
) -> None:
    """Fills y [batch, M, out_h, out_w] from x; any strides."""
    _cpu.conv2d(
        _weight(weight),
        _cpu.ConvShape(*shape),
        x.data_ptr(),
        x.stride(),
        pointer(bias),
        y.data_ptr(),
        y.stride(),
        relu,
        _WAYS.index(_way),
        torch.get_num_threads(),
    )


def conv2d_backward(
    weight: Weight,
    shape: ConvShape,
    x: Tensor,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_codebook: Tensor | None,
) -> None:
    """Adds to grad_x (any strides, zeroed before); fills grad_codebook as `linear_backward`."""
    _cpu.conv2d_backward(
        _weight(weight),
        _cpu.ConvShape(*shape),
        x=x.data_ptr(),
        x_strides=x.stride(),
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride(),
        grad_x=pointer(grad_x),
        grad_x_strides=(0, 0, 0, 0) if grad_x is None else grad_x.stride(),
        grad_codebook=pointer(grad_codebook),
        threads=torch.get_num_threads(),
    )


def kmeans_assign(
    points: Tensor, boundaries: Tensor, codes: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """Fills codes uint8 [n], sums float64 [C] and counts int64 [C] by boundaries [C - 1]."""
    _cpu.kmeans_assign(
        n=points.numel(),
        count=sums.numel(),
        points=points.data_ptr(),
        boundaries=boundaries.data_ptr(),
        codes=codes.data_ptr(),
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        threads=torch.get_num_threads(),
    )


def kmeans_optimal(points: Tensor, weights: Tensor, starts: Tensor) -> None:
    """Fills starts int64 [C] with the first point of each cluster of the exact optimum.

    points (sorted) and weights are float64 [n] on the CPU.
    """
    _cpu.kmeans_optimal(
        n=points.numel(),
        clusters=starts.numel(),
        points=points.data_ptr(),
        weights=weights.data_ptr(),
        starts=starts.data_ptr(),
    )


def count_chunks(
    K: int, row_ptr: NDArray[np.int64], col_ind: NDArray[np.int32], run_chunks: NDArray[np.uint8]
) -> None:
    """Fills run_chunks [M, windows] of the pairs layout; columns rise in each row."""
    _cpu.count_chunks(
        len(run_chunks),
        K,
        row_ptr=row_ptr.ctypes.data,
        col_ind=col_ind.ctypes.data,
        run_chunks=run_chunks.ctypes.data,
        threads=torch.get_num_threads(),
    )


def pack_pairs(
    K: int,
    row_ptr: NDArray[np.int64],
    col_ind: NDArray[np.int32],
    codes: NDArray[np.uint8],
    chunk_ptr: NDArray[np.int32],
    chunks: NDArray[np.uint8],
) -> None:
    """Fills chunks [chunk_ptr[M], 16] of the pairs layout; columns rise in each row."""
    _cpu.pack_pairs(
        len(chunk_ptr) - 1,
        K,
        row_ptr=row_ptr.ctypes.data,
        col_ind=col_ind.ctypes.data,
        codes=codes.ctypes.data,
        chunk_ptr=chunk_ptr.ctypes.data,
        chunks=chunks.ctypes.data,
        threads=torch.get_num_threads(),
    )
