"""Proofs that the arrays of a QuantSparseWeight are sound, run once when one is made or loaded.

Each message names the array, the position and the value, what was expected, and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import packing
from .codebook import prove_groups
from .packing import READ_PADDING, Layout


def prove_codebook(codebook: Tensor, bits: int, M: int) -> None:
    """Proves shape, dtype and finiteness of the codebooks of M output channels.

    Raises:
        TypeError: it is not floating.
        ValueError: it is neither [2^bits] nor [G, 2^bits] with G groups that M output channels
            make, or an entry is NaN or infinite.
    """
    if codebook.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"codebook has dtype {codebook.dtype}, expected torch.float32")
    prove_groups(M, codebook, bits)
    finite = torch.isfinite(codebook.detach())
    if not finite.all():
        at = tuple((~finite).nonzero()[0].tolist())
        place = ", ".join(map(str, at))
        raise ValueError(f"codebook[{place}] is {codebook[at].item()}, expected finite entries")


def prove_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Proves (M, K), both at least 0, and returns them as ints."""
    if len(shape) != 2 or any(int(size) < 0 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}, expected (M, K) with M, K >= 0")
    return int(shape[0]), int(shape[1])


def prove_bits(bits: int) -> None:
    """Proves an integer from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}, expected an integer from 1 to 8")


def prove_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Proves that `tensor` is a tensor of one of the `allowed` dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {wanted}")


def prove_contiguous(name: str, tensor: Tensor) -> None:
    """Proves that the elements lie side by side: the kernels get an address, no strides."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}, expected contiguous memory; call .contiguous()"
        )


def prove_size(name: str, tensor: Tensor, expected: int, why: str) -> None:
    """Proves a flat tensor of `expected` elements; `why` says what they are for."""
    if tensor.shape != (expected,):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({expected},) for {why} "
            f"with {READ_PADDING} bytes of padding"
        )


def as_numpy(name: str, array: Any, *allowed: type) -> NDArray:
    """The array on the CPU, as numpy, proven to have one of the `allowed` dtypes."""
    result = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if result.dtype not in [np.dtype(dtype) for dtype in allowed]:
        wanted = " or ".join(np.dtype(dtype).name for dtype in allowed)
        raise TypeError(f"{name} has dtype {result.dtype}, expected {wanted}")
    return result


def prove_row_ptr(row_ptr: NDArray[np.int64], M: int) -> None:
    """Proves [M + 1], from 0, never falling."""
    if row_ptr.shape != (M + 1,):
        raise ValueError(f"row_ptr has shape {row_ptr.shape}, expected ({M + 1},) for {M} rows")
    if row_ptr[0] != 0:
        raise ValueError(f"row_ptr[0] is {row_ptr[0]}, expected 0")
    falls = np.flatnonzero(row_ptr[1:] < row_ptr[:-1])  # a difference could overflow
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(
            f"row_ptr[{at}] is {row_ptr[at]}, below row_ptr[{at - 1}] = {row_ptr[at - 1]}; "
            "it must not fall"
        )


def prove_columns(row_ptr: NDArray[np.int64], col_ind: NDArray, K: int) -> None:
    """Proves columns in range and strictly increasing in each row."""
    columns = col_ind.astype(np.int64, copy=False)
    outside = np.flatnonzero((columns < 0) | (columns >= K))
    if len(outside):
        at = int(outside[0])
        raise ValueError(f"col_ind[{at}] is {columns[at]}, expected 0 <= column < K = {K}")
    rising = np.diff(columns) > 0
    starts = row_ptr[1:-1]
    starts = starts[(starts > 0) & (starts < len(columns))]
    rising[starts - 1] = True  # a new row may start anywhere
    falls = np.flatnonzero(~rising)
    if len(falls):
        at = int(falls[0]) + 1
        row = int(np.searchsorted(row_ptr, at, side="right")) - 1
        word = "repeats" if columns[at] == columns[at - 1] else "is below"
        raise ValueError(
            f"col_ind[{at}] is {columns[at]} and {word} col_ind[{at - 1}] = {columns[at - 1]} "
            f"in row {row}; columns must strictly increase in a row"
        )


def prove_codes(codes: NDArray[np.uint8], bits: int) -> None:
    """Proves codes below 2^bits."""
    large = np.flatnonzero(codes >= 1 << bits) if bits < 8 else np.zeros(0, np.int64)
    if len(large):
        at = int(large[0])
        raise ValueError(f"codes[{at}] is {codes[at]}, expected < 2^{bits} = {1 << bits}")


def prove_positions(
    layout: Layout, positions: NDArray[np.uint8], row_ptr: NDArray[np.int64], M: int, K: int
) -> None:
    """Proves that packed positions agree with the row pointer and stay inside [M, K]."""
    counts = packing.count_rows(layout, positions, M, K)
    wrong = np.flatnonzero(counts != np.diff(row_ptr))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"positions hold {counts[row]} entries in row {row}, but row_ptr gives it "
            f"{row_ptr[row + 1] - row_ptr[row]}"
        )
    if layout == Layout.WINDOW:
        windows = -(-K // packing.WINDOW)
        nnz = int(row_ptr[-1])
        places = positions[M * windows : M * windows + nnz]
        large = np.flatnonzero(places >= packing.WINDOW)
        if len(large):
            at = int(large[0])
            raise ValueError(f"positions: place {at} is {places[at]}, expected < {packing.WINDOW}")
        columns = packing.unpack_positions(layout, positions, row_ptr, M, K)
        prove_columns(row_ptr, columns, K)
        return
    if M and K % 8:
        last = positions[: M * ((K + 7) // 8)].reshape(M, -1)[:, -1]
        stray = np.flatnonzero(last >> (K % 8))
        if len(stray):
            raise ValueError(
                f"positions: row {int(stray[0])} has mask bits at or past column K = {K}"
            )
