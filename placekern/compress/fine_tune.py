"""FineTune: what a recipe is to `fit`, for a model that is trained as it stands.

Dense layers stay dense, and of compressed ones the codebooks are trained. The surprise: with
`keep_zeros` a zero that is pruned is told from one that is not as everywhere else, by its sign
(see `placekern.compress.prune`), so a checkpoint needs no masks here either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..nn import quant_sparse_layers
from . import prune


class FineTune:
    """Trains a model without compressing it, in `fit` or in a loop of yours, like a `Recipe`.

    Under `torch.distributed`, what is zero on rank 0 counts.

    Args:
        model: dense, pruned or compressed; it gets no other modules or parameters.
        optimizer: that trains it.
        keep_zeros: hold weights of dense layers (parameters of two or more dimensions) that are
            zero at `prepare`, those of a pruned network, at zero. In a bias or a codebook a zero is
            a value like any other.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, keep_zeros: bool = False
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.keep_zeros = keep_zeros
        self.steps = 0
        self.phase = "train"
        self._pruned: dict[str, tuple[Tensor, Tensor]] = {}
        self._prepared = False

    def prepare(self) -> None:
        """Begins: sees which weights are zero, where these are to be kept.

        Raises:
            RuntimeError: called twice.
        """
        if self._prepared:
            raise RuntimeError("the run is prepared already; make another FineTune for another run")
        self._prepared = True
        if not self.keep_zeros:
            return
        codebooks = {id(layer.codebook) for _, layer in quant_sparse_layers(self.model)}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or parameter.ndim < 2 or id(parameter) in codebooks:
                continue
            weight = parameter.detach()
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(weight, 0)
            pruned = weight == 0
            if pruned.any():
                prune.hold_zeros_(weight, pruned)
                self._pruned[name] = weight, pruned

    def step(self) -> bool:
        """To be called after each step of the optimiser; False, as no layer is swapped."""
        self.steps += 1
        for weight, pruned in self._pruned.values():
            prune.hold_zeros_(weight, pruned)
        return False

    def penalty(self) -> Tensor:
        """What to add to the loss: 0, a scalar."""
        return torch.zeros(())

    def finalize(self) -> nn.Module:
        """Ends; returns the model."""
        self.phase = "final"
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """The model, the optimizer and the step: plain values and tensors, which are not copied."""
        return {
            "format": 1,
            "keep_zeros": self.keep_zeros,
            "pruned": list(self._pruned),
            "steps": self.steps,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, on one of the same model and optimizer that is prepared.

        Raises:
            ValueError: the state is of another version, or of another `keep_zeros`.
        """
        if state.get("format") != 1 or "keep_zeros" not in state:
            raise ValueError("the state is of another version, or no FineTune's state_dict")
        if state["keep_zeros"] != self.keep_zeros:
            raise ValueError(
                f"the state was saved with keep_zeros = {state['keep_zeros']}, but this run has "
                f"{self.keep_zeros}; go on with the same"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        self._pruned = {
            name: (weights[name], prune.pruned_positions(weights[name])) for name in state["pruned"]
        }
