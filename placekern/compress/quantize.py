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

_SUMMARY = 4096  # points of each of the two spacings that make the summary
_BLOCK = 32  # sorted points that share a prefix sum
_ENOUGH = 1e-6  # a step that lowers the cost by a smaller share is the last
_PIECE = 1 << 22  # values handled at a time where a wider copy of them is made


def fit_kmeans(values: Tensor, clusters: int, iterations: int = 1000) -> Tensor:
    """Centroids of 1-D k-means, float32 [clusters], sorted, on the device of the values.

    Args:
        values: float32 [n], finite.
        clusters: number of centroids, 1 to 256. With no more distinct values than this, the
            distinct values are returned (the largest repeated) and nothing is lost.
        iterations: of Lloyd's algorithm, at most this many.
    """
    if values.numel() == 0:
        return torch.zeros(clusters, device=values.device)
    return _fit(_SortedPoints(values.detach().float().reshape(-1)), clusters, iterations)


def _fit(points: _SortedPoints, clusters: int, iterations: int) -> Tensor:
    distinct = points.distinct(clusters)
    if distinct is not None:
        return torch.cat([distinct, distinct[-1:].expand(clusters - len(distinct))])

    edges = _optimal_edges(points, clusters)
    centroids = torch.zeros(clusters, dtype=torch.float64, device=points.values.device)
    for _ in range(iterations):
        counts = edges.diff()
        means = points.sums(edges).diff() / counts.clamp(min=1)
        # An empty cluster repeats its neighbour; it stays empty, and costs nothing.
        first = means[(counts > 0).int().argmax(keepdim=True)]
        moved = torch.where(counts > 0, means, first).cummax(0).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
        edges[1:-1] = points.not_above(midpoints(centroids))
    return centroids.float()


def fit_entropy_constrained(
    values: Tensor, clusters: int, entropy_lambda: float, iterations: int = 1000
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
        centroids = torch.zeros(clusters, device=values.device)
        return centroids, midpoints(centroids)
    points = _SortedPoints(values.detach().float().reshape(-1))
    centroids = _fit(points, clusters, iterations)
    boundaries = midpoints(centroids)
    if entropy_lambda == 0:
        return centroids, boundaries
    squares = float(points.squares)
    price = entropy_lambda * squares / len(points)
    means = centroids.double()
    cost = float("inf")
    for _ in range(iterations):
        edges = torch.cat([points.ends[:1], points.not_above(boundaries), points.ends[1:]])
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
    for start in range(0, values.numel(), _PIECE):  # bounds the wider temporaries
        piece = slice(start, start + _PIECE)
        codes[piece] = torch.bucketize(values[piece], boundaries, out_int32=True)
    return codes


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
        return torch.zeros(clusters, device=values.device)
    low, high = values.detach().float().aminmax()
    levels = np.linspace(float(low), float(high), clusters)  # float32 steps could overflow
    return torch.from_numpy(levels.astype(np.float32)).to(values.device)


class _SortedPoints:
    """Values in rising order, float32 [n], and sums of the first of them.

    A prefix sum is kept for each block of points, not for each point: that is less memory, and
    the same on every run, which a long torch.cumsum of floats on a GPU is not.
    """

    def __init__(self, values: Tensor) -> None:
        if values.is_cuda:
            self.values = values.sort().values
        else:  # numpy sorts, and adds rows, several times faster than torch on one thread
            self.values = torch.from_numpy(np.sort(values.numpy()))
        blocks = len(values) // _BLOCK
        whole = self.values[: blocks * _BLOCK].view(blocks, _BLOCK)
        if values.is_cuda:
            sums = whole.sum(1, dtype=torch.float64).cpu()
        else:
            sums = torch.from_numpy(whole.numpy().sum(1, dtype=np.float64))
        self._prefix = torch.cat([sums.new_zeros(1), sums.cumsum(0)]).to(values.device)
        self._within = torch.arange(_BLOCK, device=values.device)

    def __len__(self) -> int:
        return len(self.values)

    def sums(self, edges: Tensor) -> Tensor:
        """For each edge, int64 [k] of 0 to n, the float64 sum of the points before it."""
        block = edges // _BLOCK
        at = block[:, None] * _BLOCK + self._within
        points = self.values[at.clamp(max=len(self) - 1)].double()
        return self._prefix[block] + torch.where(at < edges[:, None], points, 0.0).sum(1)

    @property
    def ends(self) -> Tensor:
        """0 and n, int64 [2]."""
        return torch.tensor([0, len(self)], device=self.values.device)

    @property
    def squares(self) -> Tensor:
        """The float64 sum of the squares of all points."""
        pieces = self.values.split(_PIECE)
        return torch.stack([piece.double().square().sum() for piece in pieces]).sum()

    def below(self, bounds: Tensor) -> Tensor:
        """How many points lie below each bound, float32 [k] -> int64 [k]."""
        return torch.searchsorted(self.values, bounds)

    def not_above(self, bounds: Tensor) -> Tensor:
        """How many points lie below each bound or on it, float32 [k] -> int64 [k]."""
        return torch.searchsorted(self.values, bounds, right=True)

    def distinct(self, most: int) -> Tensor | None:
        """The distinct values when there are no more than `most`, else None."""
        sample = self.values[:: max(1, len(self) >> 16)]  # often enough to tell
        if len(sample.unique_consecutive()) > most:
            return None
        distinct = self.values.unique_consecutive()
        return distinct if len(distinct) <= most else None


def _optimal_edges(points: _SortedPoints, clusters: int) -> Tensor:
    """Where clusters begin and end in sorted points, int64 [clusters + 1]; best for a summary."""
    edges = _summary_edges(points)
    weights = edges.diff().double()
    means = points.sums(edges).diff() / weights
    starts = ops.kmeans_optimal(means.cpu(), weights.cpu(), clusters)
    return torch.cat([edges[starts.to(edges.device)], edges[-1:]])


def _summary_edges(points: _SortedPoints) -> Tensor:
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
    return torch.cat([points.below(at), ends]).unique()
