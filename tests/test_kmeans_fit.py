"""How good fitted codebooks are: against the exact optimum, faiss, Core ML, and by the bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import placekern as pk
from placekern import ops
from placekern.compress.kmeans_init import INITS
from placekern.compress.quantize import assign, fit_entropy_constrained, fit_kmeans


def heavy_tailed(count: int) -> Tensor:
    generator = np.random.default_rng(count)
    return torch.from_numpy(generator.standard_t(4, count).astype(np.float32))


def squared_error(values: Tensor, centroids: Tensor) -> float:
    codes, _, _ = ops.kmeans_assign(values, centroids)
    return float((values.double() - centroids.double()[codes.int()]).square().sum())


def optimal_error(values: Tensor, clusters: int) -> float:
    """Of the exact optimum, by dynamic programming over all values."""
    points = values.double().sort().values
    starts = ops.kmeans_optimal(points, torch.ones_like(points), clusters).tolist()
    total = 0.0
    for start, end in itertools.pairwise([*starts, len(points)]):
        part = points[start:end]
        total += float((part - part.mean()).square().sum()) if len(part) else 0.0
    return total


def trained(data_dir: Path) -> dict[str, Tensor]:
    path = data_dir / "squeezenet_coreml" / "squeezenet_v11_fp16.npz"
    if not path.is_file():
        pytest.skip("the trained SqueezeNet is not here")
    with np.load(path) as arrays:
        return {
            name.removesuffix(".weight"): torch.from_numpy(arrays[name].astype(np.float32)).ravel()
            for name in arrays.files
            if name.endswith(".weight")
        }


@pytest.mark.parametrize("clusters", [2, 16, 32, 256])
@pytest.mark.parametrize("count", [5_000, 100_000])
@pytest.mark.parametrize("kind", ["heavy", "pruned", "normal", "uniform"])
def test_within_a_thousandth_of_the_optimum(kind: str, count: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = {
        "heavy": lambda: heavy_tailed(count),
        "pruned": lambda: (v := heavy_tailed(2 * count))[v.abs() > 0.7],
        "normal": lambda: torch.randn(count, generator=generator),
        "uniform": lambda: torch.rand(count, generator=generator),
    }[kind]()
    found = squared_error(values, fit_kmeans(values, clusters))
    assert found <= 1.001 * optimal_error(values, clusters)


def test_a_value_that_most_weights_have_leaves_the_others_their_share() -> None:
    generator = torch.Generator().manual_seed(0)
    others = 1 + 1e-4 * torch.randn(2000, generator=generator)
    values = torch.cat([torch.full((200_000,), 0.01), others, torch.tensor([50.0])])
    found = squared_error(values, fit_kmeans(values, 256))
    # The value and the outlier cost nothing, and two clusters.
    assert found <= 1.01 * optimal_error(others, 254)


@pytest.mark.parametrize("clusters", [32, 256])
def test_every_trained_layer_is_within_a_thousandth_of_the_optimum(
    data_dir: Path, clusters: int
) -> None:
    for name, values in trained(data_dir).items():
        found = squared_error(values, fit_kmeans(values, clusters))
        # Half-precision weights take few values: some layers have an optimum of 0.
        assert found <= 1.001 * optimal_error(values, clusters) + 1e-12, name


@pytest.mark.parametrize("clusters", [32, 256])
def test_never_worse_than_faiss(data_dir: Path, clusters: int) -> None:
    faiss = pytest.importorskip("faiss")
    for name, values in trained(data_dir).items():
        if len(values) < clusters:
            continue
        theirs = faiss.Kmeans(1, clusters, niter=30, nredo=1, seed=1, min_points_per_centroid=1)
        theirs.train(values[:, None].numpy())
        centroids = torch.from_numpy(theirs.centroids.ravel().copy())
        ours = squared_error(values, fit_kmeans(values, clusters))
        assert ours <= squared_error(values, centroids) * (1 + 1e-6) + 1e-12, name


@pytest.mark.parametrize("clusters", [32, 256])
def test_never_worse_than_scikit_learn(data_dir: Path, clusters: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    for name, values in trained(data_dir).items():
        if not clusters <= len(values) <= 100_000:  # it takes its time
            continue
        theirs = cluster.KMeans(clusters, n_init=1, random_state=0).fit(values[:, None].numpy())
        ours = squared_error(values, fit_kmeans(values, clusters))
        assert ours <= theirs.inertia_ * (1 + 1e-5) + 1e-12, name


def test_never_worse_than_core_ml(data_dir: Path) -> None:
    path = data_dir / "squeezenet_coreml" / "squeezenet_v11_lut8.npz"
    layers = trained(data_dir)
    with np.load(path) as theirs:
        for name, values in layers.items():
            codebook = torch.from_numpy(theirs[f"{name}.codebook"])
            codes = torch.from_numpy(theirs[f"{name}.codes"].ravel().astype(np.int64))
            error = float((values.double() - codebook.double()[codes]).square().sum())
            assert squared_error(values, fit_kmeans(values, 256)) <= error, name


# ---- where k-means starts ----


def lloyd(values: Tensor, centroids: Tensor) -> Tensor:
    """Lloyd's iteration in plain torch, float64, to its end."""
    points = values.double()
    while True:
        codes = (points[:, None] - centroids).abs().argmin(1)  # the lower one of two as near
        counts = torch.bincount(codes, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add(0, codes, points)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            return moved
        centroids = moved


@pytest.mark.parametrize("clusters", [2, 7, 64])
@pytest.mark.parametrize("init", ["linear", "density"])
def test_lloyd_from_stated_starts(init: str, clusters: int) -> None:
    values = heavy_tailed(3000)
    start = {
        "linear": torch.linspace(0, 1, clusters).double() * (values.max() - values.min())
        + values.min(),
        "density": values.sort()
        .values[((torch.arange(clusters) + 0.5) / clusters * (len(values) - 1)).long()]
        .double(),
    }[init]
    expected = lloyd(values, start)
    found = fit_kmeans(values, clusters, init=init)
    # The last bits of a start can decide a tie; the error cannot tell.
    error, rival = squared_error(values, found), squared_error(values, expected.float())
    assert error == pytest.approx(rival, rel=2e-2)


@pytest.mark.parametrize("init", ["linear", "density", "kmeans++"])
def test_an_init_ends_where_lloyd_has_nothing_to_move(init: str) -> None:
    values = heavy_tailed(40_000)
    found = fit_kmeans(values, 32, init=init)
    assert (found.diff() >= 0).all()
    _, sums, counts = ops.kmeans_assign(values, found)
    used = counts > 0
    torch.testing.assert_close((sums / counts)[used].float(), found[used], rtol=1e-5, atol=1e-6)


def test_kmeans_plus_plus_is_seeded() -> None:
    values = heavy_tailed(20_000)
    first = fit_kmeans(values, 32, init="kmeans++", seed=1)
    assert torch.equal(first, fit_kmeans(values, 32, init="kmeans++", seed=1))
    assert not torch.equal(first, fit_kmeans(values, 32, init="kmeans++", seed=2))


@pytest.mark.parametrize("clusters", [32, 256])
def test_no_init_beats_the_optimal_one_on_trained_layers(data_dir: Path, clusters: int) -> None:
    for name, values in trained(data_dir).items():
        best = squared_error(values, fit_kmeans(values, clusters))
        for init in ("linear", "density", "kmeans++"):
            rival = squared_error(values, fit_kmeans(values, clusters, init=init))
            assert best <= rival * (1 + 1e-6) + 1e-12, (name, init)


@pytest.mark.parametrize("init", INITS)
def test_inits_of_few_values(init: str) -> None:
    for values in (torch.zeros(0), torch.ones(3), torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])):
        for clusters in (1, 2, 4, 8):
            found = fit_kmeans(values, clusters, init=init)
            assert found.shape == (clusters,)
            assert torch.isfinite(found).all()
            assert (found.diff() >= 0).all()


def test_an_init_reaches_the_layer() -> None:
    weight = heavy_tailed(4000).reshape(40, 100)
    errors = {}
    for init in INITS:
        config = pk.CompressConfig(bits=4, init=init)
        errors[init] = float((config.compress_tensor(weight).to_dense() - weight).norm())
    assert min(errors, key=errors.get) == "optimal"
    assert len(set(errors.values())) == 4
    with pytest.raises(ValueError, match=r"init is 'random', expected one of optimal, linear"):
        pk.CompressConfig(init="random")
    with pytest.raises(ValueError, match=r"init is 'linear' with method 'uniform'"):
        pk.CompressConfig(init="linear", method="uniform")
    with pytest.raises(ValueError, match=r"init is 'random', expected one of 'optimal'"):
        fit_kmeans(weight, 4, init="random")


# ---- entropy-constrained ----


def cost(values: Tensor, codes: Tensor, book: Tensor, price: float) -> tuple[float, float, float]:
    """Mean squared error, bits a code, and the sum that is minimised, in plain torch."""
    error = float((values.double() - book.double()[codes.int()]).square().mean())
    share = torch.bincount(codes.int()).double() / len(codes)
    share = share[share > 0]
    bits = float(-(share * share.log2()).sum())
    return error, bits, error + price * float(values.double().square().mean()) * bits


@pytest.mark.parametrize("clusters", [1, 2, 32, 256])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 0.3])
def test_each_value_has_the_cheapest_centroid(clusters: int, penalty: float) -> None:
    values = heavy_tailed(20_000)
    book, boundaries = fit_entropy_constrained(values, clusters, penalty)
    assert (book.diff() >= 0).all()
    assert (boundaries.diff() >= 0).all()
    codes = assign(values, boundaries)
    counts = torch.bincount(codes.int(), minlength=clusters).double()
    price = penalty * float(values.double().square().mean())
    lengths = -(counts / counts.sum()).log2()  # infinite for a code that is not used
    squares = (values.double()[:, None] - book.double()).square()
    costs = squares + price * torch.where(counts > 0, lengths, torch.inf)
    chosen = costs.gather(1, codes.long()[:, None])[:, 0]
    # The lengths moved a little with the last assignment.
    assert float(chosen.mean()) <= float(costs.min(1).values.mean()) * 1.001
    means = torch.zeros(clusters).double().index_add(0, codes.int(), values.double()) / counts
    used = counts > 0
    torch.testing.assert_close(book[used].double(), means[used], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [5, 8])
def test_it_trades_error_for_bits_and_beats_fewer_clusters(bits: int) -> None:
    values = heavy_tailed(200_000)
    plain = fit_kmeans(values, 1 << bits)
    last = cost(values, ops.kmeans_assign(values, plain)[0], plain, 0.0)
    for penalty in (1e-3, 1e-2, 1e-1):
        book, boundaries = fit_entropy_constrained(values, 1 << bits, penalty)
        now = cost(values, assign(values, boundaries), book, penalty)
        before = cost(values, ops.kmeans_assign(values, plain)[0], plain, penalty)
        assert now[2] < before[2]
        assert now[0] > last[0]
        assert now[1] < last[1]
        last = now
        # k-means of any size that spends no fewer bits than this leaves more error.
        for size in range(1, bits):
            fewer = fit_kmeans(values, 1 << size)
            rival = cost(values, ops.kmeans_assign(values, fewer)[0], fewer, 0.0)
            assert rival[0] > now[0] or rival[1] > now[1]


def test_a_price_of_nothing_is_k_means() -> None:
    values = heavy_tailed(5000)
    book, boundaries = fit_entropy_constrained(values, 32, 0.0)
    assert torch.equal(book, fit_kmeans(values, 32))
    assert torch.equal(assign(values, boundaries), ops.kmeans_assign(values, book)[0])


@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.ones(5), torch.tensor([1.0, 1.0, 2.0, 7.0]), torch.zeros(1000)]
)
def test_few_values(values: Tensor) -> None:
    for penalty in (1e-3, 1.0):
        book, boundaries = fit_entropy_constrained(values, 8, penalty)
        assert book.shape == (8,)
        assert boundaries.shape == (7,)
        assert torch.isfinite(book).all()
        codes = assign(values, boundaries)
        assert codes.shape == values.shape
        if penalty < 0.1 and len(values):
            assert torch.allclose(book[codes.int()], values)


def test_bad_prices_are_refused() -> None:
    for bad in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"entropy_lambda is .*, expected a finite number"):
            fit_entropy_constrained(torch.ones(3), 2, bad)
        with pytest.raises(ValueError, match=r"entropy_lambda is .*, expected a finite number"):
            pk.CompressConfig(entropy_lambda=bad)
    with pytest.raises(ValueError, match=r"entropy_lambda is 0.1 with method 'uniform'"):
        pk.CompressConfig(entropy_lambda=0.1, method="uniform")
    mixed = pk.CompressConfig(entropy_lambda=0.1, layers={"Linear": {"method": "uniform"}})
    assert mixed.for_layer("a", torch.nn.Linear(1, 1)).entropy_lambda == 0


def test_a_model_spends_error_where_it_is_asked_to(tmp_path: Path) -> None:
    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        layers = torch.nn.Linear(300, 200), torch.nn.Linear(200, 100)
        for layer in layers:
            layer.weight.data = heavy_tailed(layer.weight.numel()).reshape(layer.weight.shape)
        return torch.nn.Sequential(*layers)

    sizes, errors = [], []
    for penalty in (0.0, 1e-3, 1e-2):
        small = model()
        report = pk.compress_(small, {"bits": 5, "layers": {"0": {"entropy_lambda": penalty}}})
        sizes.append(pk.save(small, tmp_path / "a"))
        errors.append([row.relative_error for row in report.layers])
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0][0] < errors[1][0] < errors[2][0]
    assert errors[0][1] == errors[1][1] == errors[2][1]
