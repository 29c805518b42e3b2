"""kmeans_assign against the least that plain torch needs for it, and against faiss."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, randn
from benchmarks.gpu.clock import Run
from placekern import _native, ops
from placekern.weight import midpoints

COPY_SHARE = 0.65  # of the bandwidth of a copy, at 5 bytes a point
TARGET = 5.0


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ours; on the emulated device the op itself would take the CPU's kernel."""
    if points.is_cuda:
        return ops.kmeans_assign(points, centroids)
    codes = torch.empty(points.shape, dtype=torch.uint8)
    sums = torch.empty(centroids.shape, dtype=torch.float64)
    counts = torch.empty(centroids.shape, dtype=torch.int64)
    _native.device_kmeans_assign(points, centroids, codes, sums, counts)
    return codes, sums, counts


def kmeans_assign(bench: Bench) -> None:
    """One pass over the weights of a whitening layer."""
    for clusters in (256, 32):
        what = f"kmeans_assign, {clusters} centroids"
        if bench.in_time(what):
            with bench.case(what):
                _kmeans_assign(bench, clusters)


def _kmeans_assign(bench: Bench, clusters: int) -> None:
    n = bench.sizes.points
    points = randn(bench, n)
    centroids = randn(bench, clusters, seed=2).sort().values
    boundaries = midpoints(centroids)
    sums = torch.zeros(clusters, device=bench.device)
    counts = torch.zeros(clusters, device=bench.device, dtype=torch.int64)
    one = torch.ones(1, device=bench.device, dtype=torch.int64).expand(n)

    def bucketize() -> Tensor:
        codes = torch.bucketize(points, boundaries, out_int32=True)
        sums.zero_().index_add_(0, codes, points)
        counts.zero_().index_add_(0, codes, one)
        return codes

    codes = bucketize()
    wanted = torch.zeros(clusters, device=bench.device, dtype=torch.float64)
    for part, code in zip(points.split(1 << 24), codes.split(1 << 24), strict=True):
        wanted.index_add_(0, code, part.double())
    ours = assign(points, centroids)
    assert torch.equal(ours[0], codes.to(torch.uint8)), "codes differ from torch.bucketize"
    assert torch.equal(ours[2], counts), "counts differ from torch.index_add"
    row = bench.compare(
        "kmeans_assign",
        {"weights": f"{n:,}", "centroids": clusters},
        {"ours": lambda: assign(points, centroids)},
        {"bucketize + index_add": bucketize},
        error=bench.check("sums", ours[1], wanted, 1e-5),
        bytes=5 * n,
        target=TARGET,
        rounds=7,  # torch takes some ten milliseconds
    )
    rate = row.bytes / row.times["ours"].us / 1e3
    share = rate / bench.facts["ceilings"]["copy GB/s"]
    bench.facts.setdefault("kmeans_assign", {})[f"{clusters} centroids"] = {
        "GB/s": rate,
        "share of copy": share,
        "target share": COPY_SHARE,
    }
    if clusters == 256:
        _faiss(bench, points, centroids, ours[0])


def _faiss(bench: Bench, points: Tensor, centroids: Tensor, codes: Tensor) -> None:
    """faiss has no pass that adds up too, so that only its assignment is timed."""
    if importlib.util.find_spec("faiss") is None:
        bench.facts["faiss"] = "not installed: not compared"
        return
    import faiss

    if bench.emulated or not hasattr(faiss, "StandardGpuResources"):
        bench.facts["faiss"] = "built for the CPU only: not compared"
        return
    import faiss.contrib.torch_utils  # lets faiss take torch tensors

    resources = faiss.StandardGpuResources()

    def nearest() -> Tensor:
        return faiss.knn_gpu(resources, points[:, None], centroids[:, None], 1)[1]

    assert (nearest().flatten() == codes).float().mean() > 0.999  # ties and its rounding
    runs: dict[str, Run] = {"ours": lambda: assign(points, centroids), "faiss": nearest}
    times = bench.clock.measure_calls(runs, 3)
    bench.facts["faiss"] = {"microseconds": times, "ratio": times["faiss"] / times["ours"]}
