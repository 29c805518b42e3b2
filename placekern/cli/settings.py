"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..compress import CompressConfig

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Bits = Annotated[int | None, typer.Option(min=1, max=8, help="Bits of a code; 8 by default.")]
Threshold = Annotated[float | None, typer.Option(help="Prune weights with |w| below this.")]
Sparsity = Annotated[float | None, typer.Option(help="Prune this share of each layer, 0 to 1.")]
Method = Annotated[str | None, typer.Option(help='Codebooks: "kmeans" (by default) or "uniform".')]
EntropyLambda = Annotated[
    float | None,
    typer.Option(help="Spend some error to save bytes: try 0.001 for 8 bits, 0.003 for 5."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(min=1, help="Output channels that share a codebook; default: the whole layer."),
]
Config = Annotated[
    Path | None,
    typer.Option(help="All of this, and exceptions by layer: CompressConfig as JSON or YAML."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights: .npz (SqueezeNet), .mat (NetVLAD structs), .safetensors."),
]
Dataset = Annotated[
    Path | None, typer.Option(help="Folder with query/, ref/ and ground_truth.csv.")
]
Queries = Annotated[Path | None, typer.Option(help="Folder of query images.")]
GroundTruth = Annotated[
    Path | None,
    typer.Option(help='.csv "query,ref_matches"; without it, UTM in the file names counts.'),
]
Distance = Annotated[float, typer.Option(help="Metres within which a match is right.")]
Size = Annotated[
    str | None, typer.Option(help='Resize images to "HEIGHTxWIDTH" pixels; default: as they are.')
]


def image_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "240x320".

    Raises:
        ValueError: the text is something else.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'--size is "{text}", expected HEIGHTxWIDTH in pixels, such as 240x320')
    return int(parts[0]), int(parts[1])


def compress_config(file: Path | None, **options: Any) -> CompressConfig:
    """The config in a file, or of the options of the command line.

    Args:
        file: given by --config, or None.
        options: by the name of their field; None where one is not given.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: it is YAML, and PyYAML is not installed.
        ValueError: options beside a file, or values that do not fit.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if file is None:
        return CompressConfig(**given)
    refuse_options(f"--config {file}", given)
    return CompressConfig.from_file(file)


def refuse_options(what: str, options: dict[str, Any]) -> None:
    """Raises where something that says it all stands beside options that are given (not None).

    Raises:
        ValueError: names them.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if names:
        raise ValueError(f"{what} leaves nothing to {', '.join(names)}: give one or the other")
