"""compress_: masks, codebooks, exceptions by name, sharing, and a report that counts real bytes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from placekern import CompressConfig, QuantSparseConv2d, QuantSparseLinear, compress_, save
from placekern.compress import fit_kmeans, fit_uniform
from placekern.compress.prune import sparsity_mask, threshold_mask
from placekern.nn import quant_sparse_layers


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, (1, 3), bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 20),
        nn.Linear(20, 4),
    )


# ---- pruning ----


def test_a_threshold_prunes_what_lies_below_it_and_every_zero() -> None:
    below = float(np.nextafter(np.float32(0.005), np.float32(0)))
    weight = torch.tensor([0.005, -0.005, below, -below, 0.0, -0.0, 1e-38, 3.0, -3.0])
    kept = [True, True, False, False, False, False, False, True, True]
    assert threshold_mask(weight, 0.005).tolist() == kept
    assert threshold_mask(weight, 0.0).tolist() == (weight != 0).tolist()
    assert not threshold_mask(weight, 4.0).any()


@pytest.mark.parametrize("shape", [(40, 50), (10, 5, 3, 3)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_sparsity_drops_that_share_smallest_first(shape: tuple[int, ...], sparsity: float) -> None:
    weight = torch.randn(shape)
    mask = sparsity_mask(weight, sparsity)
    assert mask.shape == weight.shape
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_sparsity_drops_ties_in_the_order_of_their_positions() -> None:
    weight = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 3.0, 1.0, 1.0])
    for drop in range(9):
        kept = [True] * 8
        for at in [0, 1, 3, 4, 6, 7, 2, 5][:drop]:
            kept[at] = False
        assert sparsity_mask(weight, drop / 8).tolist() == kept


def test_zeros_count_as_pruned_and_are_never_kept() -> None:
    weight = torch.tensor([0.0, 0.0, -0.0, 0.0, 5.0, 4.0, 3.0, 2.0])
    assert sparsity_mask(weight, 0.25).tolist() == [False] * 4 + [True] * 4
    assert sparsity_mask(weight, 0.625).tolist() == [False] * 4 + [True] * 3 + [False]
    assert sparsity_mask(torch.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_of_a_config_is_the_one_of_the_layer(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2).to(dtype)
    for config, mask in (
        (CompressConfig(), layer.weight != 0),
        (CompressConfig(threshold=0.1), layer.weight.float().abs() >= 0.1),
        (CompressConfig(sparsity=0.25), sparsity_mask(layer.weight.float(), 0.25)),
    ):
        compressed = QuantSparseConv2d.from_float(layer, config)
        kept = compressed.weight.to_dense() != 0
        assert torch.equal(kept, mask.reshape(6, 18))


# ---- codebooks ----


def squared_error(points: NDArray, centroids: Any) -> float:
    points, centroids = np.float64(points), np.sort(np.float64(centroids))
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, points)
    return float(((points - centroids[nearest]) ** 2).sum())


def least_squared_error(points: NDArray, clusters: int) -> float:
    """The optimum of 1-D k-means by dynamic programming over sorted points, O(clusters n^2)."""
    points = np.sort(np.float64(points)) - np.float64(points).mean()
    n = len(points)
    sums = np.concatenate([[0.0], np.cumsum(points)])
    squares = np.concatenate([[0.0], np.cumsum(points**2)])
    count = np.arange(n + 1)[None] - np.arange(n + 1)[:, None]
    cost = squares[None] - squares[:, None] - (sums[None] - sums[:, None]) ** 2 / count.clip(1)
    cost = np.where(count >= 0, cost.clip(0), np.inf)  # of points i .. j - 1 in one cluster
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[n])


def best_of_random_starts(points: NDArray, clusters: int, starts: int) -> float:
    """Plain Lloyd from random points, the best of several runs."""
    generator = np.random.default_rng(0)
    points = np.sort(np.float64(points))
    sums = np.concatenate([[0.0], np.cumsum(points)])
    results = []
    for _ in range(starts):
        centroids = np.sort(generator.choice(points, clusters, replace=False))
        for _ in range(300):
            boundaries = (centroids[1:] + centroids[:-1]) / 2
            edges = np.concatenate([[0], np.searchsorted(points, boundaries), [len(points)]])
            count = np.diff(edges)
            moved = np.where(count > 0, np.diff(sums[edges]) / count.clip(1), centroids)
            if np.array_equal(moved, centroids):
                break
            centroids = moved
        results.append(squared_error(points, centroids))
    return min(results)


def clumps(g: np.random.Generator, n: int) -> NDArray:
    return np.concatenate([g.normal(i * i, 0.01, n // 10) for i in range(10)])


def pruned_normal(g: np.random.Generator, n: int) -> NDArray:
    return (points := g.normal(size=4 * n))[np.abs(points) > 1][:n]


POINTS: dict[str, Callable[[np.random.Generator, int], NDArray]] = {
    "normal": lambda g, n: g.normal(size=n),
    "laplace": lambda g, n: g.laplace(size=n),
    "uniform": lambda g, n: g.uniform(-1, 1, n),
    "pruned normal": pruned_normal,
    "student t, 2": lambda g, n: g.standard_t(2, n),
    "cauchy": lambda g, n: g.standard_cauchy(n),
    "clumps": clumps,
    "repeated": lambda g, n: g.integers(0, 100, n) / 7,
    "one far out": lambda g, n: np.concatenate([g.normal(size=n - 1), [1e4]]),
}


@pytest.mark.parametrize("clusters", [2, 8, 32])
@pytest.mark.parametrize("name", POINTS)
def test_kmeans_of_few_points_is_the_optimum(name: str, clusters: int) -> None:
    points = POINTS[name](np.random.default_rng(1), 400).astype(np.float32)
    centroids = fit_kmeans(torch.from_numpy(points), clusters)
    assert centroids.dtype == torch.float32
    assert centroids.shape == (clusters,)
    assert (centroids.diff() >= 0).all()
    optimum = least_squared_error(points, clusters)
    assert squared_error(points, centroids) <= 1.001 * optimum + 1e-9


@pytest.mark.parametrize("clusters", [16, 256])
@pytest.mark.parametrize("name", POINTS)
def test_kmeans_of_many_points_beats_random_starts(name: str, clusters: int) -> None:
    points = POINTS[name](np.random.default_rng(2), 20_000).astype(np.float32)
    error = squared_error(points, fit_kmeans(torch.from_numpy(points), clusters))
    assert error <= 1.001 * best_of_random_starts(points, clusters, 5) + 1e-9


def test_kmeans_centroids_are_the_means_of_their_points() -> None:
    points = torch.randn(30_000)
    centroids = fit_kmeans(points, 32)
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    codes = torch.bucketize(points, boundaries)
    means = torch.zeros(32, dtype=torch.float64).index_add(0, codes, points.double())
    means /= torch.bincount(codes, minlength=32)
    assert relative_error(centroids, means) < 1e-6


def test_kmeans_does_not_depend_on_the_order_or_a_seed() -> None:
    points = torch.randn(5000)
    first = fit_kmeans(points, 16)
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(fit_kmeans(points[torch.randperm(5000)], 16), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("n", [0, 5, 31, 32, 5000, 300_000])
def test_kmeans_runs_where_the_values_are(n: int) -> None:
    points = torch.randn(n)
    for fit in (fit_kmeans, fit_uniform):
        centroids = fit(points.cuda(), 32)
        assert centroids.is_cuda
        torch.testing.assert_close(centroids.cpu(), fit(points, 32), rtol=1e-6, atol=1e-7)


def test_uniform_levels_are_equally_spaced_between_the_extremes() -> None:
    values = torch.randn(1000) + 3
    levels = fit_uniform(values, 32)
    assert levels[0] == values.min()
    assert levels[-1] == values.max()
    steps = levels.double().diff()
    assert (steps - steps.mean()).abs().max() < 1e-5 * steps.mean() * 32
    layer = nn.Linear(30, 20)
    compressed = QuantSparseLinear.from_float(layer, CompressConfig(bits=4, method="uniform"))
    error = (compressed.weight.to_dense() - layer.weight).abs().max()
    assert error <= (layer.weight.max() - layer.weight.min()) / 15 / 2 * 1.0001


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_each_weight_gets_its_nearest_entry(method: str, bits: int) -> None:
    layer = nn.Linear(60, 50)
    config = CompressConfig(bits=bits, sparsity=0.3, method=method)
    compressed = QuantSparseLinear.from_float(layer, config).weight.to_dense()
    book = config.compress_tensor(layer.weight).codebook.double()
    kept = config.mask(layer.weight.detach())
    values = layer.weight.detach()[kept].double()
    nearest = (values[:, None] - book).abs().min(1).values
    actual = (values - compressed.detach()[kept].double()).abs()
    assert (actual - nearest).max() < 1e-7
    assert not compressed[~kept].any()


def normal(*size: int) -> Tensor:
    """Drawn when the module is imported, before any fixture sets a seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def few_values(count: int) -> Tensor:
    return torch.linspace(-2, 3, count)[(normal(40, 50) * 100).int() % count]


def neighbours(count: int) -> Tensor:
    """Floats that follow each other from 1 upwards: no float lies midway between two of them."""
    return (torch.ones(1).view(torch.int32) + torch.arange(count)[None].int()).view(torch.float32)


LOSSLESS: dict[str, Tensor] = {
    "as many values as entries": few_values(8),
    "fewer values": few_values(5),
    "one value": torch.full((5, 7), -0.25),
    "two values": torch.tensor([[1.0, -1.0, 1.0]]),
    "neighbouring floats": neighbours(8),
    "near the largest float": torch.tensor([[3e38, 2e38, -3e38, -2e38, 1.0]]),
    "subnormal": torch.tensor([[1e-45, 3e-45, -1e-45, 7e-45]]),
    "all sizes": torch.tensor([[1e-30, -1e-30, 1e30, -1e30, 1.0, -1.0]]),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_few_distinct_values_are_kept_exactly(name: str) -> None:
    weight = LOSSLESS[name]
    compressed = CompressConfig(bits=3).compress_tensor(weight)
    assert torch.equal(compressed.to_dense(), weight)


HOSTILE: dict[str, Tensor] = {
    "heavy tail": torch.from_numpy(np.random.default_rng(3).standard_cauchy((50, 40))).float(),
    "one far out": torch.cat([torch.full((1, 1), 1e30), normal(1, 999)], 1),
    "constant": torch.full((20, 20), 0.5),
    "near the largest float": torch.cat([normal(4, 100) * 1e37, torch.full((4, 1), 3e38)], 1),
    "both extremes": torch.cat([normal(1, 998), torch.tensor([[-3.4e38, 3.4e38]])], 1),
    "subnormal": normal(10, 100) * 1e-40,
    "one weight": torch.tensor([[3.0]]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_give_finite_codebooks_and_small_errors(name: str) -> None:
    weight = HOSTILE[name].double()
    kmeans, uniform = (
        CompressConfig(method=method).compress_tensor(HOSTILE[name])
        for method in ("kmeans", "uniform")
    )
    assert kmeans.codebook.isfinite().all()
    assert uniform.codebook.isfinite().all()
    step = (weight.max() - weight.min()) / 255
    assert (uniform.to_dense(torch.float64) - weight).abs().max() <= 0.5001 * step
    errors = [float((w.to_dense(torch.float64) - weight).norm()) for w in (kmeans, uniform)]
    assert errors[0] <= 1.0001 * errors[1]


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
def test_a_layer_that_is_pruned_whole_works_on(method: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    report = compress_(model, CompressConfig(threshold=10.0, method=method))
    assert report.pruned == 1.0
    assert all(layer.relative_error == 1.0 for layer in report.layers)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = model(x)
    assert torch.equal(y, model[2].bias.expand(2, 5))
    y.sum().backward()
    assert not model[0].codebook.grad.any()
    assert not x.grad.any()
    assert save(model, tmp_path / "empty.safetensors") > 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_compressed_too() -> None:
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4))
    report = compress_(model)
    assert model(torch.randn(2, 4)).shape == (2, 4)
    assert report.pruned == 0.0
    assert str(report)


# ---- configs ----


EXCEPTIONS = {
    "features.0": {"bits": 1},
    "features.*": {"bits": 2},
    "*": {"bits": 3},
    "Conv2d": {"bits": 4},
    "Linear": {"bits": 5},
    "Feature*": {"bits": 6},
}


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_goes_before_a_pattern_before_a_type_before_the_default(order: int) -> None:
    layer, other = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)

    def bits(keys: list[str], name: str, module: nn.Module) -> int:
        exceptions = {key: EXCEPTIONS[key] for key in keys[::order]}
        return CompressConfig(bits=8, layers=exceptions).for_layer(name, module).bits

    assert bits(["features.0", "features.*", "Conv2d"], "features.0", layer) == 1
    assert bits(["features.*", "Conv2d"], "features.0", layer) == 2
    assert bits(["features.0", "features.*", "Conv2d"], "features.1", layer) == 2
    assert bits(["features.*", "Conv2d", "Linear"], "head", layer) == 4
    assert bits(["features.*", "Conv2d", "Linear"], "head", other) == 5
    assert bits(["*", "Linear"], "head", other) == 3
    assert bits(["features.*", "Conv2d"], "head", other) == 8
    assert bits(["Feature*"], "features.0", layer) == 8  # patterns mind the case
    assert bits([], "head", other) == 8


def test_exceptions_apply_to_the_layers_of_a_model() -> None:
    model = network()
    before = copy.deepcopy(model)
    report = compress_(
        model,
        {
            "bits": 5,
            "threshold": 0.1,
            "layers": {
                "0": None,
                "[36]": CompressConfig(bits=2, method="uniform"),
                "Linear": {"sparsity": 0.5},
            },
        },
    )
    assert [(row.name, row.bits) for row in report.layers] == [("3", 2), ("5", 5), ("6", 2)]
    assert isinstance(model[0], nn.Conv2d)
    assert report.layers[0].density == 1.0  # a config of its own inherits nothing
    assert report.layers[1].density == 0.5  # sparsity replaces the default threshold
    assert torch.equal(model[0].weight, before[0].weight)


def test_none_skips_a_type_and_filter_fn_skips_by_module() -> None:
    model = network()
    asked = []

    def wide(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module)))
        return name != "6"

    compress_(model, CompressConfig(layers={"Conv2d": None}), filter_fn=wide)
    assert [type(m) for m in model] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.Flatten,
        QuantSparseLinear,
        nn.Linear,
    ]
    assert set(asked) >= {("5", nn.Linear), ("6", nn.Linear)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bit": 8}, "config has the unknown key 'bit', expected one of bits, threshold"),
        ({"layers": {"fc": {"bit": 8}}}, r"layers\['fc'\] has the unknown key 'bit'"),
        ({"bits": 9}, "bits is 9, expected an integer from 1 to 8"),
        ({"bits": 8.0}, "bits is 8.0"),
        ({"bits": True}, "bits is True"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"sparsity": 1.5}, "sparsity is 1.5, expected 0 to 1"),
        ({"sparsity": -0.5}, "sparsity is -0.5"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"sparsity": 0.5, "threshold": 0.1}, "both given"),
        ({"method": "median"}, "method is 'median', expected one of kmeans, uniform"),
        ({"layers": {"fc": {"bits": 0}}}, "bits is 0"),
        ({"layers": {"fc": {"sparsity": 0.5, "threshold": 0.1}}}, "both given"),
        ({"layers": {"fc": {"threshold": -1}}}, "threshold is -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressConfig.from_dict(settings)
    model = network()
    with pytest.raises(ValueError, match=message):
        compress_(model, settings)
    assert not list(quant_sparse_layers(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": {"fc": 5}},
        {"layers": {"fc": "bits"}},
        {"layers": ["fc"]},
        {"threshold": "0.1"},
        {"sparsity": "half"},
        {"bits": "8"},
    ],
)
def test_settings_of_another_type_get_one_clear_sentence(settings: dict[str, Any]) -> None:
    # As they come out of a mistyped YAML file.
    with pytest.raises((ValueError, TypeError), match=r"bits|threshold|sparsity|layers") as caught:
        CompressConfig.from_dict(settings)
    assert "expected" in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CompressConfig().bits = 4  # type: ignore[misc]


# ---- the swap ----


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": shared, "three": nn.Linear(6, 6)})
    report = compress_(model)
    assert [row.name for row in report.layers] == ["one.0", "three"]
    assert model["one"][0] is model["two"]
    assert isinstance(model["two"], QuantSparseLinear)
    assert len(list(model.parameters())) == 4


def test_tied_weights_share_one_codebook_and_get_one_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    compress_(model, CompressConfig(bits=6))  # 36 values, 64 entries: nothing is lost
    assert model[0].codebook is model[2].codebook
    assert model[0].codes is model[2].codes
    assert model[0].bias is not model[2].bias
    assert len(list(model.parameters())) == 3

    x = torch.randn(3, 6)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    book, grad = model[0].codebook, torch.zeros(6, 6)
    for entry in range(64):
        grad[twin[0].weight == book[entry]] += book.grad[entry]
    assert relative_error(grad, twin[0].weight.grad) < 1e-4
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model[0].weight.to_dense(), model[2].weight.to_dense())


def test_tied_weights_with_different_settings_part() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    compress_(model, {"layers": {"1": {"bits": 2}}})
    assert (model[0].bits, model[1].bits) == (8, 2)
    assert model[0].codebook is not model[1].codebook


def test_a_weight_tied_to_an_embedding_leaves_the_embedding_dense() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    before = model["embedding"].weight.detach().clone()
    compress_(model)
    assert isinstance(model["head"], QuantSparseLinear)
    assert torch.equal(model["embedding"].weight, before)


def test_layers_left_out_are_bit_identical_and_the_same_objects() -> None:
    model = network().eval()
    kept = {name: model.get_submodule(name) for name in ("0", "1", "6")}
    before = copy.deepcopy(model.state_dict())
    biases = {name: model.get_submodule(name).bias for name in ("5",)}
    compress_(model, CompressConfig(bits=3, layers={"0": None, "6": None}))
    for name, module in kept.items():
        assert model.get_submodule(name) is module
    for name, tensor in model.state_dict().items():
        if name in before:
            assert torch.equal(tensor, before[name])
    assert model[5].bias is biases["5"]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0", "3", "6"])
def test_a_weight_that_is_not_finite_leaves_the_model_unchanged(name: str, bad: float) -> None:
    model = network()
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[5] = bad
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^{name}: weight\[.*\] is {bad} in float32, expected"):
        compress_(model, CompressConfig(threshold=0.01))
    assert dict(model.named_modules()) == modules
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[key].nan_to_num(7.0))


def test_subclasses_and_reparametrized_layers_are_left_alone() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean())

    model = nn.Sequential(
        Standardised(3, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.ConvTranspose2d(3, 3, 3),
        nn.Conv1d(3, 3, 3),
        nn.Bilinear(3, 3, 3),
    )
    modules = list(model)
    assert compress_(model).layers == ()
    assert all(one is other for one, other in zip(model, modules, strict=True))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_without_a_weight_yet_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))
    report = compress_(model)
    assert [row.name for row in report.layers] == ["0"]
    assert model(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 1)])
def test_a_model_that_is_a_layer_itself_is_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"QuantSparse{type(layer).__name__}\.from_float"):
        compress_(layer)


def test_compressing_twice_changes_nothing_more() -> None:
    model = network()
    compress_(model, CompressConfig(bits=4))
    modules = list(model)
    assert compress_(model, CompressConfig(bits=2)).layers == ()
    assert all(one is other for one, other in zip(model, modules, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_is_kept(dtype: torch.dtype) -> None:
    model = network().to(dtype).eval()
    expected = model(torch.ones(1, 3, 6, 8, dtype=dtype))
    compress_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative_error(model(torch.ones(1, 3, 6, 8, dtype=dtype)), expected) < 0.05


def test_progress_counts_the_layers() -> None:
    calls = []
    compress_(network(), progress=lambda *call: calls.append(call))
    assert calls == [("0", 0, 4), ("3", 1, 4), ("5", 2, 4), ("6", 3, 4), ("done", 4, 4)]


# ---- the report ----


def tensor_bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def file_bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(t.numel() * t.element_size() for t in tensors)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))
    model[2].weight = model[0].weight
    return model


def tied_to_an_embedding() -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(90, 50), "head": nn.Linear(50, 90)})
    model["head"].weight = model["embedding"].weight
    return model


def with_a_shared_bias() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "nothing to compress": lambda: nn.Sequential(nn.LayerNorm(5)),
    "tied": tied,
    "tied to an embedding": tied_to_an_embedding,
    "with a shared bias": with_a_shared_bias,
    "bfloat16": lambda: network().bfloat16(),
    "float64": lambda: network().double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_report_totals_are_the_bytes_of_the_real_tensors(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    dense = tensor_bytes(model)
    report = compress_(model, CompressConfig(bits=5, sparsity=0.3))
    save(model, tmp_path / "model.safetensors")
    assert report.dense_bytes == dense
    assert report.resident_bytes == tensor_bytes(model)
    assert report.disk_bytes == file_bytes(tmp_path / "model.safetensors")


def test_report_of_a_second_pass_still_counts_the_first() -> None:
    model = network()
    compress_(model, filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    between = tensor_bytes(model)
    report = compress_(model)
    assert [row.name for row in report.layers] == ["5", "6"]
    assert report.dense_bytes == between
    assert report.resident_bytes == tensor_bytes(model)


def test_report_rows_say_what_was_done() -> None:
    model = network()
    before = copy.deepcopy(model)
    report = compress_(model, CompressConfig(bits=3, threshold=0.05))
    assert [(row.name, row.kind) for row in report.layers] == [
        ("0", "Conv2d"),
        ("3", "Conv2d"),
        ("5", "Linear"),
        ("6", "Linear"),
    ]
    kept = total = 0
    for row in report.layers:
        weight = before.get_submodule(row.name).weight.detach()
        layer = model.get_submodule(row.name)
        mask = weight.abs() >= 0.05
        assert row.shape == tuple(weight.shape)
        assert row.bits == 3
        assert row.nnz == int(mask.sum())
        assert row.density == pytest.approx(float(mask.float().mean()))
        decoded = layer.weight.to_dense().reshape(weight.shape)
        assert row.relative_error == pytest.approx(relative_error(decoded, weight), rel=1e-4)
        assert row.resident_bytes == layer.resident_bytes
        kept, total = kept + row.nnz, total + weight.numel()
    assert report.pruned == pytest.approx(1 - kept / total)


@pytest.mark.parametrize("name", MODELS)
def test_report_as_a_dict_is_json(name: str) -> None:
    report = compress_(MODELS[name](), CompressConfig(bits=5, threshold=0.01))
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(again["layers"]) == len(report.layers)
    assert again["resident_bytes"] == report.resident_bytes
    for row, layer in zip(again["layers"], report.layers, strict=True):
        assert (row["name"], row["nnz"], row["density"]) == (layer.name, layer.nnz, layer.density)


def test_the_printed_table_shows_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["stem", "a" * 70, "[red]", "[/]", "conv (1)", "\\[x]"]
    model = nn.ModuleDict({name: nn.Linear(7 + i, 3) for i, name in enumerate(names)})
    report = compress_(model)
    for settings in ({}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}, {"TERM": "dumb"}):
        with monkeypatch.context() as patch:
            for key, value in settings.items():
                patch.setenv(key, value)
            text = str(report)
        assert "\x1b" not in text
        lines = text.splitlines()
        heading = next(line for line in lines if line.lstrip().startswith("layer"))
        joined = "".join(line[: heading.index("weight")].strip() for line in lines)
        for i, name in enumerate(names):
            assert name in joined
            assert f"3x{7 + i} " in text
        assert "total" in text
        assert max(len(line) for line in text.splitlines()) <= 110


def test_the_table_of_no_layers_prints() -> None:
    assert "0 layers" in str(compress_(nn.Sequential(nn.ReLU())))


def test_a_setting_for_a_layer_that_is_not_there_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"layers\['features\.\*'\] fits no layer"):
        compress_(model, CompressConfig(layers={"features.*": {"bits": 5}}))
    assert not list(quant_sparse_layers(model))
    compress_(nn.Sequential(nn.Linear(3, 3)), CompressConfig(layers={"Conv2d": None}))


def test_the_codebook_of_a_frozen_weight_is_frozen() -> None:
    model = network()
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.requires_grad_(False)
    compress_(model)
    frozen = [not layer.codebook.requires_grad for _, layer in quant_sparse_layers(model)]
    assert frozen == [True, False, False, False]


def test_a_model_without_weights_yet_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0 is on the meta device"):
        compress_(model)
