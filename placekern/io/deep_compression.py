"""Reads and writes networks in Deep Compression's own .net format, codes and codebooks as they are.

The stream (songhan/SqueezeNet-Deep-Compression, decode.py) has no layer table: it is read against a
model whose convolutions and linear layers stand in the file's order. Nothing passes through dense
weights; the format's filler entries (code 0, value 0, between far-apart non-zeros) are dropped.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..nn import COMPRESSED_KINDS, quant_sparse_layers, replace_module
from ..weight import QuantSparseWeight
from .atomic import written_beside

_FAR = 16  # positions that a filler bridges


def load_deep_compression(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Fills a dense model from an 8-bit Deep Compression file, swapping in compressed layers.

    Layout, little-endian: uint32 stored entries of each layer; then a layer: float32 codebook
    [256], float32 bias [M], uint8 code per entry, 4-bit relative positions per entry (low nibble
    first). Entry i stands at the row-major position sum(relative[: i + 1] + 1) - 1.

    Args:
        path: of the .net file.
        model: its Conv2d and Linear layers, in `named_modules` order, are the file's; swapped in
            place. Each has a bias.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit the model: it ends early, has bytes left over, or an
            entry lies outside its layer; the model is then unchanged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    layers = [(n, m) for n, m in model.named_modules() if type(m) in COMPRESSED_KINDS]
    reader = _Reader(path)
    stored = reader.take("entry counts", "<u4", len(layers))
    swaps = []
    for (name, module), entries in zip(layers, stored.tolist(), strict=True):
        if module.bias is None:
            raise ValueError(f"{name} has no bias, but the format gives every layer one")
        codebook = reader.take(f"{name} codebook", "<f4", 256)
        bias = reader.take(f"{name} bias", "<f4", module.weight.shape[0])
        codes = reader.take(f"{name} codes", "u1", entries)
        nibbles = reader.take(f"{name} positions", "u1", (entries + 1) // 2)
        weight = _weight(name, tuple(module.weight.shape), codebook, codes, nibbles)
        layer = COMPRESSED_KINDS[type(module)].from_weight(weight, module)
        layer.bias = nn.Parameter(torch.from_numpy(bias.copy()))
        swaps.append((module, layer))
    reader.finish()
    for module, layer in swaps:
        replace_module(model, module, layer)
    return model


def save_deep_compression(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes the compressed layers of a model as `load_deep_compression` reads them.

    The format holds nothing else: dense layers, norms and the architecture are not in it.

    Args:
        model: its compressed layers are written in `named_modules` order. Each has a bias, and at
            most 255 codes in use, since the format keeps code 0 for fillers.
        path: of the file; an existing one is replaced in one step.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: there are no compressed layers, or one has no bias, too many codes or several
            codebooks.
        OSError: the file cannot be written.
    """
    counts, bodies = [], []
    for name, layer in quant_sparse_layers(model):
        if layer.bias is None:
            raise ValueError(f"{name} has no bias, but the format gives every layer one")
        if layer.codebooks > 1:
            raise ValueError(
                f"{name} has {layer.codebooks} codebooks, but the format has one for a layer; "
                "compress it without group_size"
            )
        codes, gaps, codebook = _entries(name, layer.weight)
        bias = layer.bias.detach().float().cpu().numpy()
        nibbles = np.zeros(len(gaps) + len(gaps) % 2, np.uint8)
        nibbles[: len(gaps)] = gaps
        counts.append(len(codes))
        bodies += [codebook.astype("<f4"), bias.astype("<f4"), codes]
        bodies.append(nibbles[0::2] | nibbles[1::2] << np.uint8(4))
    if not counts:
        raise ValueError(f"the {type(model).__name__} has no compressed layers; compress_ it first")
    with written_beside(path) as temporary, temporary.open("wb") as file:
        file.write(np.array(counts, "<u4").tobytes())
        for body in bodies:
            file.write(body.tobytes())
    return Path(path).stat().st_size


def _entries(
    name: str, weight: QuantSparseWeight
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and gaps with fillers between them, and a codebook [256] with 0 in front."""
    K = weight.shape[1]
    rows, columns, codes = (array.cpu().numpy() for array in weight.to_csr())
    codebook = np.zeros(256, np.float32)
    book = weight.codebook.detach().float().cpu().numpy()
    used = np.bincount(codes, minlength=256)
    if weight.bits < 8:
        codebook[1 : 1 + len(book)] = book
        codes = codes + np.uint8(1)
    else:
        codebook[:] = book
        if used[0]:
            free = np.flatnonzero(used == 0)
            if len(free) == 0:
                raise ValueError(
                    f"{name} uses all of its 256 codes, but the format has room for 255; compress "
                    "it to 7 bits"
                )
            codebook[free[0]] = book[0]
            codes = np.where(codes == 0, np.uint8(free[0]), codes)
        codebook[0] = 0
    flat = np.repeat(np.arange(weight.shape[0]) * K, np.diff(rows)) + columns
    gaps = np.diff(flat, prepend=-1) - 1
    ends = np.cumsum(gaps // _FAR + 1) - 1
    size = int(ends[-1]) + 1 if len(ends) else 0
    all_codes, all_gaps = np.zeros(size, np.uint8), np.full(size, _FAR - 1, np.uint8)
    all_codes[ends], all_gaps[ends] = codes, gaps % _FAR
    return all_codes, all_gaps, codebook


def _weight(
    name: str,
    shape: tuple[int, ...],
    codebook: np.ndarray,
    codes: np.ndarray,
    nibbles: np.ndarray,
) -> QuantSparseWeight:
    M, K = shape[0], int(np.prod(shape[1:]))
    relative = np.empty(2 * len(nibbles), np.int64)
    relative[0::2] = nibbles & 15
    relative[1::2] = nibbles >> 4
    positions = np.cumsum(relative[: len(codes)] + 1) - 1
    if len(positions) and positions[-1] >= M * K:
        at = int(np.flatnonzero(positions >= M * K)[0])
        raise ValueError(
            f"{name}: entry {at} lies at position {positions[at]}, but the layer has {M * K}"
        )
    kept = codes != 0
    if codebook[0] != 0:
        raise ValueError(f"{name}: codebook[0] is {codebook[0]}, expected 0, the filler's value")
    positions, codes = positions[kept], codes[kept]
    row_ptr = np.searchsorted(positions, np.arange(M + 1) * K)
    columns = (positions % K).astype(np.uint16 if K <= 1 << 16 else np.int32)
    try:
        return QuantSparseWeight.from_csr(
            row_ptr.astype(np.int32), columns, codes, torch.from_numpy(codebook.copy()), (M, K), 8
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class _Reader:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._data = Path(path).read_bytes()
        self._at = 0

    def take(self, what: str, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if self._at + size > len(self._data):
            raise ValueError(
                f"{self._path} ends at byte {len(self._data)}, inside {what} (bytes {self._at} to "
                f"{self._at + size}); is it the file of this model?"
            )
        array = np.frombuffer(self._data, dtype, count, self._at)
        self._at += size
        return array

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ValueError(
                f"{self._path} has {len(self._data) - self._at} bytes left after the last layer; "
                "is it the file of this model?"
            )
