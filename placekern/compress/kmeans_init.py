"""Where Lloyd's iteration starts: "optimal", "linear", "density" or "kmeans++".

All but "linear" look at a summary of the points, some thousands of weighted ones, so that they cost
the same for a thousand weights and for a hundred million. "optimal" is the exact optimum of the
summary and measures best; the others are there to compare with other tools.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from .sorted_points import SortedPoints

INITS = ("optimal", "linear", "density", "kmeans++")

_SUMMARY = 4096  # points of each of the two spacings that make the summary


def initial_centroids(points: SortedPoints, clusters: int, init: str, seed: int) -> Tensor:
    """Centroids to start from, float64 [clusters], rising, on the device of the points.

    Args:
        points: with more distinct values than clusters.
        clusters: 1 to 256.
        init: "optimal": the means of the clusters that are best for the summary. "linear": equally
            spaced from the smallest to the largest value, the best of three in Han, Mao and Dally
            (2016, section 3.2). "density": equally spaced in the cumulative distribution.
            "kmeans++": drawn from the summary, each with probability proportional to its squared
            distance from those drawn before (Arthur and Vassilvitskii 2007).
        seed: of "kmeans++"; the others draw nothing.

    Raises:
        ValueError: the init is unknown.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(map(repr, INITS))}")
    device = points.values.device
    if init == "linear":
        low, high = float(points.values[0]), float(points.values[-1])
        return torch.from_numpy(np.linspace(low, high, clusters)).to(device)
    if init == "density":
        at = (np.arange(clusters) + 0.5) / clusters * (len(points) - 1)
        return points.values[torch.from_numpy(at.astype(np.int64)).to(device)].double()
    edges = _summary_edges(points)
    weights, means = edges.diff().double(), points.means(edges)
    if init == "kmeans++":
        return _drawn(means.cpu().numpy(), weights.cpu().numpy(), clusters, seed).to(device)
    starts = ops.kmeans_optimal(means.cpu(), weights.cpu(), clusters)
    return points.means(torch.cat([edges[starts.to(device)], edges[-1:]]))


def _drawn(means: NDArray, weights: NDArray, clusters: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    chosen = np.empty(clusters)
    distances = np.full(len(means), np.inf)
    mass = weights
    for i in range(clusters):
        total = np.cumsum(mass)
        # All mass gone: fewer points than clusters, and the rest repeat the last one.
        at = int(np.searchsorted(total, generator.random() * total[-1], side="right"))
        chosen[i] = means[min(at, len(means) - 1)]
        distances = np.minimum(distances, (means - chosen[i]) ** 2)
        mass = weights * distances
    return torch.from_numpy(np.sort(chosen))


def _summary_edges(points: SortedPoints) -> Tensor:
    """Where the points of the summary begin and end; equal values are never parted.

    Half of the edges lie at equal counts, half where an optimal quantizer of many levels would put
    them: with the cube root of the density (Panter and Dite, Proc. IRE 39, 1951).
    """
    n, device = len(points), points.values.device
    if n <= 2 * _SUMMARY:
        at = points.values
    else:
        equal = torch.from_numpy(np.linspace(0, n - 1, _SUMMARY).astype(np.int64))
        at = points.values[equal.to(device)]
        knots = np.unique(at.cpu().numpy()).astype(np.float64)
        # Between two knots lies the same mass, so the density is 1 / width, and its cube root
        # integrates to width^(2/3).
        mass = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
        spread = np.interp(np.linspace(0, mass[-1], _SUMMARY), mass, knots).astype(np.float32)
        at = torch.cat([at, torch.from_numpy(spread).to(device)])
    ends = torch.tensor([0, n], device=device)
    edges = torch.cat([points.below(at), ends]).unique()
    if n > 2 * _SUMMARY and len(edges) <= _SUMMARY:
        # A few values are most of the points: the others get their share by rank.
        distinct = points.values.unique_consecutive()
        rank = np.linspace(0, len(distinct) - 1, _SUMMARY).astype(np.int64)
        others = points.below(distinct[torch.from_numpy(rank).to(device)])
        edges = torch.cat([edges, others]).unique()
    return edges
