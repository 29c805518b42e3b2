"""Codebooks: k-means ("non-uniform") and uniform levels for the kept weights of a layer.

The fit is exact Lloyd: the values are sorted once, and with prefix sums an iteration costs a few
hundred binary searches, however many weights there are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_KNOTS = 4096  # quantiles that describe the density for the initial centroids


def fit_kmeans(values: Tensor, clusters: int, iterations: int = 1000) -> Tensor:
    """Centroids of 1-D k-means, float32 [clusters], sorted.

    Starts from the high-resolution optimum, centroids spread with the cube root of the density
    (Panter and Dite, Proc. IRE 39, 1951), and runs Lloyd's iteration until no centroid moves.

    Args:
        values: float32 [n], finite.
        clusters: number of centroids, 1 to 256. With no more distinct values than this, the
            distinct values are returned (the largest repeated) and nothing is lost.
        iterations: at most this many.
    """
    points = np.sort(values.detach().cpu().numpy().reshape(-1))
    if len(points) == 0:
        return torch.zeros(clusters)
    sample = points if len(points) <= 1 << 16 else points[:: len(points) >> 16]
    if len(np.unique(sample)) <= clusters and len(distinct := np.unique(points)) <= clusters:
        return torch.from_numpy(np.pad(distinct, (0, clusters - len(distinct)), mode="edge"))

    sums = np.zeros(len(points) + 1)
    np.cumsum(points, dtype=np.float64, out=sums[1:])
    centroids = _spread(points, clusters)
    for _ in range(iterations):
        boundaries = ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)
        edges = np.concatenate([[0], np.searchsorted(points, boundaries, "right"), [len(points)]])
        counts = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(counts, 1)
        moved = np.where(counts > 0, means, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return torch.from_numpy(centroids.astype(np.float32))


def fit_uniform(values: Tensor, clusters: int) -> Tensor:
    """`clusters` equally spaced levels from the smallest to the largest value, float32."""
    if values.numel() == 0:
        return torch.zeros(clusters)
    low, high = values.detach().float().aminmax()
    return torch.linspace(float(low), float(high), clusters)


def _spread(points: np.ndarray, clusters: int) -> np.ndarray:
    """Initial centroids: equal steps of the integral of density^(1/3), from sorted points."""
    knots = np.unique(points[np.linspace(0, len(points) - 1, _KNOTS).astype(np.int64)])
    # Between two knots lies the same mass, so the density is 1 / width, and its cube root
    # integrates to width^(2/3).
    knots = knots.astype(np.float64)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
    if mass[-1] == 0.0:
        return np.full(clusters, knots[0])
    return np.interp((np.arange(clusters) + 0.5) / clusters * mass[-1], mass, knots)
