"""`placekern sensitivity` and `placekern suggest`: which layer bears what, and settings from it.

The surprise: "cosine" needs neither queries nor labels. It compares the references' descriptors
with those of the dense network, so settings are not chosen on the queries they are tested with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..compress.config import CompressConfig
from ..compress.sensitivity import BITS_TRIED, Sensitivity, check_identity
from ..compress.sensitivity import sensitivity as measure
from ..compress.suggest import MB
from ..compress.suggest import suggest as choose
from ..vpr import ImageList, PlaceDataset, describe, list_images, recall_at, search
from ..vpr.digest import state_digest
from . import console
from .inputs import (
    check_folder,
    fit_what_is_missing,
    missing_parts,
    open_dataset,
    open_network,
)
from .settings import (
    Config,
    Dataset,
    Distance,
    EntropyLambda,
    GroundTruth,
    GroupSize,
    Json,
    Method,
    Queries,
    Size,
    Weights,
    compress_config,
    image_size,
)

Metric = Callable[[nn.Module], float]

_NAMES = {
    "recall": "recall@1 (share of queries)",
    "cosine": "mean cosine to the dense descriptors",
}

_Network = Annotated[
    str, typer.Argument(help='"<backbone>-netvlad", or a dense .safetensors of placekern.')
]
_References = Annotated[
    Path | None, typer.Option(help="Folder of reference images; enough by itself for cosine.")
]
_MetricName = Annotated[
    str,
    typer.Option(
        help='"recall": recall@1. "cosine": mean cosine of the references\' descriptors to the '
        "dense network's; smoother, and needs no labels."
    ),
]


def sensitivity(
    network: _Network,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for sensitivity.csv and .png. A file that is there is gone on with.",
        ),
    ],
    weights: Weights = None,
    dataset: Dataset = None,
    queries: Queries = None,
    references: _References = None,
    ground_truth: GroundTruth = None,
    distance: Distance = 25.0,
    metric: _MetricName = "recall",
    bits: Annotated[
        str, typer.Option(help='Bits to try without pruning, such as "8,5,4"; "" for none.')
    ] = ",".join(map(str, BITS_TRIED)),
    thresholds: Annotated[
        str | None, typer.Option(help='Thresholds to try, such as "0.005,0.01,0.02".')
    ] = None,
    sparsities: Annotated[
        str | None,
        typer.Option(
            help='Shares to prune, such as "0.5,0.9". Default: "0.3,0.5,0.7,0.8,0.9", or none with '
            "--thresholds."
        ),
    ] = None,
    config: Config = None,
    method: Method = None,
    entropy_lambda: EntropyLambda = None,
    group_size: GroupSize = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Try each layer alone at each number of bits and each pruning, and measure the metric.

    The CSV holds every result as soon as it is there: run the same command again to go on. NetVLAD
    and the whitening are first fitted to the references where the weights bring none.
    """
    _check_metric(metric)
    tried: dict[str, Any] = {
        "bits": _numbers("--bits", bits, int),
        "thresholds": None if thresholds is None else _numbers("--thresholds", thresholds, float),
        "sparsities": None if sparsities is None else _numbers("--sparsities", sparsities, float),
    }
    if not any(tried[name] for name in ("bits", "thresholds")) and (
        tried["sparsities"] == () or (tried["sparsities"] is None and thresholds is not None)
    ):
        raise ValueError("there is nothing to try: give --bits, --thresholds or --sparsities")
    how: CompressConfig = compress_config(
        config, method=method, entropy_lambda=entropy_lambda, group_size=group_size
    )
    model, measured, identity = _open(
        network, weights, metric, dataset, queries, references, ground_truth, distance, size
    )
    output.mkdir(parents=True, exist_ok=True)
    table_file, picture = output / "sensitivity.csv", output / "sensitivity.png"
    with console.told_to_go_on(table_file), _one_bar("layers and settings") as progress:
        found = measure(
            model,
            measured,
            **tried,
            config=how,
            resume=table_file,
            identity=identity,
            progress=progress,
        )
    drawn = find_spec("matplotlib") is not None
    if drawn:
        found.plot(picture, f"{network}: each layer alone pruned or quantized", _NAMES[metric])
    if as_json:
        console.print_json(
            {
                "baseline": found.baseline,
                "csv": str(table_file),
                "picture": str(picture) if drawn else None,
                "rows": [asdict(row) for row in found.rows[1:]],
            }
        )
        return
    console.out.print(found.table())
    console.out.print(f"csv:     {table_file}")
    if drawn:
        console.out.print(f"picture: {picture}")
    else:
        console.err.print("no picture: it is drawn by matplotlib; pip install matplotlib")


def suggest(
    csv: Annotated[Path, typer.Argument(help="sensitivity.csv of `placekern sensitivity`.")],
    network: _Network,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .json to write, for compress --config.")
    ],
    budget_mb: Annotated[
        float | None, typer.Option(help="Largest file, MB of 1,000,000 bytes, all of it counted.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest drop of the metric; the file gets small.")
    ] = None,
    weights: Weights = None,
    dataset: Dataset = None,
    queries: Queries = None,
    references: _References = None,
    ground_truth: GroundTruth = None,
    distance: Distance = 25.0,
    metric: _MetricName = "recall",
    evaluations: Annotated[
        int, typer.Option(min=1, help="Networks to measure at most, for --max-drop.")
    ] = 8,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Predict only; measuring the suggestion takes longer."),
    ] = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Choose bits and pruning of each layer for a budget of MB or of the metric's drop.

    Give the same network, images and metric as to `sensitivity`: the suggestion is measured. With
    --predict, images are needed only where the weights leave something to be fitted.
    """
    _check_metric(metric)
    if output.suffix != ".json":
        raise ValueError(f"-o is {output}, expected a name that ends in .json")
    if (budget_mb is None) == (max_drop is None):
        raise ValueError("give one of --budget-mb and --max-drop")
    check_folder(output)
    found = Sensitivity.from_csv(csv)
    model, measured, identity = _open(
        network, weights, None if predict else metric, dataset, queries, references, ground_truth,
        distance, size,
    )  # fmt: skip
    before = {name: found.rows[0].config.get(name) for name in identity}
    check_identity(identity, before if found.rows[0].config else {}, str(csv))
    with console.progress_bars() as progress:
        suggestion = choose(
            found,
            model,
            budget_mb=budget_mb,
            max_drop=max_drop,
            metric=measured,
            evaluations=evaluations,
            progress=progress,
        )
    suggestion.save(output)
    if as_json:
        console.print_json(suggestion.to_dict() | {"file": str(output)})
        return
    console.out.print(suggestion.table())
    console.out.print(
        f"{output}: for placekern compress --config; the file will have "
        f"{suggestion.file_bytes / MB:.3f} MB"
    )


def recall_metric(data: PlaceDataset, batch_size: int = 16) -> Metric:
    """recall@1 of a network on a data set, 0 to 1."""

    def metric(model: nn.Module) -> float:
        references = describe(model, data.references, batch_size)
        found = search(references, describe(model, data.queries, batch_size), 1)
        return recall_at(found, data.positives, (1,))[1]

    return metric


def cosine_metric(model: nn.Module, images: Any, batch_size: int = 16) -> Metric:
    """Mean cosine of a network's descriptors to those of `model`, which is described at once.

    Args:
        model: the dense network, to descriptors of unit length.
        images: as `describe` takes them.
        batch_size: as in `describe`.
    """
    dense = describe(model, images, batch_size).double()

    def metric(other: nn.Module) -> float:
        return float((describe(other, images, batch_size).double() * dense).sum(1).mean())

    return metric


def _open(
    network: str,
    weights: Path | None,
    metric: str | None,
    dataset: Path | None,
    queries: Path | None,
    references: Path | None,
    ground_truth: Path | None,
    distance: float,
    size: str | None,
) -> tuple[nn.Module, Metric | None, dict[str, Any]]:
    """The network, fitted where its weights leave that open, the metric, and the identity of both.

    Without a metric none is made, and images are opened only where something is to be fitted.
    """
    resize = image_size(size)
    alone = references is not None and dataset is None and queries is None
    if metric == "recall" and alone:
        raise ValueError(
            "recall needs --queries beside --references, or --dataset; --metric cosine needs "
            "references alone"
        )
    data, images = None, None
    if metric != "recall" and alone:
        images = ImageList(list_images(references), resize)
    elif metric is not None or dataset is not None or queries is not None:
        data = open_dataset(dataset, queries, references, ground_truth, distance, resize)
        images = data.references
    model = open_network(network, weights)
    # Before anything is fitted: the last bits of that depend on the number of threads.
    identity: dict[str, Any] = {"weights": state_digest(model)}
    if images is None:
        missing = missing_parts(model, network, weights)
        if missing:
            raise ValueError(
                f"{weights or network} brings no {' and no '.join(missing)}: give --references to "
                "fit them to"
            )
        return model, None, identity
    identity |= {
        "images": len(images),
        "bytes": sum(os.path.getsize(name) for name in images.names),
        "size": None if resize is None else list(resize),
    }
    with console.progress_bars() as progress:
        fit_what_is_missing(model, network, weights, images, progress=progress)
    if metric is None:
        return model, None, identity
    identity["metric"] = metric
    if metric == "recall":
        identity["queries"] = len(data.queries)
        return model, recall_metric(data), identity
    return model, cosine_metric(model, images), identity


def _check_metric(metric: str) -> None:
    if metric not in _NAMES:
        raise ValueError(f'--metric is "{metric}", expected recall or cosine')


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f'{option} is "{text}", expected numbers such as "8,5"') from None


@contextmanager
def _one_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for all layers together."""
    with console.progress_bars() as progress:
        yield lambda _, done, total: progress(label, done, total)
