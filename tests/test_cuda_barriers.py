"""Every barrier of the CUDA kernels is needed, and ThreadSanitizer sees it when one is missing.

The emulator can make one barrier, named by file and line, order no memory. A process then runs the
ops on small layers under ThreadSanitizer: silent with all barriers, a data race without any one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import build

pytestmark = pytest.mark.skipif(
    "PLACEKERN_EMULATION" not in os.environ,
    reason="takes minutes; `make sanitize` runs it",
)

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")])
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"^\s*__sync(threads|warp)\(", line)
]
PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from cuda_emulation import build
from helpers import random_weight
from placekern import _native, device, ops
from placekern.packing import Layout
_native.cuda._cuda = build.load("thread")
torch.manual_seed(0)
device._direct_splits = lambda *_: 1
device._matmul_splits = lambda *_: 1
what = sys.argv[1]
for layout in (Layout.DENSE, Layout.PAIRS):
    for bits in (5, 8):
        weight = random_weight(70, 600, 0.4, bits).to_layout(layout)
        if what.startswith(("direct", "source")):
            ops.linear(torch.randn(2, 600), weight)
        if what.startswith(("matmul", "source")):
            ops.linear(torch.randn(20, 600).bfloat16(), weight)
            image = random_weight(20, 30 * 9, 0.4, bits).to_layout(layout)
            ops.conv2d(torch.randn(1, 30, 5, 5).bfloat16(), image, kernel_size=(3, 3))
            image = random_weight(20, 32 * 9, 0.4, bits).to_layout(layout, 9)
            last = torch.randn(1, 5, 5, 32).permute(0, 3, 1, 2).bfloat16()
            ops.conv2d(last, image, kernel_size=(3, 3))
        if what.startswith("decode"):
            ops.linear(torch.randn(70, 600), weight)
        if what.startswith(("linear_backward", "codebook_gradient", "bins")):
            for N, dtype in ((20, torch.bfloat16), (80, torch.bfloat16), (20, torch.float32)):
                x = torch.randn(N, 600).to(dtype).requires_grad_()
                weight.codebook.requires_grad_()
                ops.linear(x, weight).sum().backward()
            image = random_weight(20, 30 * 9, 0.4, bits).to_layout(layout)
            image.codebook.requires_grad_()
            x = torch.randn(1, 30, 5, 5).bfloat16()
            ops.conv2d(x, image, kernel_size=(3, 3)).sum().backward()
        if what.startswith("codebook_gradient"):  # operands copied by 16 bytes
            weight = random_weight(72, 600, 0.4, bits).to_layout(layout)
            weight.codebook.requires_grad_()
            ops.linear(torch.randn(80, 600).bfloat16(), weight).sum().backward()
if what.startswith("kmeans"):
    # The last has over 4,096 points a lane, after which sums are flushed.
    for n, clusters in ((70_000, 256), (3_000, 32), (3_000, 2), (3_300_000, 256)):
        if n > 1_000_000 and what != "kmeans_assign.cuh:232":
            continue
        points, centroids = torch.randn(n), torch.randn(clusters)
        outputs = (
            torch.empty(n, dtype=torch.uint8),
            torch.empty(clusters, dtype=torch.float64),
            torch.empty(clusters, dtype=torch.int64),
        )
        _native.device_kmeans_assign(points, centroids, *outputs)
"""


def run(what: str, without: str | None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | build.environment("thread") | {"PYTHONPATH": str(build.ROOT)}
    if without is not None:
        environment["PLACEKERN_EMULATED_WITHOUT"] = without
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        capture_output=True,
        text=True,
        cwd=build.ROOT,
        env=environment,
        timeout=600,
    )


@pytest.mark.parametrize("what", sorted({barrier.split(".")[0] for barrier in BARRIERS}))
def test_with_all_barriers_there_is_no_race(what: str) -> None:
    done = run(what, None)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "data race" not in done.stderr


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_data_race(barrier: str) -> None:
    assert "WARNING: ThreadSanitizer: data race" in run(barrier, barrier).stderr
