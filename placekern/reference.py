"""Every op in a few lines of plain torch: the oracle of the tests, and a specification to read.

It writes the dense weight, which the kernels never do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode(
    row_ptr: Tensor, col_ind: Tensor, codes: Tensor, codebook: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The dense weight [M, K] of the logical form, in the codebook's dtype.

    `codebook` is [2^bits], or [G, 2^bits]: one for each ceil(M / G) rows.
    """
    M, K = shape
    books = codebook.reshape(-1, codebook.shape[-1])
    book_of_row = torch.arange(M) // max(1, -(-M // len(books)))
    rows = torch.arange(M).repeat_interleave(row_ptr.diff())
    dense = torch.zeros(M, K, dtype=codebook.dtype)
    return dense.index_put((rows, col_ind.long()), books[book_of_row[rows], codes.long()])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y [..., M] from x [..., K] and the dense weight [M, K]."""
    y = F.linear(x, weight, bias)
    return y.relu() if relu else y


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    relu: bool = False,
) -> Tensor:
    """y [batch, M, out_h, out_w] from x [batch, C, h, w] and the dense weight [M, K].

    `padding` is (top, bottom, left, right), in pixels.
    """
    top, bottom, left, right = padding
    dense = weight.reshape(weight.shape[0], x.shape[1] // groups, *kernel_size)
    padded = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(padded, dense, bias, stride, 0, dilation, groups)
    return y.relu() if relu else y


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n] of the nearest centroid, sums float64 [C] and counts int64 [C] per centroid.

    Of two centroids equally near, the smaller is taken.
    """
    order = torch.argsort(centroids, stable=True)
    sorted_centroids = centroids[order]
    boundaries = (sorted_centroids[1:].double() + sorted_centroids[:-1].double()) / 2
    codes = order[torch.searchsorted(boundaries, points.double())]
    counts = torch.bincount(codes, minlength=len(centroids))
    sums = torch.zeros(len(centroids), dtype=torch.float64).index_add(0, codes, points.double())
    return codes.to(torch.uint8), sums, counts
