"""`placekern sensitivity` and `suggest` as a user meets them, to the file that compress writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import placekern as pk
from placekern.cli.sensitivity import cosine_metric, recall_metric

for package in ("rich", "typer", "zstandard"):  # in the processes that the tests start
    pytest.importorskip(package)

PLACES = 12
# Few settings of a small network.
TRIED = ("--bits", "6,3", "--sparsities", "0.5")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from placekern.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        # On a busy machine, threads that wait for each other spin.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve places in the layout query/, ref/, ground_truth.csv, 64 x 48 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name in ("query", "ref"):
        (folder / name).mkdir()
    for i in range(PLACES):
        place = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = np.asarray(place.resize((64, 48), Image.Resampling.BICUBIC))
        for name, noise in (("query", 12), ("ref", 0)):
            noisy = image + generator.integers(-noise, noise + 1, image.shape)
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(folder / name / f"{i:07d}.png")
    rows = "\n".join(f"{i},{i}" for i in range(PLACES))
    (folder / "ground_truth.csv").write_text(f"query,ref_matches\n{rows}\n")
    return folder


@pytest.fixture(scope="module")
def analysed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an analysis by cosine, of references alone."""
    folder = tmp_path_factory.mktemp("analysis") / "new"
    result = run(
        "sensitivity", "tiny-netvlad", "-o", folder, "--references", photographs / "ref",
        "--metric", "cosine", *TRIED, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["baseline"] == pytest.approx(1, abs=1e-6)
    assert values["csv"] == str(folder / "sensitivity.csv")
    assert len(values["rows"]) == 5 * 3
    if values["picture"] is not None:
        assert Image.open(values["picture"]).size[0] > 800
    return folder


def test_the_rows_are_those_of_the_python_function(analysed: Path, photographs: Path) -> None:
    found = pk.compress.sensitivity_result.Sensitivity.from_csv(analysed / "sensitivity.csv")
    images = pk.vpr.ImageList(sorted((photographs / "ref").iterdir()))
    model = pk.vpr.fit_(pk.vpr.load("tiny-netvlad"), images)
    metric = cosine_metric(model, images)
    with torch.no_grad():
        weight = model.whiten.weight
        weight[weight.abs() < weight.abs().flatten().sort().values[weight.numel() // 2]] = 0
    row = found.of("whiten", "sparsity")[0]
    assert row.metric == pytest.approx(metric(model), abs=1e-6)
    assert row.drop > 0


def test_going_on_measures_only_what_is_missing(analysed: Path, photographs: Path) -> None:
    file = analysed / "sensitivity.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-4]) + "\n")
    result = run(
        "sensitivity", "tiny-netvlad", "-o", analysed, "--references", photographs / "ref",
        "--metric", "cosine", *TRIED,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "5/5" in result.stderr
    assert "Drop of the metric from 1" in result.stdout
    again = file.read_text().splitlines()
    assert again[: len(lines) - 4] == lines[:-4]
    assert [line.split(",")[:3] for line in again] == [line.split(",")[:3] for line in lines]


def test_a_suggestion_becomes_a_file_of_that_size(
    analysed: Path, photographs: Path, tmp_path: Path
) -> None:
    config, model = tmp_path / "config.json", tmp_path / "model.safetensors"
    images = ("--references", photographs / "ref")
    result = run(
        "suggest", analysed / "sensitivity.csv", "tiny-netvlad", *images, "--metric", "cosine",
        "--budget-mb", "0.16", "-o", config, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert 0 < values["measured_drop"] < 1
    assert values["file_bytes"] <= 160_000
    result = run("compress", "tiny-netvlad", *images, "--config", config, "-o", model, "--json")
    assert result.returncode == 0, result.stderr
    assert model.stat().st_size == values["file_bytes"]


def test_a_budget_of_drop_in_recall(photographs: Path, tmp_path: Path) -> None:
    dataset = ("--dataset", photographs)
    result = run("sensitivity", "tiny-netvlad", "-o", tmp_path, *dataset, *TRIED)
    assert result.returncode == 0, result.stderr
    result = run(
        "suggest", tmp_path / "sensitivity.csv", "tiny-netvlad", *dataset, "--max-drop", "0.2",
        "--evaluations", "3", "-o", tmp_path / "config.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "measured: from" in result.stdout
    assert "for placekern compress --config; the file will have" in " ".join(result.stdout.split())
    pk.CompressConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))


def test_recall_is_that_of_evaluate(photographs: Path) -> None:
    data = pk.vpr.load_corridor(photographs)
    model = pk.vpr.fit_(pk.vpr.load("tiny-netvlad"), data.references)
    assert recall_metric(data)(model) == pk.vpr.evaluate(model, data, repeats=1).recalls[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity", "tiny-netvlad", "-o", "x", "--metric", "speed"], "expected recall or cos"),
        (["sensitivity", "tiny-netvlad", "-o", "x", "--bits", "many"], '--bits is "many", expec'),
        (["sensitivity", "tiny-netvlad", "-o", "x"], "give --dataset, or both"),
        (["suggest", "nowhere.csv", "tiny-netvlad", "-o", "x.json"], "nowhere.csv"),
        (["suggest", __file__, "tiny-netvlad", "-o", "x.json"], "is no file of a sensitivity an"),
        (["suggest", "x.csv", "tiny-netvlad", "-o", "x.yaml"], "expected a name that ends in .js"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not Path("x").exists()
