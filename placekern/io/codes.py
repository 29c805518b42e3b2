"""Codes as bytes that an entropy coder of bytes serves well; docs/format.md describes them.

zstd spends at least a bit on a byte, and loses much sooner than that to its search for repeats. So
narrow codes share a byte. And where a few codes are far commoner than the rest, those few are
digits, several to a byte, one digit says that the code is a rare one, and the rare codes follow in
a stream of their own. By the chain rule of entropy that split costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .. import packing
from ..packing import READ_PADDING

_STEP = 1 << 18  # bytes of digits at a time

WIDTHS = {1: 1, 3: 2, 15: 4}
"""Bits of a digit, by how many codes are common."""


def shared(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Codes or digits of `width` bits, 8 // width in a byte, the first in the lowest bits."""
    share = 8 // width
    if share == 1:
        return codes
    whole = np.zeros((-(-len(codes) // share), share), np.uint8)
    whole.ravel()[: len(codes)] = codes
    out = whole[:, 0].copy()
    for place in range(1, share):
        out |= whole[:, place] << np.uint8(place * width)
    return out


def apart(whole: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """What `shared` put together, with the digits that fill the last byte."""
    share = 8 // width
    if share == 1:
        return whole
    out = np.empty((len(whole), share), np.uint8)
    for place in range(share):
        out[:, place] = (whole >> np.uint8(place * width)) & np.uint8((1 << width) - 1)
    return out.ravel()


def commonest(counts: NDArray[np.int64], count: int) -> list[int]:
    """The `count` codes that occur most often, of equals the smaller ones, in rising order."""
    return sorted(np.argsort(-counts, kind="stable")[:count].tolist())


def split(
    codes: NDArray[np.uint8], common: list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Digits, several to a byte, and the rare codes, one a byte."""
    table = np.full(256, len(common), np.uint8)
    table[common] = np.arange(len(common), dtype=np.uint8)
    digits = table[codes]
    return shared(digits, WIDTHS[len(common)]), codes[digits == len(common)]


def from_bytes(
    name: str, nnz: int, bits: int, share: int, pieces: Iterable[NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The packed form's codes, with read padding, from bytes that hold `share` codes each.

    Args:
        name: of the stream, for messages.
        nnz: codes.
        bits: of a code.
        share: codes in a byte, at most 8 // bits.
        pieces: the bytes; all pieces but the last hold a multiple of eight of them.

    Raises:
        ValueError: a byte holds more than its codes.
    """
    out = np.zeros(packing.code_bytes(nnz, bits) + READ_PADDING, np.uint8)
    done = 0
    for piece in pieces:
        _prove(name, piece, bits * share, done)
        codes = piece if share == 1 else apart(piece, bits)
        done += _put(out, done, codes[: nnz - done], bits)
    return out


def from_digits(
    name: str,
    nnz: int,
    bits: int,
    common: list[int],
    pieces: Iterable[NDArray[np.uint8]],
    rare: Callable[[int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """The packed form's codes, with read padding, from digits and rare codes.

    Args:
        name: of the stream, for messages.
        nnz: codes.
        bits: of a code.
        common: what the digits stand for.
        pieces: bytes of digits, which are kept until the rare codes are there.
        rare: called with how many rare codes there are; gives them.

    Raises:
        ValueError: a code is too large.
    """
    width = WIDTHS[len(common)]
    digits = np.concatenate([*pieces, np.zeros(0, np.uint8)])
    places = range(0, len(digits), _STEP)

    def part(start: int) -> NDArray[np.uint8]:
        return apart(digits[start : start + _STEP], width)[: nnz - start * 8 // width]

    count = sum(int((part(start) == len(common)).sum()) for start in places)
    rest = rare(count)
    _prove(f"{name} (rare ones)", rest, bits, 0)
    table = np.zeros(1 << width, np.uint8)
    table[: len(common)] = common
    out = np.zeros(packing.code_bytes(nnz, bits) + READ_PADDING, np.uint8)
    done = used = 0
    for start in places:
        digit = part(start)
        codes = table[digit]
        escaped = digit == len(common)
        count = int(escaped.sum())
        codes[escaped] = rest[used : used + count]
        used += count
        done += _put(out, done, codes, bits)
    return out


def _put(out: NDArray[np.uint8], done: int, codes: NDArray[np.uint8], bits: int) -> int:
    size = packing.code_bytes(len(codes), bits)
    start = done * bits // 8
    out[start : start + size] = packing.pack_codes(codes, bits)[:size]
    return len(codes)


def _prove(name: str, values: NDArray[np.uint8], bits: int, done: int) -> None:
    large = np.flatnonzero(values >> np.uint8(bits)) if bits < 8 else ()
    if len(large):
        at = int(large[0])
        raise ValueError(f"{name}[{done + at}] is {values[at]}, expected < {1 << bits}")
