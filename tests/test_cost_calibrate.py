"""The calibration: what is measured when, and that the fit finds the rates behind given times.

No test looks at a clock; two run the real kernels, and take whatever comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import placekern as pk
from placekern.compress import cost_calibrate
from placekern.compress.cost import predict
from placekern.compress.cost_calibrate import Needs, measured_rates
from placekern.compress.cost_work import ConvCall, LinearCall, Matrix


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every unit of work takes its true rate; gives the number of layers of each measurement."""
    monkeypatch.setattr(cost_calibrate, "_MEASURED", {})
    runs: list[int] = []

    def time(cases: Sequence[Any]) -> None:
        runs.append(len(cases))
        for case in cases:
            case.seconds = sum(count * true_rate(kind) for kind, count in case.work.items()) or 1e-6

    monkeypatch.setattr(cost_calibrate, "_time", time)
    return runs


def true_rate(kind: str) -> float:
    if kind.endswith("call"):
        return 3e-5
    return (1 + sum(map(ord, kind)) % 7) * (
        1e-11 if "byte" in kind or "dense conv" in kind else 1e-9
    )


CONV = ConvCall(1, 16, 20, 10, 20, 10)
NEEDS = Needs(frozenset({5, 8}), frozenset({5, 8}), frozenset({1, 16}))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("level", pk.available_isas())
def test_the_calibration_finds_the_rates_that_made_the_times(level: str) -> None:
    before = pk.get_isa()
    pk.set_isa(level)
    try:
        found = measured_rates(NEEDS)
    finally:
        pk.set_isa(before)
    assert found.isa == level
    wrong = {
        kind: (rate, true_rate(kind))
        for kind, rate in found.seconds.items()
        if rate != pytest.approx(true_rate(kind), rel=1e-3)
    }
    assert not wrong


@pytest.mark.usefixtures("unmeasured")
def test_every_prediction_finds_its_rates() -> None:
    """No kind of work, at any density and bits that were asked for, is left without a rate."""
    found = measured_rates(NEEDS)
    for bits in (5, 8):
        for density in (0.0, 0.01, 0.1, 0.3, 0.6, 1.0):
            matrix = Matrix(64, 576, 0, bits).at_density(density)
            for call in (CONV, replace(CONV, stride=2), LinearCall(1), LinearCall(16)):
                assert found.compressed(call, matrix) > 0
                assert found.dense(call, matrix) > 0


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.usefixtures("unmeasured")
def test_any_number_of_bits_gets_all_rates(count: int) -> None:
    bits = frozenset(range(1, 1 + count))
    found = measured_rates(Needs(bits, bits, frozenset({1})))
    for op in ("conv2d", "linear", "linear batch"):
        assert all(f"{op} lookup, {b} bits" in found.seconds for b in bits)


def test_what_was_measured_is_not_measured_again(unmeasured: list[int]) -> None:
    first = measured_rates(NEEDS)
    assert len(unmeasured) == 1
    assert measured_rates(NEEDS) is first
    assert measured_rates(Needs(frozenset(), frozenset(), frozenset())) is first
    assert len(unmeasured) == 1
    more = measured_rates(replace(NEEDS, batches=frozenset({4})))
    assert len(unmeasured) == 2
    assert unmeasured[1] == len(cost_calibrate._DENSE_SIDES)
    assert set(more.dense_linear) == {1, 4, 16}
    assert more.seconds == first.seconds
    measured_rates(replace(NEEDS, bits=frozenset({3})))
    assert len(unmeasured) == 3


def test_nothing_is_measured_for_nothing(unmeasured: list[int]) -> None:
    assert measured_rates(Needs(frozenset(), frozenset(), frozenset())).seconds == {}
    report = predict(nn.Sequential(nn.ReLU()), torch.zeros(3))
    assert report.layers == ()
    assert report.isa == pk.get_isa()
    assert unmeasured == []


def test_only_what_a_model_has_is_measured(unmeasured: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.compress_(model, {"bits": 3})
    assert predict(model).layers[0].compressed_ms > 0
    found = measured_rates(Needs(frozenset(), frozenset(), frozenset()))
    assert "linear lookup, 3 bits" in found.seconds
    assert not any("conv2d" in kind for kind in found.seconds)
    assert set(found.dense_linear) == {1}
    assert len(unmeasured) == 1


def test_the_real_calibration_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of each layer: the kernels run and rates come out, whatever they are."""
    monkeypatch.setattr(cost_calibrate, "_MEASURED", {})
    monkeypatch.setattr(cost_calibrate, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(cost_calibrate, "_SECONDS", 0.0)
    monkeypatch.setattr(cost_calibrate, "_DENSE_SIDES", (64, 256))
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(20 * 36, 30))
    pk.compress_(model, {"bits": 5, "sparsity": 0.4})
    state = torch.get_rng_state()
    report = predict(model, torch.zeros(1, 3, 8, 8))
    assert all(row.dense_ms > 0 and row.compressed_ms > 0 for row in report.layers)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callers_settings_of_torch_are_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_calibrate, "_MEASURED", {})
    outputs: list[torch.Tensor] = []

    def time(cases: Sequence[Any]) -> None:
        for case in cases:
            outputs.append(case.run())
            case.seconds = 1e-6

    monkeypatch.setattr(cost_calibrate, "_time", time)
    monkeypatch.setattr(cost_calibrate, "_DENSE_SIDES", (64,))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            measured_rates(replace(NEEDS, bits=frozenset({5})))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(outputs) > 60
    assert {(y.dtype, y.device.type) for y in outputs} == {(torch.float32, "cpu")}


def test_another_precision_of_products_is_measured_anew(unmeasured: list[int]) -> None:
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "medium", "highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            rates = measured_rates(NEEDS)
            assert found.setdefault(precision, rates) is rates
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(unmeasured) == 2


@pytest.mark.usefixtures("unmeasured")
def test_a_machine_that_was_busy_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    pk.compress_(model, {"bits": 5})
    example = torch.zeros(1, 64)
    assert predict(model, example).notes == ()

    quiet = cost_calibrate._time

    def busy(cases: Sequence[Any]) -> None:
        quiet(cases)
        for case in cases[::5]:
            case.seconds *= 20

    monkeypatch.setattr(cost_calibrate, "_MEASURED", {})
    monkeypatch.setattr(cost_calibrate, "_time", busy)
    (note,) = predict(model, example).notes
    assert note.startswith("The machine was busy while it was measured")
