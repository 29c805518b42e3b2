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
from ..vpr import TrainingImages, distill, fit_, load_places, whiten_
from ..vpr import train as train_on_places
from ..vpr.train import TrainingRecord
from . import console
from .inputs import open_network
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
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights: .npz (SqueezeNet), .mat (NetVLAD structs), .safetensors."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help='"places": tell places apart. "distill": describe images as the network did '
            "before compression. Default: places where the images are labelled."
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
    Of a .safetensors that is compressed already, the codebooks and biases are trained.
    """
    options = {
        "bits": bits,
        "threshold": threshold,
        "sparsity": sparsity,
        "method": method,
        "entropy_lambda": entropy_lambda,
        "group_size": group_size,
    }
    for path in (output, checkpoint):
        if path is not None and not path.parent.is_dir():  # not to be found out after the training
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    model = open_network(network, weights)
    settings = _recipe(model, network, dense, recipe, config, options, steps)
    data = load_places(images, image_size(size))
    loss = _loss_of(loss, data, images)
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
    guide = None if teacher is None else pk.load(teacher).to(torch.device(device))
    model.to(torch.device(device))

    labelled = f" of {len(data.places)} places" if data.labels is not None else ""
    what = {"places": "to tell places apart", "distill": "to be described as before"}[loss]
    if teacher is not None:
        what = f"to be described as by {teacher}"
    console.err.print(f"{len(data)} images{labelled}, {what}", highlight=False, markup=False)
    with console.progress_bars() as progress:
        _fit(model, network, weights, data, dim, seed, progress)
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
    try:
        with _training_bar() as on_step:
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
                    model, guide, data.images, batch_size=batch_size, on_step=on_step, **shared
                )
    except KeyboardInterrupt:
        if checkpoint is not None and checkpoint.exists():
            console.err.print(
                f"{checkpoint} is kept: run the same command again to go on", markup=False
            )
        raise
    written = pk.save(model, output)
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
        return pk.RecipeConfig.from_file(recipe)
    return pk.RecipeConfig.over_steps(steps, compress_config(config, **options))


def _loss_of(loss: str | None, data: TrainingImages, folder: Path) -> str:
    if loss is None:
        return "distill" if data.labels is None else "places"
    if loss not in ("places", "distill"):
        raise ValueError(f'--loss is "{loss}", expected places or distill')
    if loss == "places" and data.labels is None:
        raise ValueError(f"--loss places needs labels: one subfolder a place in {folder}")
    return loss


def _fit(
    model: nn.Module,
    network: str,
    weights: Path | None,
    data: TrainingImages,
    dim: int | None,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """NetVLAD's clusters and the whitening, where the weights bring none."""
    suffix = "" if weights is None else weights.suffix.lower()
    if network.endswith(".safetensors") or suffix == ".safetensors":
        if dim is not None:
            raise ValueError(
                "--dim is of a whitening that is fitted here; this network has its own"
            )
        return
    outputs = "auto" if dim is None else dim or None
    if suffix != ".mat":
        fit_(model, data.images, outputs, seed=seed, progress=progress)
    elif model.whiten is None:
        whiten_(model, data.images, outputs, seed=seed, progress=progress)
    elif dim is not None:
        raise ValueError("--dim is of a whitening that is fitted here; these weights have one")


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
