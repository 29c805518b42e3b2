"""The multiple-choice knapsack against trying everything, and against a bound for many layers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from placekern.compress.sensitivity_knapsack import Options, pareto, solve


def random_layers(generator: np.random.Generator) -> list[Options]:
    sizes = generator.integers(1, 7, generator.integers(1, 6))
    scale = generator.choice([1, 10], len(sizes))
    return [
        (generator.random(n) * s, generator.random(n))
        for n, s in zip(sizes, scale.tolist(), strict=True)
    ]


def cost_of(layers: list[Options], picks: Any) -> float:
    return sum(costs[pick] for (_, costs), pick in zip(layers, picks, strict=True))


def weight_of(layers: list[Options], picks: Any) -> float:
    return sum(weights[pick] for (weights, _), pick in zip(layers, picks, strict=True))


def test_the_knapsack_is_as_good_as_trying_everything() -> None:
    generator = np.random.default_rng(0)
    worse = 0
    for _ in range(200):
        layers = random_layers(generator)
        low = sum(weights.min() for weights, _ in layers)
        high = sum(weights.max() for weights, _ in layers)
        limit = low + (high - low) * generator.random()
        every = itertools.product(*(range(len(weights)) for weights, _ in layers))
        best = min(cost_of(layers, p) for p in every if weight_of(layers, p) <= limit)
        picks = solve(layers, limit)
        assert weight_of(layers, picks) <= limit * (1 + 1e-8)
        worse += cost_of(layers, picks) > best * (1 + 1e-6)
    assert worse <= 2  # exchanges of three layers at a time are not tried


def test_the_knapsack_of_many_layers_is_near_the_bound_of_its_relaxation() -> None:
    generator = np.random.default_rng(1)
    layers = []
    for _ in range(60):
        weights = generator.random(30) * 100
        layers.append((weights, np.exp(-weights / 20) * generator.random() * (1 + 0.1 * weights)))
    limit = 0.4 * sum(weights.max() for weights, _ in layers)
    # For any price of a unit of weight, the cheapest options give a lower bound.
    bound = max(
        sum((costs + price * weights).min() for weights, costs in layers) - price * limit
        for price in np.geomspace(1e-6, 1, 2000)
    )
    picks = solve(layers, limit)
    assert weight_of(layers, picks) <= limit
    assert bound <= cost_of(layers, picks) <= 1.002 * bound


def test_edges_of_the_knapsack() -> None:
    layers = [
        (np.array([3.0, 1.0, 2.0]), np.array([0.0, 5.0, 1.0])),
        (np.array([1.0]), np.array([2.0])),
    ]
    assert solve(layers, 1.9) is None
    assert solve(layers, 2) == [1, 0]
    assert solve(layers, 3) == [2, 0]
    assert solve(layers, math.inf) == [0, 0]
    assert pareto(np.array([1.0, 1.0, 2.0, 3.0]), np.array([4.0, 3.0, 3.0, 1.0])).tolist() == [1, 3]
