"""`kmeans_assign`: nearest centroid, sums and counts in one pass; the heart of a k-means fit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, device
from ..codebook import midpoints
from . import common


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns each point to its nearest centroid, and sums and counts them, in one pass.

    Args:
        points: float32, any shape, n elements.
        centroids: float32 [C], 1 to 256, in any order. Of two centroids equally near, the smaller
            is taken.

    Returns:
        codes uint8 of the points' shape, sums float64 [C] and counts int64 [C] of the points of
        each centroid. On the CPU the same for any number of threads; on a GPU the sums are
        rounded to about seven digits, the same way every time.

    Raises:
        ValueError: a dtype, a device or the number of centroids does not fit.
    """
    codes, sums, counts = torch.ops.placekern.kmeans_assign(points.reshape(-1), centroids)
    return codes.reshape(points.shape), sums, counts


def _kmeans_assign_check(points: Tensor, centroids: Tensor) -> None:
    for name, tensor in (("points", points), ("centroids", centroids)):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"kmeans_assign: {name} has dtype {tensor.dtype}, expected torch.float32"
            )
    if points.dim() != 1 or centroids.dim() != 1 or not 1 <= centroids.shape[0] <= 256:
        raise ValueError(
            f"kmeans_assign: points {tuple(points.shape)} and centroids "
            f"{tuple(centroids.shape)} given, expected [n] and [1 to 256]"
        )
    if points.device != centroids.device:
        raise ValueError(
            f"kmeans_assign: points on {points.device}, centroids on {centroids.device}"
        )


def _kmeans_assign_fake(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _kmeans_assign_check(points, centroids)
    return (
        torch.empty_like(points, dtype=torch.uint8, memory_format=torch.contiguous_format),
        torch.empty_like(centroids, dtype=torch.float64, memory_format=torch.contiguous_format),
        torch.empty_like(centroids, dtype=torch.int64, memory_format=torch.contiguous_format),
    )


def _kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, sums, counts = _kmeans_assign_fake(points, centroids)
    points, centroids = points.detach().contiguous(), centroids.detach().contiguous()
    if points.is_cuda:
        device.check("kmeans_assign", points)
        _native.device_kmeans_assign(points, centroids, codes, sums, counts)
        return codes, sums, counts
    order = torch.argsort(centroids, stable=True)
    _native.kmeans_assign(points, midpoints(centroids[order]), codes, sums, counts)
    if torch.equal(order, torch.arange(len(order))):
        return codes, sums, counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return order.to(torch.uint8)[codes.int()], sums[place], counts[place]


common.register(
    "kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor, Tensor)",
    _kmeans_assign,
    _kmeans_assign_fake,
    ("CPU", "CUDA"),
)
