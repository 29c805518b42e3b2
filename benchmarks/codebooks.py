"""Codebooks by where k-means starts and by group size: `python -m benchmarks.codebooks`.

First squared errors, divided by those of init "optimal": medians and worst cases over layers, with
scikit-learn and faiss where they are installed. Then errors and bytes with several codebooks a
layer, half of the weights pruned. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import placekern as pk
from placekern import ops
from placekern.compress import fit_kmeans
from placekern.io import entropy_report

INITS = ("linear", "density", "kmeans++")
FEW = 100_000  # weights; the other tools take their time


def layers(weights: Path | None) -> Iterator[Tensor]:
    """Trained weights [M, K] of an .npz, or heavy-tailed random ones where none is given."""
    if weights is None:
        generator = np.random.default_rng(0)
        for M, K in ((20, 100), (100, 500), (1000, 1000)):
            yield torch.from_numpy(generator.standard_t(4, (M, K)).astype(np.float32))
        return
    with np.load(weights) as arrays:
        for name in arrays.files:
            if name.endswith(".weight"):
                yield torch.from_numpy(arrays[name].astype(np.float32)).flatten(1)


def squared_error(values: Tensor, centroids: Tensor) -> float:
    codes, _, _ = ops.kmeans_assign(values, centroids)
    return float((values.double() - centroids.double()[codes.int()]).square().sum())


def others(values: Tensor, clusters: int) -> Iterator[tuple[str, Tensor]]:
    """Centroids that other tools find."""
    column = values[:, None].numpy()
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError:
        pass
    else:
        found = KMeans(clusters, n_init=1, random_state=0).fit(column).cluster_centers_
        yield "scikit-learn", torch.from_numpy(found.ravel()).float()
    try:
        import faiss
    except ModuleNotFoundError:
        return
    fit = faiss.Kmeans(1, clusters, niter=25, seed=0, max_points_per_centroid=FEW)
    fit.train(column)
    yield "faiss, 25 iterations", torch.from_numpy(fit.centroids.ravel().copy())


def starts(weights: Path | None) -> None:
    ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
    for weight in layers(weights):
        values = weight.ravel()
        for clusters in (32, 256):
            best = squared_error(values, fit_kmeans(values, clusters))
            if best == 0:
                continue
            found = [(init, fit_kmeans(values, clusters, init=init)) for init in INITS]
            if len(values) <= FEW:
                found += others(values, clusters)
            for name, centroids in found:
                ratios[name, clusters].append(squared_error(values, centroids) / best)
    print("| start | clusters | layers | median | worst |\n|:--|--:|--:|--:|--:|")
    for (name, clusters), found in sorted(ratios.items(), key=lambda item: item[0][1]):
        print(f"| {name} | {clusters} | {len(found)} | {np.median(found):.2f} | {max(found):.2f} |")


def groups(weights: Path | None) -> None:
    print("| bits | group_size | error | kB | of them codebooks |\n|--:|--:|--:|--:|--:|")
    for bits in (2, 3, 4):
        for group_size in (None, 16, 4):
            config = pk.CompressConfig(bits=bits, sparsity=0.5, group_size=group_size)
            error = norm = size = books = 0.0
            for weight in layers(weights):
                compressed = config.compress_tensor(weight)
                kept = weight * config.mask(weight)
                error += float((kept - compressed.to_dense()).square().sum())
                norm += float(kept.square().sum())
                books += compressed.codebook.nbytes
                size += entropy_report(compressed).bytes
            print(
                f"| {bits} | {group_size or 'whole layer'} | {(error / norm) ** 0.5:.3f} | "
                f"{(size + books) / 1e3:,.1f} | {books / 1e3:,.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help=".npz with arrays named <layer>.weight")
    args = parser.parse_args()
    starts(args.weights)
    print()
    groups(args.weights)


if __name__ == "__main__":
    main()
