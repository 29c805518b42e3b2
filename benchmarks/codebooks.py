"""How far each start of k-means ends from the best: `python -m benchmarks.kmeans_inits`.

Squared errors, divided by those of init "optimal": medians and worst cases over layers.
scikit-learn and faiss are asked too, where they are installed. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from placekern import ops
from placekern.compress import fit_kmeans

INITS = ("linear", "density", "kmeans++")
FEW = 100_000  # weights; the other tools take their time


def layers(weights: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Trained layers of an .npz, or heavy-tailed random ones where none is given."""
    if weights is None:
        generator = np.random.default_rng(0)
        for count in (2_000, 50_000, 1_000_000):
            values = generator.standard_t(4, count).astype(np.float32)
            yield f"Student t, {count:,}", torch.from_numpy(values)
        return
    with np.load(weights) as arrays:
        for name in arrays.files:
            if name.endswith(".weight"):
                yield name, torch.from_numpy(arrays[name].astype(np.float32)).ravel()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help=".npz with arrays named <layer>.weight")
    args = parser.parse_args()
    ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _, values in layers(args.weights):
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


if __name__ == "__main__":
    main()
