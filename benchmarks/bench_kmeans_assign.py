"""kmeans_assign against torch.bucketize and index_add: the least that plain torch needs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from placekern import ops, reference

POINTS = 1 << 24


@pytest.mark.parametrize("clusters", [32, 256])
def test_kmeans_assign(bench: Callable[..., Any], clusters: int) -> None:
    points = torch.randn(POINTS)
    centroids = torch.randn(clusters).sort().values
    codes, sums, counts = bench(
        lambda: ops.kmeans_assign(points, centroids),
        lambda: reference.kmeans_assign(points, centroids),
        rounds=7,
        op="kmeans_assign",
        layer=f"{POINTS:,} weights, {clusters} centroids",
        batch=1,
        bits=clusters.bit_length() - 1,
        density=1.0,
        bytes=5 * POINTS,
        flops=POINTS,
    )
    expected = reference.kmeans_assign(points, centroids)
    assert torch.equal(codes, expected[0])
    assert torch.equal(counts, expected[2])
    torch.testing.assert_close(sums, expected[1])
