"""Bits and bytes of the packed form: masks, windows of columns, and codes of 1 to 8 bits.

Everything here is numpy on arrays that were proven sound; `QuantSparseWeight` proves and calls.
docs/format.md describes the same bytes in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

WINDOW = 128
"""Columns decoded at a time by the kernels; a place in a window fits a byte."""

READ_PADDING = 64
"""Zero bytes behind `positions` and `codes`, so that vector loads stay inside the allocation."""

_CHUNK = 1 << 22  # positions handled at a time: bounds the temporaries


class Layout(IntEnum):
    """How the columns of the non-zeros are kept: the first two on the CPU, the others on a GPU."""

    MASK = 0
    WINDOW = 1
    DENSE = 2
    PAIRS = 3


HOST_LAYOUTS = (Layout.MASK, Layout.WINDOW)
"""The layouts that the CPU's kernels read."""
DEVICE_LAYOUTS = (Layout.DENSE, Layout.PAIRS)
"""The layouts that CUDA kernels read; placekern.device_packing writes them."""


def choose_layout(M: int, K: int, nnz: int) -> Layout:
    """The smaller layout: the mask from a density of about 0.12 upwards, windows below."""
    return Layout.MASK if mask_bytes(M, K) <= window_bytes(M, K, nnz) else Layout.WINDOW


def mask_bytes(M: int, K: int) -> int:
    """Bytes of an [M, K] mask; rows are padded to whole bytes."""
    return M * ((K + 7) // 8)


def window_bytes(M: int, K: int, nnz: int) -> int:
    """Bytes of a count per window and a place per entry."""
    return M * ((K + WINDOW - 1) // WINDOW) + nnz


def position_bytes(layout: Layout, M: int, K: int, nnz: int) -> int:
    """Bytes of the positions in a layout, without the read padding."""
    return mask_bytes(M, K) if layout == Layout.MASK else window_bytes(M, K, nnz)


def code_bytes(nnz: int, bits: int) -> int:
    """Bytes of a stream of codes, without the read padding."""
    return (nnz * bits + 7) // 8


def padded(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The parts one after the other, and READ_PADDING zero bytes."""
    return np.concatenate([*parts, np.zeros(READ_PADDING, np.uint8)])


def row_ptr_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where each row's entries start, int64 [M + 1], from the mask [M, K] of kept positions."""
    row_ptr = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(np.count_nonzero(mask, axis=1), out=row_ptr[1:])
    return row_ptr


def row_chunks(M: int, K: int) -> Iterator[slice]:
    """Slices of rows that hold at most about four million positions each."""
    rows = max(1, _CHUNK // max(K, 1))
    for start in range(0, M, rows):
        yield slice(start, min(start + rows, M))


def pack_positions(
    layout: Layout, row_ptr: NDArray[np.int64], col_ind: NDArray, M: int, K: int
) -> NDArray[np.uint8]:
    """Columns in a layout, padded for reading.

    Args:
        layout: where the columns go.
        row_ptr: int64 [M + 1].
        col_ind: any integer dtype [nnz], strictly increasing in each row.
        M: rows.
        K: columns.
    """
    parts = []
    windows = (K + WINDOW - 1) // WINDOW
    for rows in row_chunks(M, K):
        start, end = row_ptr[rows.start], row_ptr[rows.stop]
        count = rows.stop - rows.start
        row = np.repeat(np.arange(count), np.diff(row_ptr[rows.start : rows.stop + 1]))
        columns = col_ind[start:end].astype(np.int64)
        if layout == Layout.MASK:
            mask = np.zeros((count, K), dtype=bool)
            mask[row, columns] = True
            parts.append(np.packbits(mask, axis=1, bitorder="little").ravel())
        else:
            window = row * windows + columns // WINDOW
            parts.append(np.bincount(window, minlength=count * windows).astype(np.uint8))
    if layout == Layout.WINDOW:
        parts.append((col_ind % WINDOW).astype(np.uint8))
    return padded(parts)


def unpack_positions(
    layout: Layout, positions: NDArray[np.uint8], row_ptr: NDArray[np.int64], M: int, K: int
) -> NDArray:
    """The columns [nnz], uint16 when K <= 65,536 and int32 otherwise."""
    dtype = np.uint16 if K <= 1 << 16 else np.int32
    if layout == Layout.MASK:
        row_bytes = (K + 7) // 8
        table = positions[: M * row_bytes].reshape(M, row_bytes)
        parts = []
        for rows in row_chunks(M, K):
            bits = np.unpackbits(table[rows], axis=1, count=K, bitorder="little")
            parts.append(np.nonzero(bits)[1].astype(dtype))
        return np.concatenate(parts) if parts else np.zeros(0, dtype)
    windows = (K + WINDOW - 1) // WINDOW
    nnz = int(row_ptr[M])
    counts = positions[: M * windows]
    first = np.tile(np.arange(windows) * WINDOW, M)
    return (np.repeat(first, counts) + positions[M * windows : M * windows + nnz]).astype(dtype)


def count_rows(layout: Layout, positions: NDArray[np.uint8], M: int, K: int) -> NDArray[np.int64]:
    """Entries of each row [M] as the positions have them, whatever a row pointer says."""
    if layout == Layout.MASK:
        row_bytes = (K + 7) // 8
        table = positions[: M * row_bytes].reshape(M, row_bytes)
        bits_of_byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
        bits_of_byte = bits_of_byte.astype(np.uint8)
        parts = [bits_of_byte[table[rows]].sum(1, dtype=np.int64) for rows in row_chunks(M, K)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
    windows = (K + WINDOW - 1) // WINDOW
    return positions[: M * windows].reshape(M, windows).sum(1, dtype=np.int64)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes as a little-endian stream of `bits` bits each, padded for reading."""
    if bits == 8:
        return padded([codes])
    parts = []
    for start in range(0, len(codes), _CHUNK):
        chunk = codes[start : start + _CHUNK]
        groups = np.zeros((-(-len(chunk) // 8), 8), np.uint64)
        groups.ravel()[: len(chunk)] = chunk
        words = np.zeros(len(groups), "<u8")
        for j in range(8):
            words |= groups[:, j] << np.uint64(bits * j)
        packed = words.view(np.uint8).reshape(-1, 8)[:, :bits].ravel()
        parts.append(packed[: code_bytes(len(chunk), bits)])
    return padded(parts)


def unpack_codes(stream: NDArray[np.uint8], nnz: int, bits: int) -> NDArray[np.uint8]:
    """The first `nnz` codes of a stream, uint8 [nnz]."""
    if bits == 8:
        return stream[:nnz].copy()
    out = np.empty(nnz, np.uint8)
    for start in range(0, nnz, _CHUNK):
        count = min(_CHUNK, nnz - start)
        groups = -(-count // 8)
        packed = np.zeros((groups, 8), np.uint8)
        first = start * bits // 8  # _CHUNK is a multiple of 8: a chunk starts on a byte
        available = stream[first : first + groups * bits]
        body = np.zeros(groups * bits, np.uint8)
        body[: len(available)] = available
        packed[:, :bits] = body.reshape(groups, bits)
        words = packed.view("<u8").ravel()
        codes = np.empty((groups, 8), np.uint8)
        for j in range(8):
            codes[:, j] = (words >> np.uint64(bits * j)) & np.uint64((1 << bits) - 1)
        out[start : start + count] = codes.ravel()[:count]
    return out
