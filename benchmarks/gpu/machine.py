"""The machine that was measured: its name, versions, and what it can do at most."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import placekern as pk
from benchmarks.gpu.bench import Bench, randn
from benchmarks.gpu.report import short_name
from placekern import _native

ROOT = Path(__file__).resolve().parents[2]


def describe(bench: Bench, command: str) -> dict[str, Any]:
    """What a reader needs to know beside the times."""
    if bench.emulated:
        device = "emulated device"
    else:
        properties = torch.cuda.get_device_properties(bench.device)
        device = properties.name
    return {
        "device": device,
        "name": short_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"
        ),
        "versions": {
            "placekern": pk.__version__,
            "torch": torch.__version__,
            "CUDA of torch": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "Python": platform.python_version(),
            "nvcc": _nvcc(),
            "built for": str(_native.cuda_architectures()),
        },
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "flushed by reading": bench.clock.flushed_bytes,
    }


def ceilings(bench: Bench) -> None:
    """Measures what bounds everything else: a copy, and a product of matrices."""
    size = bench.sizes.copied_bytes
    source = torch.randint(1 << 30, (size // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    n = bench.sizes.product
    a, b = (randn(bench, n, n, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    times = bench.clock.measure({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 9)
    bench.facts["ceilings"] = {
        "copy GB/s": 2 * size / times["copy"].us / 1e3,
        "bfloat16 TFLOP/s": 2 * n**3 / times["product"].us / 1e6,
    }
    # What a pair of events around an empty graph costs is in every time.
    one = torch.zeros(1, device=bench.device)
    bench.facts["microseconds of nothing"] = bench.clock.measure({"zero": one.zero_})["zero"].us


def _nvcc() -> str:
    text = _output("nvcc", "--version") or _output("/usr/local/cuda/bin/nvcc", "--version")
    found = re.search(r"release ([\d.]+)", text or "")
    return found[1] if found else "not found"


def _commit() -> str:
    if (ROOT / ".git").exists():
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
        commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        if commit:
            return f"{commit}{' with changes' if changed else ''}"
    return "unknown"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> str:
    """The command that this process was started with."""
    return " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
