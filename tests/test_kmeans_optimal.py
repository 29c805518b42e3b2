"""kmeans_optimal against every way to split a few points."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from placekern import ops


def error_of(points: Tensor, weights: Tensor, edges: list[int]) -> float:
    total = 0.0
    for start, end in itertools.pairwise(edges):
        if end > start:
            x, w = points[start:end], weights[start:end]
            total += float((w * (x - (w * x).sum() / w.sum()) ** 2).sum())
    return total


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_no_split_is_better(n: int, clusters: int) -> None:
    points = (torch.randn(n, dtype=torch.float64) ** 3).sort().values
    weights = torch.randint(1, 9, (n,)).double()
    starts = ops.kmeans_optimal(points, weights, clusters).tolist()
    assert starts[0] == 0
    assert starts == sorted(starts)
    splits = itertools.combinations_with_replacement(range(n + 1), clusters - 1)
    best = min(error_of(points, weights, [0, *split, n]) for split in splits)
    assert error_of(points, weights, [*starts, n]) <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("points", "weights", "clusters", "message"),
    [
        (torch.zeros(3), torch.ones(3).double(), 2, "expected torch.float64"),
        (torch.zeros(3).double(), torch.ones(2).double(), 2, r"weights \(2,\)"),
        (torch.zeros(3).double(), torch.ones(3).double(), 0, "0 clusters"),
        (torch.zeros(3).double(), torch.ones(3).double(), 257, "257 clusters"),
    ],
)
def test_bad_input_is_refused(points: Tensor, weights: Tensor, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.kmeans_optimal(points, weights, clusters)
