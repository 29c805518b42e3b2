"""sensitivity: what is tried is what compress_ makes, all is put back, and no row is ever lost."""

from __future__ import annotations

import copy
import itertools
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import placekern as pk
from placekern import CompressConfig, compress_
from placekern.compress.sensitivity import Sensitivity, sensitivity
from placekern.compress.sensitivity_rows import COLUMNS, SensitivityRow
from placekern.io.streams import encoded_bytes

Metric = Callable[[nn.Module], float]
BITS, SPARSITIES = (6, 3), (0.4, 0.8)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (1, 3), bias=False),
        nn.Flatten(),
        nn.Linear(4 * 24, 12),
        nn.Linear(12, 5),
    ).eval()


def loss_of(model: nn.Module) -> Metric:
    """Mean squared distance to the outputs that the model has now, plus 1."""
    images = torch.randn(7, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        target = model.eval()(images)

    @torch.no_grad()
    def metric(other: nn.Module) -> float:
        return 1 + float((other(images) - target).square().mean())

    return metric


def measure(model: nn.Module, **options: Any) -> Sensitivity:
    settings = {"bits": BITS, "sparsities": SPARSITIES, "larger_is_better": False}
    metric = options.pop("metric", None) or loss_of(model)
    return sensitivity(model, metric, **(settings | options))


def alone(layer: str, **settings: Any) -> CompressConfig:
    """Compresses one layer and leaves all others dense."""
    return CompressConfig(**settings, layers={"Conv2d": None, "Linear": None, layer: settings})


# ---- what is measured ----


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
def test_bits_give_the_metric_of_the_compressed_model(method: str) -> None:
    model = network()
    metric = loss_of(model)
    found = measure(model, config={"method": method})
    assert found.layers == ["0", "3", "5", "6"]
    for layer in found.layers:
        for bits, row in zip(BITS, found.of(layer, "bits"), strict=True):
            compressed = copy.deepcopy(model)
            report = compress_(compressed, alone(layer, bits=bits, method=method)).layers[0]
            assert row.metric == pytest.approx(metric(compressed), rel=1e-5)
            assert row.drop == row.metric - found.baseline
            assert (row.bits, row.value, row.density) == (bits, bits, 1)
            assert row.relative_error == pytest.approx(report.relative_error, rel=1e-4)


@pytest.mark.parametrize("setting", ["sparsity", "threshold"])
def test_pruning_gives_the_metric_of_the_masked_model(setting: str) -> None:
    model = network()
    metric = loss_of(model)
    values = (0.4, 0.8) if setting == "sparsity" else (0.02, 0.1)
    plural = {"sparsity": "sparsities", "threshold": "thresholds"}[setting]
    found = measure(model, bits=(), **{plural: values})
    for layer in found.layers:
        for value, row in zip(values, found.of(layer, setting), strict=True):
            masked = copy.deepcopy(model)
            weight = masked.get_submodule(layer).weight.data
            limit = value
            if setting == "sparsity":
                limit = weight.abs().flatten().sort().values[round(value * weight.numel())]
            before = weight.norm()
            error = weight[weight.abs() < limit].norm() / before
            weight[weight.abs() < limit] = 0
            assert row.metric == pytest.approx(metric(masked), rel=1e-5)
            assert row.density == pytest.approx((weight != 0).double().mean().item())
            assert row.relative_error == pytest.approx(float(error), rel=1e-4)
            assert row.bits == 32


def test_the_harsher_the_setting_the_more_error_and_the_fewer_bytes() -> None:
    found = measure(network(), bits=(8, 5, 3, 2), sparsities=(0.3, 0.5, 0.9))
    for layer in found.layers:
        for setting in ("bits", "sparsity"):
            rows = found.of(layer, setting)
            for mild, harsh in itertools.pairwise(rows):
                assert mild.relative_error < harsh.relative_error
                assert mild.entropy_bytes > harsh.entropy_bytes


def test_entropy_bytes_are_just_below_the_bytes_of_a_file() -> None:
    model = nn.Sequential(nn.Linear(300, 100))
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.03] = 0
    found = sensitivity(model, lambda _: 0.0, bits=(5,), sparsities=(0.9,))
    row = found.of("0", "bits")[0]
    written = encoded_bytes(CompressConfig(bits=5).compress_tensor(model[0].weight))
    assert 0.95 * written < row.entropy_bytes <= written
    kept = 3000
    binary = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)) * 30_000 / 8
    assert found.of("0", "sparsity")[0].entropy_bytes == pytest.approx(binary + 4 * kept)


def test_thresholds_take_the_place_of_the_sparsities() -> None:
    model = network()
    found = sensitivity(model, loss_of(model), bits=(), thresholds=(0.05,))
    assert {row.setting for row in found.rows[1:]} == {"threshold"}
    both = sensitivity(model, loss_of(model), bits=(), thresholds=(0.05,), sparsities=(0.5,))
    assert {row.setting for row in both.rows[1:]} == {"threshold", "sparsity"}
    usual = sensitivity(model, loss_of(model), bits=())
    assert [row.value for row in usual.of("0")] == [0.3, 0.5, 0.7, 0.8, 0.9]


def test_a_weight_is_tried_in_its_own_memory_format() -> None:
    model = network().to(memory_format=torch.channels_last)
    strides: dict[str, set[tuple[int, ...]]] = {}

    def metric(other: nn.Module) -> float:
        for name, parameter in other.named_parameters():
            strides.setdefault(name, set()).add(parameter.stride())
        return 1.0

    measure(model, metric=metric)
    assert {name: seen for name, seen in strides.items() if len(seen) > 1} == {}
    assert strides["0.weight"] == {(18, 1, 6, 2)}


def test_larger_may_be_better() -> None:
    model = network()
    loss = loss_of(model)
    found = measure(model, metric=lambda m: -loss(m), larger_is_better=True)
    other = measure(model, metric=loss)
    assert [row.drop for row in found.rows] == [row.drop for row in other.rows]
    assert max(row.drop for row in found.rows) > 0


def test_a_metric_that_is_not_finite_is_an_infinite_drop() -> None:
    model = network()
    calls = iter([1.0, math.nan, math.inf, 0.5])
    found = sensitivity(
        model,
        lambda _: next(calls),
        bits=(4, 3),
        sparsities=(0.5,),
        filter_fn=lambda m, n: n == "5",
    )
    assert [row.drop for row in found.rows] == [0, math.inf, math.inf, 0.5]


def test_layers_can_be_left_out() -> None:
    model = network()
    assert measure(model, config={"layers": {"Conv2d": None}}).layers == ["5", "6"]
    assert measure(model, filter_fn=lambda module, name: name != "5").layers == ["0", "3", "6"]


def test_a_shared_weight_is_measured_once_and_everywhere() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    found = measure(model, metric=loss_of_vectors(model), bits=(2,), sparsities=())
    assert found.layers == ["0"]
    compressed = copy.deepcopy(model)
    compress_(compressed, CompressConfig(bits=2))
    assert found.rows[1].metric == pytest.approx(loss_of_vectors(model)(compressed), rel=1e-5)
    with pytest.raises(ValueError, match="0 and 1 share one weight, but config or filter_fn"):
        measure(model, metric=lambda _: 1.0, filter_fn=lambda module, name: name == "0")


def loss_of_vectors(model: nn.Module) -> Metric:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        target = model(x)
    return lambda other: float((other(x) - target).square().mean().detach())


# ---- what is left behind ----


@pytest.mark.parametrize("fails_at", [None, 1, 2, 9])
def test_the_model_is_left_bit_identical(fails_at: int | None) -> None:
    model = network().train()
    model[1].eval()
    loss = loss_of(copy.deepcopy(model))
    before = {name: (tensor, tensor.clone()) for name, tensor in tensors(model).items()}
    modes = [module.training for module in model.modules()]
    calls = 0

    def metric(other: nn.Module) -> float:
        nonlocal calls
        calls += 1
        assert not any(module.training for module in other.modules())
        if calls == fails_at:
            raise ArithmeticError("the metric fails")
        return loss(other)

    if fails_at is None:
        measure(model, metric=metric)
    else:
        with pytest.raises(ArithmeticError):
            measure(model, metric=metric)
    after = tensors(model)
    assert list(after) == list(before)
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, values)
    assert [module.training for module in model.modules()] == modes


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


# ---- files ----


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    found = measure(network(), config={"method": "uniform", "layers": {"5": {"method": "kmeans"}}})
    nothing = SensitivityRow(
        'a "b", c', "bits", 3.0, 5, 1 / 3, 3, 0.1, 1e-30, math.inf, math.inf, False, {}
    )
    found = Sensitivity((*found.rows, nothing))
    file = tmp_path / "sensitivity.csv"
    found.to_csv(file)
    assert Sensitivity.from_csv(file) == found
    assert found.of("0")[0].config == {"method": "uniform"}
    assert found.of("5")[0].config == {}
    assert file.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.csv"
    model = network()
    loss = loss_of(model)
    calls = 0

    def metric(other: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise ArithmeticError("the metric fails")
        return loss(other)

    with pytest.raises(ArithmeticError):
        measure(model, metric=metric, resume=file)
    assert len(Sensitivity.from_csv(file).rows) == 5  # one dense, four settings
    found = measure(model, metric=metric, resume=file)
    assert calls == 6 + 1 + 4 * 4 - 4
    assert found == measure(model) == Sensitivity.from_csv(file)
    more = measure(model, metric=metric, resume=file, sparsities=(0.4, 0.6, 0.8))
    assert calls == 6 + 1 + 4 * 4 - 4 + 1 + 4
    assert more == measure(model, sparsities=(0.4, 0.6, 0.8))


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.csv"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_sensitivity import loss_of, measure, network
model = network()
loss, left = loss_of(model), [5]
def metric(other):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return loss(other)
measure(model, metric=metric, resume={str(file)!r})
"""
    root = Path(pk.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model = network()
    assert Sensitivity.from_csv(file).rows == measure(model).rows[:5]
    assert measure(model, resume=file) == measure(model)


def test_a_file_of_another_analysis_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.csv"
    model = network()
    measure(model, resume=file)
    text = file.read_text()
    loss = loss_of(model)
    with pytest.raises(ValueError, match="larger_is_better is False, but here it is True"):
        measure(model, resume=file, larger_is_better=True)
    with pytest.raises(ValueError, match=r"metric is 2, but 1 in .*csv: another model"):
        measure(model, resume=file, metric=lambda m: 2 * loss(m))
    with pytest.raises(ValueError, match=r"measured with {}, but here it is {'method': 'uniform'}"):
        measure(model, resume=file, config={"method": "uniform"})
    with pytest.raises(ValueError, match="has the layer '5' with 1152 weights, which is not"):
        measure(model, resume=file, filter_fn=lambda module, name: name != "5")
    assert file.read_text() == text


def with_config(text: str) -> Callable[[list[str]], list[str]]:
    """Another config in the last row."""
    return lambda lines: [*lines[:-1], lines[-1].replace("{}", f'"{text}"')]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: ["a,b", *lines[1:]], "has the columns a, b, expected layer, setting"),
        (lambda lines: [], "has the columns none"),
        (lambda lines: lines[:1], "does not begin with the one row of the dense network"),
        (lambda lines: [lines[0], *lines[2:]], "does not begin with the one row of the dense"),
        (lambda lines: [*lines, lines[1]], "does not begin with the one row of the dense"),
        (lambda lines: [*lines, lines[3]], "has two rows for one setting"),
        (lambda lines: [*lines, lines[3][:9]], "line 19: 3 cells, expected 12"),
        (lambda lines: [*lines, lines[3].replace("bits", "colour")], "setting is 'colour'"),
        (lambda lines: [*lines[:-1], lines[-1].replace("0.8,", "x,")], "line 18: could not"),
        (lambda lines: [*lines[:-1], lines[-1].replace("{}", "[]")], r"config is \[\], expected"),
        (lambda lines: [*lines[:-1], lines[-1].replace("smaller", "larger")], "and others"),
        (with_config('{""bits"": 3}'), "csv, line 18: config has the unknown key 'bits', expected"),
        (with_config('{""colour"": 3}'), "line 18: config has the unknown key 'colour', expected"),
        (with_config('{""method"": ""best""}'), "line 18: method is 'best', expected one of"),
        (with_config('{""init"": {}}'), "line 18: init is {}, expected one of"),
        (with_config("[" * 100_000), "line 18: config is nested too deeply"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[list[str]], list[str]], message: str
) -> None:
    file = tmp_path / "sensitivity.csv"
    measure(network()).to_csv(file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(damage(lines)) + "\n")
    with pytest.raises(ValueError, match=message):
        Sensitivity.from_csv(file)


# ---- errors and progress ----


def test_errors_are_named() -> None:
    model = network()
    for options, message in [
        ({"bits": (9,)}, "bits is 9, expected an integer from 1 to 8"),
        ({"sparsities": (1.5,)}, "sparsity is 1.5, expected 0 to 1"),
        ({"thresholds": (-1,)}, "threshold is -1, expected a finite number >= 0"),
        ({"metric": lambda _: math.nan}, "metric of the dense network is nan"),
        ({"filter_fn": lambda module, name: False}, "has no Conv2d or Linear layer"),
        ({"config": {"layers": {"7": None}}}, r"layers\['7'\] fits no layer of the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(model, **options)
    with pytest.raises(TypeError, match="the metric gave 'good', expected a number"):
        measure(model, metric=lambda _: "good")
    with pytest.raises(TypeError, match="the model is itself a Linear"):
        measure(model[6], metric=lambda _: 1.0)
    with pytest.raises(ValueError, match="0 is on the meta device"):
        measure(nn.Sequential(nn.Linear(3, 3, device="meta")), metric=lambda _: 1.0)
    with pytest.warns(FutureWarning):
        hooked = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"0.weight is computed by a hook, expected a Parameter"):
        measure(hooked, metric=lambda _: 1.0)
    model[5].weight.data[3, 4] = math.inf
    for options in ({"bits": (), "sparsities": (0.5,)}, {"bits": (4,)}):
        with pytest.raises(ValueError, match=r"^5: .*finite"):
            measure(model, metric=lambda _: 1.0, **options)


def test_progress_names_each_layer() -> None:
    calls: list[tuple[str, int, int]] = []
    measure(network(), progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == list(range(18))
    assert {total for _, _, total in calls} == {17}
    layers = [layer for layer in ("0", "3", "5", "6") for _ in range(4)]
    assert [layer for layer, _, _ in calls] == ["dense", *layers, "done"]


# ---- table ----


def test_the_table_has_a_row_a_layer_and_a_column_a_setting() -> None:
    pytest.importorskip("rich")
    found = measure(network())
    text = str(found)
    assert "Drop of the metric from 1" in text
    heading = ["layer", "weights", "6", "bits", "3", "bits", "40%", "80%"]
    assert text.splitlines()[2].split() == heading
    line = next(line for line in text.splitlines() if line.strip().startswith("5 "))
    shown = [f"{row.drop:.2g}" for row in (*found.of("5", "bits"), *found.of("5", "sparsity"))]
    assert line.split() == ["5", "1,152", *shown]
