"""kmeans_assign on a GPU, and on the emulated one, against plain torch.

One surprise: most tests call the kernel below the op. On the emulator points are CPU tensors, which
the op gives to the CPU's own kernel.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Gpu
from torch import Tensor

from placekern import _native, ops
from placekern.weight import midpoints

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149
INFINITY = float("inf")
NAN = float("nan")


def assign(gpu: Gpu, points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernel on points [n] at the address they have; results come back to the CPU."""
    codes = torch.full(points.shape, 99, dtype=torch.uint8, device=points.device)
    sums = torch.full((len(centroids),), NAN, dtype=torch.float64, device=points.device)
    counts = torch.full((len(centroids),), -1, dtype=torch.int64, device=points.device)
    _native.device_kmeans_assign(points, gpu.tensor(centroids), codes, sums, counts)
    return codes.cpu(), sums.cpu(), counts.cpu()


def expected(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Comparisons with every boundary; sums in float64."""
    order = torch.argsort(centroids, stable=True)
    codes = order[(points[:, None] > midpoints(centroids[order])).sum(1)]
    sums = torch.zeros(len(centroids), dtype=torch.float64).index_add(0, codes, points.double())
    return codes.to(torch.uint8), sums, torch.bincount(codes, minlength=len(centroids))


def check(gpu: Gpu, points: Tensor, centroids: Tensor, finite: bool = True) -> None:
    codes, sums, counts = assign(gpu, gpu.tensor(points), centroids)
    right = expected(points, centroids)
    assert torch.equal(codes, right[0])
    assert torch.equal(counts, right[2])
    if finite:
        sizes = torch.zeros_like(sums).index_add(0, right[0].long(), points.double().abs())
        assert ((sums - right[1]).abs() <= 1e-6 * sizes).all()
    else:
        assert torch.equal(sums.isnan(), right[1].isnan())
        assert torch.equal(sums.isinf(), right[1].isinf())


@pytest.mark.parametrize("clusters", [1, 2, 3, 16, 31, 32, 33, 64, 100, 255, 256])
@pytest.mark.parametrize("n", [0, 1, 5, 511, 512, 517, 2049])
def test_few_points(gpu: Gpu, n: int, clusters: int) -> None:
    check(gpu, torch.randn(n), torch.randn(clusters))  # centroids in no order


@pytest.mark.parametrize("clusters", [2, 32, 256])
def test_many_points_in_many_tiles(gpu: Gpu, clusters: int) -> None:
    check(gpu, torch.randn(140_001), torch.randn(clusters).sort().values)
    check(gpu, torch.randn(70_003), torch.randn(clusters))


@pytest.mark.parametrize("head", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 515, 4096])
def test_points_and_codes_at_any_address(gpu: Gpu, n: int, head: int) -> None:
    points, centroids = torch.randn(n), torch.randn(50)
    memory = torch.zeros(n + 8, device=gpu.device)
    memory[head : head + n] = points.to(gpu.device)
    right = expected(points, centroids)
    for code_head in range(4):
        codes = torch.full((n + 8,), 77, dtype=torch.uint8, device=gpu.device)
        sums = torch.empty(50, dtype=torch.float64, device=gpu.device)
        counts = torch.empty(50, dtype=torch.int64, device=gpu.device)
        at = slice(code_head, code_head + n)
        _native.device_kmeans_assign(
            memory[head : head + n], gpu.tensor(centroids), codes[at], sums, counts
        )
        assert torch.equal(codes[at].cpu(), right[0])
        assert torch.equal(counts.cpu(), right[2])
        assert (codes[:code_head] == 77).all()
        assert (codes[code_head + n :] == 77).all()


def near(boundaries: Tensor) -> Tensor:
    """Each boundary, the floats next to it, and points between them."""
    infinity = torch.full_like(boundaries, INFINITY)
    around = [boundaries, boundaries.nextafter(infinity), boundaries.nextafter(-infinity)]
    return torch.cat(
        [*around, *(a.nextafter(infinity) for a in around), *midpoints(boundaries)[None]]
    )


CENTROIDS: dict[str, Tensor] = {
    "equal steps": torch.linspace(-1, 1, 256),
    "one far outlier": torch.cat([torch.linspace(-1, 1, 255), torch.tensor([1e6])]),
    "outliers on both sides": torch.cat(
        [torch.tensor([-1e30, -1e20]), torch.linspace(-1, 1, 200), torch.tensor([1e9, 1e30])]
    ),
    "all in one bucket but one": torch.cat([torch.arange(255) * SMALLEST, torch.ones(1)]),
    "the largest repeated": torch.cat([torch.tensor([-1.0, 0.0, 0.5]), torch.ones(253)]),
    "the smallest repeated": torch.cat([-torch.ones(100), torch.tensor([0.0, 0.5])]),
    "one in the middle repeated": torch.cat(
        [torch.linspace(-1, 0, 20), torch.zeros(30), torch.linspace(0, 1, 20)]
    ),
    "all equal": torch.full((256,), 0.25),
    "all zero": torch.zeros(7),
    "zeros of both signs": torch.tensor([0.0, -0.0, 0.0, -0.0]),
    "many zeros of both signs": torch.tensor([0.0, -0.0, 1.0, -0.0]).repeat(64),
    "signs of the smallest and of zero": torch.tensor([-SMALLEST, -0.0, SMALLEST, 0.0]).repeat(9),
    "smallest steps": torch.arange(-128, 128) * SMALLEST,
    "neighbouring floats": (torch.ones(1).view(torch.int32) + torch.arange(256).int()).view(
        torch.float32
    ),
    "far from zero": 1e6 + torch.arange(256) / 16,
    "all floats": torch.cat(
        [
            torch.tensor([-LARGEST, LARGEST]),
            torch.logspace(-44, 38, 100),
            -torch.logspace(-44, 38, 100),
        ]
    ),
    "the largest two": torch.tensor([-LARGEST, LARGEST]),
    "the largest three": torch.tensor([LARGEST, -LARGEST, 0.0]),
    "cubes": torch.linspace(-1, 1, 256) ** 9,
    "infinite": torch.tensor([-INFINITY, -1.0, 0.0, INFINITY, INFINITY]),
    "both infinities alone": torch.tensor([INFINITY, -INFINITY, INFINITY, -INFINITY]),
    "NaN among them": torch.tensor([1.0, NAN, -1.0, NAN, 2.0]),
    "NaN of both signs": torch.tensor([NAN, -0.0, -NAN, 0.0, -INFINITY, INFINITY]).repeat(42),
    "NaN behind infinity": torch.tensor([INFINITY, NAN]).repeat(128),
    "ties of three": torch.linspace(-1, 1, 85).repeat(3),
    "NaN alone": torch.tensor([NAN, NAN, NAN]),
}


@pytest.mark.parametrize("name", CENTROIDS)
def test_codes_are_exact_whatever_the_boundaries(gpu: Gpu, name: str) -> None:
    centroids = CENTROIDS[name][torch.randperm(len(CENTROIDS[name]))]
    boundaries = midpoints(centroids.sort().values).nan_to_num()
    spread = torch.tensor([0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST])
    special = torch.tensor([NAN, -NAN, INFINITY, -INFINITY])
    bits = torch.randint(-(2**31), 2**31 - 1, (600,)).int().view(torch.float32)  # of all sizes
    points = torch.cat([near(boundaries), spread, special, bits])
    points = torch.cat([points, points.flip(0)[: 512 - len(points) % 512]])  # whole tiles
    check(gpu, points, centroids, finite=False)


def test_the_same_codes_as_on_the_cpu(gpu: Gpu) -> None:
    points = torch.cat([torch.randn(5000), torch.tensor([NAN, INFINITY, -INFINITY, 0.0])])
    for centroids in (torch.randn(256), torch.tensor([0.0, NAN, INFINITY]), torch.zeros(3)):
        codes, sums, counts = assign(gpu, gpu.tensor(points), centroids)
        cpu = ops.kmeans_assign(points, centroids)
        assert torch.equal(codes, cpu[0])
        assert torch.equal(counts, cpu[2])
        torch.testing.assert_close(sums, cpu[1], rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("clusters", [1, 2, 32, 256])
def test_sums_stay_accurate_when_all_points_are_equal(gpu: Gpu, clusters: int) -> None:
    """A single float32 sum would be 0.3 % off; many, moved to float64 in time, are not."""
    points = torch.full((300_000,), 0.1)
    _, sums, _ = assign(gpu, gpu.tensor(points), torch.linspace(-1, 1, clusters))
    right = points.double().sum()
    assert abs(sums.sum() - right) <= 2e-5 * right


def test_sums_move_to_float64_before_they_lose_bits(gpu: Gpu) -> None:
    """64 of each fill the 24 bits of a float32; on 4 multiprocessors a lane gets 150 of each."""
    centroids = torch.tensor([262_143.0, 262_141.0, 262_139.0, 262_137.0])
    points = centroids.repeat(312_500)
    _, sums, counts = assign(gpu, gpu.tensor(points), centroids)
    assert sums.tolist() == (312_500 * centroids.double()).tolist()
    assert counts.tolist() == [312_500] * 4


def test_whole_numbers_are_summed_exactly(gpu: Gpu) -> None:
    points = torch.randint(-1000, 1000, (200_003,)).float()
    centroids = torch.randint(-1000, 1000, (256,)).float()
    _, sums, _ = assign(gpu, gpu.tensor(points), centroids)
    assert torch.equal(sums, expected(points, centroids)[1])


@pytest.mark.parametrize("size", [LARGEST, 2.0**100, 2.0**-126, SMALLEST])
def test_sums_of_the_largest_and_smallest_floats(gpu: Gpu, size: float) -> None:
    points = torch.tensor([size, -size]).repeat_interleave(30_000)
    _, sums, _ = assign(gpu, gpu.tensor(points), torch.tensor([size, -size, 0.0]))
    right = torch.tensor([size, -size, 0.0], dtype=torch.float64) * 30_000
    torch.testing.assert_close(sums, right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clusters", [2, 256])
def test_equal_codes_among_four_neighbours(gpu: Gpu, clusters: int) -> None:
    """Every pattern of equal and different codes among the four points of a 16-byte load."""
    patterns = torch.cartesian_prod(*[torch.arange(4)] * 4)
    picked = torch.tensor([0, clusters // 3, clusters // 2, clusters - 1])
    centroids = torch.arange(clusters).float()
    points = picked[patterns].float().reshape(-1).repeat(3)
    codes, sums, counts = assign(gpu, gpu.tensor(points), centroids)
    assert torch.equal(codes.float(), points)
    assert torch.equal(sums, counts * centroids.double())
    assert torch.equal(counts, torch.bincount(codes.long(), minlength=clusters))


def test_results_are_the_same_every_time(gpu: Gpu) -> None:
    points, centroids = gpu.tensor(torch.randn(100_000)), torch.randn(256)
    first = assign(gpu, points, centroids)
    for _ in range(2):
        for one, other in zip(assign(gpu, points, centroids), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kilobytes", [64, 99, 163])
def test_devices_with_less_shared_memory(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    if gpu.device.type == "cuda":
        pytest.skip("a real GPU has the memory it has")
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", str(kilobytes * 1024))
    for clusters in (1, 32, 200, 256):
        check(gpu, torch.randn(20_000), torch.randn(clusters))


def test_a_cuda_tensor_takes_the_kernel_without_waiting(gpu: Gpu) -> None:
    if gpu.device.type == "cpu":
        pytest.skip("the op takes the kernel for CUDA tensors only")
    points, centroids = torch.randn(10_000), torch.randn(256)
    on_device = points.cuda(), centroids.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes, sums, counts = ops.kmeans_assign(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = ops.kmeans_assign(points, centroids)
    assert torch.equal(codes.cpu(), right[0])
    assert torch.equal(counts.cpu(), right[2])
    torch.testing.assert_close(sums.cpu(), right[1], rtol=1e-5, atol=1e-4)


def test_a_cuda_graph_can_hold_it(gpu: Gpu) -> None:
    if gpu.device.type == "cpu":
        pytest.skip("the emulator has no graphs")
    points, centroids = torch.randn(10_000, device="cuda"), torch.randn(256, device="cuda")
    ops.kmeans_assign(points, centroids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.kmeans_assign(points, centroids)
    points.copy_(torch.randn(10_000))
    graph.replay()
    for one, other in zip(results, ops.kmeans_assign(points, centroids), strict=True):
        assert torch.equal(one, other)
