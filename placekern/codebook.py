"""The codebooks of a weight: one for all output channels, or one for each group of them.

The surprise: nothing but the shape says which. [2^bits] is one codebook; [G, 2^bits] are G >= 2 of
them, each for `group_size` = ceil(M / G) neighbouring output channels, the last one perhaps for
fewer.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def codebook_shape(M: int, bits: int, group_size: int | None = None) -> tuple[int, ...]:
    """The shape of the codebooks of M output channels: [2^bits], or [G, 2^bits] for G >= 2.

    Args:
        M: output channels.
        bits: of a code.
        group_size: the most output channels that share a codebook; None: all. There are
            G = ceil(M / group_size) groups, and all but the last are made equal: 10 channels by
            at most 6 are two groups of 5.

    Raises:
        ValueError: group_size is no integer of at least 1.
    """
    if group_size is None:
        return (1 << bits,)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"group_size is {group_size!r}, expected None or at least 1 output channel"
        )
    groups = -(-M // group_size)
    return (groups, 1 << bits) if groups > 1 else (1 << bits,)


def codebooks_of(shape: tuple[int, ...]) -> int:
    """How many codebooks a shape has: one for each group of output channels."""
    return 1 if len(shape) == 1 else shape[0]


def group_size_of(M: int, shape: tuple[int, ...]) -> int:
    """Output channels that share a codebook, for codebooks of this shape; M when there is one."""
    return M if len(shape) == 1 else -(-M // shape[0])


def prove_groups(M: int, codebook: Tensor, bits: int) -> None:
    """Proves [2^bits], or [G, 2^bits] with G >= 2 groups that M output channels can make.

    Raises:
        ValueError: another shape; the message says which shapes there are.
    """
    shape, entries = tuple(codebook.shape), 1 << bits
    if len(shape) not in (1, 2) or shape[-1] != entries:
        raise ValueError(
            f"codebook has shape {shape}, expected ({entries},) for {bits} bits, or "
            f"(G, {entries}) for G groups of output channels"
        )
    if len(shape) == 1:
        return
    if shape[0] < 2:
        raise ValueError(
            f"codebook has shape {shape}, expected ({entries},) where all output channels share "
            "one codebook"
        )
    group_size = group_size_of(M, shape)
    groups = -(-M // group_size) if group_size else 0
    if groups != shape[0]:
        raise ValueError(
            f"codebook has shape {shape}, but M = {M} output channels do not make {shape[0]} "
            f"groups: by ceil({M} / {shape[0]}) = {group_size} they make {groups}"
        )


def entry_index(
    row_ptr: NDArray[np.int64], codes: NDArray[np.uint8], shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """Which entry of the flattened codebooks each non-zero has: group * 2^bits + code, int64 [nnz].

    Args:
        row_ptr: int64 [M + 1].
        codes: uint8 [nnz].
        shape: of the codebooks.
    """
    index = codes.astype(np.int64)
    if len(shape) == 2:
        M = len(row_ptr) - 1
        first = np.arange(M) // group_size_of(M, shape) * shape[1]
        index += np.repeat(first, np.diff(row_ptr))
    return index


def midpoints(codebook: Tensor) -> Tensor:
    """Boundaries float32 [n - 1] between sorted entries [n]: midpoints, rounded down.

    A value above a boundary belongs to the upper entry. Rounded to nearest, the midpoint of two
    neighbouring floats could be the upper one, which would then be taken for the lower.
    """
    exact = (codebook[1:].double() + codebook[:-1].double()) / 2
    rounded = exact.float()
    return torch.where(
        rounded > exact, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded
    )


def bits_of(codebook: Tensor) -> int:
    """Bits of a code, from the last size of a codebook: a power of two from 2 to 256.

    Raises:
        ValueError: another size, or neither one nor two dimensions.
    """
    entries = codebook.shape[-1] if codebook.dim() else 0
    bits = entries.bit_length() - 1
    if codebook.dim() not in (1, 2) or entries != 1 << bits or not 1 <= bits <= 8:
        raise ValueError(
            f"codebook has shape {tuple(codebook.shape)}, expected [2^bits] or [G, 2^bits] with "
            "bits 1 to 8"
        )
    return bits


def nearest(values: Tensor, codebook: Tensor, row_ptr: NDArray[np.int64]) -> Tensor:
    """Code of the nearest entry of a value's own codebook; of two equally near, the smaller's.

    Args:
        values: float32 [nnz] on the CPU, row after row.
        codebook: floating [2^bits] or [G, 2^bits], entries in any order.
        row_ptr: int64 [M + 1], where each row's values start.

    Returns:
        uint8 [nnz].
    """
    books, order = torch.sort(codebook.detach().float().cpu(), stable=True)
    if books.dim() == 1:
        return order.to(torch.uint8)[torch.bucketize(values, midpoints(books), out_int32=True)]
    M = len(row_ptr) - 1
    size = group_size_of(M, tuple(books.shape))
    bounds = [int(row_ptr[min(g * size, M)]) for g in range(len(books) + 1)]
    parts = [
        order[g].to(torch.uint8)[
            torch.bucketize(values[start:end], midpoints(books[g]), out_int32=True)
        ]
        for g, (start, end) in enumerate(pairwise(bounds))
    ]
    return torch.cat(parts)
