"""file_sizes and planned_sizes: every byte has one role, and the plan is the file, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import placekern as pk
from placekern.io import FileSizes, entropy_report, file_sizes, planned_sizes, streams
from placekern.nn import quant_sparse_layers


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 300), nn.Linear(300, 70, bias=False)
    )


def compressed(model: nn.Module, **config: object) -> nn.Module:
    pk.compress_(model, {"bits": 5, "sparsity": 0.4, **config})
    return model


def shared() -> nn.Module:
    """A layer under two names, two layers on one weight, and a bias that both have."""
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.LayerNorm(40))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    model.append(model[0])
    return compressed(model)


def tied_to_an_embedding() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(90, 50), "head": nn.Linear(50, 90)})
    model["head"].weight = model["embedding"].weight
    return compressed(model)


def named() -> nn.Module:
    model = compressed(network())
    model.architecture = {"name": "größe", "kwargs": {"layers": [1, 2], "text": 'a "quoted" one'}}
    return model


def odd_names() -> nn.Module:
    names = ["größe", 'a "b"', "tab\t", "\\", "\x7f", "日本", "x" * 200]
    return compressed(nn.ModuleDict({name: nn.Linear(9 + i, 5) for i, name in enumerate(names)}))


def other_dtypes() -> nn.Module:
    model = compressed(nn.Sequential(nn.Linear(30, 20)))
    kinds = (torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8, torch.complex64)
    for i, dtype in enumerate(kinds):
        model.register_buffer(f"b{i}", torch.zeros(3 + i, 2, dtype=dtype))
    model.register_buffer("scalar", torch.tensor(2.0))
    model.register_buffer("strided", torch.zeros(6, 4).t())
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("not saved", torch.zeros(9), persistent=False)
    return model


def skewed() -> nn.Module:
    """Codes that are written as digits, with a stream of rare ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200))
    pk.compress_(model, pk.CompressConfig(bits=8, entropy_lambda=0.2))
    assert streams.encode(model[0].weight).rare is not None
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": network,
    "nothing": nn.ReLU,
    "compressed": lambda: compressed(network()),
    "8 bits, nearly empty": lambda: compressed(network(), bits=8, sparsity=0.99),
    "all pruned": lambda: compressed(network(), sparsity=1.0),
    "some dense": lambda: compressed(network(), layers={"Conv2d": None}),
    "a layer": lambda: pk.QuantSparseLinear(30, 9, bits=3),
    "shared": shared,
    "tied to an embedding": tied_to_an_embedding,
    "named": named,
    "odd names": odd_names,
    "bfloat16": lambda: compressed(network().bfloat16()),
    "float64": lambda: compressed(network().double()),
    "other dtypes": other_dtypes,
    "digits": skewed,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_the_file(name: str, path: Path) -> None:
    model = MODELS[name]()
    planned = planned_sizes(model)
    size = pk.save(model, path)
    assert planned.total == size == path.stat().st_size
    assert planned == file_sizes(path)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    names=st.lists(st.text(min_size=1, max_size=9).filter(lambda s: "." not in s), max_size=6),
    sparsity=st.floats(0, 1),
    bits=st.integers(1, 8),
)
def test_the_plan_is_the_file_of_any_network(
    widths: list[int],
    names: list[str],
    sparsity: float,
    bits: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("sizes") / "model.safetensors"
    model = nn.Sequential()
    for i, (K, M) in enumerate(pairwise(widths)):
        taken = i >= len(names) or hasattr(model, names[i])
        model.add_module(str(i) if taken else names[i], nn.Linear(K, M))
    assert planned_sizes(model).total == pk.save(model, path)
    pk.compress_(model, pk.CompressConfig(bits=bits, sparsity=sparsity))
    assert planned_sizes(model).total == pk.save(model, path)


@pytest.mark.parametrize("name", MODELS)
def test_the_roles_are_those_of_the_files_tensors(name: str, path: Path) -> None:
    """Against the file as another reader sees it."""
    model = MODELS[name]()
    pk.save(model, path)
    sizes = file_sizes(path)
    with safetensors.safe_open(path, framework="pt") as opened:
        stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    bytes_of = {key: t.numel() * t.element_size() for key, t in stored.items()}
    for row in sizes.layers:
        prefix = f"{row.name}." if row.name else ""

        def stored_bytes(*roles: str, prefix: str = prefix) -> int:
            return sum(bytes_of.pop(prefix + role, 0) for role in roles)

        assert row.bias == stored_bytes("bias")
        if row.shares is None:
            assert row.positions == stored_bytes("positions")
            assert row.codes == stored_bytes("codes", "rare")
            assert row.codebook == stored_bytes("codebook")
        else:
            assert row.positions == row.codes == row.codebook == 0
            assert row.shares in [layer.name for layer in sizes.layers]
    assert sizes.other == sum(bytes_of.values())
    raw = path.read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    assert sizes.padding == len(header) - len(header.rstrip(b" ")) < 8
    assert sizes.header == 8 + len(header.rstrip(b" "))


def test_bounds_stand_beside_and_totals_add_up(path: Path) -> None:
    model = compressed(network())
    pk.save(model, path)
    sizes = file_sizes(path)
    layers = [layer for _, layer in quant_sparse_layers(model)]
    for row, layer in zip(sizes.layers, layers, strict=True):
        report = entropy_report(layer.weight)
        assert (row.positions, row.codes) == (report.positions_bytes, report.codes_bytes)
        assert (row.positions_bound, row.codes_bound) == (
            report.positions_bound,
            report.codes_bound,
        )
        assert (row.shape, row.bits, row.nnz) == (layer.weight.shape, 5, layer.weight.nnz)
    assert sizes.bound == pytest.approx(sum(entropy_report(x.weight).bound for x in layers))
    parts = (sizes.positions, sizes.codes, sizes.codebooks, sizes.biases)
    assert sum(parts) + sizes.other == sizes.tensors
    assert sizes.tensors + sizes.header + sizes.padding == sizes.total


def test_a_layer_that_was_encoded_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(network())
    expected = planned_sizes(model)
    calls = []
    encode = streams.encode
    monkeypatch.setattr(streams, "encode", lambda weight: calls.append(1) or encode(weight))
    pk.compress_(network())
    assert len(calls) == 3
    assert planned_sizes(model) == expected
    assert len(calls) == 6


def test_nothing_is_written_and_nothing_changed(tmp_path: Path) -> None:
    model = compressed(network())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned_sizes(model)
    assert not list(tmp_path.iterdir())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_lazy_layers_count_nothing_and_meta_ones_are_refused() -> None:
    assert planned_sizes(nn.Sequential(nn.LazyLinear(3))).tensors == 0
    with pytest.raises(ValueError, match="on the meta device; load its weights first"):
        planned_sizes(pk.QuantSparseLinear(4, 4, device="meta"))


def test_files_that_are_not_there_not_ours_or_damaged(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        file_sizes(path)
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not one written by placekern"):
        file_sizes(path)
    pk.save(compressed(network()), path)
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        file_sizes(path)


def test_a_file_of_the_first_format() -> None:
    path = Path(__file__).parent / "data" / "format1.safetensors"
    sizes = file_sizes(path)
    assert sizes.total == path.stat().st_size
    assert sizes.codes > 0


def test_values_are_json_and_the_table_prints() -> None:
    sizes = planned_sizes(odd_names())
    assert isinstance(sizes, FileSizes)
    values = json.loads(json.dumps(sizes.to_dict(), allow_nan=False))
    roles = ("positions", "codes", "codebooks", "biases", "other", "header", "padding")
    assert sum(values[role] for role in roles) == values["total"] == sizes.total
    assert [row["name"] for row in values["layers"]] == [row.name for row in sizes.layers]
    names = ["[red]", "a" * 99, "[/]"]
    sizes = planned_sizes(compressed(nn.ModuleDict({name: nn.Linear(3, 4) for name in names})))
    text = str(sizes)
    assert f"{sizes.total:,} bytes" in text
    assert all(name in text for name in ("[red]", "[/]", "aaaa"))
    assert max(map(len, text.splitlines())) <= 110
    assert "total" in str(planned_sizes(nn.ReLU()))


def test_an_attribute_that_only_looks_like_an_architecture_is_left_out(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    for attribute in ("resnet", {"name": 3}, object()):
        model.architecture = attribute
        assert planned_sizes(model).total == pk.save(model, path)
        pk.load(path, nn.Sequential(nn.Linear(3, 3)))
