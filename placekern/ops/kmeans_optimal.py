"""`kmeans_optimal`: exact 1-D k-means of some thousands of weighted points.

No op of torch's dispatcher: it belongs to the fit of codebooks, which is neither traced nor
differentiated, and runs on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native


def kmeans_optimal(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Splits sorted points into runs of the least weighted squared error.

    Dynamic programming with monotone minimisers, O(clusters n log n) time and 4 clusters n bytes
    (Wang and Song, The R Journal 3(2), 2011; Wu, Journal of Algorithms 12, 1991).

    Args:
        points: float64 [n], not falling, n < 2^31.
        weights: float64 [n], positive.
        clusters: 1 to 256.

    Returns:
        int64 [clusters], the first point of each run; a run may be empty.

    Raises:
        ValueError: a dtype, a device, a size or the number of clusters does not fit.
    """
    if points.dtype != torch.float64 or weights.dtype != torch.float64:
        raise ValueError(
            f"kmeans_optimal: points are {points.dtype} and weights {weights.dtype}, expected "
            "torch.float64"
        )
    if points.device.type != "cpu" or weights.device.type != "cpu":
        raise ValueError(
            f"kmeans_optimal: points on {points.device}, weights on {weights.device}, expected cpu"
        )
    if points.dim() != 1 or points.shape != weights.shape or not 1 <= clusters <= 256:
        raise ValueError(
            f"kmeans_optimal: points {tuple(points.shape)}, weights {tuple(weights.shape)} and "
            f"{clusters} clusters given, expected [n], [n] and 1 to 256"
        )
    starts = torch.empty(clusters, dtype=torch.int64, device="cpu")
    _native.kmeans_optimal(points.contiguous(), weights.contiguous(), starts)
    return starts
