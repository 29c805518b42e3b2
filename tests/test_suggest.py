"""suggest: near the best choice, within the budget to the byte, and as good as it says."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from placekern import CompressConfig, compress_, save
from placekern.compress.sensitivity import Sensitivity, sensitivity
from placekern.compress.sensitivity_choices import predicted_drops, resolution
from placekern.compress.suggest import Suggestion, suggest
from placekern.io import streams

pytest.importorskip("zstandard")

suggest_module = importlib.import_module("placekern.compress.suggest")  # not the function
Metric = Callable[[nn.Module], float]
SETTINGS: dict[str, Any] = {"bits": (8, 5, 3, 2), "sparsities": (0.3, 0.6, 0.9)}


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 12)
    ).eval()


def inputs() -> Tensor:
    return torch.randn(200, 20, generator=torch.Generator().manual_seed(3))


def similarity_to(model: nn.Module) -> Metric:
    """1 - squared error / mean square of the outputs that the model has now."""
    with torch.no_grad():
        target = model(inputs())

    @torch.no_grad()
    def metric(other: nn.Module) -> float:
        return 1 - float((other(inputs()) - target).square().mean() / target.square().mean())

    return metric


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return network()


@pytest.fixture(scope="module")
def metric(model: nn.Module) -> Metric:
    return similarity_to(model)


@pytest.fixture(scope="module")
def found(model: nn.Module, metric: Metric) -> Sensitivity:
    return sensitivity(model, metric, **SETTINGS)


def file_bytes(model: nn.Module, config: CompressConfig, path: Path) -> int:
    compressed = copy.deepcopy(model)
    compress_(compressed, config)
    return save(compressed, path / "model.safetensors")


# ---- a budget of bytes ----


def test_a_budget_is_kept_to_the_byte_and_well_used(
    model: nn.Module, metric: Metric, found: Sensitivity, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.state_dict())
    last = math.inf
    for budget in (0.008, 0.010, 0.013, 0.018, 0.03, 1.0):
        suggestion = suggest(found, model, budget_mb=budget)
        assert file_bytes(model, suggestion.config, tmp_path) == suggestion.file_bytes
        assert suggestion.file_bytes <= budget * 1e6
        if budget < 0.1:
            assert suggestion.file_bytes > 0.93 * budget * 1e6
        assert suggestion.predicted_drop <= last
        assert suggestion.measured is None
        last = suggestion.predicted_drop
    assert all(layer.settings is None for layer in suggestion.layers)  # 1 MB holds it all
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_suggestion_is_better_than_one_setting_for_all_layers(
    model: nn.Module, metric: Metric, found: Sensitivity, tmp_path: Path
) -> None:
    for bits, sparsity in ((5, 0.6), (3, 0.3), (3, 0.6)):
        uniform = CompressConfig(bits=bits, sparsity=sparsity)
        size = file_bytes(model, uniform, tmp_path)
        compressed = copy.deepcopy(model)
        compress_(compressed, uniform)
        suggestion = suggest(found, model, budget_mb=size / 1e6, metric=metric)
        assert suggestion.file_bytes <= size
        assert suggestion.measured > metric(compressed)


def test_a_budget_that_cannot_be_met_names_the_smallest_file(
    model: nn.Module, found: Sensitivity
) -> None:
    with pytest.raises(ValueError, match=r"0.002 MB cannot be reached: the smallest.*has") as error:
        suggest(found, model, budget_mb=0.002)
    smallest = float(str(error.value).split("has ")[1].split(" MB")[0])
    reached = suggest(found, model, budget_mb=smallest)
    assert reached.file_bytes <= smallest * 1e6
    with pytest.raises(ValueError, match="cannot be reached"):
        suggest(found, model, budget_mb=smallest - 0.001)


def test_a_budget_with_a_metric_is_measured(
    model: nn.Module, metric: Metric, found: Sensitivity
) -> None:
    suggestion = suggest(found, model, budget_mb=0.012, metric=metric)
    compressed = copy.deepcopy(model)
    compress_(compressed, suggestion.config)
    assert suggestion.measured == pytest.approx(metric(compressed), rel=1e-6)
    assert suggestion.measured_drop == found.baseline - suggestion.measured
    assert suggestion.evaluations == 1


def test_where_the_metric_is_blind_the_error_orders(model: nn.Module) -> None:
    blind = sensitivity(model, lambda _: 0.5, **SETTINGS)
    assert resolution(blind.rows) == 1e-9
    rows = blind.of("2", "sparsity")
    drops = predicted_drops(rows, 0.01)
    assert drops == pytest.approx([0.01 * row.relative_error**2 for row in rows])
    suggestion = suggest(blind, model, budget_mb=0.015)
    harshest = [layer.settings == {"bits": 2, "sparsity": 0.9} for layer in suggestion.layers]
    assert not any(harshest)
    assert suggestion.file_bytes > 0.9 * 0.015e6


# ---- a budget of drop ----


@pytest.mark.parametrize("max_drop", [0.0, 0.001, 0.02, 0.2])
def test_the_predicted_drop_is_kept(model: nn.Module, found: Sensitivity, max_drop: float) -> None:
    suggestion = suggest(found, model, max_drop=max_drop)
    assert suggestion.predicted_drop <= max_drop * (1 + 1e-8)
    assert suggestion.predicted_drop == pytest.approx(sum(x.drop for x in suggestion.layers))
    assert suggestion.evaluations == 0


@pytest.mark.parametrize("max_drop", [0.001, 0.02, 0.2])
def test_the_measured_drop_is_kept_and_made_use_of(
    model: nn.Module, metric: Metric, found: Sensitivity, max_drop: float
) -> None:
    suggestion = suggest(found, model, max_drop=max_drop, metric=metric, evaluations=10)
    compressed = copy.deepcopy(model)
    compress_(compressed, suggestion.config)
    drop = found.baseline - metric(compressed)
    assert suggestion.measured_drop == pytest.approx(drop, rel=1e-6)
    assert max_drop / 3 < drop <= max_drop
    assert 1 < suggestion.evaluations <= 10


@pytest.mark.parametrize("power", [0.5, 3])
def test_drops_that_do_not_add_up_are_found_out(power: float) -> None:
    # The metric is a power of the share of weights left in both layers: with a power above 1 two
    # drops together cost more than their sum, below 1 less.
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))

    def metric(other: nn.Module) -> float:
        lost = sum(float((dense_of(layer) == 0).double().mean()) for layer in other) / 2
        return 1 - lost**power

    found = sensitivity(model, metric, bits=(8,), sparsities=(0.2, 0.4, 0.6, 0.8))
    once = suggest(found, model, max_drop=0.3)
    compressed = copy.deepcopy(model)
    compress_(compressed, once.config)
    measured_once = 1 - metric(compressed)
    assert (measured_once > 0.3) == (power > 1)
    best = suggest(found, model, max_drop=0.3, metric=metric)
    assert best.measured_drop <= 0.3
    assert (best.file_bytes > once.file_bytes) == (power > 1)
    assert best.evaluations > 1


def dense_of(layer: Any) -> Tensor:
    weight = layer.weight
    return weight if isinstance(weight, Tensor) else weight.to_dense()


def test_a_drop_that_nothing_keeps_to_is_named(model: nn.Module, metric: Metric) -> None:
    weights = [p.clone() for p in model.parameters()]

    def strict(other: nn.Module) -> float:
        same = all(
            torch.equal(dense_of(layer), weights[2 * i])
            for i, layer in enumerate(other[j] for j in (0, 2, 4))
        )
        return 1.0 if same else 0.0

    found = sensitivity(model, strict, bits=(8,), sparsities=())
    assert suggest(found, model, max_drop=0.5, metric=strict).measured_drop == 0
    rows = [row if row.setting == "dense" else weak(row) for row in found.rows]
    with pytest.raises(ValueError, match=r"none of 1 measured networks keeps to a drop of 2\.5e-0"):
        suggest(Sensitivity(tuple(rows)), model, max_drop=2.5e-5, metric=strict, evaluations=1)


def weak(row: Any) -> Any:
    """The row with a drop that is far too small."""
    return type(row)(**{**vars(row), "drop": 1e-6, "metric": 1 - 1e-6})


def test_a_network_that_cannot_get_milder_ends_the_search(
    model: nn.Module, found: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric that gives less for every copy, even for one that is dense."""
    solved: list[float] = []
    solve = suggest_module.solve
    monkeypatch.setattr(
        suggest_module, "solve", lambda *args: (solved.append(args[1]), solve(*args))[1]
    )

    def metric(other: nn.Module) -> float:
        return found.baseline - (other is not model)

    with pytest.raises(ValueError, match=r"none of \d+ measured networks keeps to a drop of 0.01"):
        suggest(found, model, max_drop=0.01, metric=metric, evaluations=50)
    assert len(solved) < 60


# ---- the config ----


def test_the_config_goes_through_json(model: nn.Module, found: Sensitivity, tmp_path: Path) -> None:
    suggestion = suggest(found, model, budget_mb=0.012)
    file = tmp_path / "config.json"
    suggestion.save(file)
    read = CompressConfig.from_dict(json.loads(file.read_text()))
    assert file_bytes(model, read, tmp_path) == suggestion.file_bytes
    values = json.loads(json.dumps(suggestion.to_dict()))
    assert values["config"] == json.loads(file.read_text())
    assert values["file_bytes"] == suggestion.file_bytes
    assert [layer["name"] for layer in values["layers"]] == ["0", "2", "4"]


def test_layers_that_were_not_measured_stay_dense(model: nn.Module, metric: Metric) -> None:
    found = sensitivity(model, metric, **SETTINGS, filter_fn=lambda module, name: name != "2")
    suggestion = suggest(found, model, budget_mb=0.07)
    compressed = copy.deepcopy(model)
    report = compress_(compressed, suggestion.config)
    assert "2" not in [layer.name for layer in report.layers]
    assert suggestion.file_bytes > 4 * 15_000
    with pytest.raises(ValueError, match="cannot be reached"):
        suggest(found, model, budget_mb=0.06)


def test_layers_that_share_a_weight_get_the_same(tmp_path: Path) -> None:
    first, second = nn.Linear(30, 30), nn.Linear(30, 30)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    found = sensitivity(model, lambda m: 1.0, bits=(4,), sparsities=())
    suggestion = suggest(found, model, budget_mb=0.003)
    assert dict(suggestion.config.layers) == {"0": {"bits": 4}, "1": {"bits": 4}}
    assert file_bytes(model, suggestion.config, tmp_path) == suggestion.file_bytes


class Tied(nn.Module):
    """A weight that an embedding, which is not compressed, has too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 40)
        self.body = nn.Linear(40, 40)
        self.head = nn.Linear(40, 60, bias=False)
        self.head.weight = self.embedding.weight


def test_a_weight_that_an_embedding_has_too_stays_in_the_file(tmp_path: Path) -> None:
    model = Tied()
    found = sensitivity(model, lambda m: 1.0, bits=(2,), sparsities=(0.9,))
    body, both = {"head": None}, {}
    sizes = []
    for layers in (body, both):
        config = CompressConfig(bits=2, sparsity=0.9, layers=layers)
        sizes.append(file_bytes(model, config, tmp_path))
    assert sizes[0] < sizes[1]
    suggestion = suggest(found, model, budget_mb=(sizes[0] + 200) / 1e6)
    settings = {layer.name: layer.settings for layer in suggestion.layers}
    assert (settings["head"], settings["body"]) == (None, {"bits": 2, "sparsity": 0.9})
    assert file_bytes(model, suggestion.config, tmp_path) == suggestion.file_bytes
    own = suggest_module._Planner(found, model, None, None)._choices[1]
    dense = 4 * 60 * 40
    assert own[0].bytes == dense
    assert all(choice.bytes > dense for choice in own[1:])


def test_how_a_layer_was_quantized_goes_along(model: nn.Module, metric: Metric) -> None:
    config = {"method": "uniform", "layers": {"4": {"method": "kmeans", "entropy_lambda": 0.001}}}
    found = sensitivity(model, metric, **SETTINGS, config=config)
    suggestion = suggest(found, model, budget_mb=0.012)
    settings = {layer.name: layer.settings for layer in suggestion.layers}
    assert settings["2"]["method"] == "uniform"
    assert settings["4"]["entropy_lambda"] == 0.001
    assert "method" not in settings["4"]


def test_the_table_says_what_was_measured(
    model: nn.Module, metric: Metric, found: Sensitivity
) -> None:
    pytest.importorskip("rich")
    suggestion = suggest(found, model, budget_mb=0.012, metric=metric)
    lines = str(suggestion).splitlines()
    assert lines[0].startswith(f"{suggestion.file_bytes / 1e6:.3f} MB, predicted drop")
    assert f"drop {suggestion.measured_drop:.3g}" in lines[1]
    for layer in suggestion.layers:
        line = next(line for line in lines if line.split()[:1] == [layer.name])
        assert str(layer.settings["bits"]) in line.split()
        assert f"{layer.bytes / 1000:,.1f}" in line


def test_shares_are_shown_with_their_digits() -> None:
    pytest.importorskip("rich")
    model = nn.Sequential(nn.Linear(60, 60))
    found = sensitivity(model, lambda m: 1.0, bits=(2,), sparsities=(0.995,))
    assert "99.5%" in str(found)
    assert "99.5%" in str(suggest(found, model, budget_mb=0.001))


def test_each_network_is_encoded_once(
    model: nn.Module, found: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = suggest_module._Planner(found, model, None, None)
    encoded: list[Any] = []
    encode = streams.encode
    monkeypatch.setattr(streams, "encode", lambda w: (encoded.append(w), encode(w))[1])
    assert planner._size((1, 2, 3)) == planner._size((1, 2, 3))
    assert len(encoded) == 3


# ---- errors ----


def test_an_analysis_without_layers_is_refused(model: nn.Module, found: Sensitivity) -> None:
    for budget in ({"budget_mb": 1}, {"max_drop": 1}):
        with pytest.raises(ValueError, match="no row but the dense network's; measure some layers"):
            suggest(Sensitivity(found.rows[:1]), model, **budget)


def test_errors_are_named(model: nn.Module, metric: Metric, found: Sensitivity) -> None:
    for options, message in [
        ({}, "budget_mb is None and max_drop is None, expected one of the two"),
        ({"budget_mb": 1, "max_drop": 1}, "expected one of the two"),
        ({"budget_mb": 0}, "budget_mb is 0, expected a positive number"),
        ({"budget_mb": math.nan}, "budget_mb is nan, expected a positive number"),
        ({"max_drop": -0.1}, "max_drop is -0.1, expected a number >= 0"),
        ({"max_drop": 0.1, "evaluations": 0}, "evaluations is 0, expected 1 at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            suggest(found, model, **options)
    with pytest.raises(ValueError, match="dense network's metric is 3, but 1 in the analysis"):
        suggest(found, model, budget_mb=1, metric=lambda other: 3.0)
    with pytest.raises(ValueError, match="'2' was measured, but is no Conv2d or Linear layer"):
        suggest(found, nn.Sequential(nn.Linear(20, 100)), budget_mb=1)
    other = network()
    other[2] = nn.Linear(10, 10)
    with pytest.raises(ValueError, match="2 has 100 weights, but 15000 when it was measured"):
        suggest(found, other, budget_mb=1)
    by_threshold = sensitivity(model, metric, bits=(4,), thresholds=(0.05,))
    other = network()
    other[2].weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"2 keeps 0.7\d+ of its weights at threshold 0.05, but"):
        suggest(by_threshold, other, budget_mb=1)
    with pytest.raises(ValueError, match="0 was not measured at any bits; measure some"):
        suggest(sensitivity(model, metric, bits=()), model, budget_mb=1)


def test_progress_is_told(model: nn.Module, metric: Metric, found: Sensitivity) -> None:
    calls: list[tuple[str, int, int]] = []
    result = suggest(
        found, model, max_drop=0.02, metric=metric, progress=lambda *call: calls.append(call)
    )
    assert isinstance(result, Suggestion)
    assert calls[:4] == [("choices", done, 3) for done in range(4)]
    assert calls[4] == ("measure", 0, 8)
    assert calls[-1] == ("measure", 8, 8)
