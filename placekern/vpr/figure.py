"""Pictures for people: queries beside what was retrieved for them, right and wrong marked.

The surprise: nothing is told by colour alone. A right answer has a green border *and* a tick, a
wrong one a red border *and* a cross, so the sheet can be read in grey and by the colour-blind.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from placekern.io.atomic import written_beside
from placekern.vpr.retrieve import search

RIGHT = (22, 138, 72)
WRONG = (208, 44, 44)
_INK = (28, 32, 38)
_SOFT = (104, 112, 122)
_RULE = (222, 226, 230)
_PAPER = (255, 255, 255)
_QUERY = (52, 60, 70)

# Twice the size drawn, then shrunk: Pillow draws lines and polygons without smoothing.
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Retrieval:
    """What one network found: `indices` [q, k], best first, and cosine `similarities` if known."""

    indices: Tensor
    similarities: Tensor | None = None

    @classmethod
    def of(cls, queries: Tensor, references: Tensor, k: int = 5) -> Retrieval:
        """The best `k` references of each query, by descriptors of unit length.

        Args:
            queries: [q, D]; references: [n, D].
            k: how many, at most n.

        Raises:
            ValueError: descriptors of other shapes.
        """
        indices = search(references, queries, min(k, len(references)))
        found = references[indices]  # [q, k, D]
        return cls(indices, (found @ queries[:, :, None]).squeeze(2))


def choose_queries(
    retrievals: Sequence[Retrieval],
    positives: Sequence[Sequence[int]],
    count: int = 5,
    wrong: int | None = None,
) -> list[int]:
    """Queries worth showing: spread evenly over the set, with wrong cases among them.

    Args:
        retrievals: of one or more networks for the same queries.
        positives: reference indices of each query.
        count: how many queries.
        wrong: how many of them, at most, the networks do not all answer rightly first; a third of
            `count` when None. Those that one network gets right and another wrong come first.

    Returns:
        `count` query numbers (fewer where there are no more), right cases before wrong ones.
    """
    if not retrievals:
        raise ValueError("choose_queries needs the retrieval of at least one network")
    wrong = max(1, count // 3) if wrong is None else wrong
    hits = np.array(
        [
            [
                int(row[0]) in set(map(int, truth))
                for row, truth in zip(r.indices, positives, strict=True)
            ]
            for r in retrievals
        ]
    )
    right = np.flatnonzero(hits.all(0))
    mixed = np.flatnonzero(hits.any(0) & ~hits.all(0))
    lost = np.flatnonzero(~hits.any(0))
    bad = [*_spread(mixed, wrong)]
    bad += _spread(lost, wrong - len(bad))
    good = _spread(right, count - len(bad))
    missing = count - len(good) - len(bad)
    if missing > 0:
        bad += _spread(np.setdiff1d(np.concatenate([mixed, lost]), bad), missing)
    return [int(number) for number in [*good, *bad]]


def _spread(numbers: np.ndarray, count: int) -> list[int]:
    if count <= 0 or len(numbers) == 0:
        return []
    count = min(count, len(numbers))
    return [int(n) for n in numbers[np.linspace(0, len(numbers) - 1, count).round().astype(int)]]


def retrieval_sheet(
    queries: Sequence[Tensor] | Tensor,
    references: Sequence[Tensor] | Tensor,
    retrievals: Mapping[str, Retrieval],
    positives: Sequence[Sequence[int]],
    *,
    chosen: Sequence[int] | None = None,
    captions: Mapping[int, str] | Sequence[str] | None = None,
    top: int = 5,
    rows: int = 5,
    title: str = "Which place is this?",
    subtitle: str | None = None,
    tile: tuple[int, int] = (108, 144),
) -> Image.Image:
    """A sheet of queries, a row each, with the `top` references that each network retrieved.

    With two networks (dense and compressed, say) a query has a band of two lines, so that one sees
    whether compression changed an answer.

    Args:
        queries, references: float [3, H, W] RGB in [0, 1] by number: a tensor, list or `ImageList`.
            They may be larger renderings of the images that were described.
        retrievals: what each network found, by the name to print.
        positives: reference indices of each query.
        chosen: the queries to show; `choose_queries` picks `rows` of them when None.
        captions: a word or two under each query, by its number; "query <number>" when None.
        top: columns of retrieved images.
        title, subtitle: the heading; the subtitle may hold the recalls.
        tile: height and width of an image on the sheet, in pixels; images are cut to its shape.

    Returns:
        An RGB image, its size a function of the counts and `tile` alone.

    Raises:
        ValueError: no network, no query, or counts below 1.
    """
    if not retrievals or top < 1 or rows < 1:
        raise ValueError(
            "a sheet needs at least one network, column and row, "
            f"got {len(retrievals)}, {top}, {rows}"
        )
    networks = list(retrievals.items())
    if chosen is None:
        chosen = choose_queries([found for _, found in networks], positives, rows)
    if len(chosen) == 0:
        raise ValueError("there is no query to show")
    top = min(top, *(found.indices.shape[1] for _, found in networks))
    layout = _Layout(len(chosen), len(networks), top, tile)
    sheet = _Sheet(layout.width, layout.height)
    _draw_heading(sheet, layout, networks, title, subtitle)
    for row, query in enumerate(chosen):
        truth = {int(index) for index in positives[query]}
        y = layout.band(row)
        if row:
            sheet.line(layout.margin, y - 11, layout.width - layout.margin, y - 11, _RULE)
        query_y = y + (layout.band_height - layout.gap - layout.line_height) // 2
        sheet.picture(queries[query], layout.margin, query_y, tile, _QUERY)
        caption = f"query {query}" if captions is None else captions[query]
        middle = layout.margin + tile[1] / 2
        sheet.text(middle, query_y + tile[0] + 8, caption, 13, _SOFT, "ma")
        for line, (name, found) in enumerate(networks):
            line_y = y + line * layout.line_height
            if len(networks) > 1:
                sheet.vertical_text(layout.name_x, line_y, tile[0], name, 13, _SOFT)
            for column in range(top):
                index = int(found.indices[query, column])
                x = layout.column(column)
                good = index in truth
                colour = RIGHT if good else WRONG
                sheet.picture(references[index], x, line_y, tile, colour)
                sheet.badge(x + tile[1], line_y, good)
                if found.similarities is not None:
                    value = f"{float(found.similarities[query, column]):.2f}"
                    sheet.text(x + tile[1] / 2, line_y + tile[0] + 8, value, 13, colour, "ma")
    _draw_legend(sheet, layout, any(found.similarities is not None for _, found in networks))
    return sheet.finish()


def save_sheet(sheet: Image.Image, path: str | Path, limit: int = 600_000) -> int:
    """Writes a sheet as PNG, beside its place first and then renamed, and returns its bytes.

    Above `limit` bytes the colours are reduced to the 256 that suit the sheet best, which shrinks
    it to a third and is hardly seen; a sheet that is still larger is written all the same.
    """
    data = _encode(sheet)
    if len(data) > limit:
        # Median cut alone greys rare strong colours; a few k-means rounds and dithering keep them.
        palette = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        data = _encode(sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    with written_beside(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class _Layout:
    """Where things stand, in pixels of the finished sheet."""

    def __init__(self, rows: int, networks: int, top: int, tile: tuple[int, int]) -> None:
        self.margin, self.gap = 28, 18
        self.tile = tile
        self.heading = 118
        self.line_height = tile[0] + 34
        self.band_height = networks * self.line_height + self.gap
        self.name_x = self.margin + tile[1] + 22
        self.first = self.name_x + (34 if networks > 1 else 14)
        self.top = top
        self.rows = rows
        self.width = self.first + top * (tile[1] + self.gap) - self.gap + self.margin
        self.height = self.heading + rows * self.band_height + 46

    def band(self, row: int) -> int:
        return self.heading + row * self.band_height

    def column(self, column: int) -> int:
        return self.first + column * (self.tile[1] + self.gap)


class _Sheet:
    """A canvas in finished pixels, drawn larger."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        scale = _OVERSAMPLING
        self.image = Image.new("RGB", (width * scale, height * scale), _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def font(self, size: int):
        if size not in self.fonts:
            self.fonts[size] = ImageFont.load_default(size * _OVERSAMPLING)
        return self.fonts[size]

    def text(self, x, y, words, size, colour, anchor="la", bold=False) -> None:
        place = (x * _OVERSAMPLING, y * _OVERSAMPLING)
        stroke = 1 if bold else 0
        self.draw.text(
            place, words, colour, self.font(size), anchor, stroke_width=stroke, stroke_fill=colour
        )

    def text_width(self, words: str, size: int) -> float:
        return self.draw.textlength(words, self.font(size)) / _OVERSAMPLING

    def vertical_text(self, x, y, height, words, size, colour) -> None:
        scale = _OVERSAMPLING
        strip = Image.new("RGB", (height * scale, 20 * scale), _PAPER)
        middle = (height * scale / 2, 10 * scale)
        ImageDraw.Draw(strip).text(middle, words, colour, self.font(size), "mm")
        self.image.paste(strip.rotate(90, expand=True), (int(x * scale), int(y * scale)))

    def line(self, x0, y0, x1, y1, colour) -> None:
        scale = _OVERSAMPLING
        self.draw.line((x0 * scale, y0 * scale, x1 * scale, y1 * scale), colour, scale)

    def picture(self, image: Tensor, x, y, tile, colour, border: int = 4) -> None:
        """An image cut to the tile's shape at (x, y), with a border of the colour around it."""
        scale = _OVERSAMPLING
        picture = _to_picture(image, (tile[1] * scale, tile[0] * scale))
        outer = tuple(
            scale * side
            for side in (x - border, y - border, x + tile[1] + border, y + tile[0] + border)
        )
        self.draw.rounded_rectangle(
            (outer[0], outer[1], outer[2] - 1, outer[3] - 1), border * scale, fill=colour
        )
        self.image.paste(picture, (x * scale, y * scale))

    def badge(self, x, y, good: bool, radius: int = 11) -> None:
        """A tick or a cross on a disc around (x, y)."""
        scale = _OVERSAMPLING
        x, y, radius = (x - 4) * scale, (y + 4) * scale, radius * scale
        ring = radius + 2 * scale
        self.draw.ellipse((x - ring, y - ring, x + ring, y + ring), fill=_PAPER)
        colour = RIGHT if good else WRONG
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if good:
            strokes = [[(-0.48, 0.04), (-0.12, 0.42), (0.5, -0.38)]]
        else:
            strokes = [[(-0.38, -0.38), (0.38, 0.38)], [(-0.38, 0.38), (0.38, -0.38)]]
        for stroke in strokes:
            points = [(x + radius * dx, y + radius * dy) for dx, dy in stroke]
            self.draw.line(points, _PAPER, 3 * scale, joint="curve")

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def _to_picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """float [3, H, W] in [0, 1] as a picture (width, height), cut to its shape at the edges."""
    values = torch.as_tensor(image).detach().float().clamp(0, 1) * 255
    picture = Image.fromarray(values.round().byte().permute(1, 2, 0).cpu().numpy())
    width, height = picture.size
    part = min(width / size[0], height / size[1])
    left, top = (width - part * size[0]) / 2, (height - part * size[1]) / 2
    box = (left, top, width - left, height - top)
    return picture.resize(size, Image.Resampling.BICUBIC, box)


def _draw_heading(sheet, layout, networks, title, subtitle) -> None:
    sheet.text(layout.margin, 22, title, 26, _INK, bold=True)
    if subtitle:
        sheet.text(layout.margin, 56, subtitle, 14, _SOFT)
    y = layout.heading - 16
    sheet.text(layout.margin, y, "query", 14, _INK, "ls", bold=True)
    for column in range(layout.top):
        words = f"{column + 1}" if column else "retrieved 1"
        sheet.text(layout.column(column), y, words, 14, _INK, "ls", bold=True)


def _draw_legend(sheet, layout, similarities: bool) -> None:
    y = layout.height - 26
    x = layout.margin
    for good, words in ((True, "the query's place"), (False, "another place")):
        sheet.badge(x + 12, y - 4, good, 8)
        sheet.text(x + 24, y, words, 13, _INK, "lm")
        x += 24 + int(sheet.text_width(words, 13)) + 26
    if similarities:
        sheet.text(x, y, "numbers: cosine similarity of the descriptors", 13, _SOFT, "lm")
