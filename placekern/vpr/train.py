"""Trains a place-recognition network on labelled places, or to describe images as another does.

Both run through `placekern.compress.fit`, so that a recipe can compress the network on the way and
a run that was killed goes on with the same bits. The surprise: a mirrored place is another place.
Flipping all the views of a place makes one that the set does not hold, so every set has twice its
places for nothing; a flip is no augmentation of the same place, as left and right are what tells
streets apart.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from placekern.compress import Recipe, RecipeConfig, fit
from placekern.compress.fine_tune import FineTune
from placekern.compress.recipe_report import RecipeReport
from placekern.compress.train import FitStep
from placekern.vpr.digest import state_digest, tensor_digest
from placekern.vpr.draws import ImageDraws, PlaceDraws
from placekern.vpr.fit import init_netvlad_
from placekern.vpr.losses import multi_similarity_loss
from placekern.vpr.retrieve import device_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingRecord:
    """What happened.

    Attributes:
        losses: of each step of this run, not of those before a resume.
        steps: made, those before a resume included.
        seconds: taken by this run, with the initialisation.
        finished: False where the limit of seconds ended the run.
        resumed_at: the step that a checkpoint led back to; 0 without one.
        report: of the recipe, at its end; None where there was none.
    """

    losses: list[float] = field(repr=False)
    steps: int
    seconds: float
    finished: bool
    resumed_at: int = 0
    report: RecipeReport | None = field(default=None, repr=False)


def check_recipe(recipe: RecipeConfig, steps: int) -> None:
    """Raises where a recipe is not done when a run is over.

    Raises:
        ValueError: says until when it prunes and quantizes.
    """
    due = max(recipe.pruning.last(1), recipe.quantize_at or 0)
    if due > steps:
        raise ValueError(
            f"the recipe prunes and quantizes until step {due}, but the run has {steps} "
            "steps: let it train longer, or the recipe be done sooner"
        )


def train(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    steps: int = 350,
    places: int = 9,
    views: int = 4,
    learning_rate: float = 2e-3,
    seconds: float | None = None,
    initialise: bool = True,
    keep_zeros: bool = False,
    recipe: RecipeConfig | Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[FitStep], None] | None = None,
) -> TrainingRecord:
    """Trains `model` in place to tell places apart, on batches of `places` x `views` images.

    Every parameter that requires a gradient is trained: weights of dense layers, codebooks and
    biases of compressed ones, NetVLAD's centroids and assignment. With a recipe, dense layers are
    pruned and quantized on the way. Adam's learning rate rises over the first twentieth of the
    steps and falls to zero along a cosine. A run depends only on `seed`, the number of threads and
    the machine's arithmetic, unless `seconds` cuts it short; batch i depends on (seed, i) alone.

    Under `torchrun`, as with `placekern.compress.fit`, each rank has batches of its own.

    Args:
        model: a `PlaceNet`, or any module from images to descriptors of unit length when
            `initialise` is False.
        images: float32 [n, 3, H, W] in [0, 1]; or a sequence of [3, H, W] of one size, such as an
            `ImageList`, whose files are read when a batch needs them.
        labels: int64 [n], the place of each.
        steps: optimiser steps.
        places: places in a batch (mirrored ones included).
        views: images of each.
        learning_rate: Adam's at its highest.
        seconds: a safety net: no step begins after so many. None: no limit.
        initialise: start from k-means centroids (`init_netvlad_`, which takes a whitening out);
            False to go on with a trained network.
        keep_zeros: hold weights that are zero, those of a pruned network, at zero. A recipe holds
            those of the layers that it compresses, whatever this says.
        recipe: what to compress and when, counted in these steps: a `RecipeConfig`, or a dict of
            its fields. None compresses nothing.
        checkpoint: a file to write; where it exists, the run goes on from it, and ends with the
            same bits as one that was never interrupted. It may go once the model is saved.
        checkpoint_every: steps between checkpoints.
        seed: of the initialisation and the batches.
        workers: processes that read images; 0 reads in this one.
        progress: called as progress("train", step, steps).
        on_step: called with a `placekern.compress.train.FitStep` after each step, for its loss.

    Returns:
        A `TrainingRecord`.

    Raises:
        RuntimeError: a checkpoint that cannot be read.
        ValueError: shapes that do not fit, too few places or views, nothing to train, descriptors
            that are not finite, a recipe that fits neither the model nor the steps, or a
            checkpoint of another run.
    """
    if (isinstance(images, Tensor) and images.ndim != 4) or len(images) != len(labels):
        raise ValueError(
            f"training needs images [n, 3, H, W] and a label each, got {_shape(images)} and "
            f"{list(labels.shape)}"
        )
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    members = [rows for rows in members if len(rows) >= 2]
    if len(members) < 2 or places < 2 or views < 2:
        raise ValueError(
            f"training needs at least 2 places with 2 views each, in the data and in a batch; got "
            f"{len(members)} such places and batches of {places} x {views}"
        )
    run = _Run("train", model, steps, learning_rate, seconds, keep_zeros, recipe)
    if initialise:
        init_netvlad_(model, images, seed=seed)
    device = device_of(model)

    def loss(trained: nn.Module, drawn: Sequence[Tensor]) -> Tensor:
        batch, targets = drawn
        return multi_similarity_loss(_describe(trained, batch.to(device)), targets.to(device))

    return run(
        PlaceDraws(images, members, places, views, run.batches, seed),
        loss,
        settings={
            "loss": "places",
            **_of_images(images),
            "labels": tensor_digest(labels),
            "places": places,
            "views": views,
        },
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        seed=seed,
        workers=workers,
        progress=progress,
        on_step=on_step,
    )


def distill(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor | Sequence[Tensor],
    *,
    teacher_name: str | None = None,
    steps: int = 60,
    batch_size: int = 36,
    learning_rate: float = 2e-3,
    seconds: float | None = None,
    keep_zeros: bool = True,
    recipe: RecipeConfig | Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[FitStep], None] | None = None,
) -> TrainingRecord:
    """Fine-tunes a pruned or compressed `model` in place to describe images as `teacher` does.

    The loss is the mean of 1 - cosine between the two networks' descriptors of the same images
    (knowledge distillation, Hinton, Vinyals and Dean 2015, on descriptors in place of class
    scores). It needs no labels, so a map's own images will do, and has no margin to tune: a
    compressed network starts close to its teacher, where a metric loss mostly pulls it elsewhere.

    With a recipe, `model` is a dense copy of the teacher, which is compressed on the way.

    Args:
        model: the network to repair; of compressed layers the codebooks and biases are trained.
        teacher: the dense network, with descriptors of the same length, on the same device; it is
            left as it is.
        images: float32 [n, 3, H, W] in [0, 1], or a sequence, as in `train`; mirrored ones are used
            too.
        teacher_name: what a checkpoint knows the teacher by, which must be the same in a run that
            goes on from it. None: a digest of its state dict. Give one where the teacher is fitted
            anew for each run, as its last bits then depend on the number of threads.
        steps: optimiser steps.
        batch_size: images of a step.
        learning_rate, seconds, keep_zeros, seed: as in `train`.
        recipe, checkpoint, checkpoint_every, workers: as in `train`.
        progress: called as progress("fine-tune", step, steps).
        on_step: as in `train`.

    Returns:
        A `TrainingRecord`.

    Raises:
        RuntimeError, ValueError: as `train`; also a teacher that is the model itself.
    """
    if (isinstance(images, Tensor) and images.ndim != 4) or not len(images) or batch_size < 1:
        raise ValueError(
            f"fine-tuning needs images [n, 3, H, W] and a positive batch_size, got "
            f"{_shape(images)} and {batch_size}"
        )
    if teacher is model:
        raise ValueError("the teacher is the model itself, which changes: give a copy.deepcopy")
    if teacher_name is None and checkpoint is not None:
        teacher_name = state_digest(teacher)
    run = _Run("fine-tune", model, steps, learning_rate, seconds, keep_zeros, recipe)
    device = device_of(model)

    def loss(trained: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.to(device)
        with torch.no_grad():
            targets = teacher(batch)
        descriptors = _describe(trained, batch)
        if descriptors.shape != targets.shape:
            raise ValueError(
                f"the model's descriptors have {descriptors.shape[1]} values and the teacher's "
                f"{targets.shape[1]}: they must be of one length"
            )
        return (1 - (descriptors * targets).sum(1)).mean()

    was_training = teacher.training
    teacher.eval()
    try:
        return run(
            ImageDraws(images, batch_size, run.batches, seed),
            loss,
            settings={
                "loss": "distill",
                **_of_images(images),
                "batch": batch_size,
                "teacher": teacher_name,
            },
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            seed=seed,
            workers=workers,
            progress=progress,
            on_step=on_step,
        )
    finally:
        teacher.train(was_training)


class _Run:
    """What both losses have in common: Adam with warm-up and cosine, through `fit`."""

    def __init__(
        self,
        label: str,
        model: nn.Module,
        steps: int,
        learning_rate: float,
        seconds: float | None,
        keep_zeros: bool,
        recipe: RecipeConfig | Mapping[str, Any] | None,
    ) -> None:
        self._begun = time.perf_counter()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained or steps < 1:
            raise ValueError(
                f"{label} needs at least 1 step and a parameter that requires a gradient, got "
                f"{steps} steps and {len(trained)} parameters"
            )
        if recipe is not None and not isinstance(recipe, RecipeConfig):
            recipe = RecipeConfig.from_dict(recipe)
        if recipe is not None:
            check_recipe(recipe, steps)
        self._label = label
        self._model = model
        self._steps = steps
        self._learning_rate = learning_rate
        self._seconds = seconds
        self._keep_zeros = keep_zeros
        self._config = recipe

    @property
    def batches(self) -> int:
        """To be drawn: under torchrun each rank has its own in every step."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return self._steps * ranks

    def __call__(
        self,
        data: PlaceDraws | ImageDraws,
        loss: Callable[[nn.Module, Any], Tensor],
        settings: Mapping[str, Any],
        progress: Progress | None,
        **options: Any,
    ) -> TrainingRecord:
        # The parameters of now: the initialisation may have taken some out.
        trained = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self._learning_rate)
        recipe: Recipe | FineTune = FineTune(self._model, optimizer, self._keep_zeros)
        if self._config is not None:
            recipe = Recipe(self._model, self._config, optimizer)
        left = self._seconds
        if left is not None:
            left -= time.perf_counter() - self._begun
        record = fit(
            recipe,
            data,
            loss,
            epochs=1,
            batch_size=None,
            shuffle=False,
            scheduler=self._schedule,
            seconds=left,
            settings={
                "steps": self._steps,
                "learning_rate": self._learning_rate,
                "parameters": sum(p.numel() for p in trained),
                **settings,
            },
            progress=False if progress is None else self._labelled(progress),
            **options,
        )
        return TrainingRecord(
            record.losses,
            record.steps,
            time.perf_counter() - self._begun,
            record.finished,
            record.resumed_at,
            recipe.report() if isinstance(recipe, Recipe) else None,
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        steps = self._steps
        warmup = max(1, steps // 20)
        return LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        )

    def _labelled(self, progress: Progress) -> Progress:
        return lambda phase, step, steps: progress(self._label, step, steps)


def _of_images(images: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """What a checkpoint knows images by: how many, and the shape of one."""
    return {"images": len(images), "image": list(images[0].shape)}


def _shape(images: Tensor | Sequence[Tensor]) -> str:
    return str(list(images.shape)) if isinstance(images, Tensor) else f"{len(images)} images"


def _describe(model: nn.Module, batch: Tensor) -> Tensor:
    descriptors = model(batch)
    # Mining compares, and a comparison with NaN is false: the loss would be a calm 0.
    if not torch.isfinite(descriptors).all():
        raise ValueError(
            "the model's descriptors hold NaN or infinity: try a lower learning_rate, or look for "
            "weights that are not finite"
        )
    return descriptors
