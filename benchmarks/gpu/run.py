"""`make gpu`: builds, tests, times and sanitizes on a machine with a GPU, inside eight minutes.

Needs no network, and no virtual environment: the Python that runs it has torch with CUDA. Stages
are in the order of what they are worth, and each has a limit. The surprise: a stage that fails
stops nothing, so that one visit to a GPU brings all it can. What they print is in gpu.log, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.gpu import report

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "numpy", "safetensors", "pytest", "pybind11", "setuptools")
TOTAL = 460.0  # seconds
WIND_DOWN = 10.0  # that a stage has at its limit to say what it knows

# Small cases under the sanitizers: every kernel in bfloat16, at the tests' odd sizes. The few and
# quick first, as time may run out.
OPS = ("kmeans_assign", "linear", "conv2d", "backward")
SANITIZED = [f"tests/test_cuda_{op}.py" for op in OPS]
SANITIZED_NAMES = "cuda- and (dtype2 and not decode or splits or slices or many_points or 515)"


@dataclass
class Stage:
    """One command: its heading, its limit in seconds, and how it went."""

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] | None = None
    folder: Path = ROOT
    outcome: str = ""
    seconds: float = 0.0
    last_line: str = ""

    @property
    def failed(self) -> bool:
        """Whether the stage ran and did not succeed, or found no time."""
        return not self.outcome.startswith(("ok", "skipped"))


def run(stage: Stage, limit: float, log: TextIO) -> None:
    """Runs a stage with its output passed on, and ends it with all its children at the limit.

    At the limit it is interrupted first: pytest then tells of the failures that it has seen.
    """
    say(log, f"\n==== {stage.name} (at most {limit:.0f} s)")
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=stage.folder,
        env=os.environ | (stage.environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []

    def pass_on() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(log, line, end="")
            if line.strip():
                lines.append(line.strip())

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
        stage.outcome = "ok" if status == 0 else f"failed with {status}"
    except subprocess.TimeoutExpired:
        stage.outcome = f"stopped after {limit:.0f} s"
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(WIND_DOWN)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)  # a child that left the group may hold the pipe open
    if any("Device not supported" in line for line in lines):
        stage.outcome = "skipped: the sanitizer does not work on this machine"
    stage.last_line = lines[-1][:200] if lines else ""
    stage.seconds = time.monotonic() - start
    say(log, f"==== {stage.name}: {stage.outcome}, {stage.seconds:.0f} s")


def say(log: TextIO, text: str, end: str = "\n") -> None:
    """Prints, and keeps it in the log too: a terminal may show the end only."""
    print(text, end=end, flush=True)
    log.write(text + end)
    log.flush()


def problem() -> str | None:
    """Why this machine cannot do it, in one sentence."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"make gpu needs the Python packages {', '.join(missing)}, which {sys.executable} does "
            "not have; name another with GPU_PYTHON=."
        )
    import torch

    if not torch.cuda.is_available():
        return "make gpu needs a GPU, and torch sees none on this machine."
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=search_path()) is None:
            return f"make gpu needs {tool} on the PATH, and it is not there."
    if find_tool("nvcc") is None:
        return "make gpu needs nvcc on the PATH or in /usr/local/cuda/bin, and it is not there."
    return None


def search_path() -> str:
    """The PATH, and where this Python's own programs lie."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=search_path()) or shutil.which(f"{home}/bin/{name}")


def stages(results: Path, architecture: str) -> list[Stage]:
    """What is done, the most valuable first."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-o", "faulthandler_timeout=40"]  # where a test hangs
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    build = {"PLACEKERN_CUDA": "on", "PLACEKERN_CUDA_ARCHS": architecture}
    device_tests = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda_*.py"))
    device_tests = [name for name in device_tests if not re.search("emulation|barriers", name)]
    timed = 160.0
    # Started elsewhere, setup.py finds no pyproject.toml, which only a recent setuptools can read.
    build_folder = ROOT / "build" / "gpu"
    build_command = [python, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(ROOT)]
    build_command += ["--build-temp", str(build_folder)]
    benchmarks = [python, "-m", "benchmarks.gpu", "--output", str(results)]
    seen = "from placekern import _native; n = _native.cuda_devices(); print(n, 'GPUs'); assert n"
    found = [
        Stage("build", build_command, 200, build, build_folder),
        Stage("what was built sees a GPU", [python, "-c", seen], 30),
        Stage("tests on the device", [*pytest, *spread, *device_tests, "-k", "not emulated"], 100),
        Stage("benchmarks", [*benchmarks, "--seconds", str(timed - 30)], timed),
    ]
    sanitizer = find_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "", "--tool", tool, "--kernel-regex", "kns=placekern"]
        # Of calls that fail, the tests check ours; libraries ask the driver what it may not have.
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += ["--error-exitcode", "1", *pytest, *SANITIZED, "-k", SANITIZED_NAMES]
        # Without torch's cache an array ends where its memory ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Stage(f"compute-sanitizer {tool}", command, 70, environment))
        if sanitizer is None:
            found[-1].outcome = "skipped: compute-sanitizer is not here"
    found.append(Stage("whole test suite", [*pytest, *spread], TOTAL))
    return found


def record(results: Path, device: str, done: list[Stage], since: float = 0.0) -> None:
    """Adds how the stages went to the results that the benchmarks wrote since a time."""
    path = results / f"gpu-{report.short_name(device)}.json"
    if not path.exists() or path.stat().st_mtime < since:
        print(f"{path} was not written: the benchmarks did not come so far.")
        return
    result = json.loads(path.read_text())
    kept = ("name", "outcome", "seconds", "last_line")
    result["stages"] = [{k: v for k, v in asdict(s).items() if k in kept} for s in done]
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(result))
    print(f"\nResults: {path} and {path.with_suffix('.md').name}")


def main() -> int:
    """Runs all stages; 0 when none failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    default = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=default, help="folder of the results")
    options = parser.parse_args()
    # In the background a shell may ignore it, and stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends, began = time.monotonic() + TOTAL, time.time()
    if sentence := problem():
        print(sentence, file=sys.stderr)
        return 1
    import torch

    os.environ["PATH"] = search_path()
    device = torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    print(f"{device}, compute capability {major}.{minor}, torch {torch.__version__}", flush=True)
    results = options.results.resolve()
    done = stages(results, f"{major}{minor}")
    for stage in done:
        stage.folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    with (results / "gpu.log").open("w") as log:
        for stage in done:
            left = ends - time.monotonic()
            if stage.outcome:
                say(log, f"\n==== {stage.name}: {stage.outcome}")
            elif left < 5:
                stage.outcome = "not run: no time left"
            else:
                run(stage, min(stage.limit, left), log)
    record(results, device, done, began)
    print()
    for stage in done:
        words = re.sub(r"=+", "", stage.last_line).strip()
        print(f"{stage.name:28} {stage.seconds:5.0f} s  {stage.outcome}  {words}")
    return 1 if any(stage.failed for stage in done) else 0


if __name__ == "__main__":
    sys.exit(main())
