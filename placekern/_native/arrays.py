"""The arrays of a weight as the ops receive them, and addresses of tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..codebook import codebooks_of, group_size_of


class Weight(NamedTuple):
    """The arrays of a QuantSparseWeight [M, K], as an op receives them."""

    M: int
    K: int
    bits: int
    layout: int
    row_ptr: Tensor
    positions: Tensor
    codes: Tensor
    codebook: Tensor

    @property
    def codebooks(self) -> int:
        """How many there are: one for each group of rows."""
        return codebooks_of(self.codebook.shape)

    @property
    def group_size(self) -> int:
        """Rows that share a codebook: M when there is one."""
        # Asked on every call, and mostly for one codebook.
        return self.M if self.codebook.dim() == 1 else group_size_of(self.M, self.codebook.shape)


def on_16_bytes(tensor: Tensor) -> bool:
    """Whether a tensor starts on a multiple of 16 bytes, as vector loads want it."""
    return tensor.data_ptr() % 16 == 0


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor, 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
