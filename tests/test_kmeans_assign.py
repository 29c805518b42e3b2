"""kmeans_assign against plain torch, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from placekern import ops, reference


@pytest.mark.parametrize("clusters", [1, 2, 3, 16, 31, 32, 33, 100, 255, 256])
@pytest.mark.parametrize("n", [0, 1, 17, 2049, 65_536, 140_001])
def test_agrees_with_the_reference(isa: str, n: int, clusters: int) -> None:
    points, centroids = torch.randn(n), torch.randn(clusters)  # centroids in no order
    codes, sums, counts = ops.kmeans_assign(points, centroids)
    expected = reference.kmeans_assign(points, centroids)
    assert torch.equal(codes, expected[0])
    assert torch.equal(counts, expected[2])
    torch.testing.assert_close(sums, expected[1], rtol=1e-12, atol=1e-9)


def test_the_nearest_centroid_is_found(isa: str) -> None:
    points, centroids = torch.randn(5000), torch.randn(200)
    codes, _, _ = ops.kmeans_assign(points, centroids)
    distance = (points[:, None] - centroids).abs()
    chosen = distance.gather(1, codes.long()[:, None]).squeeze(1)
    assert (chosen - distance.min(1).values).max() < 1e-6


def test_ties_go_to_the_smaller_centroid(isa: str) -> None:
    codes, _, _ = ops.kmeans_assign(torch.tensor([0.5, 1.5, -0.5]), torch.tensor([1.0, 0.0, 2.0]))
    assert codes.tolist() == [1, 0, 1]


def test_repeated_centroids_and_infinite_points(isa: str) -> None:
    points = torch.tensor([float("-inf"), -1.0, 1.0, float("inf")])
    codes, _, counts = ops.kmeans_assign(points, torch.tensor([1.0, 1.0, -1.0, 1.0]))
    assert codes.tolist() == [2, 2, 0, 0] or torch.tensor([1.0, 1.0, -1.0, 1.0])[
        codes.long()
    ].tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert counts.sum() == 4


def test_same_sums_at_every_level_and_number_of_threads() -> None:
    import placekern as pk

    points, centroids = torch.randn(300_001), torch.randn(256)
    before, threads = pk.get_isa(), torch.get_num_threads()
    results = []
    try:
        for isa in pk.available_isas():
            for count in (1, 2, 5):
                pk.set_isa(isa)
                torch.set_num_threads(count)
                results.append(ops.kmeans_assign(points, centroids))
    finally:
        pk.set_isa(before)
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_any_shape_of_points() -> None:
    points = torch.randn(6, 5, 4).permute(2, 0, 1)
    codes, _, _ = ops.kmeans_assign(points, torch.randn(9))
    assert codes.shape == points.shape


def test_opcheck() -> None:
    opcheck(torch.ops.placekern.kmeans_assign.default, (torch.randn(100), torch.randn(7)))


@pytest.mark.parametrize(
    ("points", "centroids", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), torch.zeros(2), "points has dtype torch.float64"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int32), "centroids has dtype"),
        (torch.zeros(3), torch.zeros(0), r"expected \[n\] and \[1 to 256\]"),
        (torch.zeros(3), torch.zeros(257), r"expected \[n\] and \[1 to 256\]"),
    ],
)
def test_bad_input_is_refused(points: torch.Tensor, centroids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.kmeans_assign(points, centroids)
