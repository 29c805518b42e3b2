"""Short digests that tell runs apart: of a network's weights, of labels, of a file.

The surprise: a refitted network is another one. NetVLAD and the whitening are fitted in floating
point, so another number of threads gives other bits; what names a network is its state before that.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor, nn

_LETTERS = 16
_PIECE = 1 << 20


def state_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over a state dict: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        _add(found, value)
    return found.hexdigest()[:_LETTERS]


def tensor_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of a SHA-256 over a tensor: dtype, shape and bytes."""
    found = hashlib.sha256()
    _add(found, tensor)
    return found.hexdigest()[:_LETTERS]


def file_digest(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits of a SHA-256 over the bytes of a file.

    Raises:
        OSError: the file cannot be read.
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()[:_LETTERS]


def _add(found: hashlib._Hash, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy())
