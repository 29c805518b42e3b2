"""Canvases of texels: what house fronts, landmarks, trees and cars are painted on.

The surprise: a canvas is uint8 [height, width, 5] (red, green, blue, coverage, glow) with row 0 at
the ground, so that rows grow with the height, and all painting is told in metres.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from placekern.vpr.scenery.render import COVERAGE, GLOW

#: Texels along one metre.
RESOLUTION = 12

Colour = tuple[int, int, int]


@lru_cache(maxsize=1)
def noise_maps() -> tuple[np.ndarray, np.ndarray]:
    """Two float32 [1024, 1024] maps around 0, fine grain and broad stains: one pair for all."""
    rng = np.random.default_rng(20171126)
    grain = rng.standard_normal((1024, 1024)).astype(np.float32)
    stains = np.zeros((1024, 1024), dtype=np.float32)
    for cells, weight in ((16, 0.5), (40, 0.35), (110, 0.25)):
        coarse = rng.standard_normal((cells, cells)).astype(np.float32)
        positions = np.linspace(0, cells - 1.001, 1024)
        low = positions.astype(int)
        blend = (positions - low).astype(np.float32)
        rows = coarse[low] * (1 - blend)[:, None] + coarse[low + 1] * blend[:, None]
        stains += weight * (rows[:, low] * (1 - blend) + rows[:, low + 1] * blend)
    return grain, stains


def texels(metres: float) -> int:
    """Metres to whole texels."""
    return round(metres * RESOLUTION)


def blank(width: float, height: float, colour: Colour | None = None) -> np.ndarray:
    """A canvas uint8 [h, w, 5] of so many metres: empty, or covered with one colour."""
    canvas = np.zeros((max(texels(height), 2), max(texels(width), 2), 5), dtype=np.uint8)
    if colour is not None:
        canvas[..., :3] = colour
        canvas[..., COVERAGE] = 255
    return canvas


def fill(canvas, x0, y0, x1, y1, colour: Colour, glow: int = 0) -> None:
    """Covers the rectangle between (x0, y0) and (x1, y1), in metres, at least one texel wide."""
    column, row = max(texels(x0), 0), max(texels(y0), 0)
    area = canvas[row : max(texels(y1), row + 1), column : max(texels(x1), column + 1)]
    area[..., :3] = colour
    area[..., COVERAGE] = 255
    area[..., GLOW] = glow


def darker(colour: Colour, by: float) -> Colour:
    """The colour times `by`; factors above one lighten."""
    return tuple(int(min(c * by, 255)) for c in colour)


def shade(canvas, factor: np.ndarray) -> None:
    """Multiplies the colours by `factor` [h, w] (below 2), in place, in 16-bit integers."""
    scale = np.clip(factor * 128, 0, 255).astype(np.uint16)[..., None]
    canvas[..., :3] = np.minimum((canvas[..., :3] * scale) >> 7, 255)


def noise_factor(canvas, rng: np.random.Generator, grain: float, stain: float) -> np.ndarray:
    """float32 [h, w] around 1 of the canvas's size: noise of the given strengths."""
    height, width = canvas.shape[:2]
    fine, broad = noise_maps()
    top, left = (int(rng.integers(0, max(1024 - side, 1))) for side in (height, width))
    patch = np.s_[top : top + height, left : left + width]
    factor = 1 + grain * fine[patch] + stain * broad[patch]
    missing = ((0, height - factor.shape[0]), (0, width - factor.shape[1]))
    return np.pad(factor, missing, mode="reflect") if missing != ((0, 0), (0, 0)) else factor


def roughen(canvas, rng: np.random.Generator, grain: float, stain: float) -> None:
    """Makes the colours uneven, in place."""
    shade(canvas, noise_factor(canvas, rng, grain, stain))


def stamp(canvas, tile, x: float, y: float) -> None:
    """Copies the covered texels of a tile to (x, y) metres, cut at the canvas's edges."""
    column, row = texels(x), texels(y)
    skip_column, skip_row = max(-column, 0), max(-row, 0)
    column, row = max(column, 0), max(row, 0)
    area = canvas[
        row : row + tile.shape[0] - skip_row, column : column + tile.shape[1] - skip_column
    ]
    part = tile[skip_row : skip_row + area.shape[0], skip_column : skip_column + area.shape[1]]
    if part.size:
        np.copyto(area, part, where=part[..., COVERAGE, None] > 0)
