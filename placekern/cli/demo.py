"""`placekern demo`: train, compress, retrieve, report, on a rendered city or on real images.

The whitening is fitted on training images for the city, and on the references (the map) for real
images, of which there is no training part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import placekern as pk

from ..io.atomic import written_beside
from ..vpr import (
    City,
    PlaceDataset,
    PlaceNet,
    Retrieval,
    Row,
    build,
    compare,
    describe,
    distill,
    fit_,
    label_of,
    load,
    load_corridor,
    retrieval_sheet,
    save_sheet,
    train,
    whiten_,
)
from ..vpr.retrieve import Progress
from . import console
from .settings import Json, Size, image_size

CITY_SPARSITIES = (None, 0.3, 0.5)
DATASET_THRESHOLDS = (0.005, 0.01, 0.02)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the picture, table and model.")
    ] = Path("demo"),
    network: Annotated[
        str, typer.Option(help="With --dataset: the network to compress.")
    ] = "squeezenet1_1-netvlad",
    weights: Annotated[
        Path | None, typer.Option(help="With --dataset: trained weights of the backbone.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Real images: a folder with query/, ref/ and ground_truth.csv."),
    ] = None,
    size: Size = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps on the city.")] = 350,
    tuning: Annotated[
        int, typer.Option(min=1, help="Fine-tuning steps of each compressed network on the city.")
    ] = 30,
    seed: Annotated[int, typer.Option(help="Of the city and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Train, compress, retrieve and report, on a city it renders itself or on real images.

    Without options nothing is downloaded or needed: it renders a small city, trains a small network
    on one part of it, compresses it and tests on the other part. With --dataset and --weights it
    compresses a real network and tests on real photographs.
    """
    if (weights is None) != (dataset is None):
        raise ValueError("--weights and --dataset go together: give both, or neither for the city")
    output.mkdir(parents=True, exist_ok=True)
    with console.progress_bars() as progress:
        if dataset is not None:
            model = load(network, weights)
            data = load_corridor(dataset, image_size(size))
            fit_(model, data.references, seed=seed, progress=progress)
            title = f"{network} on {dataset.name}"
            settings = [
                pk.CompressConfig(bits=bits, threshold=threshold)
                for bits in (8, 5)
                for threshold in DATASET_THRESHOLDS
            ]
            finetune = None
        else:
            model, data, images = _train_on_city(steps, seed, progress)
            title = "tiny-netvlad, unseen places of a rendered city"
            settings = [
                pk.CompressConfig(bits=bits, sparsity=sparsity)
                for bits in (8, 5)
                for sparsity in CITY_SPARSITIES
            ]

            def finetune(compressed: PlaceNet, _: pk.CompressConfig) -> None:
                # The dense network teaches the compressed one: only codebooks and biases move.
                distill(compressed, model, images, steps=tuning, seed=seed, progress=progress)

        networks: dict[str, PlaceNet] = {}

        def keep(compressed: PlaceNet, config: pk.CompressConfig) -> None:
            if finetune is not None:
                finetune(compressed, config)
            networks[label_of(config)] = compressed

        rows = compare(model, data, settings, finetune=keep, progress=progress)
        shown = label_of(settings[-2])
        pk.save(networks[shown], output / "model.safetensors")
        _save_picture(model, networks[shown], data, rows, shown, output)

    title += f": {len(data.queries)} queries, {len(data.references)} references"
    values = {"title": title, "rows": [console.row_values(row) for row in rows]}
    table_file = output / "table.json"
    with written_beside(table_file) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
    if as_json:
        console.print_json(values)
        return
    console.out.print(console.comparison_table(rows, title))
    console.out.print(f"picture: {output / 'retrieved.png'}")
    console.out.print(f"model:   {output / 'model.safetensors'}  (placekern inspect shows it)")
    console.out.print(f"table:   {table_file}")


def _train_on_city(
    steps: int, seed: int, progress: Progress
) -> tuple[PlaceNet, PlaceDataset, Tensor]:
    torch.manual_seed(seed)
    city = City(seed)
    seen = city.training(progress=progress)
    unseen = city.test(progress=progress)
    model = build("tiny-netvlad", clusters=32, seed=seed)
    train(model, seen.images, seen.labels, steps=steps, seconds=120, seed=seed, progress=progress)
    mirrored = torch.cat([seen.images, seen.images.flip(3)])
    whiten_(model.eval(), mirrored, dim=512, seed=seed, progress=progress)
    return model, unseen, seen.images


def _save_picture(
    dense: PlaceNet,
    compressed: PlaceNet,
    data: PlaceDataset,
    rows: list[Row],
    setting: str,
    output: Path,
) -> None:
    found = {}
    for name, network in (("dense", dense), ("compressed", compressed)):
        references = describe(network, data.references)
        found[name] = Retrieval.of(describe(network, data.queries), references)
    by_label = {row.label: row for row in rows}
    subtitle = "      ".join(
        f"{title}: recall@1 {by_label[label].recalls[1]:.3f}, "
        f"{by_label[label].disk_bytes / 1e6:.2f} MB"
        for title, label in (("dense", "dense"), (f"compressed ({setting})", setting))
    )
    sheet = retrieval_sheet(
        data.queries, data.references, found, data.positives, rows=3, subtitle=subtitle
    )
    save_sheet(sheet, output / "retrieved.png")
