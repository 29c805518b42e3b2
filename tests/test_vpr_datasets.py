"""Decoding of images, and ground truth from tables and from file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from placekern.vpr.datasets import (
    ImageList,
    PlaceDataset,
    list_images,
    load_corridor,
    load_folders,
    read_image,
)


def write_image(path: Path, width: int = 8, height: int = 6, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 100, 200)).save(path)
    return path


def two_folders(root: Path, queries: list[str], references: list[str]) -> tuple[Path, Path]:
    for folder, names in (("query", queries), ("ref", references)):
        for name in names:
            write_image(root / folder / name)
    return root / "query", root / "ref"


def test_corridor_is_read_whole(data_dir: Path) -> None:
    dataset = load_corridor(data_dir / "vprbench_corridor")
    assert len(dataset.queries) == len(dataset.references) == len(dataset.positives) == 111
    assert dataset.positives[0] == [0, 1, 2]
    assert dataset.positives[110] == [108, 109, 110]
    image = dataset.queries[0]
    assert image.shape == (3, 120, 160)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert load_corridor(data_dir / "vprbench_corridor", size=(60, 90)).references[5].shape == (
        3,
        60,
        90,
    )


def test_pixels_keep_their_place_and_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert image.is_contiguous()


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 51).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 3), (255, 0, 51, 10)).save(tmp_path / "alpha.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), torch.full((3, 3, 4), 0.2))
    assert read_image(tmp_path / "alpha.png")[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_orientation_tag_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned a quarter clockwise
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 20)


def test_size_is_height_and_width_or_the_shorter_side(tmp_path: Path) -> None:
    path = write_image(tmp_path / "wide.png", width=80, height=40)
    assert read_image(path, (10, 30)).shape == (3, 10, 30)
    assert read_image(path, 20).shape == (3, 20, 40)
    for size in (0, (10, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="positive numbers of pixels"):
            ImageList([path], size)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be read"):
        read_image(tmp_path / "text.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        read_image(tmp_path / "cut.jpg")


def test_image_list_of_a_tensor() -> None:
    pixels = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    images = ImageList(pixels)
    assert len(images) == 2
    assert torch.equal(images[1], pixels[1].float() / 255)
    assert [image.shape for image in images] == [(3, 2, 2)] * 2
    assert images.names == ["0", "1"]
    assert torch.equal(images[1:][0], images[1])
    floats = torch.rand(4, 3, 5, 5)
    assert torch.equal(ImageList(floats)[-1], floats[3])
    for bad in (torch.rand(3, 5, 5), torch.rand(2, 1, 5, 5), torch.ones(2, 3, 5, 5).long()):
        with pytest.raises(ValueError, match="images must be"):
            ImageList(bad)
    with pytest.raises(ValueError, match="resize the tensor"):
        ImageList(floats, size=3)


def test_image_list_of_files_is_lazy(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{index}.png", value=index) for index in range(3)]
    images = ImageList(paths)
    assert images.names == [str(path) for path in paths]
    assert [round(255 * image[0, 0, 0].item()) for image in images[1:]] == [1, 2]
    paths[0].unlink()
    with pytest.raises(FileNotFoundError):
        images[0]


def test_list_images_sorts_and_searches_below(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.PNG", "c.webp", ".hidden.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a/z.PNG", "b.jpg", "c.webp"]
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path / "empty")


def test_positives_are_checked_and_tidied() -> None:
    images = torch.rand(3, 3, 4, 4)
    assert PlaceDataset(images[:2], images, [[2, 0, 2], []]).positives == [[0, 2], []]
    assert repr(PlaceDataset(images, images, [[0]] * 3, "street")) == (
        "< street: #queries: 3; #references: 3 >"
    )
    with pytest.raises(ValueError, match="each of the 3 queries, got 2"):
        PlaceDataset(images, images, [[0], [1]])
    for row in ([3], [-1]):
        with pytest.raises(ValueError, match="positives of query 1"):
            PlaceDataset(images, images, [[0], row, [1]])


def test_table_takes_numbers_and_names(tmp_path: Path) -> None:
    queries, references = two_folders(tmp_path, ["q0.png", "q1.png"], ["a.png", "b.png", "c.png"])
    table = tmp_path / "truth.csv"
    table.write_text("query,ref_matches\nq1.png,b.png 2\n0,\n")
    assert load_folders(queries, references, table).positives == [[], [1, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,ref_matches\n0,0\n1,9\n", r"line 3: '9' is neither"),
        ("query,ref_matches\n5,0\n", r"line 2: '5' is neither"),
        ("image,places\n0,0\n", "needs the columns query and ref_matches"),
        ("", "needs the columns"),
        ("query,ref_matches\n0,0\n", r"no row for the query q1\.png"),
    ],
)
def test_faulty_tables_are_explained(tmp_path: Path, text: str, message: str) -> None:
    queries, references = two_folders(tmp_path, ["q0.png", "q1.png"], ["a.png", "b.png"])
    table = tmp_path / "truth.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_folders(queries, references, table)


def test_missing_table_is_an_error(tmp_path: Path) -> None:
    queries, references = two_folders(tmp_path, ["q.png"], ["a.png"])
    with pytest.raises(FileNotFoundError, match="no ground truth"):
        load_folders(queries, references, tmp_path / "truth.csv")


def test_positions_in_file_names_give_positives_within_the_threshold(tmp_path: Path) -> None:
    # Northings of seven digits: 24.9 m and 25.1 m must fall on either side of the threshold.
    queries, references = two_folders(
        tmp_path,
        ["@0584000.0@4477000.0@17@T@.png", "@0590000.0@4477000.0@.png"],
        ["@0584000.0@4477024.9@.png", "@0584000.0@4477025.1@.png", "@0584015.0@4477020.0@.png"],
    )
    assert load_folders(queries, references).positives == [[0, 2], []]
    assert load_folders(queries, references, threshold=26).positives == [[0, 1, 2], []]
    write_image(references / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png holds no position"):
        load_folders(queries, references)
