"""The report of compress_: each byte once, in the file and in memory, and float32 beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import placekern as pk
from placekern.compress import recipe_report, report, swap
from placekern.compress.cost import CostReport, LayerCost
from placekern.io import entropy_report, file_sizes
from placekern.nn import quant_sparse_layers
from placekern.packing import READ_PADDING


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 300),
        nn.Linear(300, 70, bias=False),
    )


def shared() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.LayerNorm(40))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "shared": shared,
    "bfloat16": lambda: network().bfloat16(),
    "nothing to compress": lambda: nn.Sequential(nn.LayerNorm(5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_counts_every_byte_of_the_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    done = pk.compress_(model, {"bits": 5, "sparsity": 0.4})
    path = tmp_path / "model.safetensors"
    assert done.file_bytes == pk.save(model, path)
    sizes = file_sizes(path)
    assert (done.disk_bytes, done.header_bytes) == (sizes.tensors, sizes.header)
    assert done.padding_bytes == sizes.padding
    for row, layer in zip(done.layers, sizes.layers, strict=True):
        assert row.name == layer.name
        assert row.positions_bytes == layer.positions
        assert row.codes_bytes == layer.codes
        assert (row.codebook_bytes, row.bias_bytes) == (layer.codebook, layer.bias)
        parts = (row.positions_bytes, row.codes_bytes, row.codebook_bytes, row.bias_bytes)
        assert row.disk_bytes == sum(parts)
        assert row.positions_bound == layer.positions_bound
        assert row.codes_bound == layer.codes_bound
    assert done.disk_bytes - sum(row.disk_bytes for row in done.layers) == sizes.other


def test_the_report_counts_every_byte_in_memory() -> None:
    model = network()
    done = pk.compress_(model, {"bits": 5, "sparsity": 0.4, "layers": {"6": {"sparsity": 0.97}}})
    for row, (_, layer) in zip(done.layers, quant_sparse_layers(model), strict=True):
        weight = layer.weight
        assert row.read_padding_bytes == 2 * READ_PADDING
        assert row.resident_positions_bytes == weight.positions.numel() - READ_PADDING
        assert row.resident_codes_bytes == weight.codes.numel() - READ_PADDING
        assert row.row_ptr_bytes == 4 * (weight.shape[0] + 1)
        parts = (
            row.resident_positions_bytes,
            row.resident_codes_bytes,
            row.row_ptr_bytes,
            row.read_padding_bytes,
            row.codebook_bytes,
            row.bias_bytes,
        )
        assert sum(parts) == row.resident_bytes == layer.resident_bytes
        bounds = entropy_report(weight)
        assert row.codes_bound == bounds.codes_bound
        assert row.positions_bound == bounds.positions_bound


def test_what_layers_share_counts_once() -> None:
    done = pk.compress_(shared())
    first, second = done.layers
    assert first.resident_bytes > first.disk_bytes > 0
    assert (second.dense_bytes, second.resident_bytes, second.disk_bytes) == (0, 0, 0)
    assert (second.bias_bytes, second.codes_bound, second.read_padding_bytes) == (0, 0.0, 0)
    assert done.resident_bytes == first.resident_bytes + 2 * 40 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_baseline_is_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    floating = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    done = pk.compress_(model)
    assert done.float32_bytes == 4 * floating + 8  # BatchNorm counts its batches in an int64
    assert done.ratio == done.file_bytes / done.float32_bytes
    assert f"{done.float32_bytes / 1e6:,.2f} MB ({done.float32_bytes / 2**20:,.2f} MiB)" in str(
        done
    )


def test_the_baseline_of_a_second_pass_is_that_of_the_first(tmp_path: Path) -> None:
    model = network()
    first = pk.compress_(model, filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    second = pk.compress_(model)
    assert first.float32_bytes == second.float32_bytes
    assert second.dense_bytes < first.dense_bytes
    assert second.file_bytes == pk.save(model, tmp_path / "model.safetensors")


def test_a_second_pass_counts_the_layers_of_the_first_as_compressed(tmp_path: Path) -> None:
    once, twice = network(), network()
    twice.load_state_dict(once.state_dict())
    whole = pk.compress_(once, {"bits": 5})
    pk.compress_(twice, {"bits": 5}, lambda module, name: isinstance(module, nn.Conv2d))
    second = pk.compress_(twice, {"bits": 5})
    assert [row.name for row in second.layers] == ["5", "6"]
    assert list(second.summary()) == list(whole.summary())  # to the byte, in file and memory
    first = whole.layers[0]
    assert second.earlier["positions_bytes"] == first.positions_bytes > 0
    assert second.earlier["resident_bytes"] == first.resident_bytes
    assert recipe_report.read_report(json.loads(json.dumps(second.to_dict()))) == second
    cells = {line.strip()[:17].rstrip(): line.split() for line in str(second).splitlines()}
    kilo = f"{first.resident_bytes / 1000:,.1f}"
    assert cells["compressed before"][2:4] == [kilo, kilo]
    other = whole.resident_bytes - sum(row.resident_bytes for row in whole.layers)
    rest = f"{other / 1000:,.1f}"
    assert cells["other tensors"][2:4] == [rest, rest]
    assert "compressed before" not in str(whole)


@pytest.mark.parametrize("where", ["sizes", "cost", "progress"])
def test_an_error_in_the_report_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*args: object) -> None:
        raise KeyError(where)

    def at_the_end(name: str, done: int, total: int) -> None:
        if where == "progress" and done == total:
            raise KeyError(where)

    model = nn.Sequential(network(), shared())
    layer = model[0][5]
    model[0].again = layer  # under two names
    before = list(model.named_modules(remove_duplicate=False))
    name = {"sizes": "planned_sizes", "cost": "predict_layers"}.get(where)
    if name:
        monkeypatch.setattr(swap, name, fail)
    monkeypatch.setattr(swap, "passes", lambda model, example: {})
    with pytest.raises(KeyError, match=where):
        pk.compress_(
            model, progress=at_the_end, example=torch.zeros(1) if where == "cost" else None
        )
    assert list(model.named_modules(remove_duplicate=False)) == before


def test_times_are_predicted_before_anything_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()

    def predicted(layers: list[tuple[str, nn.Module]], seen: object) -> CostReport:
        assert type(model[0]) is nn.Conv2d
        assert [name for name, _ in layers] == ["0", "5", "6"]
        return COST

    monkeypatch.setattr(swap, "predict_layers", predicted)
    assert pk.compress_(model, example=torch.zeros(1, 3, 8, 8)).cost is COST
    assert type(model[0]) is pk.QuantSparseConv2d


def test_a_compressed_layer_without_weights_stops_compression_before_it_begins() -> None:
    model = nn.Sequential(nn.Linear(3, 3), pk.QuantSparseLinear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="1 is on the meta device and has no weights"):
        pk.compress_(model)
    assert isinstance(model[0], nn.Linear)


# ---- predicted times ----

COST = CostReport(
    (
        LayerCost("0", "Conv2d", 0.93, 1, 1.0, 2.1, (0.12, 0.4)),
        LayerCost("5", "Linear", 0.5, 1, 2.0, 1.0),
        LayerCost("6", "Linear", 0.5, 0),
    ),
    "avx2",
    1,
    ("Layers that the example does not reach are not predicted.",),
)


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "predict_layers", lambda layers, seen: COST)


def test_no_example_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(swap, "predict_layers", never)
    monkeypatch.setattr(swap, "passes", never)
    done = pk.compress_(network())
    assert done.cost is None
    assert done.warnings == ()
    assert "redicted" not in str(done)


@pytest.mark.usefixtures("predicted")
def test_warnings_are_in_the_report_and_on_paper() -> None:
    done = pk.compress_(network(), example=torch.zeros(1, 3, 8, 8))
    warning = (
        "0: 2.1x slower than dense expected at density 0.93; faster between about 0.12 and 0.4"
    )
    assert done.warnings == (warning,)
    for line in (warning, *COST.notes):
        assert line in str(done)
    assert "time of 2 of 3 layers: 3.10 ms, dense 3.00 ms (CPU at avx2, 1 thread)" in str(done)
    assert done.table().caption.plain.endswith(warning)


def test_where_no_time_was_predicted_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = replace(COST, layers=COST.layers[2:])
    monkeypatch.setattr(swap, "predict_layers", lambda layers, seen: cost)
    done = pk.compress_(network(), example=torch.zeros(1, 3, 8, 8))
    assert "Predicted time" not in "\n".join(done.summary())
    assert cost.notes[0] in done.summary()
    whole = replace(done, cost=replace(COST, layers=COST.layers[:2]))
    assert "Predicted time of the layers: 3.10 ms" in "\n".join(whole.summary())


@pytest.mark.usefixtures("predicted")
@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 8, 8)])
def test_plain_values_come_back(example: torch.Tensor | None) -> None:
    done = pk.compress_(network(), example=example)
    values = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert values["file_bytes"] == done.file_bytes
    again = recipe_report.read_report(values)
    assert again == done
    assert str(again) == str(done)


def test_plain_values_of_an_older_report_come_back() -> None:
    values = pk.compress_(network()).to_dict()
    for name in ("float32_bytes", "header_bytes", "padding_bytes", "file_bytes", "ratio", "cost"):
        del values[name]
    del values["earlier"]
    for row in values["layers"]:
        del row["codes_bound"], row["row_ptr_bytes"]
    again = recipe_report.read_report(values)
    assert isinstance(again, report.CompressReport)
    assert (again.disk_bytes, again.ratio) == (values["disk_bytes"], 0.0)
    assert str(again)


def test_an_example_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        pk.compress_(model, example=torch.zeros(1, 7, 8, 8))
    assert not list(quant_sparse_layers(model))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_table_is_readable() -> None:
    done = pk.compress_(network())
    text = str(done)
    assert max(map(len, text.splitlines())) <= 110
    for word in ("positions", "codes", "codebooks", "biases", "header", "padding", "entropy"):
        assert word in text
