"""fit_kmeans on as many weights as AlexNet's whitening layer has; no other way to compare with.

The codebook is asserted: a fit that stops early would be fast, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from placekern import ops
from placekern.compress import fit_kmeans

WEIGHTS = 1 << 26


@pytest.mark.parametrize("clusters", [32, 256])
def test_fit_kmeans(benchmark: Any, clusters: int) -> None:
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.standard_normal(WEIGHTS, np.float32))
    centroids = benchmark.pedantic(lambda: fit_kmeans(values, clusters), rounds=3)
    _, sums, counts = ops.kmeans_assign(values, centroids)
    error = 1 - float((sums.square() / counts).sum()) / float(values.double().square().sum())
    # Panter and Dite: an optimal quantizer of a normal density leaves pi sqrt(3) / 2 / clusters^2.
    assert error < 1.01 * np.pi * 3**0.5 / 2 / clusters**2
