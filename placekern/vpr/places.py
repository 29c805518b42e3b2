"""A folder of images to train on: with labels where it has a subfolder a place.

The surprise: all images must have one size, as a batch is one tensor. That is found out from their
headers before anything is trained, not from the first odd image an hour later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from placekern.vpr.datasets import ImageList, Size, list_images


@dataclass(frozen=True)
class TrainingImages:
    """Images of one size, and the place of each where that is known.

    Attributes:
        images: read from their files when they are asked for.
        labels: int64 [n], an index into `places`; None without labels.
        places: the names of the subfolders, sorted; empty without labels.
    """

    images: ImageList
    labels: Tensor | None
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_places(folder: str | Path, size: Size = None) -> TrainingImages:
    """The images of a folder and below it, to train on.

    Args:
        folder: with a subfolder a place, the images of which may lie deeper in it: they are
            labelled. Or with images right in it: they are not.
        size: as in `ImageList`; None keeps the images as they are.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, images both in the folder and in subfolders, images of several
            sizes without a `size`, or the folder of a data set with its queries and references.
    """
    folder = Path(folder)
    paths = list_images(folder)
    parts = [path.relative_to(folder).parts for path in paths]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    loose = [part[0] for part in parts if len(part) == 1]
    if names and loose:
        raise ValueError(
            f"{folder} holds images, such as {loose[0]}, beside subfolders with images, such as "
            f"{names[0]}: give one subfolder a place and nothing else, or no subfolder"
        )
    if names == ("query", "ref"):
        raise ValueError(
            f"{folder} is a data set with queries and references, not a folder of places: to train "
            f"on the map's images, give {folder / 'ref'}"
        )
    if not isinstance(size, tuple):
        _check_sizes(paths, size)
    labels = None
    if names:
        numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([numbers[part[0]] for part in parts])
    return TrainingImages(ImageList(paths, size), labels, names)


def _check_sizes(paths: list[Path], size: int | None) -> None:
    first = _size_in_file(paths[0], size)
    for path in paths[1:]:
        other = _size_in_file(path, size)
        if other != first:
            raise ValueError(
                f"{paths[0]} has {first[0]}x{first[1]} pixels and {path} {other[0]}x{other[1]}, "
                "but the images of a batch must be of one size: give the size to resize them to"
            )


def _size_in_file(path: Path, size: int | None) -> tuple[int, int]:
    """(height, width) as `read_image` would give it, from the file's header alone."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) > 4:  # the orientation tag turns it on its side
                width, height = height, width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error
    if size is None:
        return height, width
    scale = size / min(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))
