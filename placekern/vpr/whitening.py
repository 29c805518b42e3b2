"""PCA whitening of descriptors, as a linear layer (Jegou and Chum 2012), fitted as NetVLAD does.

The surprise: with fewer descriptors than dimensions, the usual case (a 32,768-dimensional
descriptor and 10,000 images), the eigenvectors come from the n x n Gram matrix and the D x D
covariance is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to an eigenvalue before its root is inverted; descriptors have unit length, so it is far
# below those that count.
_EPSILON = 1e-9
# Columns or rows turned to float64 at a time, so that a float64 copy of all descriptors is never
# held.
_BLOCK = 4096


def fit_whitening(descriptors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Fit the linear map whose outputs on `descriptors` have zero mean and identity covariance.

    With eigenpairs (lambda, U) of the covariance X^T X / (n - 1), X centred, largest first:

        weight = diag((lambda + 1e-9) ** -0.5) U^T        bias = -weight @ mean

    In the dual form (n < D) they come from the eigenpairs (lambda, V) of X X^T / (n - 1), as
    U = X^T V diag((lambda (n - 1)) ** -0.5). Sums are float64. Signs are fixed: the entry of each
    row that is largest by magnitude is positive.

    Args:
        descriptors: [n, D] floating point, one a reference image; n >= 2.
        dim: outputs, at most the rank of the centred descriptors, which is at most min(n - 1, D).

    Returns:
        weight [dim, D] and bias [dim], float32, on the device of `descriptors`.

    Raises:
        ValueError: a wrong shape, values that are not finite, or `dim` above the rank.
    """
    if descriptors.ndim != 2 or len(descriptors) < 2:
        raise ValueError(f"descriptors must be [n, D] with n >= 2, got {list(descriptors.shape)}")
    if not torch.isfinite(descriptors).all():
        raise ValueError("descriptors must be finite to fit a whitening, got NaN or infinity")
    n, inputs = descriptors.shape
    if not 1 <= dim <= min(n - 1, inputs):
        raise ValueError(
            f"whitening to {dim} outputs needs at least {dim + 1} descriptors of at least {dim} "
            f"values, got {n} of {inputs}: describe more images or ask for fewer outputs"
        )
    mean = descriptors.mean(0, dtype=torch.float64)
    dual = n < inputs
    symmetric = _gram(descriptors, mean) if dual else _covariance(descriptors, mean)
    eigenvalues, eigenvectors = torch.linalg.eigh(symmetric / (n - 1))
    eigenvalues = eigenvalues.flip(0)[:dim]
    eigenvectors = eigenvectors.flip(1)[:, :dim]
    # float32 descriptors carry rounding noise of this order; an eigenvalue below it is that noise,
    # not a direction.
    floor = eigenvalues[0] * torch.finfo(torch.float32).eps ** 2 * max(n, inputs)
    if eigenvalues[0] <= 0 or eigenvalues[-1] <= floor:
        rank = int((eigenvalues > floor).sum()) if eigenvalues[0] > 0 else 0
        raise ValueError(
            f"the descriptors span only {rank} directions, too few to whiten to {dim} outputs: "
            "ask for fewer outputs, and see whether images are repeated"
        )
    scale = (eigenvalues + _EPSILON).rsqrt()
    if dual:
        directions = eigenvectors * (scale * (eigenvalues * (n - 1)).rsqrt())
        weight = torch.empty(dim, inputs, device=descriptors.device)
        for start in range(0, inputs, _BLOCK):
            columns = slice(start, start + _BLOCK)
            centred = descriptors[:, columns].double() - mean[columns]
            weight[:, columns] = (directions.T @ centred).float()
    else:
        weight = (eigenvectors * scale).T.float()
    signs = weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
    weight = (weight * signs).contiguous()
    bias = torch.zeros(dim, dtype=torch.float64, device=descriptors.device)
    for start in range(0, inputs, _BLOCK):
        bias -= weight[:, start : start + _BLOCK].double() @ mean[start : start + _BLOCK]
    return weight, bias.float()


def _gram(descriptors: Tensor, mean: Tensor) -> Tensor:
    n, inputs = descriptors.shape
    gram = torch.zeros(n, n, dtype=torch.float64, device=descriptors.device)
    for start in range(0, inputs, _BLOCK):
        columns = slice(start, start + _BLOCK)
        centred = descriptors[:, columns].double() - mean[columns]
        gram.addmm_(centred, centred.T)
    return gram


def _covariance(descriptors: Tensor, mean: Tensor) -> Tensor:
    inputs = descriptors.shape[1]
    covariance = torch.zeros(inputs, inputs, dtype=torch.float64, device=descriptors.device)
    for rows in descriptors.split(_BLOCK):
        centred = rows.double() - mean
        covariance.addmm_(centred.T, centred)
    return covariance
