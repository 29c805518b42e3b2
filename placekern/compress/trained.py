"""Trained quantization: the codebook is the parameter, and its gradient a sum over shared codes.

Nothing here holds a dense weight or a dense gradient. That decides what re-assignment can mean:
every weight of a code receives the same update, the one of its entry, so the real value of a kept
weight is `entry + offset`, where the offset is what rounding took from it when the layer was
quantized. Offsets are fixed until codes are assigned anew; then each kept weight goes to the entry
nearest its real value, and its offset changes with it. As entries move at different speeds, weights
near a boundary change sides. It costs one float32 a kept weight, while training, if asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..module import QuantSparseModule
from ..weight import QuantSparseWeight
from . import quantize

GRIDS = (None, "bfloat16", "int8")
GRADIENTS = ("sum", "mean")


def project(codebook: Tensor, grid: str | None) -> Tensor:
    """The entries rounded to a grid; a new tensor of the same dtype, idempotent.

    Args:
        codebook: float32 [n] or [G, n], finite.
        grid: "bfloat16": values that bfloat16 holds exactly. "int8": whole multiples, -127 to 127,
            of max |entry| / 127, the largest of each codebook. None: as they are.

    Raises:
        ValueError: the grid is unknown.
    """
    if grid == "bfloat16":
        return codebook.to(torch.bfloat16).to(codebook.dtype)
    if grid == "int8":
        # In float64, so that the largest entry is hit exactly and rounds to itself the next time.
        scale = codebook.double().abs().amax(-1, keepdim=True) / 127
        scale.masked_fill_(scale == 0, 1)
        return ((codebook.double() / scale).round() * scale).to(codebook.dtype)
    if grid is not None:
        raise ValueError(f"grid is {grid!r}, expected one of {', '.join(map(repr, GRIDS))}")
    return codebook.clone()


class TrainedCodebook:
    """Drives the codebook of one weight (of one layer, or of several that share it) in training.

    Args:
        layers: compressed layers that share one codebook.
        gradient: "sum", as the kernels give it, or "mean": divided by the number of weights of
            each code.
        grid: entries are held to it after each step, see `project`. The optimiser's updates add up
            in a float32 copy of the entries, so that steps smaller than the grid's are not lost.
        dense: the weight [M, ...] that was quantized, to have codes assigned anew; None without.
        entropy_lambda: of the codebook's fit: codes are assigned anew by the same price of a bit.
    """

    def __init__(
        self,
        layers: Sequence[QuantSparseModule],
        gradient: str = "sum",
        grid: str | None = None,
        dense: Tensor | None = None,
        entropy_lambda: float = 0.0,
    ) -> None:
        self.layers = list(layers)
        if grid is not None and self.parameter.dtype != torch.float32:
            raise ValueError(
                f"the codebook is {self.parameter.dtype}, but entries on a {grid} grid are kept in "
                "float32; train the model in float32 or leave the grid out"
            )
        self._grid = grid
        self._entropy_lambda = entropy_lambda
        self._hook = None
        self._counts: Tensor | None = None
        if gradient == "mean" and self.parameter.requires_grad:
            self._count()
            self._hook = self.parameter.register_hook(lambda g: g / self._counts.to(g))
        self._offsets: Tensor | None = None
        if dense is not None:
            # In the order of the codes: by rows, columns rising.
            kept = dense.detach()[dense.detach() != 0].float()
            self._offsets = kept - self._rounded()
        self._exact = self.parameter.detach().clone() if grid else None
        self._hold()

    @property
    def parameter(self) -> nn.Parameter:
        """The codebook, [2^bits], or [G, 2^bits] of a layer with several."""
        return self.layers[0].codebook

    def values(self) -> Tensor:
        """Real values of the kept weights, float32 [nnz] in CSR order: entry + offset.

        Raises:
            ValueError: made without `dense`, so that there are no offsets.
        """
        if self._offsets is None:
            raise ValueError("codes are not assigned anew here: there are no offsets to add")
        return self._rounded() + self._offsets

    @torch.no_grad()
    def step(self, reassign: bool = False) -> None:
        """To be called after the optimiser's step: holds the grid, assigns codes if asked."""
        if self._exact is not None:
            update = self.parameter - self._held.to(self.parameter.device)
            self._exact = self._exact.to(update.device) + update
        self._hold()
        if reassign:
            self._reassign()

    def remove(self) -> None:
        """Takes the hook from the codebook again."""
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the layers do not hold: the float32 entries behind a grid, and the offsets."""
        return {"exact": self._exact, "offsets": self._offsets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts it back, after the layers have been loaded."""
        device = self.parameter.device
        for name in ("exact", "offsets"):
            value = state[name]
            setattr(self, f"_{name}", None if value is None else value.clone().to(device))
        if self._exact is not None:
            self._held = self.parameter.detach().clone()
        if self._counts is not None:
            self._count()

    @torch.no_grad()
    def _hold(self) -> None:
        if self._exact is not None:
            self._held = project(self._exact, self._grid)
            self.parameter.copy_(self._held)

    @torch.no_grad()
    def _reassign(self) -> None:
        values, old = self.values(), self.layers[0].weight
        row_ptr, col_ind, codes = old.to_csr()
        entries = self.parameter.detach().float()
        books = entries.view(-1, entries.shape[-1])
        # Codes lie row by row, so those of a group of rows lie side by side.
        ends = [*row_ptr[: -1 : max(old.group_size, 1)].tolist(), old.nnz]
        sizes = [end - start for start, end in pairwise(ends)] or [0]
        parts = zip(values.split(sizes), books, codes.split(sizes), strict=True)
        codes = torch.cat(
            [quantize.assign_anew(*part, entropy_lambda=self._entropy_lambda) for part in parts]
        )
        new = QuantSparseWeight.from_csr(row_ptr, col_ind, codes, entries, old.shape, old.bits)
        new.codebook = self.parameter
        new = new.to_layout(new.layout, old.taps)
        for layer in self.layers:
            layer.weight = new
        self._offsets = values - self._rounded()
        if self._counts is not None:
            self._count()

    def _rounded(self) -> Tensor:
        """The entry of each kept weight, float32 [nnz] in CSR order."""
        entries = self.parameter.detach().float().flatten()
        return entries.index_select(0, self.layers[0].weight.entry_index().int())

    def _count(self) -> None:
        index = self.layers[0].weight.entry_index()
        counts = index.bincount(minlength=self.parameter.numel()).view(self.parameter.shape)
        self._counts = counts.clamp(min=1).to(self.parameter.device)
