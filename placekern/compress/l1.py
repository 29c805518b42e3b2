"""L1: soft thresholding after an optimiser's step, or a plain penalty on the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def soft_threshold_(weight: Tensor, amount: float) -> None:
    """The proximal step of amount x |w|_1, in place: moves each weight towards 0, and not past it.

    Args:
        weight: floating, any shape.
        amount: the learning rate times the strength of the penalty.
    """
    weight.copy_(torch.nn.functional.softshrink(weight, amount))


def l1_norm(weights: Iterable[Tensor]) -> Tensor:
    """The sum of |w| over all weights, a scalar; 0 without any. Its gradient at 0 is 0."""
    total = torch.zeros(())
    for weight in weights:
        total = total.to(weight.device) + weight.abs().sum()
    return total
