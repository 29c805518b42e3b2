"""Codebooks: k-means ("non-uniform") and uniform levels for the kept weights of a layer.

The k-means fit starts from the exact optimum of a summary, some thousands of weighted points, and
ends with Lloyd's iteration on all of them. The values are sorted once; with prefix sums an
iteration then costs a few hundred binary searches, however many weights there are. All of it runs
where the values are, except that the optimum of the summary is found on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..weight import midpoints
from .kmeans_init import INITS, initial_centroids
from .sorted_points import PIECE, SortedPoints

_ENOUGH = 1e-6  # a step that lowers the cost by a smaller share is the last


def fit_kmeans(
    values: Tensor,
    clusters: int,
    iterations: int = 1000,
    *,
    init: str = "optimal",
    seed: int = 0,
) -> Tensor:
    """Centroids of 1-D k-means, float32 [clusters], sorted, on the device of the values.

    Args:
        values: float32 [n], finite.
        clusters: number of centroids, 1 to 256. With no more distinct values than this, the
            distinct values are returned (the largest repeated) and nothing is lost.
        iterations: of Lloyd's algorithm, at most this many.
        init: where it starts: "optimal", "linear", "density" or "kmeans++"; see
            `placekern.compress.kmeans_init`.
        seed: of "kmeans++".

    Raises:
        ValueError: the init is unknown.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(map(repr, INITS))}")
    if values.numel() == 0:
        return torch.zeros(clusters, dtype=torch.float32, device=values.device)
    points = SortedPoints(values.detach().float().reshape(-1))
    return _fit(points, clusters, iterations, init, seed)


def _fit(points: SortedPoints, clusters: int, iterations: int, init: str, seed: int) -> Tensor:
    distinct = points.distinct(clusters)
    if distinct is not None:
        return torch.cat([distinct, distinct[-1:].expand(clusters - len(distinct))])

    centroids = initial_centroids(points, clusters, init, seed)
    for _ in range(iterations):
        edges = points.edges(midpoints(centroids))
        # A centroid with no point stays where it is, which is between its neighbours.
        moved = torch.where(edges.diff() > 0, points.means(edges), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.float()


def fit_entropy_constrained(
    values: Tensor,
    clusters: int,
    entropy_lambda: float,
    iterations: int = 1000,
    *,
    init: str = "optimal",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """k-means in which a centroid also costs the length of its code (Chou, Lookabaugh, Gray 1989).

    Minimises the mean of (value - centroid)^2 + entropy_lambda * mean(value^2) * length, the length
    of a code being -log2 of its frequency: what an entropy coder spends on it. Rare centroids then
    have to be worth their bits, and some end up unused.

    Args:
        values: float32 [n], finite.
        clusters: number of centroids, 1 to 256.
        entropy_lambda: what a bit may cost, as a share of the values' mean square, so that one
            number suits layers of any scale; 0 is plain k-means.
        iterations: at most this many.
        init, seed: of the plain k-means that it starts from, see `fit_kmeans`.

    Returns:
        centroids, float32 [clusters], sorted, and boundaries, float32 [clusters - 1], sorted: a
        value belongs to the centroid with as many boundaries below it. They are not the midpoints.
        Both are on the device of the values.

    Raises:
        ValueError: entropy_lambda is negative or not finite.
    """
    if not 0 <= entropy_lambda < float("inf"):
        raise ValueError(f"entropy_lambda is {entropy_lambda}, expected a finite number >= 0")
    if values.numel() == 0:
        centroids = torch.zeros(clusters, dtype=torch.float32, device=values.device)
        return centroids, midpoints(centroids)
    points = SortedPoints(values.detach().float().reshape(-1))
    centroids = _fit(points, clusters, iterations, init, seed)
    boundaries = midpoints(centroids)
    if entropy_lambda == 0:
        return centroids, boundaries
    squares = float(points.squares)
    price = entropy_lambda * squares / len(points)
    means = centroids.double()
    cost = float("inf")
    for _ in range(iterations):
        edges = points.edges(boundaries)
        counts = edges.diff()
        used = counts > 0
        means = torch.where(used, points.sums(edges).diff() / counts.clamp(min=1), means)
        lengths = -(counts.clamp(min=1).double() / len(points)).log2()
        # The error is the sum of squares, which does not move, less sum(n mean^2).
        now = squares + float((counts * (price * lengths - means.square()))[used].sum())
        if now >= (1 - _ENOUGH) * cost:
            break
        cost = now
        boundaries = _priced_boundaries(means, price * lengths, used)
    # An unused centroid repeats its neighbour: it stays sorted, and nothing is lost.
    first = means[used.int().argmax(keepdim=True)]
    return torch.where(used, means, first).cummax(0).values.float(), boundaries


def assign(values: Tensor, boundaries: Tensor) -> Tensor:
    """Codes by boundaries: how many lie below each value.

    Args:
        values: float32 [n].
        boundaries: float32 [clusters - 1], sorted, as `fit_entropy_constrained` gives them.

    Returns:
        uint8 [n], on the device of the values.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for start in range(0, values.numel(), PIECE):  # bounds the wider temporaries
        piece = slice(start, start + PIECE)
        codes[piece] = torch.bucketize(values[piece], boundaries, out_int32=True)
    return codes


def assign_anew(
    values: Tensor, codebook: Tensor, codes: Tensor, entropy_lambda: float = 0.0
) -> Tensor:
    """Codes of values whose codebook has moved: the nearest entry, or the cheapest.

    Args:
        values: float32 [n].
        codebook: float32 [clusters], in any order.
        codes: uint8 [n], those of before: their frequencies give the lengths of codes, and an
            entry that none of them used stays unused where lengths count.
        entropy_lambda: what a bit costs, as in `fit_entropy_constrained`; 0: nothing.

    Returns:
        uint8 [n].
    """
    if not entropy_lambda or not values.numel():
        return ops.kmeans_assign(values, codebook)[0]
    entries, order = codebook.double().sort(stable=True)
    counts = torch.bincount(codes.int(), minlength=len(codebook))[order]
    lengths = -(counts.clamp(min=1).double() / len(values)).log2()
    squares = sum(float(piece.double().square().sum()) for piece in values.split(PIECE))
    prices = entropy_lambda * squares / len(values) * lengths
    boundaries = _priced_boundaries(entries, prices, counts > 0)
    return order.to(torch.uint8)[assign(values, boundaries).int()]


def _priced_boundaries(means: Tensor, prices: Tensor, used: Tensor) -> Tensor:
    """Where one centroid becomes dearer than the next: float32 [clusters - 1], sorted.

    (x - c)^2 + price is, but for x^2, a line in x of slope -2 c: the cheapest centroids are the
    lower envelope of lines, walked from the smallest c on. A centroid that is nowhere the cheapest
    gets an empty interval.
    """
    c, price = means.cpu().numpy(), prices.cpu().numpy()
    kept: list[int] = []
    starts: list[float] = []  # where each kept centroid becomes the cheapest
    for j in np.flatnonzero(used.cpu().numpy()):
        while kept:
            i = kept[-1]
            if c[j] == c[i]:
                at = -np.inf if price[j] < price[i] else np.inf
            else:
                at = (c[i] + c[j]) / 2 + (price[j] - price[i]) / (2 * (c[j] - c[i]))
            if at > starts[-1]:
                break
            kept.pop()
            starts.pop()
        else:
            at = -np.inf
        if at < np.inf:
            kept.append(int(j))
            starts.append(float(at))
    bounds = np.empty(len(c) - 1)
    for place, code in enumerate(kept):
        # Codes between two kept ones, before the first and past the last are never used.
        bounds[(kept[place - 1] if place else 0) : code] = starts[place]
    bounds[kept[-1] :] = np.inf
    return torch.from_numpy(bounds.astype(np.float32)).to(means.device)


def fit_uniform(values: Tensor, clusters: int) -> Tensor:
    """`clusters` equally spaced levels from the smallest to the largest value, float32.

    They are on the device of the values.
    """
    if values.numel() == 0:
        return torch.zeros(clusters, dtype=torch.float32, device=values.device)
    low, high = values.detach().float().aminmax()
    levels = np.linspace(float(low), float(high), clusters)  # float32 steps could overflow
    return torch.from_numpy(levels.astype(np.float32)).to(values.device)
