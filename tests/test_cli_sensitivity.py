"""`placekern sensitivity` and `suggest` as a user meets them, to the file that compress writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import placekern as pk
from placekern.cli import app
from placekern.cli.sensitivity import cosine_metric, recall_metric
from placekern.compress import Sensitivity

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


def invoke(*arguments: str | Path) -> Result:
    """In this process, where errors keep their type."""
    return CliRunner().invoke(app, [*map(str, arguments)])


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


def test_an_analysis_knows_its_network_metric_and_images(
    analysed: Path, photographs: Path, tmp_path: Path
) -> None:
    rows = analysed / "sensitivity.csv"
    fitted = pk.vpr.fit_(
        pk.vpr.build("tiny-netvlad", seed=1), pk.vpr.load_corridor(photographs).references
    )
    other = tmp_path / "other.safetensors"
    pk.save(fitted, other)
    references = ("--references", photographs / "ref")
    cosine = ("--metric", "cosine")
    few = tmp_path / "few"
    few.mkdir()
    for i in range(PLACES - 1):
        (few / f"{i}.png").write_bytes((photographs / "ref" / f"{i:07d}.png").read_bytes())
    before = rows.read_bytes()
    for network, options, message in (
        (other, (*references, *cosine), "weights = "),
        ("tiny-netvlad", ("--references", few, *cosine), "images = 11"),
        ("tiny-netvlad", (*references, *cosine, "--size", "40x56"), "size = [40, 56]"),
        ("tiny-netvlad", ("--dataset", photographs), "metric = 'recall'"),
    ):
        for command in (
            ("sensitivity", network, "-o", analysed, *TRIED),
            ("suggest", rows, network, "-o", tmp_path / "x.json", "--budget-mb", "0.16"),
        ):
            result = invoke(*command, *options)
            error = str(result.exception)
            assert "sensitivity.csv is of" in error, (error, result.output)
            assert message in error.split("but here it is")[1]
    assert rows.read_bytes() == before


def test_identity_is_kept_and_compared_where_it_is_given(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    options = {"bits": (4,), "sparsities": (), "resume": tmp_path / "rows.csv"}

    def measure(**more: Any) -> Sensitivity:
        return pk.compress.sensitivity(model, lambda _: 1.0, **options, **more)

    assert measure(identity={"size": (2, 3)}).rows[0].config == {"size": [2, 3]}
    assert measure().rows[0].config == {"size": [2, 3]}
    message = r"rows.csv is of size = \[2, 3\], but here it is size = None"
    with pytest.raises(ValueError, match=message):
        measure(identity={"size": None})
    options["resume"].unlink()
    assert measure().rows[0].config == {}
    assert measure(identity={"size": 1}).rows[0].config == {}  # as it was measured: by nothing


def test_a_prediction_needs_no_images_of_a_whole_network(photographs: Path, tmp_path: Path) -> None:
    model = pk.vpr.fit_(pk.vpr.load("tiny-netvlad"), pk.vpr.load_corridor(photographs).references)
    file, config = tmp_path / "net.safetensors", tmp_path / "config.json"
    pk.save(model, file)
    cosine = ("--references", photographs / "ref", "--metric", "cosine")
    options = ("--bits", "4", "--sparsities", "0.5", "--group-size", "8")
    result = invoke("sensitivity", file, "-o", tmp_path, *cosine, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    suggest = ("suggest", tmp_path / "sensitivity.csv")
    options = ("-o", config, "--max-drop", "0.5", "--predict", "--json")
    result = invoke(*suggest, file, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["measured"] is None
    layers = json.loads(config.read_text())["layers"]
    assert {own["group_size"] for own in layers.values() if own} == {8}
    error = str(invoke(*suggest, "tiny-netvlad", *options).exception)
    assert "tiny-netvlad brings no NetVLAD and no whitening: give --references" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity", "t", "-o", "x", "--bits", "", "--sparsities", ""], "nothing to try: give"),
        (["sensitivity", "t", "-o", "x", "--bits", "", "--thresholds", ""], "nothing to try: give"),
        (["sensitivity", "t", "-o", "x", "--references", "y"], "--metric cosine needs references"),
        (["suggest", "x.csv", "t", "-o", "x.json"], "give one of --budget-mb and --max-drop"),
        (["suggest", "x.csv", "t", "-o", "no/x.json", "--max-drop", "1"], "there is no folder no"),
        (["suggest", "x.csv", "t", "-o", "x.json", "--metric", "speed"], "expected recall or cos"),
        (["sensitivity", "tiny-netvlad", "-o", "x", "--metric", "speed"], "expected recall or cos"),
        (["sensitivity", "tiny-netvlad", "-o", "x", "--bits", "many"], '--bits is "many", expec'),
        (["sensitivity", "tiny-netvlad", "-o", "x"], "give --dataset, or both"),
        (["suggest", "no.csv", "t", "-o", "x.json", "--max-drop", "1"], "no.csv"),
        (["suggest", __file__, "t", "-o", "x.json", "--max-drop", "1"], "is no file of a sensitiv"),
        (["suggest", "x.csv", "tiny-netvlad", "-o", "x.yaml"], "expected a name that ends in .js"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    assert message in str(result.exception)
    assert result.stdout == ""
    assert not Path("x").exists()
