"""`placekern demo`: train, compress, retrieve, report, on a rendered city or on real images.

The whitening is fitted on training images for the city, and on the references (the map) for real
images, of which there is no training part.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated

import torch
import typer

import placekern as pk

from ..vpr import (
    PlaceDataset,
    PlaceNet,
    Row,
    build,
    compare,
    describe,
    fit_,
    label_of,
    load,
    load_corridor,
    whiten_,
)
from ..vpr.city import City
from ..vpr.figure import Retrieval, retrieval_sheet, save_sheet
from ..vpr.retrieve import Progress
from ..vpr.train import train
from . import console
from .settings import Json, Size, image_size

CITY_THRESHOLDS = (0.02, 0.05, 0.08)
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
    steps: Annotated[int, typer.Option(min=1, help="Training steps on the city.")] = 400,
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
            thresholds, title = DATASET_THRESHOLDS, f"{network} on {dataset.name}"
        else:
            model, data = _train_on_city(steps, seed, progress)
            thresholds, title = CITY_THRESHOLDS, "tiny-netvlad on a rendered city"
        settings = [
            pk.CompressConfig(bits=bits, threshold=threshold)
            for bits in (8, 5)
            for threshold in thresholds
        ]
        rows = compare(model, data, settings, progress=progress)
        shown = settings[-2]
        compressed = copy.deepcopy(model)
        pk.compress_(compressed, shown)
        pk.save(compressed, output / "model.safetensors")
        _save_picture(model, compressed, data, rows, label_of(shown), output)

    title += f": {len(data.queries)} queries, {len(data.references)} references"
    values = {"title": title, "rows": [console.row_values(row) for row in rows]}
    table_file = output / "table.json"
    table_file.write_text(json.dumps(values, indent=2) + "\n")
    if as_json:
        console.print_json(values)
        return
    console.out.print(console.comparison_table(rows, title))
    console.out.print(f"picture: {output / 'retrieved.png'}")
    console.out.print(f"model:   {output / 'model.safetensors'}  (placekern inspect shows it)")
    console.out.print(f"table:   {table_file}")


def _train_on_city(steps: int, seed: int, progress: Progress) -> tuple[PlaceNet, PlaceDataset]:
    torch.manual_seed(seed)
    city = City(seed)
    seen = city.training(progress=progress)
    unseen = city.test(progress=progress)
    model = build("tiny-netvlad", clusters=16, seed=seed)
    train(model, seen.images, seen.labels, steps=steps, seconds=120, seed=seed, progress=progress)
    return whiten_(model.eval(), seen.images, seed=seed, progress=progress), unseen


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
    sheet = retrieval_sheet(data.queries, data.references, found, data.positives, subtitle=subtitle)
    save_sheet(sheet, output / "retrieved.png")
