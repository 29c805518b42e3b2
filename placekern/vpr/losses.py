"""The loss that tells places apart.

The surprise: a batch may use no pair at all. Once the hardest pairs are further apart than the
margin, nothing is left to mine, and the loss is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def multi_similarity_loss(
    descriptors: Tensor,
    labels: Tensor,
    alpha: float = 2.0,
    beta: float = 40.0,
    base: float = 0.5,
    margin: float = 0.1,
) -> Tensor:
    """Multi-similarity loss with its pair mining (Wang et al., CVPR 2019, equations 8, 9 and 15).

    Args:
        descriptors: [n, D] of unit length.
        labels: [n] int64, the place of each; at least two places, and one of them twice.
        alpha, beta: how steeply pairs of one place and of two places are weighed.
        base: the cosine similarity below which a pair of one place is penalised, and above which a
            pair of two places is.
        margin: a pair is used when it is within `margin` of the hardest pair of the other sort.

    Returns:
        The loss, a scalar; 0 where no pair is left. Anchors without a used pair count as 0.
    """
    similarity = descriptors @ descriptors.T
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = ~same
    mined = similarity.detach()
    hardest_negative = mined.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    hardest_positive = mined.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    positive = positive & (mined - margin < hardest_negative)
    negative = negative & (mined + margin > hardest_positive)
    # log(1 + sum exp(x)) over the used pairs, as a logsumexp with one zero added.
    pull = _softplus_sum(-alpha * (similarity - base), positive) / alpha
    push = _softplus_sum(beta * (similarity - base), negative) / beta
    return (pull + push).mean()


def _softplus_sum(exponents: Tensor, used: Tensor) -> Tensor:
    exponents = exponents.masked_fill(~used, -math.inf)
    zero = exponents.new_zeros(len(exponents), 1)
    return torch.logsumexp(torch.cat([exponents, zero], dim=1), dim=1)
