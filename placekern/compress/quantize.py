"""Codebooks: k-means ("non-uniform") and uniform levels for the kept weights of a layer.

The k-means fit starts from the exact optimum of a summary, some thousands of weighted points, and
ends with Lloyd's iteration on all of them. The values are sorted once; with prefix sums an
iteration then costs a few hundred binary searches, however many weights there are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops

_SUMMARY = 4096  # points of each of the two spacings that make the summary


def fit_kmeans(values: Tensor, clusters: int, iterations: int = 1000) -> Tensor:
    """Centroids of 1-D k-means, float32 [clusters], sorted.

    Args:
        values: float32 [n], finite.
        clusters: number of centroids, 1 to 256. With no more distinct values than this, the
            distinct values are returned (the largest repeated) and nothing is lost.
        iterations: of Lloyd's algorithm, at most this many.
    """
    points = np.sort(values.detach().cpu().numpy().reshape(-1))
    if len(points) == 0:
        return torch.zeros(clusters, device="cpu")
    sample = points if len(points) <= 1 << 16 else points[:: len(points) >> 16]
    if len(np.unique(sample)) <= clusters and len(distinct := np.unique(points)) <= clusters:
        return torch.from_numpy(np.pad(distinct, (0, clusters - len(distinct)), mode="edge"))

    sums = np.zeros(len(points) + 1)
    np.cumsum(points, dtype=np.float64, out=sums[1:])
    edges = _optimal_edges(points, sums, clusters)
    centroids = np.zeros(clusters)
    for _ in range(iterations):
        counts = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(counts, 1)
        # An empty cluster repeats its neighbour; it stays empty, and costs nothing.
        moved = np.maximum.accumulate(np.where(counts > 0, means, -np.inf))
        moved[np.isneginf(moved)] = means[counts > 0][0]
        if np.array_equal(moved, centroids):
            break
        centroids = moved
        # Rounded down to the points' own precision: a search among float64 would copy them all.
        exact = (centroids[1:] + centroids[:-1]) / 2
        boundaries = exact.astype(np.float32)
        boundaries = np.where(
            boundaries > exact, np.nextafter(boundaries, np.float32(-np.inf)), boundaries
        )
        inner = np.searchsorted(points, boundaries, "right")
        edges = np.concatenate([[0], inner, [len(points)]])
    return torch.from_numpy(centroids.astype(np.float32))


def fit_uniform(values: Tensor, clusters: int) -> Tensor:
    """`clusters` equally spaced levels from the smallest to the largest value, float32."""
    if values.numel() == 0:
        return torch.zeros(clusters, device="cpu")
    low, high = values.detach().float().aminmax()
    levels = np.linspace(float(low), float(high), clusters)  # float32 steps could overflow
    return torch.from_numpy(levels.astype(np.float32))


def _optimal_edges(
    points: NDArray[np.float32], sums: NDArray[np.float64], clusters: int
) -> NDArray[np.int64]:
    """Where clusters begin and end in sorted points, int64 [clusters + 1]; best for a summary."""
    edges = _summary_edges(points)
    weights = np.diff(edges).astype(np.float64)
    means = np.diff(sums[edges]) / weights
    starts = ops.kmeans_optimal(torch.from_numpy(means), torch.from_numpy(weights), clusters)
    return np.append(edges[starts.numpy()], len(points))


def _summary_edges(points: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where the points of the summary begin and end; equal values are never parted.

    Half of the edges lie at equal counts, half where an optimal quantizer of many levels would put
    them: with the cube root of the density (Panter and Dite, Proc. IRE 39, 1951).
    """
    if len(points) <= 2 * _SUMMARY:
        at = np.arange(len(points))
    else:
        at = np.linspace(0, len(points) - 1, _SUMMARY).astype(np.int64)
        knots = np.unique(points[at]).astype(np.float64)
        # Between two knots lies the same mass, so the density is 1 / width, and its cube root
        # integrates to width^(2/3).
        mass = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
        spread = np.interp(np.linspace(0, mass[-1], _SUMMARY), mass, knots)
        at = np.concatenate([at, np.searchsorted(points, spread.astype(np.float32))])
    first = np.searchsorted(points, points[np.minimum(at, len(points) - 1)])
    return np.unique(np.concatenate([[0], first, [len(points)]]))
