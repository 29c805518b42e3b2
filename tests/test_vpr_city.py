"""The rendered city: deterministic, varied, geometrically right, and recognisable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from placekern.vpr.city import City
from placekern.vpr.scenery.canvas import blank
from placekern.vpr.scenery.render import (
    Camera,
    Canyon,
    Exposure,
    Light,
    Surface,
    Texture,
    render,
)

SMALL = (60, 80)
DAY = Light((0.0, 1.0, 0.0), (0.0,) * 3, (1.0,) * 3, (0.0, 0.0, 1.0), (0.0, 0.0, 1.0), clouds=0)
PLAIN = Exposure(noise=0.0, vignette=0.0)
NO_ROWS = Canyon(10.0, 0.0, np.zeros(4, np.float32), np.zeros(4, np.float32))


@pytest.fixture(scope="module")
def city() -> City:
    return City(seed=3, size=SMALL)


def take(surfaces, light=DAY, canyon=NO_ROWS, camera=None, exposure=PLAIN, size=(40, 40)):
    camera = camera or Camera(0, 0, 0, field_of_view=90)
    return render(surfaces, canyon, camera, light, exposure, size, np.random.default_rng(0))


def card(x, y, z, side, colour, **options):
    texture = Texture.from_canvas(blank(1, 1, colour))
    return Surface((x - side / 2, y - side / 2, z), (side, 0, 0), (0, side, 0), texture, **options)


def covered(picture):
    """Pixels that are not the blue sky."""
    return picture[2] < picture[0] + picture[1]


def test_images_are_pictures(city):
    image = city.image(0)
    assert image.shape == (3, *SMALL)
    assert image.dtype == np.float32
    assert 0 <= image.min() < 0.2
    assert 0.7 < image.max() <= 1
    assert image.std() > 0.1


def test_the_same_seed_gives_the_same_pixels(city):
    again = City(seed=3, size=SMALL)
    again.image(7)  # another history must not matter
    for kind in ("reference", "query"):
        np.testing.assert_array_equal(city.image(1, 2, kind), again.image(1, 2, kind))


def test_seeds_places_kinds_and_numbers_all_differ(city):
    first = city.image(0, 0, "query")
    others = [
        City(seed=4, size=SMALL).image(0, 0, "query"),
        city.image(1, 0, "query"),
        city.image(0, 1, "query"),
        city.image(0, 0, "reference"),
    ]
    for other in others:
        assert np.abs(first - other).mean() > 0.02


def test_a_larger_size_shows_the_same_view(city):
    small = city.image(2, 0)
    large = city.image(2, 0, size=(120, 160))
    shrunk = large.reshape(3, 60, 2, 80, 2).mean((2, 4))
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.95


def test_views_of_a_place_are_closer_than_those_of_others(city):
    # No network: nearest neighbours by the colours of a coarse grid must beat chance clearly.
    places, references = 12, 2
    dataset = city.test(places=places, references=references, queries=2)

    def describe(images):
        grid = torch.nn.functional.adaptive_avg_pool2d(torch.stack(list(images)), (6, 8)).flatten(1)
        grid = grid - grid.mean(1, keepdim=True)
        return torch.nn.functional.normalize(grid, dim=1)

    similarity = describe(dataset.queries) @ describe(dataset.references).T
    same = torch.zeros_like(similarity, dtype=torch.bool)
    for query, row in enumerate(dataset.positives):
        same[query, row] = True
    assert similarity[same].mean() > similarity[~same].mean() + 0.1
    best = similarity.argmax(1)
    found = same[torch.arange(len(best)), best].float().mean()
    assert found > 3 * references / (places * references)


def test_training_and_test_parts(city):
    seen = []
    training = city.training(places=3, views=3, progress=lambda *report: seen.append(report))
    assert training.images.shape == (9, 3, *SMALL)
    assert training.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert seen[-1] == ("render training", 9, 9)
    np.testing.assert_array_equal(training.images[4].numpy(), city.image(1, 0, "query"))
    np.testing.assert_array_equal(training.images[5].numpy(), city.image(1, 1, "reference"))

    dataset = city.test(places=2, references=3, queries=2)
    assert len(dataset.references) == 6
    assert dataset.positives == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    np.testing.assert_array_equal(dataset.queries[3].numpy(), city.image(100_001, 1, "query"))
    np.testing.assert_array_equal(dataset.references[2].numpy(), city.image(100_000, 2))


def test_every_weather_is_drawn_and_dusk_is_dark(city):
    views = {}
    for number in range(40):
        views.setdefault(city.view(0, number, "query").weather, number)
    assert set(views) == {"clear", "overcast", "golden hour", "dusk", "mist"}
    dusk, clear = (city.image(0, views[name], "query").mean() for name in ("dusk", "clear"))
    assert dusk < clear
    assert {city.view(0, n, "reference").weather for n in range(20)} == {"clear", "overcast"}


def test_bad_arguments_are_named(city):
    with pytest.raises(ValueError, match="negative, got -1"):
        City(seed=-1)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        City(size=(8, 100))
    with pytest.raises(ValueError, match="numbered from 0, got -2"):
        city.place(-2)
    with pytest.raises(ValueError, match="one of reference, query, got 'night'"):
        city.image(0, 0, "night")
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        city.training(places=2, views=0)


# --- the ray caster -------------------------------------------------------------------------------


def test_a_card_covers_the_pixels_that_perspective_says():
    # At 90 degrees a card of side 2 at distance 2 spans half of the picture's height and width.
    picture = take([card(0, 0, 2, 2, (250, 120, 20))])
    expected = np.zeros((40, 40), dtype=bool)
    expected[10:30, 10:30] = True
    np.testing.assert_array_equal(covered(picture), expected)


def test_the_nearer_card_is_seen_whatever_the_order():
    near, far = card(0, 0, 2, 1, (240, 30, 20)), card(0, 0, 4, 6, (30, 240, 20))
    one, other = take([near, far]), take([far, near])
    np.testing.assert_array_equal(one, other)
    assert one[0, 20, 20] > one[1, 20, 20]
    assert one[1, 8, 20] > one[0, 8, 20]


def test_yaw_turns_to_the_right_and_pitch_up():
    right_and_up = card(2, 2, 4, 1, (250, 120, 20))
    camera = Camera(0, 0, 0, yaw=np.degrees(np.arctan(0.5)), field_of_view=90)
    rows, columns = np.nonzero(covered(take([right_and_up], camera=camera)))
    assert abs(columns.mean() - 19.5) < 1
    assert rows.max() < 20
    camera = Camera(0, 0, 0, pitch=np.degrees(np.arctan(0.5)), field_of_view=90)
    rows, columns = np.nonzero(covered(take([right_and_up], camera=camera)))
    assert abs(rows.mean() - 19.5) < 1
    assert columns.min() >= 20


def test_surfaces_behind_the_camera_or_averted_are_not_seen():
    assert not covered(take([card(0, 0, -2, 2, (250, 120, 20))])).any()
    assert not covered(take([card(0, 0, 2, 2, (250, 120, 20), normal=(0, 0, 1))])).any()
    assert covered(take([card(0, 0, 2, 2, (250, 120, 20), normal=(0, 0, -1))])).any()


def test_a_floor_that_begins_behind_the_camera_fills_the_lower_half():
    floor = Texture.from_canvas(blank(2, 2, (200, 180, 20)))
    ground = Surface((-500, -1, -500), (1000, 0, 0), (0, 0, 1000), floor, (0, 1, 0))
    seen = covered(take([ground]))
    assert seen[21:].all()
    assert not seen[:20].any()


def test_holes_show_what_is_behind():
    canvas = blank(2, 2, (240, 30, 20))
    canvas[:, : canvas.shape[1] // 2] = 0
    half = Surface((-1, -1, 2), (2, 0, 0), (0, 2, 0), Texture.from_canvas(canvas))
    seen = covered(take([half]))
    assert seen[12:28, 21:29].all()
    assert not seen[:, :19].any()


def test_a_row_of_houses_throws_its_shadow_across_the_street():
    # The sun stands 45 degrees high on the right: a row 4 m high darkens 4 m of the ground.
    floor = Texture.from_canvas(blank(2, 2, (128, 128, 128)))
    ground = Surface((-10, 0, 0), (20, 0, 0), (0, 0, 30), floor, (0, 1, 0))
    slope = float(np.sqrt(0.5))
    light = Light((slope, slope, 0.0), (2.0,) * 3, (0.2,) * 3, (0, 0, 1), (0, 0, 1), 0, haze=0)
    rows = Canyon(10.0, 0.0, np.zeros(40, np.float32), np.full(40, 4.0, np.float32))
    camera = Camera(0, 12, 12, pitch=-89.9, field_of_view=90)
    line = take([ground], light, rows, camera, size=(48, 48))[0, 24]
    metres = (np.arange(48) + 0.5 - 24) / 2  # half a metre a pixel from 12 m up
    assert line[(metres > 6.5) & (metres < 9.5)].max() < line[(metres > -9) & (metres < 5.5)].min()


def test_far_textures_are_averaged():
    # Fine stripes from afar must come out grey, not as an alias of the pattern.
    canvas = blank(8, 8, (255, 255, 255))
    canvas[:, ::2, :3] = 0
    far = Surface(
        (-40, -40, 40), (80, 0, 0), (0, 80, 0), Texture.from_canvas(np.tile(canvas, (8, 8, 1)))
    )
    picture = take([far], size=(40, 40))
    assert picture[0, 5:35, 5:35].std(axis=1).max() < 0.005
    assert 0.2 < picture[0, 20, 20] < 0.6
