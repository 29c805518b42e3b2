"""Sorted values with prefix sums: a cluster costs two binary searches, whatever its size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 32  # sorted points that share a prefix sum
PIECE = 1 << 22
"""Values handled at a time where a wider copy of them is made."""


class SortedPoints:
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

    def means(self, edges: Tensor) -> Tensor:
        """Of the points between neighbouring edges, int64 [k + 1]; float64 [k], rising.

        The mean of no points repeats the one before (the first ones, the one behind them).
        """
        counts = edges.diff()
        means = self.sums(edges).diff() / counts.clamp(min=1)
        first = means[(counts > 0).int().argmax(keepdim=True)]
        return torch.where(counts > 0, means, first).cummax(0).values

    @property
    def ends(self) -> Tensor:
        """0 and n, int64 [2]."""
        return torch.tensor([0, len(self)], device=self.values.device)

    @property
    def squares(self) -> Tensor:
        """The float64 sum of the squares of all points."""
        pieces = self.values.split(PIECE)
        return torch.stack([piece.double().square().sum() for piece in pieces]).sum()

    def edges(self, boundaries: Tensor) -> Tensor:
        """Where the points between neighbouring boundaries, float32 [k - 1], begin: int64 [k + 1].

        A point on a boundary lies below it.
        """
        return torch.cat([self.ends[:1], self.not_above(boundaries), self.ends[1:]])

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
