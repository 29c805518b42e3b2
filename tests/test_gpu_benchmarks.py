"""The GPU benchmarks and `make gpu`, as far as they go without a GPU.

A dry run on the emulated device takes every line but those that time: what would be found out on a
GPU too late, a wrong name or shape, is found here.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from placekern import _native
from placekern.packing import Layout

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """load("layers") imports benchmarks.gpu.layers from the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))

    def run(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.gpu.{name}")

    return run


def test_a_dry_run_takes_every_benchmark_to_its_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "emulated", "--output", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu-emulated-device.json").read_text())
    assert result["problems"] == []
    assert "left out for want of time" not in result
    sections = {row["section"] for row in result["rows"]}
    assert sections == {
        "linear",
        "linear_backward",
        "kmeans_assign",
        "conv2d",
        "conv2d, all layers",
        "conv2d_backward",
    }
    for row in result["rows"]:
        assert row["error"] < 1.2e-2
        assert {row["ours"], row["peer"]} <= set(row["times"])
    questions = {sweep["question"] for sweep in result["sweeps"]}
    assert len(questions) == 7
    page = (tmp_path / "gpu-emulated-device.md").read_text()
    for words in (*sections, *questions, "target", "emulated"):
        assert words in page


@pytest.mark.parametrize(("M", "repeats"), [(256, 2), (384, 3), (100, 1), (136, 1)])
@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_repeated_rows_are_what_packing_them_all_would_give(
    load, M: int, repeats: int, layout: Layout
) -> None:
    layer = load("layers").make_layer(M, 300, 0.3, 5, torch.device("cpu"), layout)
    dense = layer.dense(torch.float32)
    assert layer.weight.layout == layout
    assert torch.equal(layer.weight.to_dense(), dense)
    rows = M // repeats
    assert torch.equal(dense[:rows].repeat(repeats, 1), dense)
    entries = torch.cat([layer.weight.codebook, torch.zeros(1)])
    assert torch.equal(entries[layer.indices()], dense)
    assert 0.29 < layer.weight.density < 0.31
    for other in (Layout.DENSE, Layout.PAIRS):
        assert torch.equal(layer.in_layout(other).weight.to_dense(), dense)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 PCIe", "h100"),
    ],
)
def test_names_of_result_files(load, device: str, name: str) -> None:
    assert load("report").short_name(device) == name


def test_a_wrong_result_is_noted_and_fails_the_run(load) -> None:
    bench = load("bench")
    sizes = load("sizes").TINY
    own = bench.Bench(torch.device("cpu"), load("clock").HostClock(), sizes, time.monotonic() + 60)
    with own.case("the case"):
        own.check("y", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-2)
    assert len(own.problems) == 1
    assert "the case" in own.problems[0]
    with own.case("another"):
        own.check("y", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), 1e-2)
    assert len(own.problems) == 2
    assert own.check("y", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1e-2) == 0


def test_after_a_fault_of_the_device_a_new_process_goes_on(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, bench = load("__main__"), load("bench")
    monkeypatch.setattr(_native.cuda, "_cuda", None)
    monkeypatch.setattr(bench.Bench, "has_fault", lambda self: True)  # in this process only
    arguments = ["--device", "emulated", "--output", str(tmp_path), "calls", "backward", "linear"]
    with monkeypatch.context() as patched:
        patched.setitem(main.SECTIONS, "calls", lambda bench: 1 / 0)
        assert main.main(arguments) == 1
    result = json.loads((tmp_path / "gpu-emulated-device.json").read_text())
    assert len(result["problems"]) == 1
    assert "calls: ZeroDivisionError" in result["problems"][0]
    assert {row["section"] for row in result["rows"]} == {"linear_backward", "linear"}
    assert "linear_backward" in (tmp_path / "gpu-emulated-device.md").read_text()
    assert "--continued" not in result["command"]


def test_stages_end_at_their_limit_and_the_next_one_runs(load, capsys, tmp_path: Path) -> None:
    run = load("run")
    forever = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    stages = [
        run.Stage("endless", [sys.executable, "-c", forever], 60),
        run.Stage("wrong", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], 60),
        run.Stage("right", [sys.executable, "-c", "print('the last line')"], 60),
    ]
    with (tmp_path / "gpu.log").open("w") as log:
        for stage, limit in zip(stages, (1.0, 60.0, 60.0), strict=True):
            run.run(stage, limit, log)
    assert [stage.failed for stage in stages] == [True, True, False]
    assert stages[0].outcome == "stopped after 1 s"
    assert stages[1].outcome == "failed with 3"
    assert stages[1].last_line == "words"
    printed = capsys.readouterr().out
    assert "the last line" in printed
    assert (tmp_path / "gpu.log").read_text() == printed


def test_a_stage_says_what_it_knows_when_it_is_stopped(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ready = load("run"), tmp_path / "ready"
    os.mkfifo(ready)

    class AtItsLimit(subprocess.Popen):
        """Its limit comes as soon as it is ready for it."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout == 60:
                ready.read_text()
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", AtItsLimit)
    monkeypatch.setattr(run, "WIND_DOWN", 90)
    program = (
        f"try:\n    open({str(ready)!r}, 'w').close()\n    while True: pass\n"
        "except KeyboardInterrupt:\n    print('last words')"
    )
    stage = run.Stage("endless", [sys.executable, "-c", program], 60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as `main` does
    try:
        with (tmp_path / "gpu.log").open("w") as log:
            run.run(stage, 60, log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stage.outcome == "stopped after 60 s"
    assert stage.last_line == "last words"


def test_results_and_stages_come_together(load, tmp_path: Path) -> None:
    run, report = load("run"), load("report")
    result = {
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"torch": "2"},
        "command": "c",
        "date": "d",
        "commit": "e",
        "driver": "f",
        "problems": [],
        "rows": [],
        "sweeps": [],
    }
    path = tmp_path / "gpu-h100.json"
    path.write_text(json.dumps(result))
    stage = run.Stage("build", ["x"], 1, outcome="ok", seconds=12.3, last_line="== 5 passed ==")
    run.record(tmp_path, result["device"], [stage])
    assert json.loads(path.read_text())["stages"][0]["outcome"] == "ok"
    assert "| build | 12 | ok | 5 passed |" in (tmp_path / "gpu-h100.md").read_text()
    before = path.read_text()
    run.record(tmp_path, result["device"], [], since=time.time() + 60)  # results of another day
    assert path.read_text() == before
    assert report.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "make gpu needs a GPU, and torch sees none on this machine."


def test_stages_of_make_gpu_name_files_that_exist(load, tmp_path: Path) -> None:
    run = load("run")
    names = [stage.name for stage in run.stages(tmp_path, "90")]
    assert names[0] == "build"
    assert names[-1] == "whole test suite"
    for stage in run.stages(tmp_path, "90"):
        for word in stage.command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, *run.SANITIZED, "-k", run.SANITIZED_NAMES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert 50 < len(chosen) < 200
    assert not any("[emulated" in line for line in chosen)
    assert {line.split("::")[0] for line in chosen} == set(run.SANITIZED)
