"""The command line as a user meets it: exit codes, tables, JSON, errors without a traceback."""

from __future__ import annotations

import importlib
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
from torch import Tensor
from typer.testing import CliRunner

import placekern as pk
from placekern.cli import app, main
from placekern.cli import demo as demo_module
from placekern.cli.inputs import fit_what_is_missing, missing_parts
from placekern.cli.settings import compress_config, image_size

for package in ("rich", "typer", "zstandard"):  # in the processes that the tests start
    pytest.importorskip(package)

app_module = importlib.import_module("placekern.cli.app")  # its name is also the application's

ROOT = Path(pk.__file__).parents[1]


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    code = "from placekern.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A data set of six places in the layout query/, ref/, ground_truth.csv."""
    generator = np.random.default_rng(0)
    places = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(6)]
    for folder, noise in (("query", 12), ("ref", 0)):
        (tmp_path / folder).mkdir()
        for i, place in enumerate(places):
            image = np.asarray(Image.fromarray(place).resize((96, 72), Image.Resampling.BICUBIC))
            noisy = image + generator.integers(-noise, noise + 1, image.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                tmp_path / folder / f"{i:07d}.png"
            )
    rows = "\n".join(f"{i},{i}" for i in range(6))
    (tmp_path / "ground_truth.csv").write_text(f"query,ref_matches\n{rows}\n")
    return tmp_path


def test_info_as_json() -> None:
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert result.returncode == 0
    assert facts["placekern"] == pk.__version__
    assert facts["isas available"] == pk.available_isas()


def test_compress_inspect_evaluate(photographs: Path) -> None:
    file = photographs / "model.safetensors"
    result = run(
        "compress", "tiny-netvlad", "-o", file, "--references", photographs / "ref", "--bits", "5",
        "--sparsity", "0.4", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["file_bytes"] == file.stat().st_size
    assert report["pruned"] == pytest.approx(0.4, abs=0.01)

    table = run("inspect", file)
    assert table.returncode == 0, table.stderr
    assert "tiny-netvlad" in table.stdout
    layers = json.loads(run("inspect", file, "--json").stdout)["layers"]
    assert [row["name"] for row in layers] == [row["name"] for row in report["layers"]]
    assert all(row["bits"] == 5 for row in layers)

    picture = photographs / "picture.png"
    result = run("evaluate", file, "--dataset", photographs, "--picture", picture, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["queries"], values["references"]) == (6, 6)
    assert values["recalls"]["5"] >= 0.5
    assert Image.open(picture).size[0] > 300
    folders = ("--queries", photographs / "query", "--references", photographs / "ref")
    truth = ("--ground-truth", photographs / "ground_truth.csv")
    again = run("evaluate", file, *folders, *truth, "--json")
    assert json.loads(again.stdout)["recalls"] == values["recalls"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["inspect", __file__], "is not a sound safetensors file"),
        (["compress", "resnet-netvlad", "-o", "x"], "unknown network 'resnet-netvlad'"),
        (["compress", "tiny-netvlad", "-o", "no/such/folder/x"], "no/such/folder"),
        (["train", "tiny-netvlad", "-o", "x", "--images", "nowhere"], "no folder at nowhere"),
        (["evaluate", "nowhere.safetensors"], "give --dataset, or both"),
        (["demo", "--dataset", "nowhere"], "--weights and --dataset go together"),
        (["evaluate", "x", "--dataset", "y", "--size", "big"], '--size is "big", expected HEIGHTx'),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["fly"], ["compress"], ["inspect"], ["info", "--color"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_image_size() -> None:
    assert image_size(None) is None
    assert image_size("240x320") == (240, 320)
    for text in ("240", "240x", "0x5", "-1x5", "axb", "1x2x3"):
        with pytest.raises(ValueError, match="expected HEIGHTxWIDTH"):
            image_size(text)


def test_compress_by_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"bits": 5, "layers": {"backbone.conv1": null, "*conv4": {"bits": 3}}}')
    file = tmp_path / "model.safetensors"
    arguments = ["compress", "tiny-netvlad", "-o", str(file), "--config", str(config), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    bits = {row["name"]: row["bits"] for row in json.loads(result.stdout)["layers"]}
    assert bits == {"backbone.conv2": 5, "backbone.conv3": 5, "backbone.conv4": 3}
    for option, value in (("bits", "5"), ("threshold", "0.1"), ("method", "uniform")):
        result = CliRunner().invoke(app, [*arguments, f"--{option}", value])
        assert f"leaves nothing to --{option}: give one or the other" in str(result.exception)
    config.write_text('{"bits": 5, "width": 3}')
    assert "unknown key 'width'" in str(CliRunner().invoke(app, arguments).exception)


def test_a_config_of_options() -> None:
    assert compress_config(None, bits=None, sparsity=None, method=None) == pk.CompressConfig()
    given = compress_config(None, bits=3, sparsity=0.5, entropy_lambda=0.1)
    assert given == pk.CompressConfig(bits=3, sparsity=0.5, entropy_lambda=0.1)


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("bits: 5")
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError('no yaml', name='yaml')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    config = tmp_path / "config.yaml"
    arguments = ("compress", "tiny-netvlad", "-o", tmp_path / "x", "--config", config)
    result = run(*arguments, env=environment)
    assert result.returncode == 1
    assert "config.yaml is YAML, which needs PyYAML" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_inspect_fits_80_columns_and_shows_several_codebooks(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("backbone", torch.nn.Sequential(torch.nn.Linear(3000, 4096)))
    model.add_module("whiten", torch.nn.Linear(64, 36))
    pk.compress_(model, pk.CompressConfig(bits=5, layers={"whiten": {"group_size": 5}}))
    file = tmp_path / "model.safetensors"
    pk.save(model, file)
    table = run("inspect", file, env=os.environ | {"COLUMNS": "80"})
    assert table.returncode == 0, table.stderr
    assert "5 x 8: 8 codebooks of 5-bit codes" in " ".join(table.stdout.split())
    (row,) = (line for line in table.stdout.splitlines() if line.strip().startswith("whiten"))
    assert "36 x 64" in row
    assert "5 x 8" in row
    (row,) = (line for line in table.stdout.splitlines() if line.strip().startswith("backbone.0"))
    assert "4096 x 3000" in row
    assert all(len(line) <= 80 and "…" not in line for line in table.stdout.splitlines())
    layers = json.loads(run("inspect", file, "--json").stdout)["layers"]
    assert [layer["codebooks"] for layer in layers] == [1, 8]


def test_compress_fits_only_what_the_weights_leave_open(photographs: Path) -> None:
    references, file = photographs / "ref", photographs / "dense.safetensors"
    images = pk.vpr.ImageList(sorted(references.iterdir()))
    fitted = pk.vpr.fit_(pk.vpr.load("tiny-netvlad"), images)
    pk.save(fitted, file)
    options = ["-o", str(photographs / "x.safetensors"), "--references", str(references)]
    result = CliRunner().invoke(app, ["compress", str(file), *options])
    assert "is to be fitted: leave --references out" in str(result.exception)
    assert not (photographs / "x.safetensors").exists()

    # A .mat brings clusters, which stay, and here no whitening, which is fitted.
    start = pk.vpr.build("tiny-netvlad", seed=5)
    centroids = start.netvlad.centroids.detach().clone()
    mat = Path("clusters.mat")
    assert missing_parts(start, "tiny-netvlad", mat) == ("whitening",)
    assert fit_what_is_missing(start, "tiny-netvlad", mat, images)
    assert torch.equal(start.netvlad.centroids, centroids)
    assert missing_parts(start, "tiny-netvlad", mat) == ()
    weight = start.whiten.weight
    assert not fit_what_is_missing(start, "tiny-netvlad", mat, images)
    assert start.whiten.weight is weight


def test_a_missing_folder_is_found_out_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "open_network", None)
    file = str(tmp_path / "no" / "x.safetensors")
    result = CliRunner().invoke(app, ["compress", "tiny-netvlad", "-o", file])
    assert "there is no folder" in str(result.exception)


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"]])
def test_a_closed_pipe_is_no_error_to_speak_of(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from placekern.cli import main; main()"
    with os.fdopen(write, "wb") as closed:
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert (result.returncode, result.stderr) == (1, "")


def test_a_library_that_does_not_load_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(app_module, "app", broken)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "placekern: libcudart.so: cannot open" in capsys.readouterr().err


class SmallCity(pk.vpr.City):
    """A city with few places, so that the demo's whole path runs in seconds."""

    def training(self, progress: Any = None, **_: Any) -> Any:
        return super().training(places=6, views=4, progress=progress)

    def test(self, progress: Any = None, **_: Any) -> Any:
        return super().test(places=5, references=1, queries=2, progress=progress)


def test_demo_on_a_small_city(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small_whitening(model: Any, images: Tensor, dim: int, **rest: Any) -> Any:
        return pk.vpr.whiten_(model, images, dim=8, **rest)

    monkeypatch.setattr(demo_module, "City", SmallCity)
    monkeypatch.setattr(demo_module, "whiten_", small_whitening)
    monkeypatch.setattr(
        demo_module,
        "train",
        lambda *args, **options: pk.vpr.train(*args, **(options | {"places": 4, "views": 2})),
    )
    demo_module.demo(output=tmp_path / "out", steps=2, tuning=1, seed=0, as_json=True)
    values = json.loads(capsys.readouterr().out)
    labels = [row["label"] for row in values["rows"]]
    assert labels[0] == "dense"
    assert len(labels) == 7
    dense, *compressed = values["rows"]
    assert all(row["disk_bytes"] < dense["disk_bytes"] for row in compressed)
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == values
    assert Image.open(tmp_path / "out" / "retrieved.png").mode in ("RGB", "P")
    with torch.inference_mode():
        descriptor = pk.load(tmp_path / "out" / "model.safetensors")(torch.rand(1, 3, 72, 96))
    assert float(descriptor.norm()) == pytest.approx(1, abs=1e-5)
