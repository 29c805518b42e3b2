"""save and load: exact round trips into every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_weight
from io_files import (
    CONFIG,
    Network,
    image,
    into_compressed,
    into_compressed_meta,
    into_dense,
    into_half_compressed,
    into_meta,
    same,
)
from torch import Tensor, nn

import placekern as pk
from placekern.io import architectures, register_architecture
from placekern.nn import quant_sparse_layers
from placekern.packing import Layout


def check_loaded(loaded: nn.Module, model: nn.Module) -> None:
    same(loaded, model)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.eval()(image()), model(image()))
    assert loaded.conv.relu
    assert loaded.again is loaded.wide
    assert loaded.first.codebook is loaded.second.codebook
    assert loaded.first.codes is loaded.second.codes
    loaded(image()).sum().backward()
    assert loaded.first.codebook.grad is not None


TARGETS = [into_dense, into_compressed, into_half_compressed, into_meta, into_compressed_meta]


@pytest.mark.parametrize("target", TARGETS)
def test_load_into_a_model(target: Callable[[], nn.Module], model: Network, path: Path) -> None:
    assert pk.save(model, path) == path.stat().st_size
    fresh = target()
    loaded = pk.load(path, fresh)
    assert loaded is fresh
    check_loaded(loaded, model)


def test_load_by_the_name_of_the_architecture(model: Network, path: Path) -> None:
    pk.save(model, path)
    loaded = pk.load(path)
    assert not any(module.training for module in loaded.modules())
    assert loaded.architecture == {"name": "network", "kwargs": {"width": 8}}
    check_loaded(loaded, model)


def test_saving_what_was_loaded_gives_the_same_bytes(model: Network, path: Path) -> None:
    pk.save(model, path)
    first = path.read_bytes()
    for target in (None, into_dense(), into_compressed(), into_meta()):
        loaded = pk.load(path, target)
        loaded.architecture = model.architecture
        other = path.with_name("again")
        pk.save(loaded, other)
        assert other.read_bytes() == first
    pk.save(model, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("target", [*TARGETS, lambda: None])
def test_tied_dense_weights_are_still_one_parameter(
    target: Callable[[], nn.Module | None], model: Network, path: Path
) -> None:
    pk.save(model, path)
    loaded = pk.load(path, target())
    assert loaded.decoder.weight is loaded.embedding.weight
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_training_mode_of_a_given_model_is_left_alone(model: Network, path: Path) -> None:
    pk.save(model, path)
    assert all(module.training for module in pk.load(path, Network().train()).modules())
    assert not any(module.training for module in pk.load(path, Network().eval()).modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [into_dense, into_compressed, into_meta])
def test_the_dtype_is_kept(
    target: Callable[[], nn.Module], dtype: torch.dtype, model: Network, path: Path
) -> None:
    model.to(dtype)
    with torch.no_grad():
        model.first.codebook.mul_(1.1)  # off the float32 grid, where the dtype is wider
    pk.save(model, path)
    same(pk.load(path, target().to(dtype)), model)


@pytest.mark.parametrize("target", [into_dense, into_compressed])
def test_a_target_of_another_dtype_keeps_its_own(
    target: Callable[[], nn.Module], model: Network, path: Path
) -> None:
    # As load_state_dict copies values into the parameters that are there.
    pk.save(model, path)
    loaded = pk.load(path, target().double())
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    decoded = loaded.wide.to_dense()
    assert decoded(torch.randn(2, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("build", [lambda: nn.Linear(40, 30), lambda: nn.Conv2d(4, 6, 3)])
def test_a_single_layer_round_trip(build: Callable[[], nn.Module], path: Path) -> None:
    kind = pk.QuantSparseLinear if type(build()) is nn.Linear else pk.QuantSparseConv2d
    layer = kind.from_float(build(), pk.CompressConfig(bits=4, sparsity=0.5))
    pk.save(layer, path)
    same(pk.load(path, kind.from_float(build(), pk.CompressConfig(bits=4))), layer)
    # A dense layer cannot be swapped in place when it is the model itself.
    with pytest.raises((ValueError, TypeError)):
        pk.load(path, build())


def test_models_without_compressed_layers_are_saved_too(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), model)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_every_density_and_width(density: float, bits: int, path: Path) -> None:
    model = nn.Sequential(pk.QuantSparseLinear(203, 9, bits=bits))
    model[0].weight = random_weight(9, 203, density, bits)
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(203, 9))), model)


def test_trained_codebooks_out_of_order_are_kept(model: Network, path: Path) -> None:
    with torch.no_grad():
        model.wide.codebook.copy_(torch.randn(256))
    pk.save(model, path)
    check_loaded(pk.load(path), model)


def test_ties_survive_a_state_dict_and_a_copy(model: Network, path: Path) -> None:
    for other in (copy.deepcopy(model), Network()):
        if not list(quant_sparse_layers(other)):
            pk.compress_(other, CONFIG)
            other.load_state_dict(model.state_dict())
            other.conv.relu = True
        pk.save(other.eval(), path)
        check_loaded(pk.load(path, Network()), model)


def test_layers_that_share_codes_but_not_the_codebook_keep_both(path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    pk.compress_(model)
    model[1].codebook = nn.Parameter(model[0].codebook.detach() * 2)
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))), model)


def test_buffers_that_are_not_saved_are_still_there_after_a_rebuild(path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4))
            self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * self.scale

    register_architecture("scaled", Scaled)
    model = architectures.build_architecture("scaled", {}).eval()
    pk.compress_(model)
    pk.save(model, path)
    x = torch.randn(2, 4)
    assert torch.equal(pk.load(path)(x), model(x))


def test_frozen_parameters_of_the_target_stay_frozen(model: Network, path: Path) -> None:
    pk.save(model, path)
    for target in (Network(), into_meta()):
        target.norm.requires_grad_(False)
        assert not pk.load(path, target).norm.weight.requires_grad
        assert target.head.weight.requires_grad


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_a_weight_of_a_gpu_is_written_as_one_of_the_cpu(tmp_path: Path, layout: Layout) -> None:
    torch.manual_seed(0)
    layer = pk.QuantSparseLinear(70, 20, bits=8)
    layer.weight = random_weight(20, 70, 0.4, 8)
    pk.save(layer, tmp_path / "cpu.safetensors")
    layer.weight = layer.weight.to_layout(layout)
    pk.save(layer, tmp_path / "gpu.safetensors")
    cpu, gpu = (tmp_path / f"{name}.safetensors" for name in ("cpu", "gpu"))
    assert cpu.read_bytes() == gpu.read_bytes()
    state = layer.state_dict()
    other = pk.QuantSparseLinear(70, 20, bits=8)
    other.load_state_dict(state)
    x = torch.randn(2, 70)
    assert torch.equal(other(x), pk.load(cpu, pk.QuantSparseLinear(70, 20, bits=8))(x))
