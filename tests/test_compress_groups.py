"""group_size: fitted by compress_, trained by a recipe, re-assigned, saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import placekern as pk
from placekern.compress.quantize import assign_anew, fit_kmeans
from placekern.compress.trained import TrainedCodebook, project


def rows_of_different_scales(M: int = 24, K: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 1, M)[torch.randperm(M, generator=generator)]
    return torch.randn(M, K, generator=generator) * scales[:, None]


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
@pytest.mark.parametrize("group_size", [1, 5, 8, 24, 100])
def test_each_group_is_fitted_alone(group_size: int, method: str) -> None:
    weight = rows_of_different_scales()
    config = pk.CompressConfig(bits=3, sparsity=0.4, group_size=group_size, method=method)
    together = config.compress_tensor(weight)
    size = together.group_size
    assert size == {1: 1, 5: 5, 8: 8, 24: 24, 100: 24}[group_size]
    mask = config.mask(weight)
    alone = pk.CompressConfig(bits=3, method=method)
    parts = [
        alone.compress_tensor(rows * kept)
        for rows, kept in zip(weight.split(size), mask.split(size), strict=True)
    ]
    assert torch.equal(together.to_dense(), torch.cat([part.to_dense() for part in parts]))
    assert together.codebook.shape == ((len(parts), 8) if len(parts) > 1 else (8,))


def test_smaller_groups_leave_less_error_and_take_more_bytes(tmp_path: Path) -> None:
    weight = rows_of_different_scales()
    errors, sizes = [], []
    for group_size in (None, 12, 4, 1):
        layer = nn.Linear(200, 24)
        layer.weight.data = weight.clone()
        model = nn.Sequential(layer)
        report = pk.compress_(model, {"bits": 2, "group_size": group_size})
        errors.append(report.layers[0].relative_error)
        sizes.append(model[0].codebook.numel())
        path = tmp_path / "model.safetensors"
        pk.save(model, path)
        loaded = pk.load(path, nn.Sequential(nn.Linear(200, 24)))
        x = torch.randn(3, 200)
        assert torch.equal(loaded(x), model(x))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    assert sizes == [4, 8, 24, 96]


def test_a_setting_of_one_layer_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 6))
    pk.compress_(model, {"bits": 4, "layers": {"0": {"group_size": 5}}})
    assert model[0].codebook.shape == (4, 16)
    assert model[1].codebook.shape == (16,)


def test_layers_that_share_a_weight_but_not_the_groups_do_not_share_codes() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[1].weight = model[0].weight
    pk.compress_(model, {"bits": 4, "layers": {"0": {"group_size": 5}}})
    assert model[0].codebook.shape == (4, 16)
    assert model[1].codebook.shape == (16,)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "4"])
def test_bad_group_sizes_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"group_size is .*, expected an integer >= 1 or None"):
        pk.CompressConfig(group_size=bad)


@pytest.mark.parametrize("grid", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_a_recipe_trains_every_codebook(gradient: str, grid: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(), nn.Linear(160, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = {
        "compress": {"bits": 3, "sparsity": 0.3, "group_size": 4},
        "quantize_at": 2,
        "codebook_gradient": gradient,
        "grid": grid,
        "reassign_every": 3,
    }
    recipe = pk.Recipe(model, config, optimizer)
    recipe.prepare()
    x, target = torch.randn(6, 3, 6, 6), torch.randn(6, 7)
    for step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 4:
            saved = copy.deepcopy(recipe.state_dict())
        optimizer.step()
        recipe.step()
        if step > 1 and grid is None:
            assert all(
                not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
            )
    assert model[0].codebook.shape == (3, 8)
    assert model[2].codebook.shape == (2, 8)
    for layer in (model[0], model[2]):
        assert torch.equal(project(layer.codebook.detach(), grid), layer.codebook)
    final = [p.detach().clone() for p in recipe.finalize().parameters()]

    # From the state of step 4, the same steps lead to the same bits.
    torch.manual_seed(0)
    again = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(), nn.Linear(160, 7))
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-3)
    recipe = pk.Recipe(again, config, optimizer)
    recipe.prepare()
    recipe.load_state_dict(saved)
    for _ in range(4, 8):
        loss = (again(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recipe.step()
    for ours, theirs in zip(recipe.finalize().parameters(), final, strict=True):
        assert torch.equal(ours, theirs)


def test_the_mean_gradient_divides_by_the_weights_of_each_entry() -> None:
    torch.manual_seed(0)
    gradients, counts = {}, None
    for gradient in ("sum", "mean"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = {
            "compress": {"bits": 2, "group_size": 3},
            "quantize_at": 0,
            "codebook_gradient": gradient,
        }
        pk.Recipe(model, config, optimizer).prepare()
        torch.manual_seed(1)
        model(torch.randn(5, 40)).square().sum().backward()
        gradients[gradient] = model[0].codebook.grad
        counts = model[0].weight.entry_index().bincount(minlength=12).view(3, 4)
    torch.testing.assert_close(gradients["mean"] * counts, gradients["sum"])


def test_each_group_is_assigned_anew_to_its_own_entries() -> None:
    dense = rows_of_different_scales(10, 30)
    layer = nn.Linear(30, 10)
    layer.weight.data = dense
    config = pk.CompressConfig(bits=2, group_size=4)
    quantized = pk.QuantSparseLinear.from_float(layer, config)
    trained = TrainedCodebook([quantized], dense=dense)
    codes = quantized.weight.to_csr()[2].view(10, 30).long()
    rows = torch.arange(10)[:, None] // 4
    offsets = dense - quantized.codebook.detach()[rows, codes]
    with torch.no_grad():
        quantized.codebook.mul_(torch.linspace(0.1, 1.5, 12).view(3, 4))
    moved = quantized.codebook.detach()
    real = moved[rows, codes] + offsets
    nearest = (real[:, :, None] - moved[rows]).abs().argmin(2)
    assert not torch.equal(nearest, codes)
    trained.step(reassign=True)
    assert torch.equal(quantized.weight.to_csr()[2].view(10, 30).long(), nearest)
    torch.testing.assert_close(trained.values().view(10, 30), real)


# ---- assigning anew where bits have a price ----


@pytest.mark.parametrize("entropy_lambda", [0.0, 1e-3, 1e-1])
def test_assign_anew_takes_the_cheapest_entry(entropy_lambda: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(5000)
    book = fit_kmeans(values, 16)[torch.randperm(16)] + 0.05 * torch.randn(16)
    codes = torch.randint(0, 12, (5000,), dtype=torch.uint8)  # four entries have no weight
    found = assign_anew(values, book, codes, entropy_lambda)
    counts = torch.bincount(codes.int(), minlength=16)
    lengths = -(counts / 5000).log2()
    price = entropy_lambda * float(values.double().square().mean())
    costs = (values[:, None] - book).double().square()
    if price:
        costs = costs + price * lengths
        assert not (found >= 12).any()
    best = costs.min(1).values
    chosen = costs.gather(1, found.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-7)


def test_a_recipe_assigns_anew_by_the_price_of_its_config() -> None:
    used = {}
    for entropy_lambda in (0.0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 40))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        config = {
            "compress": {"bits": 4, "entropy_lambda": entropy_lambda},
            "quantize_at": 0,
            "reassign_every": 1,
        }
        recipe = pk.Recipe(model, config, optimizer)
        recipe.prepare()
        for _ in range(3):
            loss = (model(torch.randn(8, 60)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recipe.step()
        used[entropy_lambda] = len(model[0].weight.entry_index().unique())
    # The price left entries without a weight, and assigning anew did not bring them back.
    assert used[0.0] == 16
    assert used[0.05] < 12
