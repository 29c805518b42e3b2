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
    taps: int
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


class ConvShape(NamedTuple):
    """Sizes of a convolution; fields in the order of ConvShape in csrc/args.h.

    x is [batch, groups * channels, height, width], in pixels, and `channels` of one group.
    """

    batch: int
    groups: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_top: int
    padding_left: int
    dilation_h: int
    dilation_w: int

    @property
    def pixels(self) -> int:
        """Of one image of the output."""
        return self.out_height * self.out_width

    @property
    def kernel(self) -> tuple[int, int, int]:
        """A row of the weight as (channels, height, width)."""
        return self.channels, self.kernel_h, self.kernel_w

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Stride and dilation, as torch takes them."""
        return (self.stride_h, self.stride_w), (self.dilation_h, self.dilation_w)


def on_16_bytes(tensor: Tensor) -> bool:
    """Whether a tensor starts on a multiple of 16 bytes, as vector loads want it."""
    return tensor.data_ptr() % 16 == 0


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor, 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
