"""Compressed layers for other tools: scipy and Matrix Market files, and Core ML's palettes.

Each of them holds more bytes than our own file: that is the price of being read elsewhere.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import QuantSparseModule, quant_sparse_layers, replace_module
from ..weight import QuantSparseWeight
from .atomic import written_beside

_COREML = "_COREML_/"
_PRUNING, _PALETTIZATION = 1, 2  # Core ML's words for what was done, in this order
COREML_BITS = (1, 2, 3, 4, 6, 8)
"""Widths that a palette of Core ML can have; 5 is widened to 6, and 7 to 8."""


def save_npz(weight: QuantSparseWeight, path: str | os.PathLike[str]) -> None:
    """Writes a weight as `scipy.sparse.load_npz` reads it: a CSR matrix [M, K] of float32 values.

    Raises:
        OSError: the file cannot be written.
    """
    from scipy.sparse import save_npz as write

    with written_beside(path) as temporary, temporary.open("wb") as file:
        write(file, weight.to_scipy())


def save_matrix_market(weight: QuantSparseWeight, path: str | os.PathLike[str]) -> None:
    """Writes a weight as a Matrix Market coordinate file [M, K], exact in float32.

    Raises:
        OSError: the file cannot be written.
    """
    from scipy.io import mmwrite

    with written_beside(path) as temporary, temporary.open("wb") as file:
        mmwrite(file, weight.to_scipy(), precision=9, symmetry="general")


_WRITERS: dict[str, tuple[str, Callable[[QuantSparseWeight, Path], None]]] = {
    "csr": (".npz", save_npz),
    "mtx": (".mtx", save_matrix_market),
}


def export_layers(model: nn.Module, folder: str | os.PathLike[str], form: str) -> list[Path]:
    """Writes each compressed layer's weight to a file of its own, `<layer>.npz` or `<layer>.mtx`.

    Args:
        model: with compressed layers.
        folder: is made when it is not there.
        form: "csr" (scipy) or "mtx" (Matrix Market).

    Returns:
        The files, in the model's order. A weight that layers share is written for each.

    Raises:
        ValueError: another form, or a model without compressed layers.
        OSError: a file cannot be written.
    """
    if form not in _WRITERS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(_WRITERS)}")
    layers = list(quant_sparse_layers(model))
    if not layers:
        raise ValueError(f"the {type(model).__name__} has no compressed layers; compress_ it first")
    suffix, write = _WRITERS[form]
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = []
    for name, layer in layers:
        files.append(Path(folder) / f"{name or 'weight'}{suffix}")
        write(layer.weight, files[-1])
    return files


def coreml_palette(weight: QuantSparseWeight, rank: int) -> Tensor:
    """A codebook as Core ML wants a look-up table.

    Args:
        weight: of any bits.
        rank: dimensions of the dense weight, 4 for a convolution and 2 for a linear layer.

    Returns:
        float32 [G, 1, ..., 1, entries, 1] of rank + 2 dimensions: one palette for each M / G output
        channels. Widened tables repeat the last entry.

    Raises:
        ValueError: M is no multiple of G, as Core ML's groups of equal size want it.
    """
    M, G = weight.shape[0], weight.codebooks
    if M % G:
        raise ValueError(
            f"{M} output channels do not divide into {G} equal groups, as palettes of Core ML "
            "want them; compress it with a group_size that divides them"
        )
    width = next(bits for bits in COREML_BITS if bits >= weight.bits)
    books = weight.codebook.detach().float().cpu().reshape(G, -1)
    books = torch.cat([books, books[:, -1:].expand(-1, (1 << width) - books.shape[1])], 1)
    return books.reshape(G, *[1] * (rank - 1), 1 << width, 1)


def export_coreml(model: nn.Module) -> nn.Module:
    """A dense copy of a model that `coremltools.convert` turns into sparse palettes.

    Layers are decoded, and say in buffers by the names of coremltools' compression info protocol,
    version 1, that they were pruned and palettized: `_COREML_/weight/compression_type` and
    `_COREML_/weight/lut` in each, `_COREML_/metadata_version` in the model. Trace it and convert it
    with `minimum_deployment_target=coremltools.target.iOS18`. Nothing here needs coremltools.

    Args:
        model: with compressed layers; it is left alone.

    Returns:
        The copy, on the CPU, in eval mode. A layer that applies ReLU is a Sequential of two.

    Raises:
        ValueError: the model has no compressed layers, is itself one, or has a layer whose output
            channels do not divide into as many equal groups as it has codebooks.
    """
    if isinstance(model, QuantSparseModule):
        raise ValueError(f"the model is itself a {type(model).__name__}; put it in a Sequential")
    model = copy.deepcopy(model).cpu().eval()
    layers = list(quant_sparse_layers(model))
    if not layers:
        raise ValueError(f"the {type(model).__name__} has no compressed layers; compress_ it first")
    model.register_buffer(f"{_COREML}metadata_version", torch.tensor(1))
    for name, layer in layers:
        dense = layer.to_dense()
        owner = dense[0] if isinstance(dense, nn.Sequential) else dense  # which has a ReLU behind
        # Core ML looks each weight up in the palette, and takes zeros for pruned.
        owner.float()
        kind = torch.tensor([_PRUNING, _PALETTIZATION])
        owner.register_buffer(f"{_COREML}weight/compression_type", kind)
        try:
            palette = coreml_palette(layer.weight, owner.weight.dim())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        owner.register_buffer(f"{_COREML}weight/lut", palette)
        replace_module(model, layer, dense)
    return model
