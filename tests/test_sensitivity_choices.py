"""The choices of a layer: drops without noise, and the bytes that compression really takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from placekern import CompressConfig
from placekern.compress import sensitivity_choices
from placekern.compress.sensitivity import Sensitivity, sensitivity
from placekern.compress.sensitivity_choices import choices, monotone, predicted_drops, resolution
from placekern.io.streams import encoded_bytes

pytest.importorskip("zstandard")

BITS, SPARSITIES = (8, 5, 3, 2), (0.3, 0.6, 0.9)


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 150)).eval()


@pytest.fixture(scope="module")
def found(model: nn.Sequential) -> Sensitivity:
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    target = model(x).detach()

    @torch.no_grad()
    def metric(other: nn.Module) -> float:
        return 1 - float((other(x) - target).square().mean())

    return sensitivity(model, metric, bits=BITS, sparsities=SPARSITIES)


def test_drops_become_monotone() -> None:
    assert monotone([]) == []
    assert monotone([0.0, 0.1, 0.3]) == [0.0, 0.1, 0.3]
    assert monotone([0.1, 0.5, 0.3]) == pytest.approx([0.1, 0.4, 0.4])
    assert monotone([-0.2, -0.1, 0.4]) == [0.0, 0.0, 0.4]
    assert monotone([0.1, math.inf, 0.3]) == [0.1, math.inf, math.inf]
    drops = np.random.default_rng(0).normal(size=30).cumsum()
    smooth = np.array(monotone(drops.tolist()))
    assert (np.diff(smooth) >= 0).all()
    # Isotonic regression by its definition: max over starts of min over ends of the mean.
    expected = [
        max(min(drops[i : k + 1].mean() for k in range(j, 30)) for i in range(j + 1))
        for j in range(30)
    ]
    assert smooth == pytest.approx(np.maximum(expected, 0))


def test_the_smallest_step_of_the_metric(found: Sensitivity) -> None:
    assert resolution(found.rows) == min(abs(row.drop) for row in found.rows[1:] if row.drop)


def test_choices_are_dense_and_all_pairs_with_their_bytes(
    model: nn.Module, found: Sensitivity
) -> None:
    own = choices(found, "2", model[2], resolution(found.rows))
    assert len(own) == 1 + 4 * (1 + 3)
    assert (own[0].settings, own[0].bytes, own[0].drop) == (None, 4 * 15_000, 0)
    step = resolution(found.rows)
    by_bits, by_sparsity = (
        dict(zip([row.value for row in rows], predicted_drops(rows, step), strict=True))
        for rows in (found.of("2", "bits"), found.of("2", "sparsity"))
    )
    for choice in own[1:]:
        weight = CompressConfig(**choice.settings).compress_tensor(model[2].weight)
        assert choice.bytes == encoded_bytes(weight)
        assert choice.density == weight.density
        expected = by_bits[choice.settings["bits"]]
        expected += by_sparsity.get(choice.settings.get("sparsity"), 0.0)
        assert choice.drop == pytest.approx(expected)


def test_bytes_of_a_large_layer_are_taken_from_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(500, 400)
    with torch.no_grad():
        layer.weight.normal_().mul_(torch.linspace(0.5, 1.5, 400)[:, None])
    found = sensitivity(nn.Sequential(layer), lambda _: 1.0, bits=(8, 3), sparsities=(0.7,))
    exact = choices(found, "0", layer, 1.0)
    monkeypatch.setattr(sensitivity_choices, "_LARGE", 50_000)
    for one, other in zip(exact, choices(found, "0", layer, 1.0), strict=True):
        assert other.bytes == pytest.approx(one.bytes, rel=0.02)
        assert (other.settings, other.density, other.drop) == (one.settings, one.density, one.drop)


def test_a_drop_that_is_not_finite_is_no_choice(model: nn.Module) -> None:
    def metric(other: nn.Module) -> float:
        lost = 1 - float((other[2].weight != 0).double().mean())
        return math.nan if lost > 0.8 else 1 - lost

    found = sensitivity(model, metric, bits=BITS, sparsities=SPARSITIES)
    assert all(
        (choice.settings or {}).get("sparsity") != 0.9
        for choice in choices(found, "2", model[2], 1e-6)
    )
