"""A place of the rendered city: a street canyon drawn by lot and turned into surfaces.

x runs across the street (0 is its middle), y up, z along it. The surprise: the rows of houses are
two single textures, one a side, with holes above the roofs; the depth that a street has beyond its
fronts (side walls over lower neighbours, side streets, the backs of the next street) is a handful
of further surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from placekern.vpr.scenery import props
from placekern.vpr.scenery.canvas import RESOLUTION, blank, darker, fill, roughen, stamp
from placekern.vpr.scenery.facade import paint
from placekern.vpr.scenery.house import House, draw_house
from placekern.vpr.scenery.render import COVERAGE, Canyon, Surface, Texture

#: The street begins this far behind the middle of the place, in metres.
START = -14.0


@dataclass(frozen=True)
class Place:
    """One place: what stands there at all times.

    `heading` is the direction, in degrees from the street's own, in which the place is seen;
    `half_width` and `kerb` are x of the fronts and of the kerbs; `end` is z of the far end; `trees`
    holds (x, z, height), as a tree is hung anew in each season. All in metres.
    """

    surfaces: tuple[Surface, ...]
    canyon: Canyon
    half_width: float
    kerb: float
    end: float
    heading: float
    eye: float
    trees: tuple[tuple[float, float, float], ...]


def build_place(rng: np.random.Generator) -> Place:
    """A place by lot: widths, houses, side streets, the building at the end, trees and lamps."""
    half_width = float(rng.uniform(5.0, 9.0))
    pavement = float(rng.uniform(1.4, 2.6))
    end = float(rng.uniform(24, 62))
    heading = float(rng.uniform(-38, 38))
    tall = float(rng.uniform(0.8, 1.25))
    surfaces: list[Surface] = []
    profiles = []
    for side in (-1, 1):
        houses, profile = _row(rng, end - START, tall)
        profiles.append(profile)
        surfaces += _row_surfaces(rng, side, half_width, houses)
    surfaces += _far_end(rng, half_width, end, tall)
    surfaces.append(_ground(rng, half_width, pavement, end))
    surfaces += _furniture(rng, half_width - pavement, end)
    canyon = Canyon(half_width, START, *profiles)
    kerb = half_width - pavement
    eye, trees = float(rng.uniform(1.5, 2.2)), _trees(rng, kerb, end)
    return Place(tuple(surfaces), canyon, half_width, kerb, end, heading, eye, trees)


def _row(rng, length, tall) -> tuple[list[tuple[float, House | None]], np.ndarray]:
    """Houses of one side with where they begin (None: a side street), and its roof profile."""
    houses: list[tuple[float, House | None]] = []
    position, gaps = 0.0, 0
    profile = np.full(int(length) + 16, 0.0, dtype=np.float32)
    while position < length:
        if gaps == 0 and position > 8 and rng.random() < 0.14:
            gaps += 1
            width = float(rng.uniform(3.5, 6.5))
            houses.append((position, None))
        else:
            house = draw_house(rng, tall=tall)
            width = house.width
            houses.append((position, house))
            high = house.eaves + 0.5 * house.roof_height
            profile[int(position) : int(position + width) + 1] = high
        position += width
    houses.append((position, None))
    profile[int(position) :] = 8.0
    return houses, profile


def _row_surfaces(rng, side, half_width, houses) -> list[Surface]:
    length = houses[-1][0]
    height = max(house.height for _, house in houses if house)
    canvas = blank(length, height)
    for position, house in houses:
        if house:
            stamp(canvas, paint(house), position, 0)
    x = side * half_width
    front = Surface(
        (x, 0, START),
        (0, 0, length),
        (0, height, 0),
        Texture.from_canvas(canvas),
        (-side, 0, 0),
    )
    surfaces = [front]
    # The wall that a house shows above a lower neighbour, or in a side street.
    before = None
    for index, (position, house) in enumerate(houses):
        after_gap = index == 0 or houses[index - 1][1] is None
        if house and index and (after_gap or before.eaves < house.eaves):
            surfaces.append(_side_wall(rng, side, half_width, START + position, house))
        if house and house.roof in ("gable", "stepped", "bell", "pediment"):
            surfaces.append(_pitch(side, half_width, START + position, house))
        before = house
    gap = any(house is None for _, house in houses[:-1])
    depth = float(rng.uniform(9, 15))
    if gap or rng.random() < 0.5:
        texture = _backdrop(int(rng.integers(6)))
        x = side * (half_width + depth)
        long, high = texture.width / RESOLUTION, texture.height / RESOLUTION
        shift = float(rng.uniform(0, long - length)) if long > length else 0.0
        surfaces.append(
            Surface((x, 0, START - shift), (0, 0, long), (0, high, 0), texture, (-side, 0, 0), 0.85)
        )
    return surfaces


def _side_wall(rng, side, half_width, z, house) -> Surface:
    depth = 9.0
    wall = blank(depth, house.eaves, darker(house.wall, 0.9))
    roughen(wall, rng, 0.05, 0.09)
    if house.material == "brick":
        wall[::3, :, :3] = wall[::3, :, :3] * 0.9
    for _ in range(int(rng.integers(0, 3))):
        x, y = rng.uniform(1, depth - 2), rng.uniform(4, max(house.eaves - 2, 4.1))
        fill(wall, x, y, x + 0.9, y + 1.3, (52, 58, 64), 120)
    return Surface(
        (side * half_width, 0, z),
        (side * depth, 0, 0),
        (0, house.eaves, 0),
        Texture.from_canvas(wall),
        (0, 0, -1),
    )


def _pitch(side, half_width, z, house) -> Surface:
    """The half of the roof behind a gable that is seen by who comes along the street."""
    depth, rise, half = 9.0, 0.92 * house.roof_height, 0.5 * house.width
    slope = float(np.hypot(rise, half))
    tiles = blank(depth, slope, house.roof_colour)
    tiles[::4, :, :3] = darker(house.roof_colour, 0.8)
    return Surface(
        (side * half_width, house.eaves, z),
        (side * depth, 0, 0),
        (0, rise, half),
        Texture.from_canvas(tiles),
        (0, half / slope, -rise / slope),
    )


@lru_cache(maxsize=6)
def _backdrop(number: int) -> Texture:
    """The houses of the next street, seen through gaps and over low roofs: a few for all."""
    rng = np.random.default_rng([20171126, number])
    canvas = blank(80.0, 20.0)
    position = 0.0
    while position < 80:
        house = replace(draw_house(rng, tall=1.15), ground="plain", shutters=False)
        stamp(canvas, paint(house), position, 0)
        position += house.width
    return Texture.from_canvas(canvas)


def _far_end(rng, half_width, end, tall) -> list[Surface]:
    """What closes the street: houses, a church, a clock tower, a public hall, or only trees."""
    kind = str(rng.choice(["houses", "church", "clock", "hall", "park"]))
    width = 2 * half_width + 16
    canvas = blank(width, 34.0)
    if kind != "park":
        position = -float(rng.uniform(0, 5))
        while position < width:
            house = draw_house(rng, tall=tall)
            stamp(canvas, paint(house), position, 0)
            position += house.width
    middle = width / 2 + float(rng.uniform(-0.25, 0.25)) * half_width
    if kind == "church":
        props.paint_church(canvas, middle, rng)
    elif kind == "clock":
        props.paint_clock_tower(canvas, middle, rng)
    elif kind == "hall":
        props.paint_hall(canvas, middle, rng)
    surfaces = [
        Surface(
            (-width / 2, 0, end),
            (width, 0, 0),
            (0, canvas.shape[0] / RESOLUTION, 0),
            Texture.from_canvas(canvas),
            (0, 0, -1),
        )
    ]
    if kind == "park":
        for x in np.linspace(-width / 2, width / 2, 6):
            high = float(rng.uniform(6, 11))
            depth = end + float(rng.uniform(0, 8))
            tree = props.tree_texture(int(rng.integers(1 << 31)), 0.1)
            surfaces.append(props.upright(float(x), depth, high * 0.9, high, tree))
    return surfaces


def _ground(rng, half_width, pavement, end) -> Surface:
    """Carriageway, kerbs and pavements of the whole street as one surface."""
    margin = 16.0
    width, length = 2 * (half_width + margin), end - START + 12
    resolution = 8
    canvas = np.zeros((int(length * resolution), int(width * resolution), 5), dtype=np.uint8)
    canvas[..., COVERAGE] = 255
    x = (np.arange(canvas.shape[1]) + 0.5) / resolution - width / 2
    z = (np.arange(canvas.shape[0]) + 0.5) / resolution
    road = np.array(
        [(92, 92, 94), (112, 108, 102), (78, 78, 82), (138, 122, 104)][int(rng.integers(4))]
    )
    paving = np.array([(158, 152, 144), (176, 166, 150), (142, 142, 144)][int(rng.integers(3))])
    aside = np.abs(x) > half_width - pavement
    canvas[..., :3] = np.where(aside[:, None], paving, road)
    column, row = np.arange(canvas.shape[1]), np.arange(canvas.shape[0])[:, None]
    slabs = aside & ((row % 6 == 0) | (column % 6 == 0))
    canvas[slabs, :3] = paving * 0.86
    marking = int(rng.integers(4))
    cobbles = marking == 3
    if cobbles:
        stones = ~aside & ((row % 3 == 0) | ((column + (row // 3 % 2) * 2) % 4 == 0))
        canvas[stones, :3] = road * 0.8
    roughen(canvas, rng, 0.045, 0.07)
    kerb = np.abs(np.abs(x) - (half_width - pavement)) < 0.12
    canvas[:, kerb, :3] = (190, 186, 178)
    white = (222, 220, 212)
    if marking == 0:
        dashes = (z % 4.0) < 2.0
        canvas[np.ix_(dashes, np.abs(x) < 0.08)] = (*white, 255, 0)
    elif marking == 1:
        bars = (np.floor(x / 0.5) % 2 == 0) & ~aside
        at = -START + float(rng.uniform(5, 12))
        canvas[np.ix_((z > at) & (z < at + 2.6), bars)] = (*white, 255, 0)
    elif marking == 2:
        lines = np.abs(np.abs(x) - (half_width - pavement - 0.35)) < 0.07
        canvas[:, lines] = (204, 172, 60, 255, 0)
    return Surface(
        (-width / 2, 0, START),
        (width, 0, 0),
        (0, 0, length),
        Texture.from_canvas(canvas),
        (0, 1, 0),
    )


def _furniture(rng, kerb, end) -> list[Surface]:
    """Lamp posts along the kerbs, by turns left and right."""
    surfaces = []
    lamp = props.lamp_texture(int(rng.integers(3)))
    spacing = float(rng.uniform(14, 24))
    side = 1 if rng.random() < 0.5 else -1
    for z in np.arange(float(rng.uniform(4, 10)), end, spacing):
        surfaces.append(props.upright(side * (kerb + 0.4), float(z), 1.4, 5.2, lamp))
        side = -side
    return surfaces


def _trees(rng, kerb, end) -> tuple[tuple[float, float, float], ...]:
    """Street trees along one kerb in some places: x, z and height of each."""
    if rng.random() < 0.55:
        return ()
    side = 1 if rng.random() < 0.5 else -1
    rows = np.arange(float(rng.uniform(9, 14)), end - 4, float(rng.uniform(9, 16)))
    return tuple((side * (kerb + 0.35), float(z), float(rng.uniform(4.5, 7.5))) for z in rows[:3])
