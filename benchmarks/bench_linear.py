"""linear against torch's float32 linear. Batch 1 streams the weight: watch the GB/s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import BITS, DENSITIES, WHITENING, LinearShape

from placekern import QuantSparseWeight, ops


def make_weight(shape: LinearShape, density: float, bits: int) -> QuantSparseWeight:
    mask = torch.rand(shape.M, shape.K) < density
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    return QuantSparseWeight.from_mask(mask, codes, torch.randn(1 << bits))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", WHITENING, ids=lambda shape: shape.name)
def test_linear(
    bench: Callable[..., Any], shape: LinearShape, bits: int, density: float, batch: int
) -> None:
    weight = make_weight(shape, density, bits)
    dense = weight.to_dense()
    x = torch.randn(batch, shape.K)
    y = bench(
        lambda: ops.linear(x, weight),
        lambda: F.linear(x, dense),
        op="linear",
        layer=shape.name,
        batch=batch,
        bits=bits,
        density=density,
        bytes=weight.nbytes + 4 * batch * (shape.K + shape.M),
        flops=2 * weight.nnz * batch,
    )
    expected = F.linear(x.double(), dense.double())
    assert (y - expected).norm() / expected.norm() < 1e-5
