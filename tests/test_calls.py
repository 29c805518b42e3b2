"""What a call does before the kernel runs: its checks, and how much Python they take.

Time would depend on the machine, so what is counted is calls of functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import Gpu
from helpers import random_weight
from torch import Tensor

import placekern as pk
from placekern import _native
from placekern.ops import common

SOURCES = str(Path(pk.__file__).parent)


def functions_called(run: Callable[[], Any]) -> int:
    """Functions of ours, and functions of others that they call, in one run."""
    count = 0

    def seen(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(SOURCES):
            count += 1

    run()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


# On a GPU a layer may be done in ten microseconds, and Python must not take longer. The bounds are
# what is there today and a little more: whoever adds to every call meets them.
@pytest.mark.parametrize(("name", "most"), [("linear", 45), ("conv2d", 58)])
def test_a_call_on_the_cpu_takes_few_functions(name: str, most: int) -> None:
    layer, x = small_layer(name)
    with torch.inference_mode():
        assert functions_called(lambda: layer(x)) <= most


@pytest.mark.parametrize("batch", [1, 16])
def test_a_call_on_a_gpu_takes_few_functions(batch: int, gpu: Gpu) -> None:
    weight = gpu.weight(random_weight(64, 128, 0.5, 8))
    x = gpu.tensor(torch.randn(batch, 128).bfloat16())
    arrays = common.arrays(weight)
    with torch.inference_mode():
        count = functions_called(lambda: pk.ops.linear_op(x, *arrays, None, False))
    assert count <= 65


def small_layer(name: str) -> tuple[torch.nn.Module, Tensor]:
    config = pk.CompressConfig(bits=8, threshold=0.01)
    if name == "linear":
        dense = torch.nn.Linear(64, 32)
        return pk.QuantSparseLinear.from_float(dense, config), torch.randn(1, 64)
    dense = torch.nn.Conv2d(8, 16, 3, padding=1)
    return pk.QuantSparseConv2d.from_float(dense, config), torch.randn(1, 8, 6, 6)


def wrong_arguments() -> dict[str, dict[str, Any]]:
    """What one field may hold that `_prove_weight` refuses, by name."""
    long = torch.arange(9)
    return {
        "layout": {"layout": 9},
        "layout of a GPU": {"layout": 2},
        "negative layout": {"layout": -1},
        "row_ptr of bytes": {"row_ptr": torch.zeros(9, dtype=torch.uint8)},
        "row_ptr with gaps": {"row_ptr": torch.zeros(18, dtype=torch.int32)[::2]},
        "positions of int8": {"positions": torch.zeros(500, dtype=torch.int8)},
        "positions with gaps": {"positions": torch.zeros(900, dtype=torch.uint8)[::2]},
        "too few positions": {"positions": torch.zeros(71, dtype=torch.uint8)},
        "codes of int16": {"codes": torch.zeros(500, dtype=torch.int16)},
        "codes with gaps": {"codes": torch.zeros(900, dtype=torch.uint8)[::2]},
        "no padding of codes": {"codes": torch.zeros(63, dtype=torch.uint8)},
        "codebook of integers": {"codebook": torch.arange(32)},
        "short codebook": {"codebook": torch.zeros(31)},
        "codebooks without rows": {"codebook": torch.zeros(9, 32)},
        "codebook elsewhere": {"codebook": torch.zeros(32, device="meta")},
        "positions elsewhere": {"positions": torch.zeros(500, dtype=torch.uint8, device="meta")},
        "no rows at all": {"M": -1},
        "x of integers": {"x": long},
        "bias of integers": {"bias": long[:8]},
        "bias elsewhere": {"bias": torch.zeros(8, device="meta")},
        "long bias": {"bias": torch.zeros(9)},
        "bias [8, 1]": {"bias": torch.zeros(8, 1)},
    }


@pytest.mark.parametrize("wrong", wrong_arguments().values(), ids=list(wrong_arguments()))
def test_the_quick_look_lets_nothing_pass_that_is_refused(wrong: dict[str, Any]) -> None:
    weight = random_weight(8, 8, 0.5, 5)
    fields = _native.Weight(8, *common.arrays(weight)[4:], *common.arrays(weight)[:4])
    arguments: dict[str, Any] = {"x": torch.randn(1, 8), "bias": torch.randn(8)}
    assert common._is_usual(arguments["x"], fields, arguments["bias"])
    arguments |= {k: v for k, v in wrong.items() if k in arguments}
    fields = fields._replace(**{k: v for k, v in wrong.items() if k not in arguments})
    with pytest.raises(ValueError, match="linear: "):
        common._prove_weight("linear", arguments["x"], fields, arguments["bias"])
    assert not common._is_usual(arguments["x"], fields, arguments["bias"])
