"""The multiple-choice knapsack: of each layer one option, least cost within a limit on weight.

The start is the best point of the relaxed problem (the lower convex hull of each layer's options,
walked from the steepest step on, which is what a Lagrange multiplier would choose); then options
are exchanged, one layer or two at a time, as long as that lowers the cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Options = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of a layer: weights [n] and costs [n], finite."""

_ROUNDING = 1e-9  # of the limit: sums of floats are not exact


def solve(layers: Sequence[Options], limit: float) -> list[int] | None:
    """The option of each layer with the least total cost that was found within the limit.

    Args:
        layers: weights and costs of each layer's options, one at least.
        limit: on the sum of the chosen weights.

    Returns:
        An index a layer; None when even the lightest options weigh more than the limit.
    """
    layers = [(np.asarray(w, np.float64), np.asarray(c, np.float64)) for w, c in layers]
    useful = [pareto(weights, costs) for weights, costs in layers]
    lightest = [int(kept[0]) for kept in useful]
    limit += _ROUNDING * abs(limit)
    if _total(layers, lightest, 0) > limit:
        return None
    found = []
    for picks in (_relaxed(layers, useful, lightest, limit), list(lightest)):
        while moves := _best_moves(layers, useful, picks, limit - _total(layers, picks, 0)):
            for layer, option in moves:
                picks[layer] = option
        found.append(picks)
    return min(found, key=lambda picks: _total(layers, picks, 1))


def pareto(weights: NDArray[np.float64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Options that no other beats in both: weights rise and costs fall along them."""
    order = np.lexsort((costs, weights))
    least = np.minimum.accumulate(costs[order])
    better = np.r_[True, least[1:] < least[:-1]]
    return order[better]


def _total(layers: Sequence[Options], picks: Sequence[int], part: int) -> float:
    """Sum of the chosen weights (part 0) or costs (part 1)."""
    return float(sum(options[part][pick] for options, pick in zip(layers, picks, strict=True)))


def _relaxed(
    layers: Sequence[Options],
    useful: Sequence[NDArray[np.int64]],
    lightest: Sequence[int],
    limit: float,
) -> list[int]:
    """Up the hulls from the lightest options, the most cost saved per weight first."""
    steps = []
    for layer, ((weights, costs), kept) in enumerate(zip(layers, useful, strict=True)):
        hull: list[int] = []
        for option in kept.tolist():
            while len(hull) > 1 and _slope(weights, costs, hull[-2], hull[-1]) >= _slope(
                weights, costs, hull[-1], option
            ):
                hull.pop()
            hull.append(option)
        for before, after in itertools.pairwise(hull):
            steps.append((_slope(weights, costs, before, after), layer, before, after))
    picks = list(lightest)
    slack = limit - _total(layers, picks, 0)
    for _, layer, before, after in sorted(steps):  # of one layer in order: a hull gets flatter
        weights = layers[layer][0]
        step = weights[after] - weights[before]
        if picks[layer] == before and step <= slack:
            picks[layer] = after
            slack -= step
    return picks


def _slope(
    weights: NDArray[np.float64], costs: NDArray[np.float64], before: int, after: int
) -> float:
    return float((costs[after] - costs[before]) / (weights[after] - weights[before]))


def _best_moves(
    layers: Sequence[Options],
    useful: Sequence[NDArray[np.int64]],
    picks: Sequence[int],
    slack: float,
) -> list[tuple[int, int]]:
    """The exchange of one layer's option, or of two layers', that saves most; [] if none saves."""
    layer_of, option_of, heavier, dearer = [], [], [], []
    for layer, ((weights, costs), kept) in enumerate(zip(layers, useful, strict=True)):
        layer_of += [layer] * len(kept)
        option_of += kept.tolist()
        heavier += (weights[kept] - weights[picks[layer]]).tolist()
        dearer += (costs[kept] - costs[picks[layer]]).tolist()
    order = np.argsort(heavier, kind="stable")
    rising = np.asarray(heavier)[order]
    # Of the moves up to each place, the two that save most and are of different layers.
    first, second = -1, -1
    firsts, seconds = [], []
    for move in order.tolist():
        if first < 0 or dearer[move] < dearer[first]:
            if first >= 0 and layer_of[first] != layer_of[move]:
                second = first
            first = move
        elif layer_of[move] != layer_of[first] and (second < 0 or dearer[move] < dearer[second]):
            second = move
        firsts.append(first)
        seconds.append(second)

    scale = max(float(np.abs(costs).max()) for _, costs in layers)
    best, found = -1e-12 * scale, []
    for move in range(len(order)):
        # A layer's own option is among its moves: with it for a partner, one layer changes alone.
        place = int(np.searchsorted(rising, slack - heavier[move], side="right")) - 1
        other = firsts[place] if place >= 0 else -1
        if other >= 0 and layer_of[other] == layer_of[move]:
            other = seconds[place]
        if other < 0 and heavier[move] > slack:
            continue
        saved = dearer[move] + (dearer[other] if other >= 0 else 0.0)
        if saved < best:
            best, found = saved, [move] if other < 0 else [move, other]
    return [(layer_of[move], option_of[move]) for move in found]
