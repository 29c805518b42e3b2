"""fit: a training loop for those who have none, with progress, checkpoints and exact resume.

A run that is killed and started again ends with the same bits as one that was not: the checkpoint
holds the model, the optimiser, the recipe, the scheduler, where in the data it was and the state of
every random generator. The order of the data depends on the seed and the epoch alone.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..io.atomic import written_beside
from ..nn import quant_sparse_layers
from .fine_tune import FineTune
from .recipe import Recipe

Progress = Callable[[str, int, int], None]

_PACKED = ("row_ptr", "positions", "codes")


@dataclass(frozen=True)
class FitStep:
    """One step of the optimiser, as it is over.

    Attributes:
        step: its number, from 1; those before a resume count.
        steps: of the whole run.
        phase: of the recipe now: "dense" or "codebook"; "train" where nothing is compressed.
        loss: before the step, without the recipe's penalty.
    """

    step: int
    steps: int
    phase: str
    loss: float


@dataclass(frozen=True)
class FitRecord:
    """What happened.

    Attributes:
        losses: of the steps of this run, not of those before a resume.
        steps: of the optimiser, those before a resume included.
        resumed_at: the step that a checkpoint led back to; 0 without one.
        finished: False where the limit of seconds ended the run.
    """

    losses: list[float] = field(repr=False)
    steps: int
    resumed_at: int
    finished: bool = True


def fit(
    recipe: Recipe | FineTune,
    data: Dataset[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    epochs: int,
    batch_size: int | None,
    shuffle: bool = True,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool | Progress = True,
    on_step: Callable[[FitStep], None] | None = None,
) -> FitRecord:
    """Trains a recipe's model with its optimizer, and compresses it on the way, in place.

    At the end the recipe is finalized, also when the limit of seconds ended the run. Where the file
    `checkpoint` exists, the run goes on from it; with one thread a machine then computes the same
    bits as without the interruption (on a GPU, as far as its kernels repeat). Random augmentation
    in worker processes does not repeat; in this process (`workers=0`) it does.

    Under `torchrun` each rank trains on its own batches through DistributedDataParallel, which is
    wrapped around the model here, and rank 0 alone writes checkpoints; all ranks read them.

    Args:
        recipe: with an optimizer, not prepared yet; a `FineTune` to train without compressing.
        data: a map-style dataset; its samples are batched as by DataLoader.
        loss: called with (model, batch), returns a scalar. The recipe's L1 penalty is added to it.
        epochs: passes over the data. The last, smaller batch is used too, but under torchrun left
            out so that all ranks make the same steps.
        batch_size: samples of a step, on each rank; None: a sample is a batch already.
        shuffle: each epoch has another order; False takes the data as it is ordered.
        scheduler: makes a learning-rate scheduler of the optimizer; it is stepped after each batch.
        seconds: no step begins after so many, counted anew after a resume; None: no limit.
        checkpoint: a file to write; None writes none.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch. One is written
            at the end of the run, too.
        settings: what else must be the same in a run that goes on from the checkpoint, by name, as
            plain values.
        seed: of the order of the data; torch's own generators are left as they are.
        workers: processes that load data.
        progress: True draws a bar on a terminal, where rich is installed; or called with
            (phase, step, steps) after each step.
        on_step: called with a `FitStep` after each step, to log the loss.

    Returns:
        A `FitRecord`.

    Raises:
        RuntimeError: the recipe is prepared already, or a checkpoint cannot be read.
        ValueError: no optimizer, too little data, sizes < 1, a loss that is not finite, or a
            checkpoint of another run.
    """
    if recipe.optimizer is None:
        raise ValueError("fit trains with the recipe's optimizer, and this recipe has none")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected >= 1")
    for name, value in (("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected >= 1 or None")
    begun = time.perf_counter()
    run = _Run(recipe, scheduler, data, batch_size, shuffle, seed, settings)
    steps = epochs * run.per_epoch
    losses: list[float] = []
    resumed_at = 0
    in_time = True
    was_training = recipe.model.training
    recipe.model.train()
    try:
        with _reporter(progress) as report:
            if checkpoint is not None and Path(checkpoint).exists():
                run.load(checkpoint)
                resumed_at = recipe.steps
            wrapped = _wrap(recipe.model)
            while in_time and recipe.steps < steps:
                for batch in run.rest_of_epoch(workers):
                    in_time = seconds is None or _agreed(time.perf_counter() - begun <= seconds)
                    if not in_time:
                        break
                    losses.append(run.step(wrapped, loss, batch))
                    if run.swapped:
                        wrapped = _wrap(recipe.model)
                    report(recipe.phase, recipe.steps, steps)
                    if on_step is not None:
                        on_step(FitStep(recipe.steps, steps, recipe.phase, losses[-1]))
                    every = checkpoint_every or run.per_epoch
                    due = recipe.steps % every == 0 or recipe.steps == steps
                    if checkpoint is not None and due:
                        run.save(checkpoint)
            if checkpoint is not None and not in_time:
                run.save(checkpoint)
        recipe.finalize()
    finally:
        recipe.model.train(was_training)
        recipe.model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)  # of _wrap
    return FitRecord(losses, recipe.steps, resumed_at, in_time)


class _Run:
    """What a step needs and a checkpoint holds."""

    def __init__(
        self,
        recipe: Recipe | FineTune,
        scheduler: Any,
        data: Dataset[Any],
        batch_size: int | None,
        shuffle: bool,
        seed: int,
        settings: Mapping[str, Any] | None,
    ) -> None:
        self.recipe = recipe
        self.swapped = False
        self._data = data
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._settings = dict(settings or {})
        self._rank, self._ranks = _rank()
        samples = len(data)  # type: ignore[arg-type]
        size = batch_size or 1
        self.per_epoch = (
            -(-samples // size) if self._ranks == 1 else samples // (size * self._ranks)
        )
        if self.per_epoch < 1:
            raise ValueError(
                f"the data has {samples} samples, expected one for each of {size} in a batch on "
                f"{self._ranks} ranks at least"
            )
        recipe.prepare()  # before the scheduler, which counts the parameter groups
        self._scheduler = scheduler(recipe.optimizer) if scheduler else None

    def rest_of_epoch(self, workers: int) -> Iterator[Any]:
        """The batches of this rank that are left of the epoch that the recipe is in."""
        epoch, done = divmod(self.recipe.steps, self.per_epoch)
        generator = torch.Generator().manual_seed(hash((self._seed, epoch)) % (1 << 63))
        samples = len(self._data)  # type: ignore[arg-type]
        order = torch.arange(samples)
        if self._shuffle:
            order = torch.randperm(samples, generator=generator)
        batches = order.split(self._batch_size or 1)[self._rank :: self._ranks]
        rest = [rows.tolist() for rows in batches[done : self.per_epoch]]
        batched: dict[str, Any] = {"batch_sampler": rest}
        if self._batch_size is None:
            batched = {"sampler": [row for (row,) in rest], "batch_size": None}
        # A generator of its own: DataLoader would draw a seed from torch's.
        yield from DataLoader(self._data, num_workers=workers, generator=generator, **batched)

    def step(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> float:
        """One step of the optimiser, the recipe and the scheduler; returns the loss."""
        recipe = self.recipe
        value = loss(model, batch)
        shown = float(value.detach())
        if not math.isfinite(shown):
            raise ValueError(
                f"the loss is {shown} at step {recipe.steps + 1}; try a lower learning "
                "rate, or look for values in the data that are not finite"
            )
        recipe.optimizer.zero_grad(set_to_none=True)
        (value + recipe.penalty()).backward()
        recipe.optimizer.step()
        self.swapped = recipe.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return shown

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rank 0 writes the checkpoint beside its place and renames it."""
        generators: list[Any] = [_generators()]
        if self._ranks > 1:
            generators = [None] * self._ranks
            dist.all_gather_object(generators, _generators())
        if self._rank == 0:
            state = {
                "recipe": self.recipe.state_dict(),
                "scheduler": self._scheduler and self._scheduler.state_dict(),
                "run": self._identity(),
                "generators": generators,
            }
            with written_beside(path) as temporary:
                torch.save(state, temporary)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint; only tensors and plain values are read."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RuntimeError(f"{path} is no checkpoint that can be read: {error}") from None
        if not isinstance(state, dict) or state.keys() != {
            "recipe",
            "scheduler",
            "run",
            "generators",
        }:
            raise ValueError(f"{path} is no checkpoint of fit")
        theirs, own = state["run"], self._identity()
        if theirs != own:
            names = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
            told = [
                ", ".join(f"{name} = {run.get(name)!r}" for name in names) for run in (theirs, own)
            ]
            raise ValueError(
                f"{path} is of a run with {told[0]}, but this one has {told[1]}; go on with the "
                "same, or remove the file"
            )
        if (state["scheduler"] is None) != (self._scheduler is None):
            raise ValueError(f"{path} and this run do not both have a scheduler")
        self.recipe.load_state_dict(state["recipe"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        _set_generators(state["generators"][self._rank])

    def _identity(self) -> dict[str, Any]:
        """What a resumed run has in common with the first: how it trains, and on what order."""
        return {
            **self._settings,
            "trained": type(self.recipe).__name__,
            "samples": len(self._data),  # type: ignore[arg-type]
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "ranks": self._ranks,
        }


def _rank() -> tuple[int, int]:
    """(rank, ranks), (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _agreed(value: bool) -> bool:
    """Rank 0's value on all ranks, which must make the same steps."""
    if _rank()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def _wrap(model: nn.Module) -> nn.Module:
    """The model for training: itself, or in DistributedDataParallel where there are ranks."""
    if _rank()[1] == 1:
        return model
    # The packed arrays never change between ranks: not to be broadcast before each pass.
    fixed = [f"{name}.{key}" for name, _ in quant_sparse_layers(model) for key in _PACKED]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, fixed)
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _generators() -> dict[str, Any]:
    """The states of the random generators of this process, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def _reporter(progress: bool | Progress) -> Iterator[Progress]:
    """Gives a progress(phase, step, steps): the caller's, a bar of rich, or one that is silent."""
    if callable(progress):
        yield progress
        return
    Bars = _bars() if progress and sys.stderr.isatty() and _rank()[0] == 0 else None
    if Bars is None:
        yield lambda phase, step, steps: None
        return
    from rich.console import Console

    with Bars(console=Console(stderr=True)) as bars:
        task = bars.add_task("dense")
        yield lambda phase, step, steps: bars.update(
            task, description=phase, completed=step, total=steps
        )


def _bars() -> Any:
    """rich's Progress; None where rich is not installed."""
    before = random.getstate()
    try:
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        return None
    finally:
        random.setstate(before)  # importing rich draws from Python's generator
    return Bars
