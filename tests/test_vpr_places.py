"""Folders of images to train on: labels by subfolder, and one size for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from placekern.vpr.places import load_places


def draw(path: Path, size: tuple[int, int] = (8, 6), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def test_a_subfolder_is_a_place(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a/deep/er/1.png", "c/1.png"):
        draw(tmp_path / name)
    data = load_places(tmp_path)
    assert data.places == ("a", "b", "c")
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert [Path(name).name for name in data.images.names] == ["1.png", "1.png", "2.png", "1.png"]
    assert data.images[3].shape == (3, 8, 6)
    assert len(data) == 4


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png")
    data = load_places(tmp_path, (4, 5))
    assert data.labels is None
    assert data.places == ()
    assert data.images[2].shape == (3, 4, 5)


def test_what_cannot_be_a_training_set_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "mixed" / "a" / "1.png")
    draw(tmp_path / "mixed" / "loose.png")
    with pytest.raises(ValueError, match=r"such as loose\.png, beside .* such as a: give one"):
        load_places(tmp_path / "mixed")
    for name in ("query", "ref"):
        draw(tmp_path / "set" / name / "1.png")
    with pytest.raises(ValueError, match="is a data set with queries and references"):
        load_places(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_places(tmp_path / "nowhere")


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg")
    draw(tmp_path / "2.jpg", (6, 8), orientation=6)  # lies on its side
    assert len(load_places(tmp_path)) == 2
    draw(tmp_path / "3.jpg", (16, 12))
    with pytest.raises(ValueError, match=r"1\.jpg has 8x6 pixels and .*3\.jpg 16x12"):
        load_places(tmp_path)
    assert load_places(tmp_path, 6).images[2].shape == (3, 8, 6)
    draw(tmp_path / "4.jpg", (12, 16))
    with pytest.raises(ValueError, match=r"1\.jpg has 8x6 pixels and .*4\.jpg 6x8"):
        load_places(tmp_path, 6)
    assert len(load_places(tmp_path, (5, 5))) == 4
    (tmp_path / "2.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.jpg is not a readable image"):
        load_places(tmp_path)
