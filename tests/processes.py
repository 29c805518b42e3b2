"""Python processes that tests start, alone or as the two ranks of a process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import placekern

ROOT = Path(placekern.__file__).parents[1]
_RANK = """
import os, sys
import torch
import torch.distributed as dist
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def leave(result):
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # ending in the usual way, torch's own threads abort the process now and then
"""


def child(source: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """A process that runs `source` with these in sys.argv, started."""
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def on_two_ranks(source: str, folder: Path) -> tuple[Any, Any]:
    """What `source` leaves on the ranks of a process group.

    It finds `folder` and its `rank`, and ends with leave(result).
    """
    processes = [child(_RANK + source, folder, rank, OMP_NUM_THREADS="1") for rank in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second
