"""The sheet of retrievals: size, borders, marks, and the choice of queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from placekern.vpr.figure import (
    RIGHT,
    WRONG,
    Retrieval,
    choose_queries,
    retrieval_sheet,
    save_sheet,
)

TILE = (48, 64)


@pytest.fixture(scope="module")
def scene():
    """Four queries, six references of plain grey; the first two queries are answered rightly."""
    queries = torch.full((4, 3, 48, 64), 0.4)
    references = torch.full((6, 3, 48, 64), 0.6)
    indices = torch.tensor([[0, 1], [1, 0], [2, 3], [4, 5]])
    similarities = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4], [0.3, 0.2]])
    positives = [[0], [1], [3], [0]]
    return queries, references, Retrieval(indices, similarities), positives


def colour_share(picture, colour, box):
    pixels = np.asarray(picture.crop(box)).astype(int)
    return (np.abs(pixels - colour).max(2) < 12).mean()


def borders(sheet, tile=TILE):
    """(y, x, colour) of every horizontal run of RIGHT or WRONG as long as an image is wide."""
    pixels = np.asarray(sheet).astype(int)
    found = []
    for colour in (RIGHT, WRONG):
        near = np.abs(pixels - colour).max(2) < 12
        for y, line in enumerate(near):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                if stop - start >= tile[1]:
                    found.append((y, start, colour))
    return found


def test_borders_tell_right_from_wrong(scene):
    queries, references, found, positives = scene
    sheet = retrieval_sheet(
        queries, references, {"dense": found}, positives, chosen=[0, 2], top=2, tile=TILE
    )
    runs = borders(sheet)
    left = min(x for _, x, _ in runs)
    middle = sheet.height / 2
    top_left = {colour for y, x, colour in runs if y < middle and abs(x - left) < 4}
    top_right = {colour for y, x, colour in runs if y < middle and abs(x - left) >= 4}
    low_left = {colour for y, x, colour in runs if y >= middle and abs(x - left) < 4}
    low_right = {colour for y, x, colour in runs if y >= middle and abs(x - left) >= 4}
    assert (top_left, top_right) == ({RIGHT}, {WRONG})
    assert (low_left, low_right) == ({WRONG}, {RIGHT})


def test_marks_differ_without_colour(scene):
    # The same sheet with other truths, in grey: only marks may tell them apart, but they must.
    queries, references, found, _ = scene
    sheets = [
        retrieval_sheet(queries, references, {"dense": found}, truth, chosen=[0], top=1, tile=TILE)
        for truth in ([[0]] * 4, [[5]] * 4)
    ]
    white = [(np.asarray(s).min(2) > 230) for s in sheets]
    assert (white[0] != white[1]).sum() > 20


def test_size_follows_from_the_counts_alone(scene):
    queries, references, found, positives = scene

    def size(networks, rows, top):
        return retrieval_sheet(
            queries,
            references,
            dict.fromkeys(networks, found),
            positives,
            chosen=range(rows),
            top=top,
            tile=TILE,
        ).size

    one, two = size(["a"], 1, 1), size(["a"], 2, 1)
    assert two[0] == one[0]
    assert two[1] - one[1] > TILE[0]
    assert size(["a"], 1, 2)[0] - one[0] > TILE[1]
    assert size(["a", "b"], 1, 1)[1] > one[1] + TILE[0]
    assert size(["a"], 3, 2) == size(["another name"], 3, 2)


def test_pictures_keep_their_colours_and_are_cut_to_the_tile(scene):
    _, references, found, positives = scene
    # Twice as wide as the tile, red only where the cut takes it away.
    wide = torch.zeros(4, 3, 48, 128)
    wide[:, 1] = 0.6
    wide[:, :, :, :30] = wide[:, :, :, -30:] = torch.tensor([0.9, 0.0, 0.0]).view(3, 1, 1)
    sheet = retrieval_sheet(
        wide, references, {"dense": found}, positives, chosen=[0], top=1, tile=TILE
    )
    assert colour_share(sheet, (0, 153, 0), (0, 0, *sheet.size)) > 0.8 * 48 * 64 / np.prod(
        sheet.size
    )
    assert colour_share(sheet, (230, 0, 0), (0, 0, *sheet.size)) == 0


def test_retrieval_finds_the_best(scene):
    references = torch.eye(4)
    queries = torch.nn.functional.normalize(torch.tensor([[0.0, 3.0, 1.0, 0.0]]), dim=1)
    found = Retrieval.of(queries, references, k=2)
    assert found.indices.tolist() == [[1, 2]]
    assert found.similarities[0].tolist() == pytest.approx([3 / 10**0.5, 1 / 10**0.5])
    assert Retrieval.of(queries, references, k=9).indices.shape == (1, 4)


def test_choice_shows_right_and_wrong():
    # Queries 0 to 7 are right for both, 8 for one network only, 9 to 11 for none.
    truth = [[0]] * 12
    dense = Retrieval(torch.tensor([[0]] * 9 + [[1]] * 3), torch.ones(12, 1))
    small = Retrieval(torch.tensor([[0]] * 8 + [[1]] * 4), torch.ones(12, 1))
    chosen = choose_queries([dense, small], truth, count=6)
    assert len(set(chosen)) == 6
    assert chosen[:4] == [0, 2, 5, 7]
    assert chosen[4] == 8
    assert chosen[5] in (9, 10, 11)
    assert choose_queries([dense], truth, count=3, wrong=0) == [0, 4, 8]
    assert len(choose_queries([dense, small], truth, count=50)) == 12


def test_saved_sheets_stay_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    whole = save_sheet(picture, tmp_path / "whole.png")
    small = save_sheet(picture, tmp_path / "small.png", limit=60_000)
    assert whole > 100_000
    assert small <= 60_000
    assert (tmp_path / "small.png").stat().st_size == small
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.png", "whole.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "whole.png")), noise)


def test_bad_arguments_are_named(scene):
    queries, references, found, positives = scene
    with pytest.raises(ValueError, match="at least one network"):
        retrieval_sheet(queries, references, {}, positives)
    with pytest.raises(ValueError, match="no query to show"):
        retrieval_sheet(queries, references, {"dense": found}, positives, chosen=[])
    with pytest.raises(ValueError, match="at least one network"):
        choose_queries([], positives)
