"""Which weights stay: magnitude pruning by an absolute threshold or to a target sparsity."""

from __future__ import annotations

import torch
from torch import Tensor


def threshold_mask(weight: Tensor, threshold: float) -> Tensor:
    """True where |w| >= threshold and w is not 0; bool, of the weight's shape."""
    return (weight.abs() >= threshold) & (weight != 0)


def sparsity_mask(weight: Tensor, sparsity: float) -> Tensor:
    """True for the largest |w|, all but a share `sparsity` (0 to 1) of the positions.

    Zeros are never kept, so a weight that is sparse already may come out sparser than asked.
    Weights equal to the smallest kept one are dropped in the order of their positions.
    """
    flat = weight.detach().abs().reshape(-1)
    drop = round(sparsity * flat.numel())
    if drop == 0:
        return weight != 0
    keep = torch.ones_like(flat, dtype=torch.bool)
    limit = flat.kthvalue(drop).values
    keep[flat < limit] = False
    ties = (flat == limit).nonzero().squeeze(1)
    keep[ties[: drop - int((~keep).sum())]] = False
    return keep.reshape(weight.shape) & (weight != 0)
