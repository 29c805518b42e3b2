"""A real task, small enough for a test: what one-shot compression loses, the recipe recovers."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest

from placekern import CompressConfig, QuantSparseLinear, compress_

ROOT = Path(__file__).resolve().parents[1]


def test_five_bits_above_70_percent_pruned_recovers_four_fifths_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    digits = importlib.import_module("benchmarks.digits")
    data, test = digits.draw_digits(4000, seed=1), digits.draw_digits(1000, seed=2)
    dense = digits.network()
    digits.train(dense, data, epochs=16, lr=3e-3)
    base = digits.accuracy(dense, test)
    assert base > 0.9

    shot = copy.deepcopy(dense)
    report = compress_(shot, CompressConfig(bits=5, sparsity=0.75))
    before = digits.accuracy(shot, test)
    assert report.pruned > 0.7
    assert base - before > 0.1  # there is something to recover

    trained = copy.deepcopy(dense)
    epochs = 5
    steps = epochs * len(data[0]) // digits.BATCH
    recipe = digits.train(trained, data, epochs, 2e-3, digits.recipe_config(5, 0.75, steps))
    assert recipe.report().pruned > 0.7
    assert type(trained[7]) is QuantSparseLinear
    assert trained[7].bits == 5
    after = digits.accuracy(trained, test)
    assert after - before >= 0.8 * (base - before), (base, before, after)
