"""House fronts: paints a `House` on a canvas.

The surprise: nothing is drawn twice. A window is painted in four variants, dark and lit, and
stamped; masonry and dirt are one factor that the wall's colour is multiplied with.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from placekern.vpr.scenery.canvas import (
    RESOLUTION,
    blank,
    darker,
    fill,
    noise_factor,
    noise_maps,
    shade,
    stamp,
    texels,
)
from placekern.vpr.scenery.house import ACCENTS, House, pick
from placekern.vpr.scenery.render import COVERAGE, GLOW


def paint(house: House) -> np.ndarray:
    """The front as a canvas uint8 [h, w, 5]; texels beside a gable or over a parapet are holes."""
    rng = np.random.default_rng(house.seed)
    canvas = blank(house.width, house.height)
    wall = canvas[: texels(house.eaves)]
    wall[..., :3] = house.wall
    wall[..., COVERAGE] = 255
    _paint_roof(canvas, house, rng)
    factor = noise_factor(canvas, rng, 0.035, 0.05)
    factor[: len(wall)] *= _masonry(wall, house)
    # Rain and traffic leave the lowest metre darker.
    factor[: texels(1.0)] *= np.linspace(0.78, 1, texels(1.0), dtype=np.float32)[:, None]
    shade(canvas, factor)
    if house.material == "timber":
        _paint_beams(wall, house, rng)
    _paint_trim(canvas, house)
    _paint_windows(canvas, house, rng)
    _paint_ground_floor(canvas, house, rng)
    return canvas


def _masonry(wall, house) -> np.ndarray:
    """How light each texel of a wall is by its bricks, blocks or panels: broadcasts to [h, w]."""
    row, column = np.arange(wall.shape[0])[:, None], np.arange(wall.shape[1])
    grain = noise_maps()[0]
    if house.material == "brick":
        # Courses of a fifth of a metre: real ones would fall between the texels.
        course, brick = row // 3, (column + 4 * ((row // 3) % 2)) // 8
        return (1 + 0.09 * grain[course, brick]) * np.where(row % 3 == 0, 0.9, 1.0)
    if house.material == "stone":
        tall, wide = texels(0.55), texels(1.1)
        block = (column + (wide // 2) * ((row // tall) % 2)) // wide
        return (1 + 0.05 * grain[row // tall, block]) * np.where(row % tall == 0, 0.82, 1.0)
    if house.material == "modern":
        panel = texels(house.storey_height)
        return np.where((row % panel == 0) | (column % texels(1.6) == 0), 0.82, 1.0)
    return np.ones((1, 1))


def _paint_beams(wall, house, rng) -> None:
    beam = (64, 44, 34)
    for level in range(house.storeys):
        y = house.ground_height + level * house.storey_height
        fill(wall, 0, y - 0.12, house.width, y + 0.12, beam)
        fill(wall, 0, y + 0.95, house.width, y + 1.08, beam)
    for x in np.linspace(0, house.width, house.columns * 2 + 1):
        fill(wall, x - 0.09, house.ground_height, x + 0.09, house.eaves, beam)
    row, column = np.arange(wall.shape[0])[:, None], np.arange(wall.shape[1])
    slope = 1 if rng.random() < 0.5 else -1
    slanted = ((row + slope * column) % texels(2.4)) < 2
    wall[slanted & (row > texels(house.eaves - house.storey_height)), :3] = beam


def _paint_roof(canvas, house, rng) -> None:
    eaves, top = texels(house.eaves), canvas.shape[0]
    roof = canvas[eaves:]
    rise = np.arange(top - eaves)[:, None] / max(top - eaves, 1)
    aside = np.abs(np.linspace(-1, 1, canvas.shape[1]))
    if house.roof in ("stepped", "bell", "gable"):
        edge = 1 - rise
        if house.roof == "stepped":
            edge = np.ceil(edge * 5) / 5
        elif house.roof == "bell":
            edge = np.where(rise < 0.85, 0.32 + 0.68 * np.clip(1 - rise / 0.85, 0, 1) ** 2.2, 0.4)
        inside = aside <= edge
        roof[inside, :3] = house.wall
        rim = inside & (aside > edge - 1.6 / house.width)
        roof[rim, :3] = house.trim if house.roof != "gable" else darker(house.roof_colour, 0.8)
        roof[inside, COVERAGE] = 255
        return
    if house.roof == "parapet":
        roof[..., :3] = darker(house.wall, 0.92)
        roof[-2:, :, :3] = house.trim
        roof[..., COVERAGE] = 255
        return
    if house.roof == "pediment":
        inside = aside <= 1.05 - rise
        roof[inside, :3] = house.wall
        roof[inside & (aside > 0.93 - rise), :3] = house.trim
        roof[inside, COVERAGE] = 255
        return
    slope = 0.05 if house.roof == "mansard" else 0.16
    inside = aside <= 1 - slope * rise
    lines = np.where(np.arange(top - eaves) % 4 == 0, 0.8, 1.0)[:, None]
    shade = lines * (1.06 - 0.16 * rise)
    roof[..., :3] = np.clip(np.array(house.roof_colour) * shade[..., None], 0, 255)
    roof[..., COVERAGE] = np.where(inside, 255, 0)
    dormers = int(rng.integers(0, house.columns + 1))
    for x in (np.arange(dormers) + 0.5) * house.width / max(dormers, 1):
        high = 0.62 * house.roof_height
        fill(canvas, x - 0.62, house.eaves + 0.3, x + 0.62, house.eaves + high, house.trim)
        glow = int(rng.choice([0, 0, 200]))
        fill(
            canvas,
            x - 0.42,
            house.eaves + 0.45,
            x + 0.42,
            house.eaves + high - 0.2,
            (52, 60, 70),
            glow,
        )
        fill(canvas, x - 0.04, house.eaves + 0.45, x + 0.04, house.eaves + high - 0.2, house.frame)
        fill(
            canvas,
            x - 0.72,
            house.eaves + high,
            x + 0.72,
            house.eaves + high + 0.16,
            darker(house.roof_colour, 0.7),
        )


def _paint_trim(canvas, house) -> None:
    shadow = darker(house.wall, 0.62)
    if house.material != "timber":
        if house.roof in ("tiles", "mansard", "parapet", "pediment"):
            fill(canvas, 0, house.eaves - 0.5, house.width, house.eaves - 0.34, shadow)
            fill(canvas, 0, house.eaves - 0.34, house.width, house.eaves + 0.05, house.trim)
        if house.material != "modern":
            fill(
                canvas,
                0,
                house.ground_height - 0.22,
                house.width,
                house.ground_height - 0.14,
                shadow,
            )
            fill(
                canvas,
                0,
                house.ground_height - 0.14,
                house.width,
                house.ground_height + 0.1,
                house.trim,
            )
        if house.surround >= 0.18 and house.material != "brick":
            for side in (0.0, house.width - 0.45):
                for y in np.arange(0.2, house.eaves - 0.8, 0.9):
                    fill(canvas, side, y, side + 0.45, y + 0.45, house.trim)
    # The joint between two houses.
    canvas[: texels(house.eaves), :1, :3] = darker(house.wall, 0.55)


def _window_tile(house, width, height, rng, glow: int) -> np.ndarray:
    """One window with its surround, sill and shutters; holes where the wall shows."""
    wing = width * 0.52 if house.shutters else 0.0
    margin = house.surround + wing + 0.1
    tile = blank(width + 2 * margin, height + 0.75)
    left, sill = margin, 0.3
    right, top = left + width, sill + height
    if house.shutters:
        for x in (left - wing, right):
            fill(tile, x, sill, x + wing - 0.04, top, house.accent)
            for y in np.arange(sill + 0.1, top - 0.05, 0.22):
                fill(tile, x + 0.08, y, x + wing - 0.1, y + 0.05, darker(house.accent, 0.72))
    if house.surround:
        s = house.surround
        fill(tile, left - s, sill, right + s, top + s, house.trim)
        if s > 0.2:
            fill(
                tile,
                left - s - 0.1,
                top + s,
                right + s + 0.1,
                top + s + 0.14,
                darker(house.trim, 1.06),
            )
    pane = blank(width, height, (46, 54, 62))
    rows = np.linspace(0, 1, pane.shape[0])[:, None]
    columns = np.linspace(0, 1, pane.shape[1])
    mirror = np.clip(rows * 0.9 + 0.25 * (((columns + rows) % 0.7) > 0.5) - 0.25, 0, 1)
    pane[..., :3] = (np.array((34, 40, 46)) + mirror[..., None] * np.array((78, 92, 104))).astype(
        np.uint8
    )
    pane[..., GLOW] = glow
    curtain = rng.random()
    if curtain < 0.45:
        cloth = (206, 200, 188) if curtain < 0.3 else (150, 120, 96)
        drawn = float(rng.uniform(0.15, 0.32))
        sides = (columns < drawn) | (columns > 1 - drawn)
        pane[:, sides, :3] = cloth
        pane[:, sides, GLOW] = glow // 2
    elif curtain < 0.6:
        pane[rows[:, 0] > rng.uniform(0.3, 0.7), :, :3] = (196, 190, 176)
    # The reveal throws a shadow on the top of the glass.
    pane[-max(2, texels(0.14)) :, :, :3] //= 2
    bars = {
        "sash": ([0.5], [0.5]),
        "cross": ([0.5], [0.66]),
        "grid": ([0.25, 0.5, 0.75], [0.2, 0.4, 0.6, 0.8]),
        "arched": ([0.5], [0.62]),
        "wide": ([0.35], []),
        "french": ([0.5], [0.78]),
    }[house.window]
    for x in bars[0]:
        fill(pane, x * width - 0.04, 0, x * width + 0.04, height, house.frame)
    for y in bars[1]:
        fill(pane, 0, y * height - 0.04, width, y * height + 0.04, house.frame)
    pane[:1, :, :3] = pane[:, :1, :3] = pane[:, -1:, :3] = house.frame
    if house.window == "arched":
        arch = np.abs(columns * 2 - 1) ** 2 + np.clip((rows - 0.72) / 0.28, 0, None) ** 2 > 1
        pane[arch & (rows > 0.72), COVERAGE] = 0
        if house.surround:
            cut = texels(sill) + int(0.72 * pane.shape[0])
            tile[cut:, :, COVERAGE] = 0
            _ring(
                tile,
                (left + right) / 2,
                sill + 0.72 * height,
                width / 2 + house.surround,
                0.28 * height + house.surround,
                house.trim,
            )
    stamp(tile, pane, left, sill)
    if house.window == "french":
        rail = (40, 40, 44)
        fill(tile, left - 0.1, sill + 0.85, right + 0.1, sill + 0.93, rail)
        for x in np.arange(left - 0.1, right + 0.1, 0.22):
            fill(tile, x, sill, x + 0.05, sill + 0.9, rail)
    fill(tile, left - 0.1, sill - 0.14, right + 0.1, sill, darker(house.trim, 0.96))
    fill(tile, left - 0.1, sill - 0.26, right + 0.1, sill - 0.14, darker(house.wall, 0.7))
    return tile


def _ring(canvas, x, y, across, up, colour) -> None:
    """Covers the upper half of an ellipse around (x, y)."""
    rows = (np.arange(canvas.shape[0])[:, None] + 0.5) / RESOLUTION - y
    columns = (np.arange(canvas.shape[1]) + 0.5) / RESOLUTION - x
    inside = (rows > 0) & ((rows / up) ** 2 + (columns / across) ** 2 < 1)
    canvas[inside, :3] = colour
    canvas[inside, COVERAGE] = 255


def _paint_windows(canvas, house, rng) -> None:
    tiles = [
        _window_tile(house, house.window_width, house.window_height, rng, glow)
        for glow in (0, 0, 150, 230)
    ]
    pitch = house.width / house.columns
    margin = (tiles[0].shape[1] / RESOLUTION) / 2
    rise = (house.storey_height - house.window_height) * 0.45 - 0.3
    for level in range(house.storeys - 1):
        y = house.ground_height + level * house.storey_height + rise
        for column in range(house.columns):
            stamp(canvas, pick(rng, tiles), (column + 0.5) * pitch - margin, y)
    if house.roof in ("stepped", "bell", "gable") and house.roof_height > 2.6:
        small = _window_tile(house, 0.8, 1.1, rng, 150)
        margin = small.shape[1] / RESOLUTION / 2
        stamp(canvas, small, house.width / 2 - margin, house.eaves + 0.2)


def _paint_ground_floor(canvas, house, rng) -> None:
    high = house.ground_height - 0.3
    if house.ground == "shop":
        _paint_shop(canvas, house, rng, high)
    elif house.ground == "arcade":
        bays = max(2, int(house.width / 3))
        pitch = house.width / bays
        for x in (np.arange(bays) + 0.5) * pitch:
            fill(canvas, x - pitch * 0.36, 0, x + pitch * 0.36, high * 0.62, (38, 36, 38), 60)
            _ring(canvas, x, high * 0.62 - 0.04, pitch * 0.36, high * 0.3, (38, 36, 38))
    else:
        tile = _window_tile(house, house.window_width, min(house.window_height, 1.8), rng, 180)
        margin = tile.shape[1] / RESOLUTION / 2
        pitch = house.width / house.columns
        doors = {int(rng.integers(house.columns))}
        if house.ground == "doors" and house.columns > 3:
            doors.add(int(rng.integers(house.columns)))
        for column in range(house.columns):
            x = (column + 0.5) * pitch
            if column not in doors:
                stamp(canvas, tile, x - margin, 0.75)
                continue
            fill(canvas, x - 0.75, 0, x + 0.75, 2.75, house.trim)
            fill(canvas, x - 0.55, 0.15, x + 0.55, 2.2, house.accent)
            fill(canvas, x - 0.55, 2.25, x + 0.55, 2.6, (60, 66, 70), 200)
            for y in (0.4, 1.3):
                for side in (-0.42, 0.08):
                    fill(canvas, x + side, y, x + side + 0.34, y + 0.65, darker(house.accent, 0.7))
            fill(canvas, x - 0.9, 0, x + 0.9, 0.15, (150, 146, 140))


def _paint_shop(canvas, house, rng, high) -> None:
    accent, sign = house.accent, high - 0.75
    fill(canvas, 0.15, 0, house.width - 0.15, high, darker(accent, 0.8))
    door = float(rng.uniform(0.6, max(house.width - 2.0, 0.7)))
    bays = max(1, round((house.width - 1.6) / 2.4))
    edges = np.linspace(0.35, house.width - 0.35, bays + 1)
    goods = [pick(rng, ACCENTS) for _ in range(3)]
    for left, right in pairwise(edges):
        fill(canvas, left + 0.08, 0.55, right - 0.08, sign - 0.12, (58, 64, 68), 210)
        fill(canvas, left + 0.08, sign - 0.5, right - 0.08, sign - 0.12, (104, 114, 120), 230)
        for x in np.arange(left + 0.2, right - 0.4, 0.42):
            tall = float(rng.uniform(0.15, 0.8))
            fill(canvas, x, 0.6, x + 0.32, 0.6 + tall, pick(rng, goods), 130)
    fill(canvas, door - 0.1, 0, door + 1.1, sign - 0.1, darker(accent, 0.6))
    fill(canvas, door, 0.1, door + 1.0, sign - 0.2, (70, 78, 82), 190)
    board = darker(accent, 1.0) if sum(accent) < 480 else (52, 44, 40)
    fill(canvas, 0.1, sign, house.width - 0.1, high, board)
    _letter(canvas, house, rng, sign, high)
    if rng.random() < 0.5:
        second = (238, 232, 218)
        low = sign - 0.75
        row = slice(texels(low), texels(sign + 0.05))
        stripe = (np.arange(texels(0.3), texels(house.width - 0.3)) // texels(0.4)) % 2
        area = canvas[row, texels(0.3) : texels(house.width - 0.3)]
        plain = rng.random() < 0.35
        area[..., :3] = np.where(
            (stripe == 0) | plain, np.array(accent)[:, None], np.array(second)[:, None]
        ).T
        area[: texels(0.15), :, :3] = area[: texels(0.15), :, :3] * 0.75
        area[..., GLOW] = 0


def _letter(canvas, house, rng, low, high) -> None:
    """A name in strokes of one texel: it reads as lettering from across the street."""
    ink = (244, 232, 196) if rng.random() < 0.7 else (250, 250, 250)
    tall = texels((high - low) * 0.56)
    letters = int(min(rng.integers(4, 11), (house.width - 1.4) / 0.42))
    x = texels(house.width / 2 - letters * 0.21)
    y = texels(low + (high - low) * 0.22)
    for _ in range(letters):
        glyph = rng.random((3, 3)) < 0.55
        glyph[:, 0] = True
        big = np.kron(glyph, np.ones((max(tall // 3, 1), 1), dtype=bool))
        area = canvas[y : y + big.shape[0], x : x + 3]
        cut = big[: area.shape[0], : area.shape[1]]
        area[cut, :3] = ink
        area[cut, GLOW] = 90
        x += texels(0.42)
