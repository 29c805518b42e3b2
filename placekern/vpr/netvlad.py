"""NetVLAD pooling (Arandjelovic et al., CVPR 2016): local descriptors in, one place descriptor out.

Two surprises. The assignment has no bias and its weights are independent of the centroids: this is
the released "v1" layer, the one behind the published numbers. And the flattened order is D-major,
element `d * K + k`, as MATLAB's column-major release has it, where most PyTorch ports are K-major;
a whitening matrix is tied to its order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The release normalises by sqrt(sum + eps) per location and per cluster, and by (norm + eps) over
# the whole.
_EPSILON = 1e-12


class NetVLAD(nn.Module):
    """Soft-assigned sums of residuals to K centroids, by matrix products.

    With x_i the L2-normalised local descriptors and a_i = softmax(assign x_i):

        V[k] = sum_i a_ik (x_i - centroids[k]) = (A X^T)[k] - (sum_i a_ik) centroids[k]

    The form on the right is computed. It needs storage for K x D
    values where the textbook form needs D x K x N.

    Args:
        clusters: K.
        dim: D, the length of a local descriptor.

    Parameters of the module: `assign` [K, D] and `centroids` [K, D], float32. They are plain
    parameters, not a convolution, so that weight compression leaves them as they are (under 0.1 %
    of a network's bytes).
    """

    def __init__(self, clusters: int, dim: int) -> None:
        super().__init__()
        if clusters < 1 or dim < 1:
            raise ValueError(f"clusters and dim must be positive, got {clusters} and {dim}")
        self.clusters = clusters
        self.dim = dim
        self.assign = nn.Parameter(torch.empty(clusters, dim))
        self.centroids = nn.Parameter(torch.empty(clusters, dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random unit centroids and their directions as assignment; `init_` uses data."""
        with torch.no_grad():
            self.centroids.normal_(generator=generator)
            self.centroids.copy_(F.normalize(self.centroids, dim=1))
            self.assign.copy_(10.0 * self.centroids)

    @torch.no_grad()
    def init_(self, descriptors: Tensor, seed: int = 0) -> NetVLAD:
        """Set `centroids` and `assign` from local descriptors, as the release does.

        The centroids are the k-means centres of the normalised descriptors. `assign = alpha *
        centroids / norms`, with alpha such that the nearest centroid outweighs the second by a
        factor of 100 on average.

        Args:
            descriptors: [n, D] floating point, n >= K; they are L2-normalised here. The release
                uses 50,000.
            seed: of the k-means.

        Raises:
            ValueError: a wrong shape, fewer descriptors than clusters, or descriptors that are all
                alike.
        """
        if descriptors.ndim != 2 or descriptors.shape[1] != self.dim:
            raise ValueError(f"descriptors must be [n, {self.dim}], got {list(descriptors.shape)}")
        points = F.normalize(descriptors.to(torch.float32), dim=1)
        centroids = kmeans(points, self.clusters, seed)
        directions = F.normalize(centroids, dim=1)
        alpha = 1.0
        if self.clusters > 1:
            nearest = (points @ directions.T).topk(2, dim=1).values
            gap = (nearest[:, 0] - nearest[:, 1]).mean().item()
            if gap < 1e-7:
                raise ValueError(
                    f"the {len(points)} local descriptors are too alike to tell {self.clusters} "
                    "clusters apart: use images with more variety, or fewer clusters"
                )
            alpha = -math.log(0.01) / gap
        self.centroids.copy_(centroids)
        self.assign.copy_(alpha * directions)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Pool features.

        Args:
            features: [B, D, H, W] or [B, D, N], not normalised.

        Returns:
            [B, D * K], unit length, element d * K + k.

        Raises:
            ValueError: another number of channels.
        """
        if features.ndim < 3 or features.shape[1] != self.dim:
            raise ValueError(f"features must be [B, {self.dim}, H, W], got {list(features.shape)}")
        x = features.flatten(2)  # [B, D, N]
        x = x / (x.square().sum(1, keepdim=True) + _EPSILON).sqrt()
        assignments = torch.softmax(self.assign @ x, dim=1)  # [B, K, N]
        residuals = assignments @ x.transpose(1, 2)  # [B, K, D]
        residuals = residuals - assignments.sum(2, keepdim=True) * self.centroids
        residuals = residuals / (residuals.square().sum(2, keepdim=True) + _EPSILON).sqrt()
        return normalize(residuals.transpose(1, 2).flatten(1))

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"clusters={self.clusters}, dim={self.dim}"


def normalize(descriptors: Tensor) -> Tensor:
    """Unit length along the last dimension, `x / (norm(x) + 1e-12)`; a zero vector stays zero."""
    return descriptors / (torch.linalg.vector_norm(descriptors, dim=-1, keepdim=True) + _EPSILON)


def kmeans(points: Tensor, clusters: int, seed: int = 0, iterations: int = 100) -> Tensor:
    """Lloyd's k-means in many dimensions, seeded by k-means++ (Arthur and Vassilvitskii 2007).

    A cluster that loses all its points takes the point farthest from its own centroid.
    Deterministic by `seed`.

    Args:
        points: [n, D] float32, n >= clusters.
        clusters: K.
        seed: of the initial draw.
        iterations: at most so many; it ends early when no assignment changes.

    Returns:
        [K, D] float32 centroids.

    Raises:
        ValueError: fewer points than clusters, or points that are not finite.
    """
    if len(points) < clusters:
        raise ValueError(
            f"k-means of {clusters} clusters needs at least as many points, got {len(points)}: "
            "give more images or ask for fewer clusters"
        )
    if not torch.isfinite(points).all():
        raise ValueError(
            "k-means points must be finite: the network's features hold NaN or infinity"
        )
    centroids = _spread(points, clusters, torch.Generator("cpu").manual_seed(seed))
    squares = points.square().sum(1)
    assignments = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        distances = centroids.square().sum(1) - 2.0 * (points @ centroids.T)  # [n, K], up to |x|^2
        nearest, updated = distances.min(1)
        if torch.equal(updated, assignments):
            break
        assignments = updated
        counts = torch.bincount(assignments, minlength=clusters)
        sums = torch.zeros_like(centroids).index_add_(0, assignments, points)
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        centroids[empty] = points[(nearest + squares).topk(len(empty)).indices]
    return centroids


def _spread(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    # k-means++: each next centroid is drawn with probability proportional to the squared distance
    # to those drawn.
    first = int(torch.randint(len(points), (1,), generator=generator, device="cpu"))
    centroids = [points[first]]
    nearest = (points - points[first]).square().sum(1)
    for _ in range(1, clusters):
        cumulative = nearest.double().cumsum(0).cpu()
        threshold = (
            torch.rand(1, generator=generator, dtype=torch.float64, device="cpu") * cumulative[-1]
        )
        index = min(int(torch.searchsorted(cumulative, threshold, right=True)), len(points) - 1)
        centroids.append(points[index])
        nearest = torch.minimum(nearest, (points - points[index]).square().sum(1))
    return torch.stack(centroids)
