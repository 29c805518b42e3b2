"""Houses by lot: what a front is like, in metres and colours, before any of it is painted.

The surprise: the lots are not independent. A material brings its own windows and roofs, as a street
of houses that mixed all with all would look like no town, and be too easy to tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placekern.vpr.scenery.canvas import Colour

_WALLS: dict[str, tuple[Colour, ...]] = {
    "brick": (
        (150, 74, 56),
        (124, 58, 48),
        (170, 98, 72),
        (186, 152, 108),
        (98, 60, 52),
        (160, 120, 96),
    ),
    "plaster": (
        (226, 202, 150),
        (236, 226, 204),
        (222, 172, 112),
        (214, 150, 130),
        (176, 192, 196),
        (190, 200, 164),
        (232, 188, 170),
        (204, 124, 92),
        (160, 178, 198),
        (240, 236, 228),
        (208, 184, 92),
        (138, 160, 138),
    ),
    "stone": ((196, 184, 160), (170, 166, 160), (206, 192, 150), (148, 142, 136), (214, 206, 194)),
    "timber": ((232, 222, 198), (224, 206, 160), (214, 176, 140)),
    "modern": ((120, 126, 132), (206, 206, 202), (92, 90, 92), (176, 160, 140), (150, 160, 158)),
}
_TRIMS: tuple[Colour, ...] = (
    (238, 234, 224),
    (214, 202, 178),
    (180, 170, 152),
    (120, 96, 80),
    (246, 244, 240),
)
_FRAMES: tuple[Colour, ...] = (
    (240, 238, 232),
    (70, 52, 42),
    (40, 62, 54),
    (228, 220, 200),
    (52, 60, 76),
    (110, 40, 36),
)
ACCENTS: tuple[Colour, ...] = (
    (36, 84, 64),
    (28, 62, 112),
    (136, 34, 38),
    (196, 140, 36),
    (60, 50, 46),
    (88, 42, 92),
    (214, 92, 40),
    (24, 110, 122),
    (190, 60, 92),
    (230, 214, 170),
)
_ROOFS: tuple[Colour, ...] = (
    (142, 74, 54),
    (112, 62, 50),
    (82, 86, 94),
    (98, 92, 88),
    (70, 74, 80),
)


_MATERIAL_ODDS = (0.27, 0.36, 0.16, 0.08, 0.13)


@dataclass(frozen=True)
class House:
    """One front, in metres: what `paint` needs to know about it."""

    width: float
    storeys: int
    storey_height: float
    ground_height: float
    material: str
    wall: Colour
    trim: Colour
    frame: Colour
    accent: Colour
    window: str
    window_width: float
    window_height: float
    columns: int
    surround: float
    shutters: bool
    ground: str
    roof: str
    roof_colour: Colour
    roof_height: float
    seed: int

    @property
    def eaves(self) -> float:
        """Height of the walls, without the roof."""
        return self.ground_height + (self.storeys - 1) * self.storey_height

    @property
    def height(self) -> float:
        """Height of everything."""
        return self.eaves + self.roof_height


def pick(rng: np.random.Generator, options):
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def draw_house(rng: np.random.Generator, width: float | None = None, tall: float = 1.0) -> House:
    """A house by lot; `tall` scales the number of storeys."""
    material = str(rng.choice(["brick", "plaster", "stone", "timber", "modern"], p=_MATERIAL_ODDS))
    if width is None:
        width = float(rng.uniform(5.5, 13.5) + (4 if material == "modern" else 0))
    storeys = int(np.clip(round(rng.normal(3.6, 1.1) * tall), 2, 6))
    if material == "timber":
        storeys = min(storeys, 4)
    storey = float(rng.uniform(2.8, 3.7))
    window = str(
        rng.choice(
            {
                "brick": ["sash", "cross", "grid", "arched"],
                "plaster": ["cross", "sash", "french", "arched"],
                "stone": ["cross", "french", "arched", "sash"],
                "timber": ["cross", "grid"],
                "modern": ["wide", "grid", "wide"],
            }[material]
        )
    )
    wide = window == "wide"
    window_width = float(rng.uniform(1.7, 2.6) if wide else rng.uniform(0.9, 1.4))
    tallness = {"wide": (1.3, 1.9), "french": (2.1, 2.5)}.get(window, (1.4, 2.1))
    window_height = min(float(rng.uniform(*tallness)), storey - 0.7)
    shutters = (
        window in ("cross", "sash") and material in ("plaster", "stone") and rng.random() < 0.4
    )
    pitch = window_width * (2.1 if shutters else 1.0) + float(rng.uniform(0.7, 1.5))
    roof = str(
        rng.choice(
            {
                "brick": ["parapet", "tiles", "stepped", "gable", "mansard"],
                "plaster": ["tiles", "tiles", "parapet", "bell", "mansard"],
                "stone": ["parapet", "mansard", "tiles", "pediment"],
                "timber": ["gable", "tiles"],
                "modern": ["parapet"],
            }[material]
        )
    )
    if width > 10 and roof in ("stepped", "bell", "gable"):
        roof = "tiles"
    roof_height = {
        "parapet": rng.uniform(0.5, 1.1),
        "tiles": rng.uniform(2.2, 3.4),
        "mansard": rng.uniform(2.8, 3.6),
        "pediment": rng.uniform(2.0, 2.8),
    }.get(roof, 0.42 * width + rng.uniform(0, 1.2))
    return House(
        width=float(width),
        storeys=storeys,
        storey_height=storey,
        ground_height=float(rng.uniform(3.4, 4.4)),
        material=material,
        wall=_vary(rng, pick(rng, _WALLS[material])),
        trim=pick(rng, _TRIMS),
        frame=pick(rng, _FRAMES),
        accent=_vary(rng, pick(rng, ACCENTS)),
        window=window,
        window_width=window_width,
        window_height=window_height,
        columns=max(1, int((width - 0.8) / pitch)),
        surround=float(rng.choice([0.0, 0.1, 0.18, 0.24])),
        shutters=bool(shutters),
        ground=str(rng.choice(["shop", "shop", "doors", "arcade", "plain"])),
        roof=roof,
        roof_colour=_vary(rng, pick(rng, _ROOFS)),
        roof_height=float(roof_height),
        seed=int(rng.integers(1 << 31)),
    )


def _vary(rng: np.random.Generator, colour: Colour, by: float = 10) -> Colour:
    return tuple(int(c) for c in np.clip(np.add(colour, rng.normal(0, by, 3)), 12, 248))
