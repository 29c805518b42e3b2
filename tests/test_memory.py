"""No pass writes a layer's dense weight or dense gradient: peak memory, in processes of its own.

The kernel's counter of the peak is set back after everything is built, so what is measured is what
a pass adds, its results included.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import placekern

CHILD = """
import ctypes, json, sys
import torch
from placekern import QuantSparseConv2d, QuantSparseLinear, QuantSparseWeight
from placekern.packing import READ_PADDING

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def added(run):
    "Bytes by which the peak rises above what is in use before."
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but kept would hide as many new ones
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = run()
    return status("VmHWM") - before, result

def fill(layer, density=0.5):
    "Random positions and 8-bit codes, in the mask layout, made from its bytes: no mask in memory."
    M, K = layer._shape
    padding = torch.zeros(READ_PADDING, dtype=torch.uint8)
    mask = torch.randint(256, (M, K // 8), dtype=torch.uint8)  # density 0.5
    bits = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
    row_ptr = torch.zeros(M + 1, dtype=torch.int32)
    row_ptr[1:] = torch.cat([bits[rows.int()].sum(1) for rows in mask.split(256)]).cumsum(0)
    codes = torch.randint(256, (int(row_ptr[-1]),), dtype=torch.uint8)
    layer.weight = QuantSparseWeight(
        (M, K), 8, row_ptr, torch.cat([mask.flatten(), padding]), torch.cat([codes, padding]),
        torch.randn(layer.codebook.shape),
    )
    return layer

torch.set_num_threads(2)
torch.manual_seed(0)
what, backward = sys.argv[1], sys.argv[2] == "backward"
if what.startswith("linear"):
    groups = {"group_size": 1} if what == "linear, a codebook a row" else {}
    small = QuantSparseLinear(64, 8, **groups)
    layer = QuantSparseLinear(32768, 4096, device="meta", **groups)
    batch = (4 if backward else 1,)
    size, start = (*batch, 32768), (*batch, 64)
else:
    small = QuantSparseConv2d(8, 8, 3, padding=1)
    layer = QuantSparseConv2d(512, 512, 3, padding=1, device="meta")
    size, start = (1, 512, 7, 7), (1, 8, 7, 7)
layer.bias = None
fill(layer)
assert abs(layer.weight.density - 0.5) < 0.01
dense = 4 * layer._shape[0] * layer._shape[1]

def step(module, x):
    if not backward:
        with torch.no_grad():
            return module(x)
    y = module(x.requires_grad_())
    y.backward(torch.ones_like(y))
    assert module.codebook.grad.any() and x.grad.any()
    return y

step(small, torch.randn(start))  # threads and torch's own tables are there from here on
x = torch.randn(size)
rise, y = added(lambda: step(layer, x))
seen, _ = added(lambda: torch.ones(dense // 4 // 5))  # a fifth of the dense weight would be seen
print(json.dumps({"rise": rise, "seen": seen, "dense": dense, "finite": bool(y.isfinite().all())}))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK)
    or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only Linux can set the peak back, and only glibc gives back what was freed",
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layer", ["linear", "linear, a codebook a row", "conv2d"])
def test_a_pass_adds_less_than_a_tenth_of_the_dense_weight(layer: str, direction: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, layer, direction],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(placekern.__file__).parents[1],  # the package that these tests import
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["finite"]
    assert result["seen"] > 0.19 * result["dense"], result  # the measurement sees such a thing
    assert result["rise"] < 0.1 * result["dense"], result
