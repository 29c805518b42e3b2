"""Layers and their training need torch, numpy and safetensors only; the rest is missed in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import MISSING, OPTIONAL

import placekern as pk

HIDE = "import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"
USE = """
import torch
import placekern as pk
layer = pk.QuantSparseLinear(30, 4, bits=5)
layer(torch.randn(2, 30)).sum().backward()
twin = pk.QuantSparseLinear(30, 4, bits=5)
twin.load_state_dict(layer.state_dict())
pk.vpr.load("squeezenet1_1-netvlad")
"""


def run(names: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process where importing these packages fails."""
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(names=names) + code],
        capture_output=True,
        text=True,
        cwd=Path(pk.__file__).parents[1],
        timeout=120,
    )


def test_layers_and_networks_work_without_all_of_them() -> None:
    done = run(OPTIONAL, USE)
    assert done.returncode == 0, done.stderr


def test_files_say_that_zstandard_is_missing(tmp_path: Path) -> None:
    new, written = tmp_path / "new.safetensors", tmp_path / "written.safetensors"
    layer = "pk.QuantSparseLinear(30, 4, bits=5)"
    calls = [f"pk.save({layer}, {str(new)!r})"]
    if "zstandard" not in MISSING:
        pk.save(pk.QuantSparseLinear(30, 4, bits=5), written)
        calls.append(f"pk.load({str(written)!r}, {layer})")
    for call in calls:
        done = run(("zstandard",), f"import placekern as pk\n{call}")
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == (
            "ModuleNotFoundError: placekern's files are compressed by the package zstandard, which "
            "is not installed; pip install zstandard"
        )
    assert not new.exists()
