"""Trains a place-recognition network on labelled places, small enough for a CPU and a minute.

The surprise: a mirrored place is another place. Flipping all the views of a place makes one that
the set does not hold, so every set has twice its places for nothing; a flip is no augmentation of
the same place, as left and right are what tells streets apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from placekern.vpr.fit import init_netvlad_

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingRecord:
    """What happened.

    Attributes:
        losses: of each step.
        steps: made.
        seconds: taken, with the initialisation.
        finished: False where the limit of seconds ended the run.
    """

    losses: list[float] = field(repr=False)
    steps: int
    seconds: float
    finished: bool


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


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 350,
    places: int = 9,
    views: int = 4,
    learning_rate: float = 2e-3,
    seconds: float | None = None,
    initialise: bool = True,
    keep_zeros: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingRecord:
    """Trains `model` in place to tell places apart, on batches of `places` x `views` images.

    Every parameter that requires a gradient is trained: weights of dense layers, codebooks and
    biases of compressed ones, NetVLAD's centroids and assignment. Adam's learning rate rises over
    the first twentieth of the steps and falls to zero along a cosine. A run depends only on `seed`,
    the number of threads and the machine's arithmetic, unless `seconds` cuts it short.

    Args:
        model: a `PlaceNet`, or any module from images to descriptors of unit length when
            `initialise` is False.
        images: float32 [n, 3, H, W] in [0, 1].
        labels: int64 [n], the place of each.
        steps: optimiser steps.
        places: places in a batch (mirrored ones included).
        views: images of each.
        learning_rate: Adam's at its highest.
        seconds: a safety net: no step begins after so many. None: no limit.
        initialise: start from k-means centroids (`init_netvlad_`, which takes a whitening out);
            False to go on with a trained network.
        keep_zeros: hold weights that are zero, those of a pruned network, at zero.
        seed: of the initialisation and the batches.
        progress: called as progress("train", step, steps).

    Returns:
        A `TrainingRecord`.

    Raises:
        ValueError: shapes that do not fit, too few places or views, nothing to train, or
            descriptors that are not finite.
    """
    if images.ndim != 4 or len(images) != len(labels):
        raise ValueError(
            f"training needs images [n, 3, H, W] and a label each, got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    members = [rows for rows in members if len(rows) >= 2]
    if len(members) < 2 or places < 2 or views < 2:
        raise ValueError(
            f"training needs at least 2 places with 2 views each, in the data and in a batch; got "
            f"{len(members)} such places and batches of {places} x {views}"
        )
    begun = time.perf_counter()
    if initialise:
        init_netvlad_(model, images, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def loss_of_batch() -> Tensor:
        batch, targets = _draw_places(images, members, places, views, generator)
        return multi_similarity_loss(_describe(model, batch), targets)

    return _optimise(
        model, loss_of_batch, "train", steps, learning_rate, seconds, begun, keep_zeros, progress
    )


def distill(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    steps: int = 60,
    batch_size: int = 36,
    learning_rate: float = 2e-3,
    seconds: float | None = None,
    keep_zeros: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingRecord:
    """Fine-tunes a pruned or compressed `model` in place to describe images as `teacher` does.

    The loss is the mean of 1 - cosine between the two networks' descriptors of the same images
    (knowledge distillation, Hinton, Vinyals and Dean 2015, on descriptors in place of class
    scores). It needs no labels, so a map's own images will do, and has no margin to tune: a
    compressed network starts close to its teacher, where a metric loss mostly pulls it elsewhere.

    Args:
        model: the network to repair; of compressed layers the codebooks and biases are trained.
        teacher: the dense network, with descriptors of the same length; it is left as it is.
        images: float32 [n, 3, H, W] in [0, 1]; mirrored ones are used too.
        steps: optimiser steps.
        batch_size: images of a step.
        learning_rate, seconds, keep_zeros, seed: as in `train`.
        progress: called as progress("fine-tune", step, steps).

    Returns:
        A `TrainingRecord`.

    Raises:
        ValueError: shapes that do not fit, nothing to train, or descriptors that are not finite.
    """
    if images.ndim != 4 or not len(images) or batch_size < 1:
        raise ValueError(
            f"fine-tuning needs images [n, 3, H, W] and a positive batch_size, got "
            f"{list(images.shape)} and {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        batch = images[rows]
        if torch.rand(1, generator=generator) < 0.5:
            batch = batch.flip(3)
        with torch.no_grad():
            targets = teacher(batch)
        descriptors = _describe(model, batch)
        if descriptors.shape != targets.shape:
            raise ValueError(
                f"the model's descriptors have {descriptors.shape[1]} values and the teacher's "
                f"{targets.shape[1]}: they must be of one length"
            )
        return (1 - (descriptors * targets).sum(1)).mean()

    was_training = teacher.training
    teacher.eval()
    begun = time.perf_counter()
    try:
        return _optimise(
            model,
            loss_of_batch,
            "fine-tune",
            steps,
            learning_rate,
            seconds,
            begun,
            keep_zeros,
            progress,
        )
    finally:
        teacher.train(was_training)


def _optimise(
    model, loss_of_batch, label, steps, learning_rate, seconds, begun, keep_zeros, progress
) -> TrainingRecord:
    """Adam with warm-up and cosine, until `steps` or until `seconds` have gone since `begun`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or steps < 1:
        raise ValueError(
            f"{label} needs at least 1 step and a parameter that requires a gradient, got {steps} "
            f"steps and {len(parameters)} parameters"
        )
    # Codebooks and biases have one dimension: a zero there is a value like any other.
    pruned = [(p, p == 0) for p in parameters if keep_zeros and p.ndim > 1 and (p == 0).any()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    losses: list[float] = []
    was_training = model.training
    model.train()
    try:
        for step in range(steps):
            if seconds is not None and time.perf_counter() - begun > seconds:
                break
            loss = loss_of_batch()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter, zero in pruned:
                    parameter.masked_fill_(zero, 0)
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(label, step + 1, steps)
    finally:
        model.train(was_training)
    return TrainingRecord(losses, len(losses), time.perf_counter() - begun, len(losses) == steps)


def _describe(model, batch) -> Tensor:
    descriptors = model(batch)
    # Mining compares, and a comparison with NaN is false: the loss would be a calm 0.
    if not torch.isfinite(descriptors).all():
        raise ValueError(
            "the model's descriptors hold NaN or infinity: try a lower learning_rate, or look for "
            "weights that are not finite"
        )
    return descriptors


def _draw_places(images, members, places, views, generator):
    """Images [places * views, 3, H, W] and labels; place i + len(members) is place i mirrored."""
    count = len(members)
    drawn = torch.randperm(2 * count, generator=generator)[:places].tolist()
    parts, targets = [], []
    for place in drawn:
        rows = members[place % count]
        rows = rows[torch.randperm(len(rows), generator=generator)[:views]]
        chosen = images[rows]
        parts.append(chosen.flip(3) if place >= count else chosen)
        targets += [place] * len(rows)
    return torch.cat(parts), torch.tensor(targets)
