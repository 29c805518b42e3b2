"""`placekern train` as a user meets it: what it trains, what it writes, and how it goes on."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import placekern as pk
from placekern.cli import app
from placekern.compress.train import _Run

for package in ("rich", "typer", "zstandard"):  # in the processes that the tests start
    pytest.importorskip(package)

train_module = importlib.import_module("placekern.cli.train")  # its name is also the command's

ROOT = Path(pk.__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of three places, in places/<name>/, and the same in flat/."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    (root / "flat").mkdir()
    for name in ("bridge", "square", "tower"):
        (root / "places" / name).mkdir(parents=True)
        place = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(place).resize((64, 48), Image.Resampling.BICUBIC))
        for i in range(4):
            noisy = image + generator.integers(-25, 26, image.shape)
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(root / "places" / name / f"{i}.png")
            picture.save(root / "flat" / f"{name}{i}.png")
    return root


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def trained(*arguments: Any) -> dict[str, Any]:
    """The JSON that a run prints, which must be a good one."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


SHORT = ("--steps", 6, "--batch-size", 8, "--seed", 3)


@pytest.mark.parametrize(
    ("folder", "loss", "places"), [("places", "places", 3), ("flat", "distill", 0)]
)
def test_a_folder_of_images_becomes_a_compressed_file(
    folders: Path, tmp_path: Path, folder: str, loss: str, places: int
) -> None:
    file = tmp_path / "net.safetensors"
    values = trained(
        "tiny-netvlad", "-o", file, "--images", folders / folder, *SHORT,
        "--bits", 5, "--sparsity", 0.6,
    )  # fmt: skip
    assert (values["loss"], values["images"], values["places"]) == (loss, 12, places)
    assert values["file_bytes"] == file.stat().st_size
    assert len(values["losses"]) == values["steps"] == 6
    assert values["pruned"] == pytest.approx(0.6, abs=0.01)
    model = pk.load(file)
    assert {layer.bits for _, layer in pk.nn.quant_sparse_layers(model)} == {5}
    assert model.architecture["kwargs"]["dim"] == 4  # a third of the images
    assert [layer["name"] for layer in values["layers"]][-1] == "whiten"
    with torch.inference_mode():
        assert float(model(torch.rand(1, 3, 48, 64)).norm()) == pytest.approx(1, abs=1e-5)


def test_what_a_person_sees(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    result = invoke("tiny-netvlad", "-o", file, "--images", folders / "places", *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "12 images of 3 places, to tell places apart" in result.stderr
    assert "step 3/6: codebook, loss 0." in result.stderr  # quantized after step 3
    assert "step 2/6: dense, loss 0." in result.stderr
    assert "whiten" in result.stdout
    assert "6 steps, loss 0." in result.stdout
    assert "every byte counted" in result.stdout


def test_a_recipe_from_a_file(folders: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    settings = {
        "compress": {
            "bits": 3,
            "sparsity": 0.8,
            "layers": {"whiten": {"bits": 2}, "backbone.conv1": None},
        },
        "prune_begin": 2,
        "quantize_at": 3,
        "grid": "int8",
    }
    recipe.write_text(json.dumps(settings))
    file = tmp_path / "net.safetensors"
    trained(
        "tiny-netvlad", "-o", file, "--images", folders / "flat", *SHORT,
        "--recipe", recipe, "--dim", 5,
    )  # fmt: skip
    layers = dict(pk.nn.quant_sparse_layers(pk.load(file)))
    assert "backbone.conv1" not in layers
    assert layers["whiten"].bits == 2
    assert layers["whiten"].weight.shape[0] == 5
    assert layers["backbone.conv3"].bits == 3
    entries = layers["backbone.conv3"].codebook.detach()
    grid = entries * (127 / entries.abs().max())
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-4)


def test_dense_then_compressed_then_its_codebooks(folders: Path, tmp_path: Path) -> None:
    dense, small, again = (tmp_path / f"{name}.safetensors" for name in ("dense", "small", "again"))
    flat = ("--images", folders / "flat")
    trained("tiny-netvlad", "-o", dense, "--images", folders / "places", "--dense", *SHORT)
    assert not list(pk.nn.quant_sparse_layers(pk.load(dense)))

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"bits": 4, "layers": {"Linear": {"sparsity": 0.5}}}))
    trained(dense, "-o", small, *flat, "--config", config, *SHORT)
    before = pk.load(small)
    # The network of the file is what is trained: its whitening stays, its clusters move a little.
    centroids, start = (m.netvlad.centroids.detach() for m in (before, pk.load(dense)))
    assert 0 < float((centroids - start).norm() / start.norm()) < 0.1

    trained(small, "-o", again, *flat, "--teacher", dense, *SHORT)
    after = pk.load(again)
    assert torch.equal(before.whiten.codes, after.whiten.codes)
    assert not torch.equal(before.whiten.codebook, after.whiten.codebook)


# The command, killed or interrupted after a step.
COMMAND = """
import os, signal, sys
import torch
from placekern.cli import main
from placekern.compress import train

torch.set_num_threads(1)
how, at = sys.argv[1], int(sys.argv[2])
step = train._Run.step

def stopped(self, *arguments):
    loss = step(self, *arguments)
    if self.recipe.steps == at:
        os.kill(os.getpid(), getattr(signal, how))
    return loss

if how != "-":
    train._Run.step = stopped
sys.argv[1:] = sys.argv[3:]
main()
"""


def command(how: str, at: int, *arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, how, str(at), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_same_command_goes_on_after_a_kill_and_after_ctrl_c(
    folders: Path, tmp_path: Path
) -> None:
    def arguments(name: str) -> tuple[Any, ...]:
        return (
            "train", "tiny-netvlad", "-o", tmp_path / f"{name}.safetensors", "--images",
            folders / "flat", "--steps", 10, "--batch-size", 6, "--bits", 3, "--sparsity", 0.5,
            "--json",
        )  # fmt: skip

    whole = command("-", 0, *arguments("whole"))
    assert whole.returncode == 0, whole.stderr

    parts = (*arguments("parts"), "--checkpoint", tmp_path / "run.pt", "--checkpoint-every", 2)
    killed = command("SIGKILL", 5, *parts)  # while its layers are dense
    assert killed.returncode == -signal.SIGKILL
    interrupted = command("SIGINT", 9, *parts)  # while its codebooks are trained
    assert interrupted.returncode == 130
    assert "run the same command again to go on" in " ".join(interrupted.stderr.split())
    assert "Traceback" not in interrupted.stderr
    assert not (tmp_path / "parts.safetensors").exists()
    last = command("-", 0, *parts)
    assert last.returncode == 0, last.stderr
    record, expected = json.loads(last.stdout), json.loads(whole.stdout)
    assert (record["resumed_at"], record["steps"]) == (8, 10)
    assert record["losses"] == expected["losses"][8:]
    files = [tmp_path / f"{name}.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


class StoppedError(Exception):
    """Ends a run as a kill would."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command until its checkpoint of step 2 is written."""

    def run(*arguments: Any) -> None:
        step = _Run.step

        def stop(self: Any, *rest: Any) -> float:
            if self.recipe.steps == 2:
                raise StoppedError
            return step(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(_Run, "step", stop)
            result = invoke(*arguments, "--checkpoint-every", 2)
        assert isinstance(result.exception, StoppedError), (result.output, result.exception)

    return run


def test_a_checkpoint_knows_images_labels_and_teacher(
    folders: Path, tmp_path: Path, stopped: Callable[..., None]
) -> None:
    teachers = []
    for seed in (1, 2):
        teacher = pk.vpr.build("tiny-netvlad", dim=4, seed=seed)
        teachers.append(tmp_path / f"teacher{seed}.safetensors")
        pk.save(teacher, teachers[-1])
    other = tmp_path / "places"
    shutil.copytree(folders / "places", other)
    (other / "bridge" / "0.png").rename(other / "square" / "4.png")
    flat, places = ("--images", folders / "flat"), ("--images", folders / "places")
    for i, (first, second, message) in enumerate(
        (
            (flat, (*flat, "--size", "40x56"), "image = [3, 40, 56]"),
            (flat, (*flat, "--teacher", teachers[0]), "teacher = "),
            ((*flat, "--teacher", teachers[0]), (*flat, "--teacher", teachers[1]), "teacher = "),
            (places, ("--images", other), "labels = "),
        )
    ):
        options = ("-o", tmp_path / "x.safetensors", *SHORT, "--checkpoint", tmp_path / f"{i}.pt")
        stopped("tiny-netvlad", *options, *first)
        error = str(invoke("tiny-netvlad", *options, *second).exception)
        assert "is of a run with" in error
        assert message in error.split("but this one has")[1]
        assert trained("tiny-netvlad", *options, *first)["resumed_at"] == 2


def test_a_resume_fits_nothing_again(
    folders: Path, tmp_path: Path, stopped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, kept = tmp_path / "run.pt", tmp_path / "run.pt.fitted.safetensors"
    options = ("tiny-netvlad", "--images", folders / "flat", *SHORT)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    trained(*options, "-o", whole)
    options = (*options, "-o", parts, "--checkpoint", checkpoint)
    stopped(*options)
    assert kept.exists()
    before = kept.read_bytes()
    # Another whitening is not the one that is kept, and leaves that alone.
    assert "but this one has parameters" in str(invoke(*options, "--dim", 3).exception)
    assert kept.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "fit_what_is_missing", None)
        assert trained(*options)["resumed_at"] == 2
    assert not kept.exists()
    assert parts.read_bytes() == whole.read_bytes()


def test_a_teacher_is_to_be_distilled_from(folders: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    pk.save(pk.vpr.build("tiny-netvlad", dim=4), teacher)
    options = ("-o", tmp_path / "x.safetensors", "--images", folders / "places", *SHORT)
    assert trained("tiny-netvlad", *options, "--teacher", teacher)["loss"] == "distill"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "metric"], '--loss is "metric", expected places or distill'),
        (["--loss", "places"], "--loss places needs labels: one subfolder a place in"),
        (["--dense"], "--dense leaves nothing to learn from itself: give --teacher"),
        (["--images", "places", "--batch-size", "7"], "--batch-size is 7, expected at least 8"),
        (["--teacher", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--dense", "--bits", "5"], "--dense leaves nothing to --bits"),
        (["--config", "c.json", "--entropy-lambda", "0.1"], "c.json leaves nothing to --entropy-"),
        (["--recipe", "r.json", "--sparsity", "0.1"], "r.json leaves nothing to --sparsity: give"),
        (["--recipe", "r.json", "--config", "c.json"], "r.json leaves nothing to --config: give"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
        (["--recipe", "late.json"], "prunes and quantizes until step 9, but the run has 6 steps"),
        (["--checkpoint", "no/such/run.pt"], "there is no folder no/such to write run.pt to"),
        (["-o", "no/such/net"], "there is no folder no/such to write net to"),
        (["--images", "nowhere"], "no folder at nowhere"),
        (["--size", "big"], '--size is "big", expected HEIGHTx'),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    file = tmp_path / "net.safetensors"
    monkeypatch.chdir(folders)
    monkeypatch.setattr(train_module, "fit_what_is_missing", None)  # all is found out before it
    (folders / "late.json").write_text('{"quantize_at": 9}')
    result = invoke("tiny-netvlad", "-o", file, "--images", "flat", *SHORT, *arguments)
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    assert message in str(result.exception)
    assert not file.exists()


def test_a_compressed_network_takes_no_recipe(folders: Path, tmp_path: Path) -> None:
    model = pk.vpr.build("tiny-netvlad", clusters=8, dim=4)
    pk.compress_(model)
    file = tmp_path / "small.safetensors"
    pk.save(model, file)
    options = ("-o", tmp_path / "net.safetensors", "--images", folders / "flat", *SHORT)
    for more, message in (
        ((), "is compressed already, and leaves nothing to learn from itself: give --teacher"),
        (("--bits", 5), "is compressed already, which leaves nothing to --bits"),
        (("--dense",), "is compressed already, which leaves nothing to --dense"),
        (("--teacher", file, "--dim", 3), "is trained as it is: leave --dim out"),
    ):
        assert message in str(invoke(file, *options, *more).exception)
    assert "--weights out" in str(invoke(file, *options, "--weights", file).exception)
    options = (*options[:2], "--images", folders / "places", "--teacher", file, "--loss", "places")
    assert "--teacher goes with --loss distill" in str(invoke(file, *options).exception)


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_the_default_recipe_fits_any_number_of_steps(steps: int) -> None:
    config = pk.RecipeConfig.over_steps(steps, pk.CompressConfig(sparsity=0.5))
    assert config.prune_end <= config.quantize_at <= steps
    assert config.pruning.prunes(config.prune_end, 0, 1)
    if steps == 300:
        assert (config.prune_end, config.quantize_at, config.prune_every) == (150, 180, 3)
