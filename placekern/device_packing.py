"""Bytes of a weight in GPU memory: a code for every position, or (place, code) pairs.

Written for instructions rather than bytes, which is what limits a kernel there. Arrays that come
in were proven sound. csrc/cuda/layout.cuh reads the same bytes; docs/format.md describes them in
words.

DENSE cuts the matrix into units of 16 rows x 64 columns and keeps a code at every position. No code
is spent on zero: the rarest one stands for "pruned", and the few entries that really have it are
escapes, listed by unit. A warp reads a unit at once; lane 4 g + q owns columns 16 q to 16 q + 15 of
rows g and g + 8, which is also its part of a tensor-core fragment.

PAIRS keeps 16 bytes for eight entries of one row and one window of 248 columns: eight places, then
eight codes. A run that is no multiple of eight is filled up with places from 248 on, where x is
taken to be zero. The order within a run means nothing, and is chosen for the banks of shared
memory, in csrc/cpu/pack_pairs.cpp.

In either the columns of a filter may lie tap by tap, the channels of a tap side by side: as in a
filter in channels_last, and as an image in channels_last is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _native
from .packing import Layout, choose_layout, padded, row_chunks

UNIT_ROWS = 16
UNIT_COLUMNS = 64
CHUNK = 8
"""Pairs that lie together, of one row and window."""
PAIRS_WINDOW = 248
"""Columns of a window; places 248 to 255 of a byte mean "no entry"."""
MAX_PAIRS_K = 256 * PAIRS_WINDOW
"""Columns that PAIRS can number: the window of a chunk is a byte."""


def code_width(bits: int) -> int:
    """Bits that a code takes in the DENSE layout: 5 up to five bits, else 8."""
    return 5 if bits <= 5 else 8


def units(M: int, K: int) -> tuple[int, int]:
    """Blocks of 16 rows, and units of 64 columns in each."""
    return -(-M // UNIT_ROWS), -(-K // UNIT_COLUMNS)


def windows(K: int) -> int:
    """Windows of 248 columns in a row."""
    return -(-K // PAIRS_WINDOW)


def choose_device_layout(M: int, K: int, nnz: int, bits: int) -> Layout:
    """The layout that takes fewer bytes: PAIRS below a density of about 0.44 (5 bits: 0.27)."""
    blocks, columns = units(M, K)
    dense = blocks * columns * (128 * code_width(bits) + 4)
    runs = M * windows(K)
    # A run wastes three and a half pairs on average, where it has entries at all.
    pairs = (nnz + 3.5 * min(nnz, runs)) * 17 / 8 + runs + 4 * M
    return Layout.PAIRS if pairs < dense and K <= MAX_PAIRS_K else Layout.DENSE


def best_layout(device_type: str, M: int, K: int, nnz: int, bits: int) -> Layout:
    """The layout of a weight of these sizes on "cpu" or "cuda"."""
    if device_type == "cuda":
        return choose_device_layout(M, K, nnz, bits)
    return choose_layout(M, K, nnz)


def least_position_bytes(layout: int, M: int, K: int) -> int:
    """Bytes of `positions` when the weight has no entries, without the read padding."""
    if layout == Layout.DENSE:
        blocks, columns = units(M, K)
        return 4 * (blocks * columns + 2)
    return 4 * (M + 1) + M * windows(K)


def pack(
    layout: Layout,
    row_ptr: NDArray[np.int64],
    col_ind: NDArray,
    codes: NDArray[np.uint8],
    M: int,
    K: int,
    bits: int,
    taps: int = 1,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The arrays `positions` and `codes` of a layout, padded for reading to whole 16 bytes.

    So each starts on 16 bytes also where torch lays one behind the other, as DataParallel does.

    Args:
        layout: DENSE or PAIRS.
        row_ptr: int64 [M + 1].
        col_ind: any integer dtype [nnz], strictly increasing in each row.
        codes: uint8 [nnz], each < 2^bits.
        M: rows.
        K: columns, at most MAX_PAIRS_K for PAIRS.
        bits: of a code, 1 to 8.
        taps: of a filter; column k becomes (k % taps) * (K / taps) + k / taps.
    """
    if taps > 1:
        col_ind, codes = _regrouped(row_ptr, col_ind, codes, K, taps)
    if layout == Layout.DENSE:
        positions, packed = _pack_dense(row_ptr, col_ind, codes, M, K, bits)
    else:
        positions, packed = _pack_pairs(row_ptr, col_ind, codes, M, K)
    return np.pad(positions, (0, -len(positions) % 16)), packed


def unpack(
    layout: Layout,
    positions: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    row_ptr: NDArray[np.int64],
    M: int,
    K: int,
    bits: int,
    taps: int = 1,
) -> tuple[NDArray, NDArray[np.uint8]]:
    """The logical form of what `pack` made: col_ind [nnz] (uint16 or int32) and codes [nnz]."""
    if layout == Layout.DENSE:
        columns, codes = _unpack_dense(positions, codes, row_ptr, M, K, bits)
    else:
        columns, codes = _unpack_pairs(positions, codes, row_ptr, M, K)
    return (columns, codes) if taps == 1 else _regrouped(row_ptr, columns, codes, K, K // taps)


def _regrouped(
    row_ptr: NDArray[np.int64], col_ind: NDArray, codes: NDArray[np.uint8], K: int, inner: int
) -> tuple[NDArray, NDArray[np.uint8]]:
    """col_ind and codes [nnz] of the matrix whose columns [K / inner, inner] are transposed."""
    if K == 0:
        return col_ind, codes
    columns = col_ind.astype(np.int64)
    columns = columns % inner * (K // inner) + columns // inner
    rows = np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr))
    order = np.argsort(rows * K + columns)
    return columns[order].astype(col_ind.dtype), codes[order]


def _pack_dense(
    row_ptr: NDArray[np.int64],
    col_ind: NDArray,
    codes: NDArray[np.uint8],
    M: int,
    K: int,
    bits: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    width = code_width(bits)
    blocks, columns = units(M, K)
    zero = int(np.argmin(np.bincount(codes, minlength=1 << bits)))
    escaped = np.flatnonzero(codes == zero)
    rows = np.searchsorted(row_ptr, escaped, side="right") - 1
    at = col_ind[escaped].astype(np.int64)
    unit = rows // UNIT_ROWS * columns + at // UNIT_COLUMNS
    order = np.argsort(unit, kind="stable")
    places = (rows % UNIT_ROWS * UNIT_COLUMNS + at % UNIT_COLUMNS)[order].astype("<u2")
    unit_ptr = np.zeros(blocks * columns + 1, "<i4")
    np.cumsum(np.bincount(unit, minlength=blocks * columns), out=unit_ptr[1:])
    head = np.concatenate([np.array([zero], "<i4"), unit_ptr])
    positions = padded([head.view(np.uint8), places.view(np.uint8)])

    parts = []
    step = UNIT_ROWS * max(1, (1 << 22) // max(1, columns * UNIT_COLUMNS * UNIT_ROWS))
    for start in range(0, M, step):
        stop = min(start + step, M)
        count = -(-(stop - start) // UNIT_ROWS)
        table = np.full((count * UNIT_ROWS, columns * UNIT_COLUMNS), zero, np.uint8)
        first, last = row_ptr[start], row_ptr[stop]
        row = np.repeat(np.arange(stop - start), np.diff(row_ptr[start : stop + 1]))
        table[row, col_ind[first:last].astype(np.int64)] = codes[first:last]
        # [block, half, g, unit, q, column] -> [block, unit, lane (g, q), half, column]
        lanes = table.reshape(count, 2, 8, columns, 4, 16).transpose(0, 3, 2, 4, 1, 5)
        parts.append(_pack_lanes(lanes.reshape(count * columns, 32, 32), width).ravel())
    return positions, padded(parts)


def _unpack_dense(
    positions: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    row_ptr: NDArray[np.int64],
    M: int,
    K: int,
    bits: int,
) -> tuple[NDArray, NDArray[np.uint8]]:
    width = code_width(bits)
    blocks, columns = units(M, K)
    zero = int(positions[:4].view("<i4")[0])
    unit_ptr = positions[4 : 8 + 4 * blocks * columns].view("<i4").astype(np.int64)
    begin = 8 + 4 * blocks * columns
    places = positions[begin : begin + 2 * unit_ptr[-1]].view("<u2").astype(np.int64)
    unit = np.repeat(np.arange(blocks * columns), np.diff(unit_ptr))
    rows = unit // max(columns, 1) * UNIT_ROWS + places // UNIT_COLUMNS
    at = unit % max(columns, 1) * UNIT_COLUMNS + places % UNIT_COLUMNS

    dtype = np.uint16 if K <= 1 << 16 else np.int32
    found_columns, found_codes = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)]
    words = codes[: blocks * columns * 128 * width].view("<u4").reshape(blocks, columns, 32 * width)
    step = max(1, (1 << 22) // max(1, columns * UNIT_COLUMNS * UNIT_ROWS))
    for start in range(0, blocks, step):
        count = min(step, blocks - start)
        lanes = _unpack_lanes(words[start : start + count].reshape(-1, 32 * width), width)
        lanes = lanes.reshape(count, columns, 8, 4, 2, 16).transpose(0, 4, 2, 1, 3, 5)
        table = lanes.reshape(count * UNIT_ROWS, columns * UNIT_COLUMNS)
        kept = table != zero
        own = (rows >= start * UNIT_ROWS) & (rows < (start + count) * UNIT_ROWS)
        kept[rows[own] - start * UNIT_ROWS, at[own]] = True
        row, column = np.nonzero(kept[: max(0, M - start * UNIT_ROWS), :K])
        found_columns.append(column.astype(dtype))
        found_codes.append(table[row, column])
    return np.concatenate(found_columns), np.concatenate(found_codes)


def _pack_lanes(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Codes [units, 32 lanes, 32] as bytes [units, 128 width].

    A lane's codes are a little-endian string of 32 `width` bits, `width` words of 32. Four words of
    a lane lie together for one 16-byte load; what is left over of `width` lies word by word.
    """
    words = np.zeros((len(codes), 32, width), np.uint32)
    for j in range(32):
        word, shift = divmod(j * width, 32)
        words[:, :, word] |= codes[:, :, j].astype(np.uint32) << np.uint32(shift)
        if shift + width > 32:
            words[:, :, word + 1] |= codes[:, :, j].astype(np.uint32) >> np.uint32(32 - shift)
    quads = width // 4
    together = words[:, :, : 4 * quads].reshape(len(codes), 32, quads, 4).transpose(0, 2, 1, 3)
    single = words[:, :, 4 * quads :].transpose(0, 2, 1)
    flat = [
        together.reshape(len(codes), 128 * quads),
        single.reshape(len(codes), 32 * (width - 4 * quads)),
    ]
    return np.concatenate(flat, axis=1).astype("<u4").view(np.uint8)


def _unpack_lanes(words: NDArray[np.uint32], width: int) -> NDArray[np.uint8]:
    quads = width // 4
    together = words[:, : 128 * quads].reshape(len(words), quads, 32, 4).transpose(0, 2, 1, 3)
    single = words[:, 128 * quads :].reshape(len(words), width - 4 * quads, 32).transpose(0, 2, 1)
    own = np.concatenate([together.reshape(len(words), 32, 4 * quads), single], axis=2)
    codes = np.empty((len(words), 32, 32), np.uint8)
    for j in range(32):
        word, shift = divmod(j * width, 32)
        value = own[:, :, word] >> np.uint32(shift)
        if shift + width > 32:
            value = value | own[:, :, word + 1] << np.uint32(32 - shift)
        codes[:, :, j] = value & np.uint32((1 << width) - 1)
    return codes


def _pack_pairs(
    row_ptr: NDArray[np.int64],
    col_ind: NDArray,
    codes: NDArray[np.uint8],
    M: int,
    K: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    row_ptr = np.ascontiguousarray(row_ptr, np.int64)
    col_ind = np.ascontiguousarray(col_ind, np.int32)
    codes = np.ascontiguousarray(codes, np.uint8)
    counts = np.empty((M, windows(K)), np.uint8)
    _native.count_chunks(K, row_ptr, col_ind, counts)
    chunk_ptr = np.zeros(M + 1, "<i4")
    np.cumsum(counts.sum(1), out=chunk_ptr[1:])
    chunks = np.empty((chunk_ptr[M], 2 * CHUNK), np.uint8)
    _native.pack_pairs(K, row_ptr, col_ind, codes, chunk_ptr, chunks)
    ids = np.repeat(np.tile(np.arange(windows(K), dtype=np.uint8), M), counts.ravel())
    return padded([chunk_ptr.view(np.uint8), counts.ravel(), ids]), padded([chunks.ravel()])


def _unpack_pairs(
    positions: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    row_ptr: NDArray[np.int64],
    M: int,
    K: int,
) -> tuple[NDArray, NDArray[np.uint8]]:
    chunk_ptr = positions[: 4 * (M + 1)].view("<i4")
    total = int(chunk_ptr[M])
    begin = 4 * (M + 1) + M * windows(K)
    ids = positions[begin : begin + total].astype(np.int32)
    table = codes[: total * 2 * CHUNK].reshape(total, 2, CHUNK)
    columns, found = np.empty(row_ptr[M], np.int32), np.empty(row_ptr[M], np.uint8)
    for rows in row_chunks(M, K):
        count = rows.stop - rows.start
        own = slice(chunk_ptr[rows.start], chunk_ptr[rows.stop])
        row = np.repeat(np.arange(count), np.diff(chunk_ptr[rows.start : rows.stop + 1]))
        places = table[own, 0]
        real = places < PAIRS_WINDOW
        at = (row[:, None] * K + ids[own, None] * PAIRS_WINDOW + places)[real]
        code = np.full(count * K, -1, np.int16)
        code[at] = table[own, 1][real]
        at = np.flatnonzero(code >= 0)  # in ascending order, which a run is not
        entries = slice(row_ptr[rows.start], row_ptr[rows.stop])
        columns[entries], found[entries] = at % K, code[at]
    return columns.astype(np.uint16 if K <= 1 << 16 else np.int32), found
