"""NetVLAD pooling against its definition, its initialisation, and the k-means beneath."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from placekern.vpr.netvlad import NetVLAD, kmeans, normalize


def random_netvlad(clusters: int, dim: int) -> NetVLAD:
    pool = NetVLAD(clusters, dim)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        pool.assign.normal_(0, 3, generator=generator)
        pool.centroids.normal_(generator=generator)
    return pool


def naive(pool: NetVLAD, features: torch.Tensor) -> torch.Tensor:
    # The textbook form, with its B x D x K x N residuals.
    x = F.normalize(features.flatten(2).double(), dim=1)
    a = torch.einsum("kd,bdn->bkn", pool.assign.double(), x).softmax(1)
    centroids = pool.centroids.double()
    residuals = x[:, :, None, :] - centroids.T[None, :, :, None]
    v = (a[:, None] * residuals).sum(3)  # [B, D, K]
    v = F.normalize(v, dim=1)
    return F.normalize(v.flatten(1), dim=1)  # D-major: row-major [D, K]


def test_matches_the_textbook_formula() -> None:
    pool = random_netvlad(5, 7)
    features = torch.randn(3, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(features).double(), naive(pool, features), rtol=0, atol=1e-6)


def test_one_location_gives_a_hand_computed_descriptor() -> None:
    pool = NetVLAD(2, 2)
    with torch.no_grad():
        pool.assign.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        pool.centroids.copy_(torch.tensor([[0.0, 0.0], [0.6, 0.0]]))
    # x = (3, 4) becomes (0.6, 0.8); residuals (0.6, 0.8) and (0, 0.8); each normalised; D-major.
    expected = torch.tensor([[0.6, 0.0, 0.8, 1.0]]) / math.sqrt(2)
    torch.testing.assert_close(pool(torch.tensor([[[3.0], [4.0]]])), expected)


def test_descriptors_do_not_depend_on_the_order_of_locations_or_the_batch() -> None:
    pool = random_netvlad(4, 6)
    features = torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(0))
    shuffled = features[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(pool(features), pool(shuffled), rtol=0, atol=1e-6)
    torch.testing.assert_close(pool(features)[1], pool(features[1:])[0], rtol=0, atol=1e-6)


def test_scale_of_a_local_descriptor_does_not_matter() -> None:
    pool = random_netvlad(4, 6)
    features = torch.randn(1, 6, 30, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(1, 1, 30, generator=torch.Generator().manual_seed(3)) * 100 + 0.1
    torch.testing.assert_close(pool(features), pool(features * scales), rtol=0, atol=1e-6)


def test_zero_features_and_empty_clusters_stay_finite() -> None:
    pool = random_netvlad(3, 4)
    with torch.no_grad():
        pool.assign[0] = -1e4
        pool.assign[1:] = 1e4
    features = torch.ones(1, 4, 2, 2)
    features[..., 0] = 0
    assert torch.isfinite(pool(features)).all()
    assert torch.isfinite(pool(torch.zeros(1, 4, 2, 2))).all()


def test_gradients_are_those_of_the_function() -> None:
    pool = random_netvlad(3, 4).double()
    features = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, assign, centroids: torch.func.functional_call(
            pool, {"assign": assign, "centroids": centroids}, (x,)
        ),
        (features, pool.assign, pool.centroids),
    )


def test_init_separates_the_two_nearest_clusters_by_a_factor_of_a_hundred() -> None:
    generator = torch.Generator().manual_seed(0)
    descriptors = torch.randn(600, 16, generator=generator)
    pool = NetVLAD(8, 16).init_(descriptors, seed=3)
    logits = F.normalize(descriptors, dim=1) @ pool.assign.T
    first, second = logits.topk(2, dim=1).values.unbind(1)
    assert (first - second).mean().item() == pytest.approx(math.log(100), rel=1e-4)
    cosines = F.cosine_similarity(pool.assign, pool.centroids, dim=1)
    torch.testing.assert_close(cosines, torch.ones(8))
    # Centroids are raw means of unit vectors, so shorter than one.
    assert (pool.centroids.norm(dim=1) < 1).all()


def test_init_is_deterministic_by_seed() -> None:
    descriptors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (NetVLAD(6, 8).init_(descriptors, seed) for seed in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_init_with_one_cluster_is_a_plain_mean() -> None:
    descriptors = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    pool = NetVLAD(1, 4).init_(descriptors)
    torch.testing.assert_close(pool.centroids[0], F.normalize(descriptors, dim=1).mean(0))


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        (torch.rand(3, 8), "at least as many points, got 3"),
        (torch.rand(20, 7), r"\[n, 8\], got \[20, 7\]"),
        (torch.ones(20, 8), "too alike"),
        (torch.full((20, 8), torch.nan), "finite"),
    ],
)
def test_init_refuses_what_it_cannot_cluster(descriptors: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetVLAD(4, 8).init_(descriptors)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, 8, H, W\], got \[1, 7, 2, 2\]"):
        NetVLAD(4, 8)(torch.rand(1, 7, 2, 2))
    with pytest.raises(ValueError, match="must be positive"):
        NetVLAD(0, 8)


def test_kmeans_finds_separated_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(6, 12)
    points = centres.repeat(40, 1) + 0.1 * torch.randn(240, 12, generator=generator)
    found = kmeans(points, 6, seed=5)
    distances = torch.cdist(centres, found)
    assert distances.min(1).values.max() < 0.2
    assert sorted(distances.argmin(1).tolist()) == list(range(6))


def test_kmeans_ends_at_a_fixed_point() -> None:
    points = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    centroids = kmeans(points, 7, seed=0)
    assignments = torch.cdist(points, centroids).argmin(1)
    means = torch.stack([points[assignments == k].mean(0) for k in range(7)])
    torch.testing.assert_close(centroids, means, rtol=0, atol=1e-5)


def test_kmeans_refills_a_cluster_without_points() -> None:
    # Two distinct values, three clusters: the third starts on a copy of another and owns nothing,
    # and the mean of nothing would be 0.
    points = torch.tensor([[5.0], [5.0], [7.0], [7.0]])
    centroids = kmeans(points, 3, seed=0)
    assert set(centroids.flatten().tolist()) == {5.0, 7.0}


def test_normalize_keeps_zero() -> None:
    rows = normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
