"""Positions and codes as entropy-coded byte streams; docs/format.md describes them.

The row pointer is not stored: the positions imply it. Codes are written one a byte, because zstd's
entropy stage works on bytes and then spends about their entropy, 5-bit codes included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import packing
from ..packing import READ_PADDING
from ..weight import QuantSparseWeight

_LEVEL = 3  # higher levels look for repeated strings, which random-looking streams do not have


def encode(weight: QuantSparseWeight) -> tuple[Tensor, Tensor]:
    """The two streams of a weight, (positions, codes), uint8."""
    weight = weight.to_layout(weight.best_layout("cpu"))
    size = weight.positions.numel() - READ_PADDING
    positions = weight.positions[:size].cpu().numpy()
    codes = packing.unpack_codes(weight.codes.cpu().numpy(), weight.nnz, weight.bits)
    return _compress(positions), _compress(codes)


def encoded_bytes(weight: QuantSparseWeight) -> int:
    """Bytes of a weight in a file: both streams and the codebook."""
    return sum(stream.numel() for stream in encode(weight)) + weight.codebook.nbytes


def decode(
    name: str,
    shape: tuple[int, int],
    bits: int,
    nnz: int,
    positions: Tensor,
    codes: Tensor,
    codebook: Tensor,
) -> QuantSparseWeight:
    """A proven weight from its streams. Never unpacks more bytes than shape and nnz allow.

    Raises:
        ValueError: a stream is damaged or says something else than the header; names the layer.
    """
    M, K = shape
    if not 0 <= nnz <= M * K:
        raise ValueError(f"{name}: nnz is {nnz}, expected 0 to M * K = {M * K}")
    layout = packing.choose_layout(M, K, nnz)
    raw = _decompress(f"{name}.positions", positions, packing.position_bytes(layout, M, K, nnz))
    counts = packing.count_rows(layout, raw, M, K)
    row_ptr = np.zeros(M + 1, np.int64)
    np.cumsum(counts, out=row_ptr[1:])
    if row_ptr[-1] != nnz:
        raise ValueError(f"{name}.positions hold {row_ptr[-1]} entries, the header says {nnz}")
    code = _decompress(f"{name}.codes", codes, nnz)
    large = np.flatnonzero(code >= 1 << bits) if bits < 8 else ()
    if len(large):
        at = int(large[0])
        raise ValueError(f"{name}.codes[{at}] is {code[at]}, expected < {1 << bits}")
    index = torch.int32 if nnz < 1 << 31 else torch.int64
    try:
        return QuantSparseWeight(
            shape,
            bits,
            torch.from_numpy(row_ptr).to(index),
            torch.from_numpy(packing.padded([raw])),
            torch.from_numpy(packing.pack_codes(code, bits)),
            codebook,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _zstandard() -> Any:
    # Imported when a stream is made or read: everything but files works without it.
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
    packed = _zstandard().ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(data))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _decompress(name: str, stream: Tensor, size: int) -> NDArray[np.uint8]:
    if stream.dtype != torch.uint8 or stream.dim() != 1:
        raise ValueError(
            f"{name} is {stream.dtype} {tuple(stream.shape)}, expected a flat torch.uint8 tensor"
        )
    data = stream.numpy().tobytes()
    zstandard = _zstandard()
    try:
        promised = zstandard.frame_content_size(data)
        if promised != size:
            raise ValueError(f"{name} unpacks to {promised} bytes, expected {size}")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is not a sound zstd stream ({error})") from None
    if len(raw) != size:
        raise ValueError(f"{name} unpacks to {len(raw)} bytes, expected {size}")
    return np.frombuffer(bytearray(raw), np.uint8)
