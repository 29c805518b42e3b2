"""Recipe: prune, quantize and train the codebooks of a model inside any training loop.

Phases: "dense" (the model's own layers, pruned on a schedule), then from `quantize_at` on
"codebook" (compressed layers whose codebooks are trained), then "final". The surprise: from the
dense phase to the next the model holds other modules and other parameters, so a wrapper that keeps
lists of parameters (DistributedDataParallel) is to be made anew when `step` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import COMPRESSED_KINDS, replace_module
from ..weight import QuantSparseWeight
from . import l1, prune
from .config import CompressConfig
from .param_groups import add_codebook_groups, group_of, replace_weights
from .recipe_config import RecipeConfig, without_pruning
from .recipe_report import RecipeLayer, RecipeReport, read_report
from .report import CompressReport
from .swap import check_model, compress_
from .trained import TrainedCodebook


@dataclass
class _Dense:
    """A weight that is still dense: the layers that hold it, and which of it is pruned."""

    names: list[str]
    module: nn.Module
    config: CompressConfig
    pruned: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def target(self) -> tuple[float | None, float | None]:
        return self.config.threshold, self.config.sparsity


class Recipe:
    """Compresses a model while a loop of yours trains it.

    ```
    recipe = pk.Recipe(model, config, optimizer)
    recipe.prepare()                          # before a learning-rate scheduler is made
    for batch in data:
        loss = loss_of(model, batch) + recipe.penalty()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        recipe.step()                         # before scheduler.step()
    recipe.finalize()
    ```

    Zeros that a layer has at `prepare` count as pruned (unless all of its weights are zero). Pruned
    weights are exactly +0.0 after each `step`, whatever the optimiser; live ones that are zero read
    -0.0. Layers that the config skips are not touched.

    Under `torch.distributed`, call it on every rank: weights are broadcast from rank 0 at
    `prepare` and before codebooks are fitted, and these after, so that all are equal bit by bit.

    Args:
        model: with `nn.Conv2d` or `nn.Linear` layers; changed in place. Not a wrapper: give the
            module inside.
        config: a `RecipeConfig` or a dict of its fields.
        optimizer: that trains the model; its groups are rewritten when layers are quantized. None:
            for pruning without it; proximal L1 and trained codebooks need one.
        filter_fn: called with (module, name); False leaves that layer dense.

    Raises:
        TypeError: the model is itself a Conv2d or Linear layer.
        ValueError: the config does not fit the model, or needs an optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RecipeConfig | Mapping[str, Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ) -> None:
        if not isinstance(config, RecipeConfig):
            config = RecipeConfig.from_dict(config or {})
        self.model = model
        self.config = config
        self.optimizer = optimizer
        self.steps = 0
        self.phase = "dense"
        self._prepared = False
        check_model(model, config.compress)
        self._dense = self._find(filter_fn)
        self._owners: dict[str, str] = {}
        self._codebooks: dict[str, TrainedCodebook] = {}
        self._compressed: CompressReport | None = None
        self._pairs: list[tuple[int, int]] = []

        prunes = any(dense.target != (None, None) for dense in self._dense)
        last = config.pruning.last(len(self._dense)) if prunes else None
        end = config.quantize_at if config.quantize_at is not None else float("inf")
        if last is not None and last > end:
            raise ValueError(
                f"layers are quantized at step {end}, but the last of {len(self._dense)} is "
                f"pruned at step {last}; quantize after pruning"
            )
        self._last_prune = last
        self._l1_end = config.l1_end if config.l1_end is not None else (last if prunes else end)
        if config.l1 and self._l1_end < 1:
            raise ValueError(
                "l1 would act on no step: pruning or quantizing is done before the first; "
                "prune later, or set l1_end"
            )
        if optimizer is None and config.quantize_at is not None:
            raise ValueError("trained codebooks replace weights in the optimizer: give it")
        if config.l1 and config.l1_mode == "proximal":
            for dense in self._dense:
                if optimizer is None or not group_of(optimizer, dense.weight):
                    raise ValueError(
                        f"proximal L1 takes its learning rate from the optimizer, which does not "
                        f'train {dense.names[0]}; add its weight, skip it, or use "penalty"'
                    )

    # ---- in the loop ----

    def prepare(self) -> None:
        """Begins: makes the codebooks' parameter groups, and does what is due at step 0.

        Raises:
            RuntimeError: called twice.
        """
        if self._prepared:
            raise RuntimeError("the recipe is prepared already")
        self._prepared = True
        for dense in self._dense:
            weight = dense.weight.detach()
            _broadcast(weight)
            dense.pruned = (weight == 0) & bool(weight.any())
            prune.hold_zeros_(weight, dense.pruned)
        if self.config.quantize_at is not None:
            weights = [dense.weight for dense in self._dense]
            self._pairs = add_codebook_groups(self.optimizer, weights, self.config.codebook_lr)
        self._act()

    def step(self) -> bool:
        """To be called after each step of the optimiser, and before that of a scheduler.

        Returns:
            True when layers were swapped: the model has other parameters from here on, and
            DistributedDataParallel is to be wrapped around it anew.

        Raises:
            RuntimeError: not prepared, or finalized already.
        """
        self._check_running()
        self.steps += 1
        if self.phase == "dense":
            if self._l1_active("proximal", self.steps):
                for dense in self._dense:
                    group = group_of(self.optimizer, dense.weight)
                    l1.soft_threshold_(dense.weight.detach(), float(group["lr"]) * self.config.l1)
            for dense in self._dense:
                dense.pruned = dense.pruned.to(dense.weight.device)
                prune.hold_zeros_(dense.weight.detach(), dense.pruned)
            return self._act()
        every = self.config.reassign_every
        due = every is not None and (self.steps - self.config.quantize_at) % every == 0
        for codebook in self._codebooks.values():
            codebook.step(reassign=due)
        return False

    def penalty(self) -> Tensor:
        """What to add to the loss of the next step: l1 x sum |w|, or a 0 when that is not asked."""
        self._check_running()
        active = self.phase == "dense" and self._l1_active("penalty", self.steps + 1)
        weights = [dense.weight for dense in self._dense] if active else []
        return self.config.l1 * l1.l1_norm(weights)

    def finalize(self) -> nn.Module:
        """Ends: layers that are still dense are pruned to their targets and quantized.

        Returns:
            The model, compressed, with nothing of the recipe left on it.
        """
        self._check_running()
        if self.phase == "dense":
            if self._last_prune is not None and self.steps < self._last_prune:
                self._prune(range(len(self._dense)), final=True)
            self._swap()
        for codebook in self._codebooks.values():
            codebook.remove()
        self.phase = "final"
        return self.model

    def report(self) -> RecipeReport:
        """Where the recipe stands, a row a layer; `print` it."""
        rows = []
        if self.phase == "dense":
            for dense in self._dense:
                nnz = int((dense.weight.detach() != 0).sum())
                size = dense.weight.numel()
                rows += [RecipeLayer(name, size, nnz, None, *dense.target) for name in dense.names]
        else:
            for name in self._owners:
                weight = self.model.get_submodule(name).weight
                size = weight.shape[0] * weight.shape[1]
                rows.append(RecipeLayer(name, size, weight.nnz, weight.bits, None, None))
        return RecipeReport(self.steps, self.phase, tuple(rows), self._compressed)

    # ---- stopping and going on ----

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: the model, the optimizer and where the recipe stands.

        Plain values and tensors, so that `torch.load(weights_only=True)` reads it. Each weight is
        in it once: no masks, as zeros say what is pruned. Tensors are not copied.
        """
        self._check_running()
        return {
            "format": 1,
            "config": self.config.to_dict(),
            "steps": self.steps,
            "phase": self.phase,
            "model": dict(self.model.state_dict()),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "owners": dict(self._owners),
            "codebooks": {name: book.state_dict() for name, book in self._codebooks.items()},
            "report": None if self._compressed is None else self._compressed.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, on a prepared recipe of the same model, config, optimizer.

        Raises:
            RuntimeError: not prepared, or finalized already.
            ValueError: the state is of another config or another version.
        """
        self._check_running()
        if state.get("format") != 1:
            raise ValueError(
                f"the state has format {state.get('format')!r}, expected 1: it is of another "
                "version, or no recipe's state_dict"
            )
        if state["config"] != self.config.to_dict():
            theirs, own = state["config"], self.config.to_dict()
            name = next(key for key in own if theirs.get(key) != own[key])
            raise ValueError(
                f"the state was saved with {name} = {theirs.get(name)!r}, but this recipe has "
                f"{own[name]!r}; go on with the same config"
            )
        if state["phase"] == "dense" and self.phase != "dense":
            raise ValueError("the state is of dense layers, but this recipe has swapped them")
        if state["phase"] != self.phase:
            self._swap_from(state)
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        for name, saved in state["codebooks"].items():
            self._codebooks[name].load_state_dict(saved)
        for dense in self._dense:
            dense.pruned = prune.pruned_positions(dense.weight.detach())
        self.steps = state["steps"]
        self._compressed = None if state["report"] is None else read_report(state["report"])

    # ---- inside ----

    def _find(self, filter_fn: Callable[[nn.Module, str], bool] | None) -> list[_Dense]:
        found: dict[int, _Dense] = {}
        for name, module in self.model.named_modules():
            if type(module) not in COMPRESSED_KINDS or (filter_fn and not filter_fn(module, name)):
                continue
            config = self.config.compress.for_layer(name, module)
            if config is None:
                continue
            dense = found.setdefault(id(module.weight), _Dense([], module, config))
            if dense.target != (config.threshold, config.sparsity):
                raise ValueError(
                    f"{dense.names[0]} and {name} share a weight, but are to be pruned by "
                    f"different settings; give them the same"
                )
            dense.names.append(name)
        if not found:
            raise ValueError("the recipe has no layer to compress; look at its config and filter")
        return list(found.values())

    def _check_running(self) -> None:
        if not self._prepared:
            raise RuntimeError("the recipe is not prepared; call prepare() first")
        if self.phase == "final":
            raise RuntimeError("the recipe is finalized; the model is yours")

    def _l1_active(self, mode: str, step: int) -> bool:
        return self.config.l1 > 0 and self.config.l1_mode == mode and step <= self._l1_end

    def _act(self) -> bool:
        """What is due at this step in the dense phase; True when layers were swapped."""
        count = len(self._dense)
        if self._last_prune is not None:
            due = [i for i in range(count) if self.config.pruning.prunes(self.steps, i, count)]
            self._prune(due, final=False)
        if self.steps != self.config.quantize_at:
            return False
        self._swap()
        return True

    @torch.no_grad()
    def _prune(self, indices: range | list[int], final: bool) -> None:
        schedule, default = self.config.pruning, self.config.compress
        together = []
        for dense in (self._dense[i] for i in indices):
            threshold, sparsity = dense.target
            weight = dense.weight.detach()
            if sparsity is not None:
                if self.config.scope == "global" and dense.target == (None, default.sparsity):
                    together.append(dense)
                    continue
                if not final:
                    sparsity = schedule.sparsity_at(self.steps, sparsity)
                self._apply(dense, prune.sparsity_mask(weight.float(), sparsity))
            elif threshold is not None:
                if not final:
                    threshold = schedule.threshold_at(self.steps, threshold)
                self._apply(dense, prune.threshold_mask(weight.float(), threshold))
        if together:
            sparsity = default.sparsity
            if not final:
                sparsity = schedule.sparsity_at(self.steps, sparsity)
            masks = prune.global_sparsity_masks([d.weight.detach() for d in together], sparsity)
            for dense, mask in zip(together, masks, strict=True):
                self._apply(dense, mask)

    def _apply(self, dense: _Dense, mask: Tensor) -> None:
        dense.pruned = ~mask
        prune.hold_zeros_(dense.weight.detach(), dense.pruned)

    def _layers(self) -> Iterator[tuple[_Dense, str]]:
        for dense in self._dense:
            for name in dense.names:
                yield dense, name

    def _swap(self) -> None:
        """Compresses the layers; the weights' places in the optimizer go to their codebooks."""
        names = {name for _, name in self._layers()}
        for dense in self._dense:
            _broadcast(dense.weight.detach())
        config = without_pruning(self.config.compress)
        self._compressed = compress_(self.model, config, lambda module, name: name in names)
        owners: dict[int, str] = {}
        for _, name in self._layers():
            layer = self.model.get_submodule(name)
            self._owners[name] = owners.setdefault(id(layer.codebook), name)
        for name in owners.values():
            layer = self.model.get_submodule(name)
            _broadcast(layer.codebook.detach())
            _broadcast(layer.codes)
        self._train_codebooks(keep_dense=self.config.reassign_every is not None)

    def _swap_from(self, state: Mapping[str, Any]) -> None:
        """Puts in the layers of a saved state, without fitting them again."""
        self._owners = dict(state["owners"])
        made: dict[str, QuantSparseWeight] = {}
        for dense, name in self._layers():
            owner, module = self._owners[name], self.model.get_submodule(name)
            config = self.config.compress.for_layer(name, module)
            if owner not in made:
                shape = (module.weight.shape[0], module.weight[0].numel())
                keys = ("row_ptr", "positions", "codes", "codebook")
                arrays = [state["model"][f"{owner}.{key}"] for key in keys]
                made[owner] = QuantSparseWeight(shape, config.bits, *arrays)
                made[owner].codebook = nn.Parameter(
                    arrays[-1].clone(), requires_grad=dense.weight.requires_grad
                )
            layer = COMPRESSED_KINDS[type(module)].from_weight(made[owner], module)
            replace_module(self.model, module, layer.to(dense.weight.device))
        self._train_codebooks(keep_dense=False)

    def _train_codebooks(self, keep_dense: bool) -> None:
        config = self.config
        swapped = []
        for dense in self._dense:
            own = sorted({self._owners[name] for name in dense.names})
            swapped.append((dense.weight, [self.model.get_submodule(n).codebook for n in own]))
            for owner in own:
                sharing = [name for name in dense.names if self._owners[name] == owner]
                self._codebooks[owner] = TrainedCodebook(
                    [self.model.get_submodule(name) for name in sharing],
                    config.codebook_gradient,
                    config.grid,
                    dense.weight.detach() if keep_dense else None,
                    dense.config.entropy_lambda,
                )
        if self.optimizer is not None:
            replace_weights(self.optimizer, self._pairs, swapped)
        self._dense = []
        self.phase = "codebook"


def _broadcast(tensor: Tensor) -> None:
    """Rank 0's bits to all ranks, where there are ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, 0)
