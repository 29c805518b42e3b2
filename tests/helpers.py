"""Random weights of a given density, and the error measure of the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from placekern import QuantSparseWeight

CONVOLUTIONS: list[dict[str, Any]] = [
    {"channels": 3, "M": 20, "size": (9, 7), "kernel_size": (3, 3), "padding": (1, 1)},
    {"channels": 20, "M": 33, "size": (6, 6), "kernel_size": (1, 1)},
    {"channels": 2, "M": 5, "size": (11, 13), "kernel_size": (5, 3), "stride": (2, 3)},
    {
        "channels": 8,
        "M": 17,
        "size": (8, 9),
        "kernel_size": (3, 2),
        "padding": (2, 1, 0, 1),
        "dilation": (2, 3),
    },
    {"channels": 4, "M": 6, "size": (5, 5), "kernel_size": (3, 3), "groups": 2},
    {"channels": 6, "M": 6, "size": (5, 4), "kernel_size": (2, 2), "groups": 6},
    {"channels": 30, "M": 70, "size": (3, 3), "kernel_size": (3, 3)},  # one output pixel
    {"channels": 5, "M": 1, "size": (4, 4), "kernel_size": (3, 3), "padding": (1, 1)},
]
"""Convolutions of every kind; what a case leaves out is nn.Conv2d's default."""


def random_weight(
    M: int,
    K: int,
    density: float,
    bits: int,
    dtype: torch.dtype = torch.float32,
    codebooks: int = 1,
) -> QuantSparseWeight:
    """Random positions, codes and codebooks (unsorted, no entry zero)."""
    mask = torch.rand(M, K) < density
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    codebook = torch.randn(1 << bits) if codebooks == 1 else torch.randn(codebooks, 1 << bits)
    codebook = codebook + torch.where(codebook >= 0, 0.1, -0.1)
    weight = QuantSparseWeight.from_mask(mask, codes, codebook)
    weight.codebook = codebook.to(dtype)
    return weight


def with_codebook(weight: QuantSparseWeight, codebook: Tensor) -> QuantSparseWeight:
    """The same positions and codes on another codebook."""
    w = weight
    return QuantSparseWeight.trusted(
        w.shape, w.bits, w.layout, w.nnz, w.row_ptr, w.positions, w.codes, codebook, w.taps
    )


def relative_error(actual: Tensor, expected: Tensor, squares: Tensor | None = None) -> float:
    """|actual - expected| / |expected|, Frobenius norms in float64; absolute where it is 0.

    `squares` holds the sum of the squares of the terms of each result: its root is the size that a
    result has when its terms do not happen to cancel. Where they do, the error is relative to that.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    size = expected.norm()
    if squares is not None:
        size = size.maximum(squares.detach().sum().sqrt())
    return float((actual - expected).norm() / size.clamp_min(1e-3))


def exact_copies(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 leaves of the same values, None where there is none."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def squared_copies(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 leaves of the squares: run through an op, they give the squares of its terms."""
    return [None if t is None else t.detach().double().square().requires_grad_() for t in tensors]
