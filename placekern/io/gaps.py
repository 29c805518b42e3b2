"""Positions as gaps: one byte for the positions between two marked ones, 255 for a long way.

The surprise: whichever is rarer is marked, the kept positions or the pruned ones, so gaps are worth
their bytes at both ends of the scale. docs/format.md describes the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .. import packing
from ..packing import READ_PADDING, WINDOW, Layout
from ..weight import QuantSparseWeight

_FAR = 255  # this many positions without a mark, and no mark at the end of them


def marks_pruned(M: int, K: int, nnz: int) -> bool:
    """Whether gaps stand between the pruned positions: when more than half are kept."""
    return 2 * nnz > M * K


def marked(M: int, K: int, nnz: int) -> int:
    """How many positions gaps lead to."""
    return min(nnz, M * K - nnz)


def gap_bytes(M: int, K: int, nnz: int) -> tuple[int, int]:
    """The least and the most bytes that the gaps of a weight of these sizes can take."""
    count = marked(M, K, nnz)
    return count, count + M * K // _FAR


def encode(weight: QuantSparseWeight) -> NDArray[np.uint8]:
    """The gaps of a weight in a layout of the CPU, uint8."""
    M, K = weight.shape
    parts, last = [np.zeros(0, np.uint8)], -1
    for flat in _marked_positions(weight, marks_pruned(M, K, weight.nnz)):
        if len(flat) == 0:
            continue
        gaps = np.diff(flat, prepend=last) - 1
        ends = np.cumsum(gaps // _FAR + 1) - 1
        part = np.full(int(ends[-1]) + 1, _FAR, np.uint8)
        part[ends] = gaps % _FAR
        parts.append(part)
        last = int(flat[-1])
    return np.concatenate(parts)


def _marked_positions(weight: QuantSparseWeight, pruned: bool) -> Iterator[NDArray[np.int64]]:
    """Row-major positions in rising order, int64, some millions of candidates at a time."""
    M, K = weight.shape
    positions = weight.positions.numpy()
    if weight.layout == Layout.MASK:
        table = positions[: len(positions) - READ_PADDING].reshape(M, (K + 7) // 8)
        for rows in packing.row_chunks(M, K):
            bits = np.unpackbits(table[rows], axis=1, count=K, bitorder="little")
            yield np.flatnonzero(bits == (0 if pruned else 1)) + rows.start * K
        return
    # Windows are for low densities, where it is the kept positions that are marked.
    row_ptr = weight.row_ptr.numpy().astype(np.int64)
    columns = packing.unpack_positions(weight.layout, positions, row_ptr, M, K)
    for rows in packing.row_chunks(M, K):
        pointers = row_ptr[rows.start : rows.stop + 1]
        first = np.repeat(np.arange(rows.start, rows.stop) * K, np.diff(pointers))
        yield first + columns[pointers[0] : pointers[-1]]


def decode(
    name: str, layout: Layout, M: int, K: int, nnz: int, chunks: Iterable[NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The packed positions in a layout of the CPU, with read padding.

    Args:
        name: of the stream, for messages.
        layout: the one that a weight of these sizes has.
        M: rows.
        K: columns.
        nnz: entries.
        chunks: the gaps, in pieces of any size; none is looked at after an error.

    Raises:
        ValueError: a gap leads out of the matrix, or there are not as many marks as nnz says.
    """
    flat = _flat_positions(name, M * K, marked(M, K, nnz), chunks)
    out = np.zeros(packing.position_bytes(layout, M, K, nnz) + READ_PADDING, np.uint8)
    if layout == Layout.MASK:
        _fill_mask(out, M, K, flat, marks_pruned(M, K, nnz))
    else:
        _fill_windows(out, M, K, flat)
    return out


def _flat_positions(
    name: str, size: int, count: int, chunks: Iterable[NDArray[np.uint8]]
) -> Iterator[NDArray[np.int64]]:
    last, seen = -1, 0
    for chunk in chunks:
        if len(chunk) == 0:
            continue
        ends = chunk != _FAR
        at = np.cumsum(chunk + ends.astype(np.int64)) + last
        last = int(at[-1])
        if last >= size:
            raise ValueError(f"{name} lead to position {last}, but the matrix has {size}")
        at = at[ends]
        seen += len(at)
        if seen > count:
            break
        yield at
    if seen != count:
        more = "more than " if seen > count else ""
        raise ValueError(f"{name} mark {more}{min(seen, count)} positions, expected {count}")


def _fill_mask(
    out: NDArray[np.uint8], M: int, K: int, flat: Iterator[NDArray[np.int64]], pruned: bool
) -> None:
    row_bytes = (K + 7) // 8
    table = out[: M * row_bytes].reshape(M, row_bytes)
    waiting = np.zeros(0, np.int64)
    for rows in packing.row_chunks(M, K):
        bits = np.full(((rows.stop - rows.start), K), pruned)
        start, stop = rows.start * K, rows.stop * K
        while True:
            cut = int(np.searchsorted(waiting, stop))
            bits.ravel()[waiting[:cut] - start] = not pruned
            waiting = waiting[cut:]
            if len(waiting):
                break
            piece = next(flat, None)
            if piece is None:
                break
            waiting = piece
        table[rows] = np.packbits(bits, axis=1, bitorder="little")
    for _ in flat:  # an error may still stand at the end
        pass


def _fill_windows(
    out: NDArray[np.uint8], M: int, K: int, flat: Iterator[NDArray[np.int64]]
) -> None:
    windows = (K + WINDOW - 1) // WINDOW
    at = M * windows
    for piece in flat:
        if len(piece) == 0:
            continue
        row, column = np.divmod(piece, K)
        window = row * windows + column // WINDOW
        first = int(window[0])
        counts = np.bincount(window - first)
        out[first : first + len(counts)] += counts.astype(np.uint8)
        out[at : at + len(piece)] = column % WINDOW
        at += len(piece)
