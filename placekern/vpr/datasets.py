"""Images and ground truth: queries, references and which of them show the same place.

The surprise: an image is decoded when it is asked for and is float RGB [3, H, W] in [0, 1] at its
native size unless `size` is given, so that a set may hold images of different sizes and be larger
than memory.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
Size = int | tuple[int, int] | None


class ImageList(Sequence[Tensor]):
    """A read-only sequence of images, [3, H, W] float32 RGB in [0, 1], decoded on access.

    Args:
        source: image files, or a tensor [n, 3, H, W], floating point in [0, 1] or uint8.
        size: (H, W) in pixels, or an int for the shorter side with the proportions kept; None keeps
            native sizes. Only for files.

    Raises:
        ValueError: a tensor of another shape or type, or a size that is not positive.
    """

    def __init__(self, source: Sequence[str | Path] | Tensor, size: Size = None) -> None:
        sides = (size,) if isinstance(size, int) else size
        if sides is not None and (len(sides) > 2 or min(sides) < 1):
            raise ValueError(
                f"image size must be one or two positive numbers of pixels, got {size}"
            )
        if isinstance(source, Tensor):
            if source.ndim != 4 or source.shape[1] != 3:
                raise ValueError(f"images must be [n, 3, H, W], got {list(source.shape)}")
            if not source.is_floating_point() and source.dtype != torch.uint8:
                raise ValueError(f"images must be floating point or uint8, got {source.dtype}")
            if size is not None:
                raise ValueError("size applies to image files: resize the tensor beforehand")
            self._source: Tensor | list[Path] = source
        else:
            self._source = [Path(path) for path in source]
        self.size = size

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index: int | slice) -> Tensor | ImageList:
        item = self._source[index]
        if isinstance(index, slice):
            return ImageList(item, self.size)
        if isinstance(item, Path):
            return read_image(item, self.size)
        return item.float() / 255 if item.dtype == torch.uint8 else item.float()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def names(self) -> list[str]:
        """A name an image: the path as given, or its position in the tensor."""
        if isinstance(self._source, Tensor):
            return [str(index) for index in range(len(self))]
        return [str(path) for path in self._source]


class PlaceDataset:
    """Queries, references, and for each query the references that show the same place.

    Args:
        queries, references: an `ImageList`, or what it is made of.
        positives: a list of reference indices a query; empty where the place is not in the
            references.
        name: for reports.

    Raises:
        ValueError: as many lists as queries are needed, with indices of existing references.
    """

    def __init__(
        self,
        queries: ImageList | Sequence[str | Path] | Tensor,
        references: ImageList | Sequence[str | Path] | Tensor,
        positives: Sequence[Sequence[int]],
        name: str = "places",
    ) -> None:
        self.queries = queries if isinstance(queries, ImageList) else ImageList(queries)
        self.references = references if isinstance(references, ImageList) else ImageList(references)
        self.positives = [sorted({int(index) for index in row}) for row in positives]
        self.name = name
        if len(self.positives) != len(self.queries):
            raise ValueError(
                f"a list of positives is needed for each of the {len(self.queries)} queries, "
                f"got {len(self.positives)}"
            )
        for query, row in enumerate(self.positives):
            if row and not 0 <= row[0] <= row[-1] < len(self.references):
                raise ValueError(
                    f"positives of query {query} must be indices of the {len(self.references)} "
                    f"references, got {row}"
                )

    def __repr__(self) -> str:
        return (
            f"< {self.name}: #queries: {len(self.queries)}; #references: {len(self.references)} >"
        )


def read_image(path: str | Path, size: Size = None) -> Tensor:
    """Decode an image file.

    Grey images are replicated to three channels, an alpha channel is dropped, the camera's
    orientation tag is applied. Resizing is bilinear and antialiased.

    Args:
        path: any format Pillow reads.
        size: as in `ImageList`.

    Returns:
        [3, H, W] float32 RGB in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a readable image.
    """
    from PIL import Image, ImageOps  # here, so that networks need no Pillow

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if size is not None:
        if isinstance(size, int):
            scale = size / min(image.size)
            size = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float() / 255


def list_images(folder: str | Path) -> list[Path]:
    """The image files in a folder and below, sorted by path; hidden ones are passed over.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise ValueError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return paths


def load_corridor(folder: str | Path, size: Size = None) -> PlaceDataset:
    """A data set in VPR-Bench's layout: `query/`, `ref/` and `ground_truth.csv` in one folder.

    Raises:
        FileNotFoundError, ValueError: as `load_folders`.
    """
    folder = Path(folder)
    return load_folders(
        folder / "query", folder / "ref", folder / "ground_truth.csv", size=size, name=folder.name
    )


def load_folders(
    queries: str | Path,
    references: str | Path,
    ground_truth: str | Path | None = None,
    threshold: float = 25.0,
    size: Size = None,
    name: str | None = None,
) -> PlaceDataset:
    """Two folders of images, with a table of matches or with positions in the file names.

    Args:
        queries, references: folders, searched with their sub-folders; images are numbered in sorted
            order of path.
        ground_truth: a CSV file with the columns `query` and `ref_matches`, the latter separated by
            spaces; an entry is an image's number or its file name. None reads
            `@UTM_east@UTM_north@...` names instead.
        threshold: metres within which a reference is positive, for positions in file names.
        size: as in `ImageList`.
        name: for reports; the references' folder if None.

    Raises:
        FileNotFoundError: a folder or the table is missing.
        ValueError: an entry of the table matches no image, a query has no row, or a file name holds
            no position.
    """
    query_paths, reference_paths = list_images(queries), list_images(references)
    if ground_truth is None:
        positives = _within(_positions(query_paths), _positions(reference_paths), threshold)
    else:
        positives = _read_matches(Path(ground_truth), query_paths, reference_paths)
    return PlaceDataset(
        ImageList(query_paths, size),
        ImageList(reference_paths, size),
        positives,
        Path(references).name if name is None else name,
    )


def _read_matches(path: Path, queries: list[Path], references: list[Path]) -> list[list[int]]:
    if not path.is_file():
        raise FileNotFoundError(f"no ground truth at {path}")
    query_numbers, reference_numbers = _numbers(queries), _numbers(references)
    positives: list[list[int] | None] = [None for _ in queries]
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"query", "ref_matches"} <= set(reader.fieldnames):
            raise ValueError(
                f"{path} needs the columns query and ref_matches, got {reader.fieldnames}"
            )
        for row in reader:
            try:
                query = query_numbers[(row["query"] or "").strip()]
                positives[query] = [
                    reference_numbers[entry] for entry in (row["ref_matches"] or "").split()
                ]
            except KeyError as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {error} is neither the number nor the file "
                    f"name of an image ({len(queries)} queries, {len(references)} references)"
                ) from None
    for path_of_query, row in zip(queries, positives, strict=True):
        if row is None:
            raise ValueError(
                f"{path} has no row for the query {path_of_query.name}: a query without a match "
                "needs one with empty ref_matches"
            )
    return positives


def _numbers(paths: list[Path]) -> dict[str, int]:
    numbers = {path.name: index for index, path in enumerate(paths)}
    return numbers | {str(index): index for index in range(len(paths))}


def _positions(paths: list[Path]) -> np.ndarray:
    # [n, 2] float64 metres: a northing has seven digits, of which float32 would lose the last.
    positions = []
    for path in paths:
        fields = path.name.split("@")
        try:
            positions.append((float(fields[1]), float(fields[2])))
        except (IndexError, ValueError):
            raise ValueError(
                f"{path.name} holds no position: name files @UTM_east@UTM_north@...@.jpg "
                "or give a ground truth table"
            ) from None
    return np.array(positions)


def _within(queries: np.ndarray, references: np.ndarray, threshold: float) -> list[list[int]]:
    return [
        np.flatnonzero(np.hypot(*(references - query).T) <= threshold).tolist() for query in queries
    ]
