"""The cost model on rates that are given: counts of work, sums, break-evens and what is said.

No test looks at a clock.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_models import compressed
from torch import Tensor, nn

import placekern as pk
from placekern import packing
from placekern.compress import cost, cost_trace, cost_work
from placekern.compress.cost import CostReport, LayerCost, predict
from placekern.compress.cost_work import (
    ConvCall,
    LinearCall,
    Matrix,
    Rates,
    compressed_work,
    dense_conv2d_work,
)

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


class Known(dict):
    """Rates of which all that are not given are zero."""

    def __missing__(self, kind: str) -> float:
        return 0.0


def rates(dense_linear: float = 1e-12, isa: str = "avx512", threads: int = 1, **of: float) -> Rates:
    """Seconds by kind of work ("conv2d__call" for "conv2d call"); dense linear by weight."""
    seconds = Known({kind.replace("__", " "): value for kind, value in of.items()})
    points = ((1, dense_linear), (1 << 20, dense_linear * (1 << 20)))
    return Rates(isa, threads, seconds, dict.fromkeys(range(1, 129), points))


# ---- counts of work ----


def counted(call: Any, matrix: Matrix, isa: str = "avx512", threads: int = 1) -> dict[str, float]:
    return compressed_work(call, matrix, isa, threads)


def test_linear_work_at_a_small_batch() -> None:
    assert counted(LinearCall(3), Matrix(64, 1000, 32_000, 5)) == {
        "linear call": 1,
        "linear row": 64,
        "linear position": 64_000,
        "linear multiply-add": 2 * 64_000,
        "linear lookup, 5 bits": 32_000,
    }
    assert counted(LinearCall(3), Matrix(64, 1000, 640, 5)) == {
        "linear call": 1,
        "linear row": 64,
        "linear window": 64 * 8,
        "linear listed entry": 3 * 640,
        "linear listed lookup": 640,
    }


def test_linear_work_at_a_large_batch_decodes_once_for_64_columns() -> None:
    assert counted(LinearCall(65), Matrix(64, 1000, 32_000, 8)) == {
        "linear batch call": 1,
        "linear batch output": 64 * 65,
        "linear batch multiply-add": 64_000 * 65,
        "linear batch window": 2 * 64 * 8,
        "linear batch lookup, 8 bits": 2 * 32_000,
    }
    listed = counted(LinearCall(5), Matrix(64, 1000, 640, 8))
    assert listed["linear batch listed lookup"] == 640


# 20 x 10 output pixels are 4 tiles of 64 at AVX-512, which one task takes.
CONV = ConvCall(1, 16, 20, 10, 20, 10)


@pytest.mark.parametrize(("nnz", "way"), [(5068, "direct"), (5069, "dense")])
def test_convolution_work_and_its_two_ways(nnz: int, way: str) -> None:
    # 64 x 144 positions, of which a share of 0.55 is 5068.8: decoded above it.
    matrix = Matrix(64, 144, nnz, 8)
    assert counted(CONV, matrix) == {
        "conv2d call": 1,
        "conv2d gather": 144 * 4,
        "conv2d run": 144 * (4 + 20),
        "conv2d output": 64 * 4,
        f"conv2d {way} block": 64 * 2 * 4,
        f"conv2d {way} multiply-add": (64 * 144 if way == "dense" else nnz) * 4,
        "conv2d mask window": 64 * 2,
        "conv2d lookup, 8 bits": nnz,
    }


def test_tiles_are_shorter_where_vectors_are() -> None:
    matrix = Matrix(64, 144, 1000, 8)
    wide, narrow = (counted(CONV, matrix, isa) for isa in ("avx512", "avx2"))
    assert wide["conv2d output"] == 64 * 4
    assert narrow["conv2d output"] == 64 * 7
    assert narrow["conv2d lookup, 8 bits"] == 2 * 1000  # seven tiles are two tasks


def test_strides_groups_and_pointwise_images_gather_otherwise() -> None:
    matrix = Matrix(64, 144, 1000, 8)
    strided = counted(replace(CONV, stride=2), matrix)
    assert strided["conv2d strided gather"] == counted(CONV, matrix)["conv2d gather"]
    assert "conv2d gather" not in strided
    assert counted(replace(CONV, groups=2), matrix)["conv2d gather"] == 2 * 144 * 4
    assert counted(replace(CONV, pointwise=True), matrix)["conv2d run"] == 144 * (4 + 1)
    tall = counted(CONV, Matrix(1025, 144, 100_000, 8))
    assert tall["conv2d gather"] == 3 * 144 * 4  # once for each 512 rows


def test_threads_without_work_cost_time() -> None:
    """Three tasks of four tiles for two threads take as long as four."""
    call = ConvCall(1, 16, 64, 12, 64, 12)  # 12 tiles: tasks of 3 for 2 threads, which are 4
    one, two = (counted(call, Matrix(64, 144, 1000, 8), threads=n) for n in (1, 2))
    assert two["conv2d output"] == one["conv2d output"]
    few = counted(LinearCall(1), Matrix(96, 1000, 50_000, 8), threads=2)
    assert few["linear row"] == 96 * 4 / 3
    assert few["linear call"] == 1


def test_dense_convolution_work() -> None:
    call = ConvCall(2, 16, 20, 10, 10, 5, stride=2)
    assert dense_conv2d_work(call, Matrix(64, 144, 7, 8)) == {
        "dense conv2d call": 1,
        "dense conv2d multiply-add": 64 * 144 * 100,
        "dense conv2d weight byte": 4 * 64 * 144,
        "dense conv2d image byte": 4 * (2 * 16 * 200 + 64 * 100),
    }
    pointwise = dense_conv2d_work(replace(call, pointwise=True), Matrix(64, 16, 7, 8))
    assert pointwise["dense conv2d pointwise weight byte"] == 4 * 64 * 16
    assert pointwise["dense conv2d pointwise image byte"] == 4 * (2 * 16 * 200 + 64 * 100)


@pytest.mark.parametrize("call", [LinearCall(0), ConvCall(0, 3, 5, 5, 5, 5)])
@pytest.mark.parametrize("matrix", [Matrix(0, 9, 0, 5), Matrix(4, 0, 0, 5), Matrix(4, 9, 0, 5)])
def test_empty_layers_have_a_time(call: Any, matrix: Matrix) -> None:
    given = rates(linear__call=1.0, conv2d__call=1.0, dense_linear=1.0)
    assert given.compressed(call, matrix) >= 1.0
    assert given.dense(call, matrix) >= 0.0


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests")
def test_constants_are_those_of_the_kernels() -> None:
    for isa, lanes in (("scalar", 8), ("avx2", 8), ("avx512", 16)):
        source = (CSRC / f"{isa}.cpp").read_text()
        (density,) = re.findall(r"kDecodeDensity = ([\d.]+)", source)
        assert float(density) == cost_work.DECODE_DENSITY[isa]
        assert set(map(int, re.findall(r"constexpr int lanes = (\d+)", source))) == {lanes}
        assert cost_work.TILE_PIXELS[isa] == 4 * lanes
    conv, linear = ((CSRC / f"{op}-inl.h").read_text() for op in ("conv2d", "linear"))
    for source, name, value in (
        (conv, "kMostTileRows", cost_work.MOST_TILE_ROWS),
        (conv, "kTaskTiles", cost_work.TASK_TILES),
        (conv, "kBlockRows", cost_work.BLOCK_ROWS),
        (linear, "kBatchRows", cost_work.BATCH_ROWS),
        (linear, "kBatchColumns", cost_work.BATCH_COLUMNS),
    ):
        assert f"constexpr int {name} = {value};" in source
    assert f"schedule(dynamic, {cost_work.DYNAMIC_ROWS})" in linear
    assert f"if (args.N <= {cost_work.FEW_ROWS})" in linear
    assert set(cost_work.TILE_PIXELS) >= set(pk.available_isas())


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_no_rows_are_no_negative_work(density: float) -> None:
    assert min(counted(LinearCall(0), Matrix(64, 100, 0, 8).at_density(density)).values()) >= 0


# ---- times ----


def test_a_rate_that_is_not_there_is_named() -> None:
    model = compressed()
    none = Rates("avx2", 1, {}, {})
    with pytest.raises(ValueError, match="rates have no dense linear layers at batch 1; leave"):
        predict(model, rates=none)
    given = replace(none, dense_linear={1: ((1, 1e-6),)})
    with pytest.raises(ValueError, match="the rates have no 'linear row'; leave `rates` out"):
        predict(model, rates=given)
    with pytest.raises(ValueError, match="the rates have no 'dense conv2d call'; leave"):
        predict(model, torch.zeros(1, 3, 8, 8), rates=given)


def test_time_is_the_sum_of_work_times_rates() -> None:
    given = Rates(
        "avx2",
        1,
        {
            "linear call": 1e-5,
            "linear row": 1e-8,
            "linear position": 1e-10,
            "linear multiply-add": 0.0,
            "linear lookup, 5 bits": 1e-9,
        },
        {},
    )
    time = given.compressed(LinearCall(1), Matrix(64, 1000, 32_000, 5))
    assert time == pytest.approx(1e-5 + 64e-8 + 64_000e-10 + 32_000e-9)


def test_dense_linear_is_interpolated_between_sizes_and_grows_beyond() -> None:
    points = ((100, 1e-6), (10_000, 1e-5), (1_000_000, 1e-3))
    given = Rates("avx2", 1, {}, {1: points, 128: points})

    def dense(weights: int, N: int = 1) -> float:
        return given.dense(LinearCall(N), Matrix(1, weights, 0, 8))

    assert dense(10) == dense(100) == pytest.approx(1e-6)  # the call itself
    assert dense(10_000) == pytest.approx(1e-5)
    assert dense(1000) == pytest.approx(10**-5.5)
    assert dense(100_000) == pytest.approx(1e-4)
    assert dense(4_000_000) == pytest.approx(4e-3)
    assert dense(10_000, 128) == pytest.approx(1e-5)
    assert dense(10_000, 512) == pytest.approx(4e-5)


# ---- prediction ----


def test_without_an_example_linear_layers_take_one_row_and_convolutions_none() -> None:
    given = rates(dense_linear=1e-6, linear__call=1e-3)
    report = predict(compressed(), rates=given)
    conv, first, second = report.layers
    assert (conv.name, conv.kind, conv.calls, conv.dense_ms) == ("0", "Conv2d", 0, None)
    assert (first.name, first.kind, first.calls) == ("5", "Linear", 1)
    assert first.dense_ms == pytest.approx(1e3 * 6000e-6)
    assert first.compressed_ms == second.compressed_ms == pytest.approx(1.0)
    assert report.notes == ("Convolutions are not predicted without an example input.",)
    assert report.dense_ms == pytest.approx(first.dense_ms + second.dense_ms)


def test_an_example_gives_batch_and_pixels() -> None:
    given = rates(dense_linear=1e-6, **{"dense__conv2d__multiply-add": 1e-9})
    report = predict(compressed(), torch.zeros(4, 3, 9, 11), rates=given)
    conv, first, _ = report.layers
    assert conv.dense_ms == pytest.approx(1e3 * 1e-9 * 20 * 27 * 4 * 5 * 6)
    assert first.calls == 1
    assert report.notes == ()


def test_a_layer_that_runs_twice_costs_twice() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    pk.compress_(model)
    (row,) = predict(model, torch.zeros(1, 8), rates=rates(linear__call=1e-3)).layers
    assert (row.calls, row.compressed_ms) == (2, pytest.approx(2.0))


def test_layers_that_the_example_does_not_reach() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](x)

    model = Second()
    pk.compress_(model)
    report = predict(model, torch.zeros(1, 8), rates=rates(linear__call=1e-3))
    assert [row.compressed_ms for row in report.layers] == [None, pytest.approx(1.0)]
    assert report.notes == ("Layers that the example does not reach are not predicted.",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_only_float32_is_predicted(dtype: torch.dtype) -> None:
    model = compressed().to(dtype)
    name = str(dtype).removeprefix("torch.")
    note = f"Layers that compute in {name} are not predicted, only those in float32 are."
    for example in (None, torch.zeros(1, 3, 8, 8, dtype=dtype)):
        report = predict(model, example, rates=rates())
        assert note in report.notes
        assert all(row.dense_ms is None for row in report.layers)


def test_autocast_is_another_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = predict(compressed(), torch.zeros(1, 3, 8, 8), rates=rates())
    assert "bfloat16" in report.notes[0]
    assert all(row.dense_ms is None for row in report.layers)


def test_nothing_is_predicted_for_cuda() -> None:
    passed = cost_trace.Passed(LinearCall(1), torch.float32, "cuda")
    layers = [("a", pk.QuantSparseLinear(3, 3))]
    report = cost.predict_layers(layers, {"a": [passed]}, rates())
    assert report.notes == ("Layers on cuda are not predicted: nothing has been measured there.",)
    assert report.layers[0].dense_ms is None


# ---- warnings ----


def one_layer(sparsity: float, **of: float) -> CostReport:
    """A linear layer of 10,000 positions that takes 1 ms dense."""
    model = nn.Sequential(nn.Linear(100, 100))
    pk.compress_(model, pk.CompressConfig(bits=5, sparsity=sparsity))
    return predict(model, rates=rates(dense_linear=1e-7, **of))


def test_a_slowdown_is_warned_of_with_the_density_that_breaks_even() -> None:
    # 2.02 ms at full density, in proportion to the non-zeros: as fast as dense at 0.495.
    report = one_layer(0.1, **{"linear__lookup,__5__bits": 2.02e-7})
    (row,) = report.layers
    assert row.ratio == pytest.approx(1 / 1.818)
    assert row.break_even == (0.0, 0.49)
    assert report.warnings == (
        "0: 1.8x slower than dense expected at density 0.90; faster below about 0.49",
    )


def test_no_warning_where_it_is_faster_or_nearly_even() -> None:
    for sparsity, ratio in ((0.8, 2.5), (0.48, 1 / 1.04)):
        report = one_layer(sparsity, **{"linear__lookup,__5__bits": 2e-7})
        assert report.layers[0].ratio == pytest.approx(ratio)
        assert report.warnings == ()
    assert one_layer(0.8, **{"linear__lookup,__5__bits": 2e-7}).layers[0].break_even is None


def test_a_slowdown_at_any_density_is_said_to_be_one() -> None:
    report = one_layer(0.5, linear__call=3e-3)
    assert report.warnings == (
        "0: 3.0x slower than dense expected at density 0.50; no lower density makes it faster",
    )


def test_the_break_even_may_lie_in_the_other_layout() -> None:
    """Masks are slow here, windows are not."""
    report = one_layer(0.5, linear__position=1e-6)
    assert packing.choose_layout(100, 100, 1300) == packing.Layout.MASK
    low, edge = report.layers[0].break_even
    assert low == 0.0
    assert packing.choose_layout(100, 100, round(edge * 10_000)) == packing.Layout.WINDOW
    assert packing.choose_layout(100, 100, round((edge + 0.01) * 10_000)) == packing.Layout.MASK


@pytest.mark.parametrize(
    ("steps", "words"), [(5, "between about {} and {}"), (1, "only at about {}")]
)
def test_where_low_densities_are_slower_again_the_interval_is_said(steps: int, words: str) -> None:
    """Here positions in lists are slow, and masks are fast up to a few steps above their edge."""
    first = next(s for s in range(100) if packing.choose_layout(100, 100, 100 * s).name == "MASK")
    last = first + steps - 1
    lookup = 1e-3 / (100 * last + 50)
    report = one_layer(0.1, **{"linear__lookup,__5__bits": lookup, "linear__window": 1.0})
    low, high = first / 100, last / 100
    assert report.layers[0].break_even == (low, high)
    assert report.warnings[0].endswith(f"; faster {words.format(f'{low:.2g}', f'{high:.2g}')}")


def test_the_report_as_values_and_on_paper() -> None:
    report = CostReport(
        (
            LayerCost("[red]", "Conv2d", 0.93, 2, 1.0, 2.0, (0.12, 0.4)),
            LayerCost("b", "Linear", 0.5, 0),
            LayerCost("c", "Linear", 0.9, 1, 1.0, 2.0, (0.0, 0.37)),
        ),
        "avx2",
        3,
        ("A note.",),
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["layers"][0]["ratio"] == 0.5
    assert values["warnings"] == list(report.warnings)
    assert CostReport.from_dict(values) == report
    text = str(report)
    for part in ("faster at", "0.12 to 0.40", "below 0.37"):
        assert part in text
    for part in ("[red]", "CPU at avx2, 3 threads", "A note.", report.warnings[0], "0.50", "total"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110
    assert "total" in str(CostReport((), "avx2", 1))
