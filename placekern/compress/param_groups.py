"""An optimiser's parameter groups when dense weights give way to codebooks.

A learning-rate scheduler counts the groups when it is made. So the groups of the codebooks are made
early and stay empty until the swap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group that holds a parameter; None if none does."""
    for group in optimizer.param_groups:
        if any(held is parameter for held in group["params"]):
            return group
    return None


def add_codebook_groups(
    optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], factor: float
) -> list[tuple[int, int]]:
    """Adds an empty group for each group that holds some of the weights, with lr x factor.

    Returns:
        Pairs (index of the weights' group, index of the new one).
    """
    groups = optimizer.param_groups
    owners = {id(group_of(optimizer, weight)) for weight in weights}
    pairs = []
    for index, group in enumerate(list(groups)):
        if id(group) not in owners:
            continue
        options = {key: value for key, value in group.items() if key not in ("params", "lr")}
        if "param_names" in options:
            options["param_names"] = []
        if "initial_lr" in options:
            options["initial_lr"] = options["initial_lr"] * factor
        pairs.append((index, len(groups)))
        optimizer.add_param_group({"params": [], "lr": group["lr"] * factor, **options})
    return pairs


def replace_weights(
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[int, int]],
    codebooks: Sequence[tuple[Tensor, Sequence[nn.Parameter]]],
) -> None:
    """Takes dense weights out, with their state, and puts their codebooks into the new groups.

    Args:
        optimizer: whose groups are changed in place; the state of other parameters stays.
        pairs: of `add_codebook_groups`.
        codebooks: each weight with the codebooks that replace it.
    """
    for source, target in pairs:
        group, new = optimizer.param_groups[source], optimizer.param_groups[target]
        for weight, replacements in codebooks:
            at = [i for i, held in enumerate(group["params"]) if held is weight]
            if not at:
                continue
            del group["params"][at[0]]
            new["params"].extend(replacements)
            optimizer.state.pop(weight, None)
            if "param_names" in group:  # of a model's named_parameters()
                prefix = group["param_names"].pop(at[0]).removesuffix("weight")
                new["param_names"].extend(f"{prefix}codebook" for _ in replacements)
