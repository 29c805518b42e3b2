"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Bits = Annotated[int, typer.Option(min=1, max=8, help="Bits of a code.")]
Threshold = Annotated[float | None, typer.Option(help="Prune weights with |w| below this.")]
Sparsity = Annotated[float | None, typer.Option(help="Prune this share of each layer, 0 to 1.")]
Method = Annotated[str, typer.Option(help='Codebooks: "kmeans" or "uniform".')]
EntropyLambda = Annotated[
    float, typer.Option(help="Spend some error to save bytes: try 0.001 for 8 bits, 0.003 for 5.")
]
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
