"""A small city that is rendered, not downloaded: labelled views of places for training and testing.

A place is a street with its houses (`scenery`); a view of it is a camera, a light, a season and
whoever happens to be in the street (`draw_view`). The surprise: every place and every view has a
random generator of its own, seeded by (city, place, kind, number). So any image can be made alone
and in any order, and is the same one; a larger `size` shows the same view sharper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from placekern.vpr.datasets import PlaceDataset
from placekern.vpr.scenery import props
from placekern.vpr.scenery.render import Camera, Exposure, Light, Surface, render
from placekern.vpr.scenery.street import Place, build_place

Progress = Callable[[str, int, int], None]

#: References are photographed by day from near the middle of a place, queries from anywhere in it
#: and in any light.
KINDS = ("reference", "query")


@dataclass(frozen=True)
class View:
    """One photograph: where from, in what light, how exposed, and what is there only this time."""

    camera: Camera
    light: Light
    exposure: Exposure
    transients: tuple[Surface, ...]
    weather: str


@dataclass(frozen=True)
class LabelledImages:
    """Images float32 [n, 3, H, W] in [0, 1] and the place of each, int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class City:
    """The city of one seed.

    Args:
        seed: cities of different seeds share no place; the same seed gives the same pixels.
        size: height and width of the images.

    Raises:
        ValueError: a negative seed, or images smaller than 16 pixels.
    """

    def __init__(self, seed: int = 0, size: tuple[int, int] = (120, 160)) -> None:
        if seed < 0:
            raise ValueError(f"a city's seed must not be negative, got {seed}")
        if min(size) < 16:
            raise ValueError(f"images of a city must be at least 16 pixels each way, got {size}")
        self.seed = seed
        self.size = (int(size[0]), int(size[1]))

    def __repr__(self) -> str:
        return f"City(seed={self.seed}, size={self.size})"

    def place(self, number: int) -> Place:
        """The place of that number, 0 or more: there is no last one."""
        if number < 0:
            raise ValueError(f"places are numbered from 0, got {number}")
        return _build_place(self.seed, number)

    def view(self, place: int, number: int = 0, kind: str = "reference") -> View:
        """What photograph `number` of that kind ("reference" or "query") of a place is like."""
        return self._draw(place, number, kind)[0]

    def image(
        self,
        place: int,
        number: int = 0,
        kind: str = "reference",
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Photograph `number` of that kind of a place: float32 [3, H, W] in [0, 1]."""
        view, rng = self._draw(place, number, kind)
        stage = self.place(place)
        surfaces = stage.surfaces + view.transients
        return render(
            surfaces, stage.canyon, view.camera, view.light, view.exposure, size or self.size, rng
        )

    def photograph(
        self,
        places: Sequence[int],
        numbers: Sequence[int],
        kind: str = "reference",
        size: tuple[int, int] | None = None,
        progress: Progress | None = None,
        label: str = "render",
    ) -> LabelledImages:
        """Photographs `numbers` of one kind of every place, labelled, place by place."""
        shots = [(place, number, kind) for place in places for number in numbers]
        return self._render(shots, size or self.size, progress, label)

    def training(
        self, places: int = 80, views: int = 8, progress: Progress | None = None
    ) -> LabelledImages:
        """`views` training images each of places 0, 1, ...: references and queries by turns.

        Raises:
            ValueError: a count below 1.
        """
        _positive(places=places, views=views)
        shots = [
            (place, view // 2, KINDS[view % 2]) for place in range(places) for view in range(views)
        ]
        return self._render(shots, self.size, progress, "render training")

    def test(
        self,
        places: int = 80,
        references: int = 3,
        queries: int = 3,
        first: int = 100_000,
        progress: Progress | None = None,
    ) -> PlaceDataset:
        """A test set on `places` other places, numbered from `first`: they are in no training part.

        Every query's positives are the references of its own place. Query i is photograph
        `i % queries` of place `first + i // queries`, and references are numbered the same way, so
        that `image` can show any of them larger.

        Raises:
            ValueError: a count below 1.
        """
        _positive(places=places, references=references, queries=queries)
        # The two kinds of a place one after the other: places are built, and kept only for a while.
        shots = [
            (place, number, kind)
            for place in range(first, first + places)
            for kind, count in (("reference", references), ("query", queries))
            for number in range(count)
        ]
        images = self._render(shots, self.size, progress, "render test").images
        asked = torch.tensor([kind == "query" for _, _, kind in shots])
        positives = [
            list(range(place * references, (place + 1) * references))
            for place in range(places)
            for _ in range(queries)
        ]
        return PlaceDataset(images[asked], images[~asked], positives, name=f"city {self.seed}")

    def _render(
        self,
        shots: Sequence[tuple[int, int, str]],
        size: tuple[int, int],
        progress: Progress | None,
        label: str,
    ) -> LabelledImages:
        images = torch.empty(len(shots), 3, *size)
        for done, shot in enumerate(shots):
            images[done] = torch.from_numpy(self.image(*shot, size))
            if progress is not None:
                progress(label, done + 1, len(shots))
        return LabelledImages(images, torch.tensor([place for place, _, _ in shots]))

    def _draw(self, place: int, number: int, kind: str) -> tuple[View, np.random.Generator]:
        if kind not in KINDS:
            raise ValueError(f"kind of view must be one of {', '.join(KINDS)}, got {kind!r}")
        rng = np.random.default_rng([self.seed, place, KINDS.index(kind) + 1, number])
        return draw_view(rng, self.place(place), kind), rng


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


# Views of a place come together, so a few places are enough; one takes some megabytes.
@lru_cache(maxsize=4)
def _build_place(seed: int, number: int) -> Place:
    return build_place(np.random.default_rng([seed, number, 0]))


def draw_view(rng: np.random.Generator, place: Place, kind: str) -> View:
    """A view of a place by lot: references by day and near its middle, queries anyhow."""
    query = kind == "query"
    spread = 1.0 if query else 0.4
    aside = min(0.55 * place.kerb, 2.6)
    camera = Camera(
        x=spread * float(rng.uniform(-aside, aside)),
        y=place.eye + float(rng.normal(0, 0.12)),
        z=spread * float(rng.uniform(-4, 4)),
        yaw=place.heading + spread * float(rng.uniform(-13, 13)),
        pitch=float(rng.uniform(2, 9)) if query else 5.5 + float(rng.normal(0, 0.8)),
        roll=spread * float(rng.normal(0, 1.6)),
        field_of_view=62 + spread * float(rng.uniform(-11, 11)),
    )
    weathers, odds = zip(*(_QUERY_WEATHER if query else _REFERENCE_WEATHER).items(), strict=True)
    weather = str(rng.choice(weathers, p=odds))
    tint = np.exp(rng.normal(0, 0.09 if query else 0.03, 3))
    exposure = Exposure(
        brightness=float(rng.uniform(0.34, 0.52) if query else rng.uniform(0.44, 0.5)),
        tint=tuple(float(t) for t in tint / tint.mean()),
        contrast=float(rng.uniform(0.82, 1.15)) if query else 1.0,
        noise=float(rng.uniform(0.004, 0.022)) if query else 0.005,
        blur=float(rng.choice([0.0, 0.0, 0.15, 0.4])) if query else 0.0,
        vignette=float(rng.uniform(0, 0.5)) if query else 0.15,
    )
    if weather == "dusk":
        exposure = Exposure(**{**vars(exposure), "brightness": exposure.brightness * 0.78})
    transients = _draw_transients(rng, place, camera)
    return View(camera, _draw_light(rng, weather), exposure, transients, weather)


_REFERENCE_WEATHER = {"clear": 0.6, "overcast": 0.4}
_QUERY_WEATHER = {"clear": 0.34, "overcast": 0.24, "golden hour": 0.22, "dusk": 0.14, "mist": 0.06}


def _draw_light(rng: np.random.Generator, weather: str) -> Light:
    azimuth = float(rng.uniform(0, 2 * np.pi))
    elevation = float(rng.uniform(9, 20) if weather == "golden hour" else rng.uniform(28, 62))
    high, flat = np.sin(np.radians(elevation)), np.cos(np.radians(elevation))
    sun = (float(flat * np.sin(azimuth)), float(high), float(flat * np.cos(azimuth)))
    dark = (0.0, 0.0, 0.0)
    if weather == "clear":
        return Light(
            sun,
            (1.75, 1.55, 1.25),
            (0.42, 0.49, 0.6),
            (0.2, 0.42, 0.86),
            (0.72, 0.86, 1.0),
            clouds=float(rng.uniform(0.1, 0.6)),
            haze=0.0015,
        )
    if weather == "golden hour":
        return Light(
            sun,
            (2.3, 1.45, 0.68),
            (0.4, 0.41, 0.5),
            (0.3, 0.42, 0.68),
            (1.15, 0.86, 0.58),
            clouds=float(rng.uniform(0.1, 0.5)),
            haze=0.003,
        )
    if weather == "dusk":
        return Light(
            sun,
            dark,
            (0.13, 0.16, 0.26),
            (0.05, 0.08, 0.22),
            (0.42, 0.29, 0.3),
            clouds=0.3,
            glow=float(rng.uniform(0.35, 0.6)),
            haze=0.002,
        )
    mist = weather == "mist"
    return Light(
        sun,
        dark,
        (0.8, 0.83, 0.88),
        (0.74, 0.79, 0.86),
        (0.92, 0.94, 0.97),
        clouds=0.9,
        haze=float(rng.uniform(0.018, 0.035)) if mist else 0.003,
    )


def _draw_transients(rng: np.random.Generator, place: Place, camera: Camera) -> tuple[Surface, ...]:
    """Parked cars, passers-by and the trees in their leaves of the season."""
    surfaces: list[Surface] = []
    for side in (-1, 1):
        z = float(rng.uniform(-6, 10))
        while z < place.end - 8:
            x, colour = side * (place.kerb - 1.1), int(rng.integers(8))
            # No car stands where the photographer does, nor right before the lens.
            free = abs(x - camera.x) > 1.6 or not z - 3 < camera.z < z + 4.5
            if rng.random() < 0.35 and free:
                surfaces += props.car(x, z, colour)
            z += float(rng.uniform(5.2, 9))
    for _ in range(int(rng.integers(0, 6))):
        x = float(rng.choice([-1, 1])) * (place.kerb + float(rng.uniform(0.3, 1.0)))
        person = props.person_texture(int(rng.integers(24)))
        surfaces.append(props.upright(x, float(rng.uniform(4, 26)), 0.8, 1.8, person))
    season = float(rng.choice([0.0, 0.15, 0.9]))
    for number, (x, z, height) in enumerate(place.trees):
        texture = props.tree_texture(number % 4, season)
        surfaces.append(props.upright(x, z, 0.91 * height, height, texture))
    return tuple(surfaces)
