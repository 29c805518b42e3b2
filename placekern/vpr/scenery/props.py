"""What stands in the streets of the rendered city: landmarks, trees, lamps, cars and passers-by.

The surprise: all of it is flat. A tree, a lamp or a person is one upright picture with holes, and a
car is six rectangles; at the distances of a street nothing more is seen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from placekern.vpr.scenery.canvas import (
    RESOLUTION,
    Colour,
    blank,
    darker,
    fill,
    noise_maps,
    roughen,
    stamp,
    texels,
)
from placekern.vpr.scenery.house import pick
from placekern.vpr.scenery.render import COVERAGE, GLOW, Surface, Texture


def upright(x: float, z: float, width: float, height: float, texture: Texture) -> Surface:
    """A flat thing that stands at (x, z) and faces along the street, lit from all sides."""
    return Surface((x - width / 2, 0, z), (width, 0, 0), (0, height, 0), texture)


def _grid(canvas) -> tuple[np.ndarray, np.ndarray]:
    """Metres [h, 1] above the ground and [w] from the left of each texel's middle."""
    rows = (np.arange(canvas.shape[0])[:, None] + 0.5) / RESOLUTION
    return rows, (np.arange(canvas.shape[1]) + 0.5) / RESOLUTION


def _cover(canvas, inside, colour: Colour, glow: int = 0) -> None:
    canvas[inside, :3] = colour
    canvas[inside, COVERAGE] = 255
    canvas[inside, GLOW] = glow


def _disc(canvas, x, y, across, up, colour: Colour, glow: int = 0) -> None:
    rows, columns = _grid(canvas)
    _cover(canvas, ((columns - x) / across) ** 2 + ((rows - y) / up) ** 2 < 1, colour, glow)


def _spire(canvas, x, y, half, height, colour: Colour) -> None:
    rows, columns = _grid(canvas)
    inside = (rows >= y) & (np.abs(columns - x) < half * (1 - (rows - y) / height))
    _cover(canvas, inside, colour)
    _cover(canvas, inside & (columns > x), darker(colour, 0.8))


_MASONRY: tuple[Colour, ...] = (
    (198, 186, 160),
    (160, 150, 140),
    (176, 112, 84),
    (222, 214, 200),
    (206, 176, 120),
)
_LEADS: tuple[Colour, ...] = ((84, 112, 100), (82, 86, 96), (120, 66, 52), (60, 62, 68))


def _block(rng, width, height, colour: Colour) -> np.ndarray:
    """A piece of plain masonry with courses."""
    canvas = blank(width, height, colour)
    canvas[:: texels(0.6), :, :3] = darker(colour, 0.88)
    roughen(canvas, rng, 0.04, 0.06)
    return canvas


def _lancet(canvas, x, y, width, height, glow: int = 120) -> None:
    """A tall dark window with a round head."""
    fill(canvas, x - width / 2 - 0.14, y, x + width / 2 + 0.14, y + height, (226, 220, 206))
    _disc(canvas, x, y + height, width / 2 + 0.14, width / 2 + 0.14, (226, 220, 206))
    fill(canvas, x - width / 2, y, x + width / 2, y + height, (44, 50, 60), glow)
    _disc(canvas, x, y + height, width / 2, width / 2, (44, 50, 60), glow)


def paint_church(canvas, middle: float, rng: np.random.Generator) -> None:
    """A church front: nave with gable, portal and rose, and one or two towers with spires."""
    stone, lead = pick(rng, _MASONRY), pick(rng, _LEADS)
    half, nave = float(rng.uniform(4.0, 5.5)), float(rng.uniform(9, 12))
    stamp(canvas, _block(rng, 2 * half, nave, stone), middle - half, 0)
    rows, columns = _grid(canvas)
    gable = (rows >= nave) & (np.abs(columns - middle) < half * (1 - (rows - nave) / 4.5))
    _cover(canvas, gable, stone)
    _cover(
        canvas, gable & (np.abs(columns - middle) > half * (1 - (rows - nave) / 4.5) - 0.4), lead
    )
    _disc(canvas, middle, nave - 0.6, 1.7, 1.7, (228, 222, 208))
    _disc(canvas, middle, nave - 0.6, 1.4, 1.4, (58, 70, 104), 140)
    for angle in np.arange(0, np.pi, np.pi / 4):
        along = np.abs((columns - middle) * np.sin(angle) - (rows - nave + 0.6) * np.cos(angle))
        inside = (along < 0.09) & ((columns - middle) ** 2 + (rows - nave + 0.6) ** 2 < 1.9)
        _cover(canvas, inside, (228, 222, 208))
    _lancet(canvas, middle, 0, 2.2, 3.0, 0)
    for offset in (-0.66, 0.66):
        _lancet(canvas, middle + offset * half, 3.4, 0.8, 2.6)
    towers = {0: (0.0,), 1: (-1.0,), 2: (1.0,), 3: (-1.0, 1.0)}[int(rng.integers(4))]
    high, wide = float(rng.uniform(15, 20)), float(rng.uniform(1.7, 2.3))
    spire = float(rng.uniform(4, 12))
    for at in towers:
        x = middle + at * (half + 0.6 * wide)
        base = nave + 4.6 if at == 0 else 0
        stamp(canvas, _block(rng, 2 * wide, high - base, darker(stone, 0.96)), x - wide, base)
        _lancet(canvas, x, high - 3.2, 1.0, 1.8)
        fill(canvas, x - wide - 0.2, high - 0.4, x + wide + 0.2, high, (226, 220, 206))
        _spire(canvas, x, high, wide + 0.1, spire, lead)


def paint_clock_tower(canvas, middle: float, rng: np.random.Generator) -> None:
    """A slim tower with a clock under a pointed roof or a dome."""
    stone, lead = pick(rng, _MASONRY), pick(rng, _LEADS)
    rows, columns = _grid(canvas)
    half, high = float(rng.uniform(2.0, 3.0)), float(rng.uniform(16, 23))
    stamp(canvas, _block(rng, 2 * half, high, stone), middle - half, 0)
    for side in (-half, half - 0.5):
        fill(canvas, middle + side, 0, middle + side + 0.5, high, (224, 216, 200))
    for y in np.arange(4.5, high - 6, 3.6):
        _lancet(canvas, middle, y, 0.9, 1.5)
        fill(canvas, middle - half, y - 0.6, middle + half, y - 0.4, (224, 216, 200))
    _lancet(canvas, middle, 0, 1.6, 2.2, 0)
    _disc(canvas, middle, high - 2.4, 1.5, 1.5, (60, 56, 52))
    _disc(canvas, middle, high - 2.4, 1.3, 1.3, (240, 236, 220), 160)
    fill(canvas, middle - 0.07, high - 2.4, middle + 0.07, high - 1.4, (30, 30, 32))
    fill(canvas, middle - 0.07, high - 2.45, middle + 0.8, high - 2.31, (30, 30, 32))
    fill(canvas, middle - half - 0.3, high - 0.5, middle + half + 0.3, high, (224, 216, 200))
    if rng.random() < 0.5:
        _spire(canvas, middle, high, half + 0.2, float(rng.uniform(4, 8)), lead)
    else:
        dome = rows >= high
        dome = dome & (((columns - middle) / half) ** 2 + ((rows - high) / half / 1.1) ** 2 < 1)
        _cover(canvas, dome, lead)
        _cover(canvas, dome & (columns > middle + 0.3 * half), darker(lead, 0.85))
        fill(canvas, middle - 0.12, high, middle + 0.12, high + half * 1.1 + 1.5, lead)


def paint_hall(canvas, middle: float, rng: np.random.Generator) -> None:
    """A public building: steps, columns, a pediment and sometimes a dome."""
    stone = darker(pick(rng, _MASONRY), 1.08)
    half, high = float(rng.uniform(6, 8)), float(rng.uniform(8.5, 11))
    if rng.random() < 0.6:
        lead = pick(rng, _LEADS)
        _disc(canvas, middle, high + 4.2, 3.4, 3.2, lead)
        fill(canvas, middle - 3.6, high, middle + 3.6, high + 4.2, darker(stone, 0.94))
        for x in np.arange(middle - 3.1, middle + 3.1, 0.9):
            fill(canvas, x, high + 2.8, x + 0.45, high + 3.8, (70, 74, 82), 60)
        fill(canvas, middle - 0.5, high + 7, middle + 0.5, high + 8.6, stone)
    stamp(canvas, _block(rng, 2 * half, high, stone), middle - half, 0)
    rows, columns = _grid(canvas)
    edge = 1 - (rows - high) / 2.6
    pediment = (rows >= high) & (np.abs(columns - middle) < 0.75 * half * edge)
    _cover(canvas, pediment, stone)
    _cover(
        canvas, pediment & (np.abs(columns - middle) > 0.75 * half * edge - 0.5), (236, 230, 216)
    )
    fill(canvas, middle - half, high - 0.7, middle + half, high, (236, 230, 216))
    fill(canvas, middle - 0.7 * half, 0.8, middle + 0.7 * half, high - 0.7, (96, 88, 80), 40)
    for x in np.linspace(middle - 0.68 * half, middle + 0.68 * half, int(rng.integers(4, 8))):
        fill(canvas, x - 0.34, 0.8, x + 0.34, high - 0.7, (232, 226, 212))
        fill(canvas, x + 0.12, 0.8, x + 0.34, high - 0.7, (196, 188, 174))
    fill(canvas, middle - 0.8 * half, 0, middle + 0.8 * half, 0.8, (186, 180, 170))
    for side in (-0.86 * half, 0.86 * half):
        _lancet(canvas, middle + side, 2.2, 0.9, 2.4)


@lru_cache(maxsize=256)
def tree_texture(seed: int, autumn: float) -> Texture:
    """A tree painted 6 m wide and 6.6 m tall, hung at any size; `autumn` from 0 (green) to 1."""
    rng = np.random.default_rng(seed)
    canvas = blank(6.0, 6.6)
    fill(canvas, 2.8, 0, 3.2, 3.2, (84, 66, 52))
    green = np.array([rng.uniform(58, 92), rng.uniform(92, 124), rng.uniform(40, 60)])
    leaves = green * (1 - autumn) + np.array([176, 112, 40]) * autumn
    rows, columns = _grid(canvas)
    grain = noise_maps()[0]
    top, left = rng.integers(0, 900, 2)
    patch = np.s_[top : top + canvas.shape[0], left : left + canvas.shape[1]]
    for _ in range(9):
        x, y = 3.0 + rng.normal(0, 0.85), 4.2 + rng.normal(0, 0.75)
        radius = rng.uniform(0.8, 1.4)
        reach = ((columns - x) ** 2 + (rows - y) ** 2) / radius**2
        inside = reach + 0.28 * grain[patch] < 1
        light = 0.72 + 0.3 * (rows - y) / radius - 0.1 * (columns - x) / radius
        shade = np.clip(light + 0.14 * grain[patch], 0.3, 1.3)[..., None]
        canvas[inside, :3] = np.clip(leaves * shade, 0, 255)[inside]
        canvas[inside, COVERAGE] = 255
    return Texture.from_canvas(canvas)


@lru_cache(maxsize=8)
def lamp_texture(kind: int) -> Texture:
    """A lamp post 1.4 x 5.2 m: a lantern, a globe or a modern arm."""
    canvas = blank(1.4, 5.2)
    iron = ((44, 48, 50), (40, 58, 52), (120, 124, 126))[kind]
    fill(canvas, 0.64, 0, 0.78, 4.4, iron)
    fill(canvas, 0.56, 0, 0.86, 0.8, iron)
    if kind == 0:
        fill(canvas, 0.48, 4.3, 0.94, 4.95, (232, 214, 160), 255)
        fill(canvas, 0.42, 4.9, 1.0, 5.05, iron)
    elif kind == 1:
        _disc(canvas, 0.71, 4.65, 0.34, 0.34, (240, 232, 206), 255)
    else:
        fill(canvas, 0.1, 4.9, 0.78, 5.0, iron)
        fill(canvas, 0.64, 4.3, 0.78, 5.0, iron)
        fill(canvas, 0.1, 4.75, 0.5, 4.9, (236, 232, 220), 255)
    return Texture.from_canvas(canvas)


@lru_cache(maxsize=256)
def person_texture(seed: int) -> Texture:
    """A passer-by 0.8 x 1.8 m: legs, a coat, arms, a head, sometimes a bag."""
    rng = np.random.default_rng(seed)
    canvas = blank(0.8, 1.8)
    coats = [
        (52, 60, 84),
        (120, 40, 44),
        (200, 180, 140),
        (60, 60, 62),
        (76, 108, 84),
        (196, 120, 60),
    ]
    coat, trousers = pick(rng, coats), pick(rng, [(40, 44, 60), (70, 62, 54), (30, 30, 34)])
    skin = pick(rng, [(224, 184, 156), (164, 116, 88), (110, 76, 58)])
    stride = float(rng.uniform(0.04, 0.14))
    fill(canvas, 0.4 - stride - 0.08, 0, 0.4 - stride + 0.06, 0.85, trousers)
    fill(canvas, 0.4 + stride - 0.06, 0, 0.4 + stride + 0.08, 0.85, trousers)
    fill(canvas, 0.2, 0.75, 0.6, 1.48, coat)
    fill(canvas, 0.12, 0.85, 0.22, 1.42, darker(coat, 0.8))
    fill(canvas, 0.58, 0.85, 0.68, 1.42, darker(coat, 0.8))
    _disc(canvas, 0.4, 1.63, 0.12, 0.15, skin)
    _disc(canvas, 0.4, 1.7, 0.13, 0.1, pick(rng, [(50, 38, 30), (120, 84, 50), (190, 180, 170)]))
    if rng.random() < 0.4:
        fill(canvas, 0.62, 0.6, 0.8, 0.85, pick(rng, coats))
    return Texture.from_canvas(canvas)


_PAINTS: tuple[Colour, ...] = (
    (190, 32, 34),
    (36, 62, 120),
    (228, 228, 226),
    (40, 42, 46),
    (150, 154, 158),
    (88, 120, 96),
    (226, 186, 60),
    (110, 60, 50),
)


@lru_cache(maxsize=64)
def _car_parts(paint: int) -> tuple[Texture, Texture, Texture, Texture, Texture]:
    """Side and end of the body, its flat top, side and end of the cabin."""
    colour = _PAINTS[paint]
    side = blank(4.2, 0.95)
    fill(side, 0, 0.28, 4.2, 0.95, colour)
    fill(side, 0, 0.28, 4.2, 0.36, darker(colour, 0.6))
    fill(side, 2.05, 0.4, 2.1, 0.95, darker(colour, 0.6))
    for x in (0.8, 3.35):
        _disc(side, x, 0.34, 0.4, 0.4, darker(colour, 0.4))
        _disc(side, x, 0.33, 0.33, 0.33, (26, 26, 28))
        _disc(side, x, 0.33, 0.17, 0.17, (150, 150, 152))
    end = blank(1.7, 0.95, colour)
    fill(end, 0, 0, 1.7, 0.25, (24, 24, 26))
    fill(end, 0, 0.25, 1.7, 0.42, (52, 52, 54))
    fill(end, 0.06, 0.6, 0.38, 0.8, (200, 30, 28), 160)
    fill(end, 1.32, 0.6, 1.64, 0.8, (200, 30, 28), 160)
    fill(end, 0.6, 0.48, 1.1, 0.62, (232, 226, 190))
    flat = blank(1.7, 4.2, darker(colour, 1.1))
    cabin = blank(2.6, 0.6, colour)
    fill(cabin, 0.1, 0.06, 2.5, 0.5, (40, 46, 54))
    fill(cabin, 1.2, 0, 1.32, 0.6, colour)
    glass = blank(1.5, 0.8, colour)
    fill(glass, 0.1, 0.08, 1.4, 0.68, (44, 52, 60))
    return tuple(Texture.from_canvas(part) for part in (side, end, flat, cabin, glass))


@lru_cache(maxsize=1)
def _shadow() -> Texture:
    return Texture.from_canvas(blank(1, 1, (34, 34, 38)))


def car(x: float, z: float, paint: int) -> list[Surface]:
    """A car parked along the street: x of its middle, z of the end that is nearer to the start."""
    side, end, flat, cabin, glass = _car_parts(paint % len(_PAINTS))
    half, length = 0.85, 4.2
    surfaces = [
        Surface(
            (x - 0.95, 0.02, z - 0.1), (1.9, 0, 0), (0, 0, length + 0.2), _shadow(), (0, 1, 0), 0.6
        ),
        Surface((x - half, 0, z), (2 * half, 0, 0), (0, 0.95, 0), end, (0, 0, -1)),
        Surface((x - half, 0.95, z), (2 * half, 0, 0), (0, 0, length), flat, (0, 1, 0)),
        Surface((x - 0.72, 0.95, z + 0.5), (1.44, 0, 0), (0, 0.58, 0.45), glass, (0, 0.6, -0.8)),
        Surface((x - 0.66, 1.53, z + 0.95), (1.32, 0, 0), (0, 0, 1.5), flat, (0, 1, 0)),
    ]
    for sign in (-1, 1):
        out = (sign, 0, 0)
        surfaces.append(Surface((x + sign * half, 0, z), (0, 0, length), (0, 0.95, 0), side, out))
        surfaces.append(
            Surface(
                (x + sign * 0.72, 0.95, z + 0.6), (0, 0, 2.5), (-sign * 0.06, 0.58, 0), cabin, out
            )
        )
    return surfaces
