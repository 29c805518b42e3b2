"""`python -m benchmarks.gpu`: times everything on a GPU and writes gpu-<name>.json and .md.

`--device emulated` runs the same code with small sizes on the tests' emulated GPU: it proves that
the benchmarks run and that results are right; its times mean nothing, and no page is written unless
a folder is named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import backward, forward, kmeans, machine, report, sweep
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import CudaClock, HostClock
from benchmarks.gpu.sizes import FULL, TINY
from placekern import _native

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "linear": forward.linear,
    "backward": backward.linear_backward,
    "kmeans": kmeans.kmeans_assign,
    "conv2d": forward.conv2d,
    "conv2d_backward": backward.conv2d_backward,
    "calls": forward.calls,
    "sweep": sweep.sweep,
}


def emulate() -> None:
    """Puts the emulated device in the place of the CUDA module."""
    sys.path.insert(0, str(machine.ROOT / "tests"))
    from cuda_emulation import build

    _native.cuda._cuda = build.load("plain")


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections that were asked for; 1 when a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--continued", action="store_true", help="adds to the results in --output")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after these")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(SECTIONS)}")
    ends = time.monotonic() + options.seconds
    if options.device == "emulated":
        emulate()
        bench = Bench(torch.device("cpu"), HostClock(), TINY, ends)
    elif not torch.cuda.is_available() or _native.cuda_devices() == 0:
        print("No GPU can be used: torch or placekern sees none, or placekern lacks CUDA.")
        return 1
    else:
        bench = Bench(torch.device("cuda", 0), CudaClock(), FULL, ends)
        torch.backends.cudnn.benchmark = True
        options.output = options.output or machine.ROOT / "benchmarks" / "results"
    bench.facts |= machine.describe(bench, machine.command_line())
    if options.continued:
        bench.earlier = json.loads(results(bench, options.output).read_text())
    sections = options.sections or list(SECTIONS)
    with torch.inference_mode():
        machine.ceilings(bench)
        for i, name in enumerate(sections):
            print(f"-- {name}", flush=True)
            with bench.case(name):
                SECTIONS[name](bench)
            if options.output is not None:  # after each, so that what is stopped leaves results
                write(bench, options.output)
            left = sections[i + 1 :]
            if left and bench.has_fault():
                return go_on(options, left, ends)
    for problem in bench.problems:
        print(f"FAILED {problem}")
    return 1 if bench.problems else 0


def go_on(options: argparse.Namespace, sections: list[str], ends: float) -> int:
    """The other sections in a new process, for a device that has met an error in this one."""
    print("-- nothing works after this error: a new process goes on", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--continued", "--device", options.device]
    left = max(0.0, ends - time.monotonic())
    command += ["--output", str(options.output.resolve()), "--seconds", f"{left:.1f}"]
    subprocess.run([*command, *sections], check=False, cwd=machine.ROOT)
    return 1


def results(bench: Bench, folder: Path) -> Path:
    """The file of the results; the page beside it is .md."""
    return folder / f"gpu-{bench.facts['name']}.json"


def write(bench: Bench, folder: Path) -> None:
    """Writes both forms of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    result = bench.result()
    path = results(bench, folder)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(result))


if __name__ == "__main__":
    sys.exit(main())
