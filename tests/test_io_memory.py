"""Loading takes little more memory than the model it makes: peaks in processes of their own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import placekern as pk

M, K = 4096, 16_384

CHILD = """
import ctypes, json, sys
import torch
from torch import nn
import placekern as pk

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

torch.set_num_threads(1)
path, small = sys.argv[1:]
pk.load(small, nn.Sequential(nn.Linear(64, 8)))  # what is imported and set up once is there now
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(16384, 4096))
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
pk.load(path, model)
peak = status("VmHWM") - before
left = status("VmRSS") - before
print(json.dumps({"peak": peak, "left": left, "resident": model[0].resident_bytes}))
"""


def layer(density: float, bits: int) -> nn.Sequential:
    """A whitening layer of heavy-tailed codes, made without its dense weight."""
    generator = np.random.default_rng(0)
    mask = torch.from_numpy(generator.random((M, K), np.float32) < density)
    codes = generator.binomial((1 << bits) - 1, 0.5, int(mask.sum())).astype(np.uint8)
    model = nn.Sequential(pk.QuantSparseLinear(K, M, bits=bits, device="meta"))
    book = torch.randn(1 << bits)
    model[0].weight = pk.QuantSparseWeight.from_mask(mask, torch.from_numpy(codes), book)
    model[0].bias = nn.Parameter(torch.zeros(M))
    return model


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK)
    or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only Linux can set the peak back, and only glibc gives back what was freed",
)
@pytest.mark.parametrize(
    ("density", "bits", "beside"), [(0.5, 8, 8 << 20), (0.25, 5, 40 << 20), (0.06, 5, 80 << 20)]
)
def test_load_peaks_near_the_resident_size(
    density: float, bits: int, beside: int, tmp_path: Path
) -> None:
    path, small = tmp_path / "layer.safetensors", tmp_path / "small.safetensors"
    file_bytes = pk.save(layer(density, bits), path)
    tiny = nn.Sequential(nn.Linear(64, 8))
    pk.compress_(tiny, {"bits": bits})
    pk.save(tiny, small)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(small)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(pk.__file__).parents[1],
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    resident = result["resident"]
    assert result["left"] > 0.9 * resident, result
    # Unpacking gaps and narrow codes, and proving windows, takes some pieces that do not grow with
    # the layer; neither the file nor a second copy of the arrays is held beside the model.
    assert result["peak"] < 1.05 * resident + beside, (result, file_bytes)
