"""Positions and codes as entropy-coded byte streams; docs/format.md describes them.

The row pointer is not stored: the positions imply it. zstd's entropy stage counts bytes, so codes
lie whole in a byte (`codes`): it then spends about their entropy. The surprise: its search for
repeated strings is all but turned off for one of two tries, since in a random stream it finds
repeats that cost more than they save, a tenth of a 5-bit layer. The smaller try is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import packing
from ..packing import READ_PADDING, Layout
from ..weight import QuantSparseWeight
from . import gaps
from .codes import WIDTHS, commonest, from_bytes, from_digits, shared, split
from .stored import Section

MASK, WINDOW, GAPS = "mask", "window", "gaps"
CODINGS = (MASK, WINDOW, GAPS)
"""How positions are written. "window" stands in files of format 1 only."""

_FULL = 4  # bits of entropy in a byte from which zstd is within some 2 % of it
_STEP = 1 << 18  # bytes unpacked at a time: a multiple of 8
_RATIO = 1 << 15  # zstd spends at least 4 bytes on a block of 128 KiB
_LARGEST_WINDOW = 1 << 24  # memory that a frame can ask for; what is written here asks for 2 MiB


class Encoded(NamedTuple):
    """The streams of a weight, uint8 tensors, and how they are written.

    `coding` is the word for the positions. `common` lists the codes that digits stand for, and
    `rare` is the stream of the others; it is empty and None where codes are written as they are.
    """

    positions: Tensor
    codes: Tensor
    coding: str
    common: list[int]
    rare: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of all streams."""
        streams = (self.positions, self.codes, self.rare)
        return sum(stream.numel() for stream in streams if stream is not None)


def encode(weight: QuantSparseWeight) -> Encoded:
    """The streams of a weight, positions as a mask or as gaps, whichever is smaller."""
    weight = weight.to("cpu")
    M, K = weight.shape
    tries = []
    if weight.layout == Layout.MASK:
        tries.append((_compress(_content(weight.positions)), MASK))
    # Past a third, a byte a mark is more than a mask takes.
    if 3 * gaps.marked(M, K, weight.nnz) <= M * K:
        tries.append((_compress(gaps.encode(weight)), GAPS))
    positions, coding = min(tries, key=lambda found: found[0].numel())
    return Encoded(positions, coding=coding, **_encode_codes(weight))


def encoded_bytes(weight: QuantSparseWeight) -> int:
    """Bytes of a weight in a file: the streams and the codebook."""
    return encode(weight).nbytes + weight.codebook.nbytes


def decode(
    name: str,
    shape: tuple[int, int],
    bits: int,
    nnz: int,
    positions: Tensor | Section,
    codes: Tensor | Section,
    codebook: Tensor,
    coding: str = MASK,
    common: Sequence[int] = (),
    rare: Tensor | Section | None = None,
    codes_per_byte: int | None = None,
) -> QuantSparseWeight:
    """A proven weight from its streams, unpacked piece by piece into the packed form.

    Never unpacks more bytes than shape and nnz allow, nor more than the length of a stream makes
    possible.

    Args:
        name: of the layer, for messages.
        shape: (M, K).
        bits: of a code.
        nnz: entries.
        positions: the stream of positions.
        codes: the stream of codes.
        codebook: [2^bits] or [G, 2^bits].
        coding: of the positions, one of `CODINGS`.
        common: the codes that digits stand for; none: the codes are written as they are.
        rare: the stream of the other codes, where there are digits.
        codes_per_byte: 8 // bits when None; 1 in files of format 1.

    Raises:
        ValueError: a stream is damaged or says something else than the header; names the layer.
    """
    zstandard()  # a missing package is reported before anything else
    M, K = shape
    if not 0 <= nnz <= M * K:
        raise ValueError(f"{name}: nnz is {nnz}, expected 0 to M * K = {M * K}")
    try:
        layout = packing.choose_layout(M, K, nnz)
        packed = _decode_positions(f"{name}.positions", layout, M, K, nnz, positions, coding)
        row_ptr = np.zeros(M + 1, np.int64)
        np.cumsum(packing.count_rows(layout, packed, M, K), out=row_ptr[1:])
        if row_ptr[-1] != nnz:
            raise ValueError(f"{name}.positions hold {row_ptr[-1]} entries, the header says {nnz}")
        if common:
            code = _decode_digits(name, bits, nnz, codes, list(common), rare)
        else:
            code = _decode_codes(f"{name}.codes", bits, nnz, codes, codes_per_byte or 8 // bits)
    except MemoryError:
        raise ValueError(f"{name} is {M} x {K}, which does not fit in memory") from None
    index = torch.int32 if nnz < 1 << 31 else torch.int64
    try:
        return QuantSparseWeight(
            shape,
            bits,
            torch.from_numpy(row_ptr).to(index),
            torch.from_numpy(packed),
            torch.from_numpy(code),
            codebook,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _content(padded: Tensor) -> NDArray[np.uint8]:
    return padded[: padded.numel() - READ_PADDING].numpy()


def _encode_codes(weight: QuantSparseWeight) -> dict[str, Any]:
    codes = packing.unpack_codes(weight.codes.numpy(), weight.nnz, weight.bits)
    counts = np.bincount(codes, minlength=1 << weight.bits)
    whole = _compress(shared(codes, weight.bits))
    best = {"codes": whole, "common": [], "rare": None}
    size = whole.numel()
    # The bytes hold much: zstd has little to lose on them, and digits little to win.
    if entropy_bits(counts) * (8 // weight.bits) > _FULL * len(codes):
        return best
    for count in WIDTHS:
        if count < 1 << weight.bits:
            common = commonest(counts, count)
            digits, rest = (_compress(part) for part in split(codes, common))
            if digits.numel() + rest.numel() < size:
                size = digits.numel() + rest.numel()
                best = {"codes": digits, "common": common, "rare": rest}
    return best


def _decode_positions(
    name: str, layout: Layout, M: int, K: int, nnz: int, stream: Tensor | Section, coding: str
) -> NDArray[np.uint8]:
    if coding == GAPS:
        frame = _Frame(name, stream, *gaps.gap_bytes(M, K, nnz))
        return gaps.decode(name, layout, M, K, nnz, frame.pieces())
    if coding != layout.name.lower():
        raise ValueError(
            f"{name} are a {coding}, but {nnz} entries of {M} x {K} are kept as "
            f"{layout.name.lower()} or gaps"
        )
    size = packing.position_bytes(layout, M, K, nnz)
    return _unpacked(_Frame(name, stream, size, size))


def _decode_codes(
    name: str, bits: int, nnz: int, stream: Tensor | Section, share: int
) -> NDArray[np.uint8]:
    size = -(-nnz // share)
    frame = _Frame(name, stream, size, size)
    if bits * share == 8:  # the bytes are those of the packed form
        return _unpacked(frame)
    return from_bytes(name, nnz, bits, share, frame.pieces())


def _decode_digits(
    name: str,
    bits: int,
    nnz: int,
    stream: Tensor | Section,
    common: list[int],
    rare: Tensor | Section | None,
) -> NDArray[np.uint8]:
    known = sorted(set(common)) == common and common[0] >= 0 and common[-1] < 1 << bits
    if len(common) not in WIDTHS or not known or rare is None:
        raise ValueError(
            f"{name} has {common} for common codes, expected 1, 3 or 15 of {bits} bits in rising "
            "order, and a stream of rare ones"
        )

    def others(count: int) -> NDArray[np.uint8]:
        frame = _Frame(f"{name}.rare", rare, count, count)
        return _unpacked(frame)[:count]

    size = -(-nnz * WIDTHS[len(common)] // 8)
    frame = _Frame(f"{name}.codes", stream, size, size)
    return from_digits(f"{name}.codes", nnz, bits, common, frame.pieces(), others)


def _unpacked(frame: _Frame) -> NDArray[np.uint8]:
    out = np.zeros(frame.size + READ_PADDING, np.uint8)
    at = 0
    for piece in frame.pieces():
        out[at : at + len(piece)] = piece
        at += len(piece)
    return out


def entropy_bits(counts: NDArray | list[int]) -> float:
    """Order-0 entropy of a stream, in bits for all of it.

    Args:
        counts: how often each symbol occurs, [symbols].

    Returns:
        sum(-n log2(n / total)), 0 for an empty stream.
    """
    seen = np.asarray(counts, np.float64)
    seen = seen[seen > 0]
    return float((seen * (math.log2(seen.sum()) - np.log2(seen))).sum()) if len(seen) else 0.0


def zstandard() -> Any:
    """The package; imported when a stream is made or read: all but files works without it.

    Raises:
        ModuleNotFoundError: it is not installed; says what to do.
    """
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "placekern's files are compressed by the package zstandard, which is not installed; "
            "pip install zstandard",
            name=error.name,
        ) from None
    return zstandard


def _compress(data: NDArray[np.uint8]) -> Tensor:
    zs = zstandard()
    content = np.ascontiguousarray(data)
    settings = (
        # Strings of seven bytes at least, of which hardly any is remembered: entropy coding alone.
        zs.ZstdCompressionParameters(
            strategy=zs.STRATEGY_FAST, min_match=7, hash_log=10, window_log=17, compression_level=1
        ),
        # For layers with structure: rows, channels or blocks without an entry.
        zs.ZstdCompressionParameters.from_level(3),
    )
    tries = [zs.ZstdCompressor(compression_params=s).compress(content) for s in settings]
    return torch.frombuffer(bytearray(min(tries, key=len)), dtype=torch.uint8)


class _Frame:
    """One zstd frame that unpacks to `low` to `high` bytes; raises ValueError when it does not."""

    def __init__(self, name: str, stream: Tensor | Section, low: int, high: int) -> None:
        self._name = name
        self._source = Section.of(name, stream)
        self._error = zstandard().ZstdError
        try:
            self.size = zstandard().frame_content_size(self._source.peek(18))
        except self._error as error:
            raise self._unsound(error) from None
        if not low <= self.size <= high:
            raise self._wrong_size(self.size, low, high)
        if self.size > _RATIO * self._source.size:
            raise ValueError(
                f"{name} promises {self.size} bytes from {self._source.size}, more than zstd packs"
            )

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """The content in pieces of `_STEP` bytes, the last shorter."""
        decompressor = zstandard().ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        reader = decompressor.stream_reader(self._source)
        done = 0
        try:
            while done < self.size:
                piece = reader.read(min(_STEP, self.size - done))
                if not piece:
                    break
                done += len(piece)
                yield np.frombuffer(piece, np.uint8)
            more = len(reader.read(1)) if done == self.size else 0
        except self._error as error:
            raise self._unsound(error) from None
        if done != self.size or more:
            raise self._wrong_size(done + more, self.size, self.size)

    def _unsound(self, error: Exception) -> ValueError:
        return ValueError(f"{self._name} is not a sound zstd stream ({error})")

    def _wrong_size(self, size: int, low: int, high: int) -> ValueError:
        expected = f"{low}" if low == high else f"{low} to {high}"
        return ValueError(f"{self._name} unpacks to {size} bytes, expected {expected}")
