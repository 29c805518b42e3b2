"""conv2d against torch's float32 convolution (oneDNN), which is dense whatever the density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import CONVOLUTIONS, DENSITIES, ConvShape

from placekern import QuantSparseWeight, ops


@pytest.mark.parametrize("batch", [1])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bits", [8])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=lambda shape: shape.name)
def test_conv2d(
    bench: Callable[..., Any], shape: ConvShape, bits: int, density: float, batch: int
) -> None:
    K = shape.channels // shape.groups * shape.kernel**2
    mask = torch.rand(shape.M, K) < density
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    weight = QuantSparseWeight.from_mask(mask, codes, torch.randn(1 << bits))
    dense = weight.to_dense().reshape(shape.M, -1, shape.kernel, shape.kernel)
    x = torch.randn(batch, shape.channels, shape.size, shape.size)
    conv = {
        "stride": (shape.stride, shape.stride),
        "padding": (shape.padding, shape.padding),
        "groups": shape.groups,
    }
    expected = F.conv2d(x.double(), dense.double(), **conv)
    y = bench(
        lambda: ops.conv2d(x, weight, kernel_size=(shape.kernel, shape.kernel), **conv),
        lambda: F.conv2d(x, dense, **conv),
        op="conv2d",
        layer=shape.name,
        batch=batch,
        bits=bits,
        density=density,
        bytes=weight.nbytes + 4 * (x.numel() + expected.numel()),
        flops=2 * weight.nnz * expected.numel() // shape.M,
    )
    assert (y - expected).norm() / expected.norm() < 1e-5
