"""`placekern train`: a network, a folder of images and a recipe become one compressed file.

The surprise: images without labels are enough. The network before compression is then the teacher
of the network that is compressed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import placekern as pk

from ..compress.train import FitStep
from ..nn import quant_sparse_layers
from ..vpr import TrainingImages, distill, load_places
from ..vpr import train as train_on_places
from ..vpr.digest import file_digest, state_digest
from ..vpr.fit import auto_dim
from ..vpr.retrieve import device_of
from ..vpr.train import TrainingRecord, check_recipe
from . import console
from .inputs import check_folder, fit_what_is_missing, missing_parts, open_network
from .settings import (
    Bits,
    Config,
    EntropyLambda,
    GroupSize,
    Json,
    Method,
    Size,
    Sparsity,
    Threshold,
    Weights,
    compress_config,
    image_size,
    refuse_options,
)

_VIEWS = 4


def train(
    network: Annotated[
        str, typer.Argument(help='"<backbone>-netvlad", or a .safetensors written by placekern.')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    images: Annotated[
        Path, typer.Option(help="Folder of images to train on; labelled by a subfolder a place.")
    ],
    weights: Weights = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help='"places": tell places apart. "distill": describe images as the network did '
            "before compression. Default: places where the images are labelled, and no --teacher "
            "is given."
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="With distill: a .safetensors to learn from instead of itself."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="What to compress and when: RecipeConfig as JSON or YAML. Default: prune over "
            "the first half of the steps, quantize at three fifths, then train codebooks."
        ),
    ] = None,
    config: Config = None,
    bits: Bits = None,
    threshold: Threshold = None,
    sparsity: Sparsity = None,
    method: Method = None,
    entropy_lambda: EntropyLambda = None,
    group_size: GroupSize = None,
    dense: Annotated[bool, typer.Option("--dense", help="Train without compressing.")] = False,
    dim: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Outputs of the whitening, where it is fitted here; 0: none. Default: a third of "
            "the images, at most 4096.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Adam's at its highest.")] = 1e-3,
    batch_size: Annotated[
        int, typer.Option(min=1, help=f"Images of a step; with places, {_VIEWS} of each place.")
    ] = 36,
    size: Size = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Written as it trains; run the same command again to go on from it."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 25,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Annotated[str, typer.Option(help='"cpu" or "cuda".')] = "cpu",
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a network, and compress it on the way, into one file.

    NetVLAD and the whitening are first fitted to the images where the weights bring none.
    Of a .safetensors that is compressed already, also of one with layers that stayed dense, nothing
    more is compressed: codebooks, biases and dense layers are trained, and zeros stay zero.
    """
    options = {
        "bits": bits,
        "threshold": threshold,
        "sparsity": sparsity,
        "method": method,
        "entropy_lambda": entropy_lambda,
        "group_size": group_size,
    }
    check_folder(output, checkpoint)
    model = open_network(network, weights)
    settings = _recipe(model, network, dense, recipe, config, options, steps)
    data = load_places(images, image_size(size))
    loss = _loss_of(loss, teacher, data, images)
    if loss == "distill" and settings is None and teacher is None:
        what = "--dense" if dense else f"{network} is compressed already, and"
        raise ValueError(
            f"{what} leaves nothing to learn from itself: give --teacher, or --loss places with "
            "labelled images"
        )
    if loss == "places" and teacher is not None:
        raise ValueError('--teacher goes with --loss distill, but the loss is "places"')
    if loss == "places" and batch_size < 2 * _VIEWS:
        raise ValueError(
            f"--batch-size is {batch_size}, expected at least {2 * _VIEWS}: {_VIEWS} images of "
            "each of 2 places"
        )
    _check_dim(dim, model, network, weights)
    guide = None if teacher is None else pk.load(teacher).to(torch.device(device))
    # The network is its own teacher once it is fitted, but what is fitted again has other last bits
    # with another number of threads: what goes into the fit is what stays the same.
    name = None
    if loss == "distill" and checkpoint is not None:
        name = f"{state_digest(model)}, seed {seed}" if teacher is None else file_digest(teacher)
    model.to(torch.device(device))

    labelled = f" of {len(data.places)} places" if data.labels is not None else ""
    what = {"places": "to tell places apart", "distill": "to be described as before"}[loss]
    if teacher is not None:
        what = f"to be described as by {teacher}"
    console.err.print(f"{len(data)} images{labelled}, {what}", highlight=False, markup=False)
    model, kept = _fitted(model, network, weights, data, dim, seed, checkpoint)
    shared: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "keep_zeros": True,
        "recipe": settings,
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "workers": workers,
    }
    with console.told_to_go_on(checkpoint), _training_bar() as on_step:
        if loss == "places":
            record = train_on_places(
                model,
                data.images,
                data.labels,
                places=batch_size // _VIEWS,
                views=_VIEWS,
                initialise=False,
                on_step=on_step,
                **shared,
            )
        else:
            guide = guide or copy.deepcopy(model)
            record = distill(
                model,
                guide,
                data.images,
                teacher_name=name,
                batch_size=batch_size,
                on_step=on_step,
                **shared,
            )
    written = pk.save(model, output)
    if kept is not None:
        kept.unlink(missing_ok=True)
    _show(record, loss, data, output, written, as_json)


def _recipe(
    model: nn.Module,
    network: str,
    dense: bool,
    recipe: Path | None,
    config: Path | None,
    options: dict[str, Any],
    steps: int,
) -> pk.RecipeConfig | None:
    """What to compress and when; None where nothing is."""
    given = {"recipe": recipe, "config": config, **options}
    if next(quant_sparse_layers(model), None) is not None:
        refuse_options(f"{network} is compressed already, which", given | {"dense": dense or None})
        return None
    if dense:
        refuse_options("--dense", given)
        return None
    if recipe is not None:
        refuse_options(f"--recipe {recipe}", {"config": config, **options})
        read = pk.RecipeConfig.from_file(recipe)
        check_recipe(read, steps)
        return read
    return pk.RecipeConfig.over_steps(steps, compress_config(config, **options))


def _loss_of(loss: str | None, teacher: Path | None, data: TrainingImages, folder: Path) -> str:
    if loss is None:
        return "distill" if data.labels is None or teacher is not None else "places"
    if loss not in ("places", "distill"):
        raise ValueError(f'--loss is "{loss}", expected places or distill')
    if loss == "places" and data.labels is None:
        raise ValueError(f"--loss places needs labels: one subfolder a place in {folder}")
    return loss


def _check_dim(dim: int | None, model: nn.Module, network: str, weights: Path | None) -> None:
    if dim is not None and "whitening" not in missing_parts(model, network, weights):
        raise ValueError(
            f"--dim is of a whitening that is fitted here, but {weights or network} is trained as "
            "it is: leave --dim out"
        )


def _fitted(
    model: nn.Module,
    network: str,
    weights: Path | None,
    data: TrainingImages,
    dim: int | None,
    seed: int,
    checkpoint: Path | None,
) -> tuple[nn.Module, Path | None]:
    """The network with what its weights do not bring, and the file that keeps it for a resume.

    That file stands beside the checkpoint, so that a run goes on at once, from the same bits.
    """
    if not missing_parts(model, network, weights):
        return model, None
    kept = None
    if checkpoint is not None:
        kept = checkpoint.with_name(checkpoint.name + ".fitted.safetensors")
        if checkpoint.exists() and kept.exists():
            before = pk.load(kept)
            netvlad = before.netvlad
            auto = auto_dim(len(data), netvlad.clusters * netvlad.dim)
            if before.architecture["kwargs"]["dim"] == (auto if dim is None else dim or None):
                return before.to(device_of(model)), kept
    outputs = "auto" if dim is None else dim or None
    with console.progress_bars() as progress:
        fit_what_is_missing(model, network, weights, data.images, outputs, seed, progress)
    if kept is not None and not checkpoint.exists():
        pk.save(model, kept)
    return model, kept


@contextmanager
def _training_bar() -> Iterator[Callable[[FitStep], None]]:
    """Gives an on_step that draws a bar with phase and loss; lines where there is no terminal."""
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    terminal = console.err.is_terminal
    with Progress(*columns, console=console.err, disable=not terminal) as bars:
        task = bars.add_task("train", total=None)

        def on_step(step: FitStep) -> None:
            text = f"{step.phase}, loss {step.loss:.4f}"
            bars.update(task, description=text, completed=step.step, total=step.steps)
            if not terminal and (step.step % max(1, step.steps // 20) == 0):
                console.err.print(f"step {step.step}/{step.steps}: {text}", highlight=False)

        yield on_step


def _show(
    record: TrainingRecord,
    loss: str,
    data: TrainingImages,
    output: Path,
    written: int,
    as_json: bool,
) -> None:
    report = record.report
    if as_json:
        layers = [] if report is None else [asdict(layer) for layer in report.layers]
        console.print_json(
            {
                "file": str(output),
                "file_bytes": written,
                "loss": loss,
                "losses": record.losses,
                "steps": record.steps,
                "resumed_at": record.resumed_at,
                "seconds": record.seconds,
                "images": len(data),
                "places": len(data.places),
                "pruned": None if report is None else report.pruned,
                "layers": layers,
            }
        )
        return
    if report is not None and report.compressed is not None:
        console.out.print(report.compressed.table())
    trained = f"{record.steps} steps"
    if record.resumed_at:
        trained += f", resumed at {record.resumed_at}"
    if record.losses:
        few = max(1, len(record.losses) // 10)
        first, last = record.losses[:few], record.losses[-few:]
        trained += f", loss {sum(first) / few:.4f} -> {sum(last) / few:.4f}"
    console.out.print(trained, highlight=False)
    console.out.print(f"{output}: {console.size(written)}, every byte counted")
