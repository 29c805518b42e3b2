"""Which weights stay: masks by threshold or sparsity, when they are taken, and zeros that stay.

The surprise: no mask is ever saved. A pruned weight is +0.0; a weight that happens to be zero but
is alive (soft thresholding makes many) is written as -0.0. So the bits of the weight say what is
pruned, in memory and in any file, and a resumed run prunes exactly what the first one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("one-shot", "iterative", "layers", "polynomial")


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


def global_sparsity_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of several weights by one threshold over all of them, as `sparsity_mask` of the whole.

    Args:
        weights: floating, of any shapes, on any devices.
        sparsity: share of all their positions to drop, 0 to 1, smallest |w| first.

    Returns:
        bool masks, each of its weight's shape and on its device. While this runs, |w| of all
        weights is held once more, in float32.
    """
    if not weights:
        return []
    sizes = [weight.numel() for weight in weights]
    device = weights[0].device
    flat = torch.cat([w.detach().abs().reshape(-1).to(device, torch.float32) for w in weights])
    parts = sparsity_mask(flat, sparsity).split(sizes)
    return [p.reshape(w.shape).to(w.device) for p, w in zip(parts, weights, strict=True)]


# ---- zeros that stay ----


def pruned_positions(weight: Tensor) -> Tensor:
    """True where a weight is pruned, that is +0.0; bool, of the weight's shape."""
    return (weight == 0) & ~weight.signbit()


@torch.no_grad()
def hold_zeros_(weight: Tensor, pruned: Tensor) -> None:
    """Writes +0.0 at `pruned` (bool, of the weight's shape), and -0.0 for every other zero.

    Filled, not multiplied: a NaN or an infinity at a pruned position does not survive.
    """
    weight.masked_fill_(weight == 0, -0.0)
    weight.masked_fill_(pruned, 0.0)


# ---- when ----


@dataclass(frozen=True)
class PruneSchedule:
    """At which steps weights are pruned, and how far.

    "one-shot" prunes once, at step `begin`. "iterative" prunes, fine-tunes and repeats: at `begin`
    and every `every` steps until `end`; a sparsity is approached by dropping the same share of what
    is left each time, a threshold is the final one each time (fine-tuning brings more weights below
    it). "layers" is layer by layer: the first to its final target at `begin`, the next one `every`
    steps later, and so on. "polynomial" raises sparsity or threshold from 0 at `begin` to the final
    one at `end` by 1 - (1 - t)^3 (Zhu and Gupta 2017), every `every` steps: fast while there is
    much to drop, slowly at the end.

    Step n is the state after n steps of the optimiser; step 0 is before the first.

    Args:
        kind: one of the four.
        begin: first step that prunes, >= 0.
        end: last step that prunes, >= begin; None for "one-shot" and "layers", where it follows.
        every: steps between two prunings, >= 1.

    Raises:
        ValueError: a value is out of range or does not fit the kind.
    """

    kind: str = "one-shot"
    begin: int = 0
    end: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule is {self.kind!r}, expected one of {', '.join(SCHEDULES)}")
        ranged = self.kind in ("iterative", "polynomial")
        if self.begin < 0 or self.every < 1:
            raise ValueError(
                f"the schedule begins at {self.begin} and prunes every {self.every} steps, "
                "expected begin >= 0 and every >= 1"
            )
        if ranged and (self.end is None or self.end < self.begin):
            raise ValueError(
                f"the {self.kind} schedule ends at {self.end}, expected a step from {self.begin} on"
            )
        if not ranged and self.end is not None:
            raise ValueError(
                f"the {self.kind} schedule has no end of its own, but end is {self.end}; leave it"
            )

    def last(self, layers: int) -> int:
        """The last step that prunes, in a model of so many layers."""
        if self.kind == "layers":
            return self.begin + self.every * max(layers - 1, 0)
        return self.begin if self.end is None else self.end

    def prunes(self, step: int, layer: int, layers: int) -> bool:
        """Whether layer number `layer` of `layers` is pruned at a step."""
        if self.kind == "layers":
            return step == self.begin + self.every * layer
        last = self.last(layers)
        return self.begin <= step <= last and (
            (step - self.begin) % self.every == 0 or step == last
        )

    def sparsity_at(self, step: int, final: float) -> float:
        """The sparsity to prune to at a step that prunes, 0 to `final`."""
        if self.kind == "iterative":
            begin, end = self.begin, self.last(1)
            done = (step - begin) // self.every + ((step - begin) % self.every > 0) + 1
            rounds = -(-(end - begin) // self.every) + 1
            return 1 - (1 - final) ** (done / rounds)
        return final * self._ramp(step)

    def threshold_at(self, step: int, final: float) -> float:
        """The threshold to prune by at a step that prunes, 0 to `final`."""
        return final * self._ramp(step)

    def _ramp(self, step: int) -> float:
        if self.kind != "polynomial" or step >= self.last(1):
            return 1.0
        return 1 - (1 - (step - self.begin) / (self.last(1) - self.begin)) ** 3
