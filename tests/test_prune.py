"""Masks, schedules, zeros that stay zero through any optimiser, and L1."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from placekern import Recipe
from placekern.compress import PruneSchedule, RecipeConfig
from placekern.compress.l1 import l1_norm, soft_threshold_
from placekern.compress.prune import (
    global_sparsity_masks,
    hold_zeros_,
    pruned_positions,
)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: -0.0 differs from 0.0 here."""
    return tensor.detach().contiguous().view(torch.uint8)


# ---- masks ----


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 1.0])
def test_global_sparsity_is_one_threshold_over_all_weights(sparsity: float) -> None:
    weights = [torch.randn(30, 20), 0.1 * torch.randn(8, 4, 3, 3), torch.randn(5).bfloat16()]
    masks = global_sparsity_masks(weights, sparsity)
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    kept = torch.cat([w.abs().float()[m] for w, m in zip(weights, masks, strict=True)])
    dropped = torch.cat([w.abs().float()[~m] for w, m in zip(weights, masks, strict=True)])
    assert len(dropped) == round(sparsity * sum(w.numel() for w in weights))
    if len(kept) and len(dropped):
        assert dropped.max() <= kept.min()
    if 0 < sparsity < 1:  # the small weights of the second layer give more than their share
        assert (~masks[1]).float().mean() > sparsity > (~masks[0]).float().mean()
    assert global_sparsity_masks([], 0.5) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sign_of_a_zero_says_whether_it_is_pruned(dtype: torch.dtype) -> None:
    weight = torch.tensor(
        [0.0, -0.0, 1.0, -2.0, float("nan"), 0.0, -0.0, float("inf")], dtype=dtype
    )
    pruned = torch.tensor([True, True, False, True, True, False, False, True])
    hold_zeros_(weight, pruned)
    assert weight.signbit().tolist() == [False] * 5 + [True, True, False]
    assert weight.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert torch.equal(pruned_positions(weight), pruned)


# ---- schedules ----


def test_one_shot_and_layers_prune_once_each() -> None:
    once = PruneSchedule("one-shot", begin=4)
    assert [s for s in range(20) for layer in range(3) if once.prunes(s, layer, 3)] == [4, 4, 4]
    assert (once.sparsity_at(4, 0.7), once.threshold_at(4, 0.1), once.last(3)) == (0.7, 0.1, 4)
    turns = PruneSchedule("layers", begin=2, every=5)
    at = [(s, layer) for s in range(40) for layer in range(3) if turns.prunes(s, layer, 3)]
    assert at == [(2, 0), (7, 1), (12, 2)]
    assert (turns.sparsity_at(7, 0.7), turns.threshold_at(7, 0.1), turns.last(3)) == (0.7, 0.1, 12)


def test_the_polynomial_schedule_is_the_cubic_of_zhu_and_gupta() -> None:
    schedule = PruneSchedule("polynomial", begin=10, end=33, every=4)
    steps = [s for s in range(60) if schedule.prunes(s, 0, 1)]
    assert steps == [10, 14, 18, 22, 26, 30, 33]
    for step in steps:
        share = 1 - (1 - (step - 10) / 23) ** 3
        assert schedule.sparsity_at(step, 0.9) == pytest.approx(0.9 * share)
        assert schedule.threshold_at(step, 0.05) == pytest.approx(0.05 * share)
    assert schedule.sparsity_at(33, 0.9) == 0.9
    assert PruneSchedule("polynomial", begin=5, end=5).sparsity_at(5, 0.3) == 0.3


@pytest.mark.parametrize("end", [9, 10])
def test_iterative_pruning_drops_the_same_share_of_what_is_left_each_time(end: int) -> None:
    schedule = PruneSchedule("iterative", begin=1, end=end, every=3)
    steps = [s for s in range(30) if schedule.prunes(s, 0, 1)]
    assert steps == [1, 4, 7, end]
    left = [1 - schedule.sparsity_at(step, 0.9) for step in steps]
    assert left == pytest.approx([0.1 ** (k / 4) for k in (1, 2, 3, 4)])
    assert {schedule.threshold_at(step, 0.01) for step in steps} == {0.01}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cubic"}, "schedule is 'cubic'"),
        ({"begin": -1}, "begin >= 0"),
        ({"every": 0}, "every >= 1"),
        ({"kind": "polynomial"}, "ends at None"),
        ({"kind": "iterative", "begin": 5, "end": 4}, "ends at 4, expected a step from 5"),
        ({"kind": "layers", "end": 4}, "no end of its own"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneSchedule(**settings)


# ---- in training ----

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "AMSGrad, maximize": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.9, centered=True),
}


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 12), nn.Linear(12, 3)
    )


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    x = torch.randn(4, 2, 6, 6, dtype=next(model.parameters()).dtype)
    loss = (model(x).float() - 1).square().mean() + recipe.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    recipe.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero_through_any_optimizer(
    name: str, dtype: torch.dtype
) -> None:
    model = small_network().to(dtype)
    with torch.no_grad():
        model[3].weight[0, :5] = torch.tensor([0.0, -0.0, 0.0, -0.0, 7.0])
    optimizer = OPTIMIZERS[name](model.parameters())
    config = RecipeConfig(
        compress={"sparsity": 0.6}, schedule="polynomial", prune_begin=4, prune_end=8
    )
    recipe = Recipe(model, config, optimizer)
    recipe.prepare()
    layers = [model[0], model[3], model[4]]
    for step in range(1, 15):
        before = [pruned_positions(layer.weight) for layer in layers]
        train_step(model, optimizer, recipe)
        after = [pruned_positions(layer.weight) for layer in layers]
        for layer, old, new in zip(layers, before, after, strict=True):
            assert not (old & ~new).any()  # what is pruned stays pruned
            assert not bits(layer.weight.detach()[new]).any()  # as +0.0
        assert before[1][0, :5].tolist() == [True] * 4 + [False]  # zeros of the start, of any sign
        if step >= 8:
            shares = [float(mask.float().mean()) for mask in after]
            assert shares == pytest.approx([0.6, 0.6, 0.6], abs=0.02)
        if step == 12:  # they move without the recipe, so that it is the recipe that holds them
            free = copy.deepcopy((model, optimizer))[0]
            old = pruned_positions(free[3].weight)
            copied = OPTIMIZERS[name](free.parameters())
            free(torch.randn(4, 2, 6, 6, dtype=dtype)).sum().backward()
            copied.step()
            assert (free[3].weight.detach()[old] != 0).any()


def test_a_live_weight_at_zero_is_no_pruned_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(model, {"compress": {"sparsity": 0.5}}, optimizer)
    recipe.prepare()
    pruned = pruned_positions(model[0].weight)
    with torch.no_grad():
        model[0].weight.zero_()  # as an optimiser's step may
    recipe.step()
    assert torch.equal(pruned_positions(model[0].weight), pruned)
    assert (model[0].weight == 0).all()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    recipe.step()
    assert torch.equal(model[0].weight != 0, ~pruned)


def test_a_layer_of_zeros_is_not_taken_for_a_pruned_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    recipe = Recipe(model, {}, torch.optim.SGD(model.parameters(), lr=0.1))
    recipe.prepare()
    assert not pruned_positions(model[1].weight).any()


@pytest.mark.parametrize("schedule", ["one-shot", "iterative", "layers", "polynomial"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_schedules_reach_their_target_and_skipped_layers_keep_their_bits(
    schedule: str, scope: str
) -> None:
    if (schedule, scope) == ("layers", "global"):
        pytest.skip("refused, see test_recipe.py")
    model = small_network()
    with torch.no_grad():
        model[4].weight[0] = torch.tensor([0.0, -0.0] * 6)
    skipped, kept = model[4], bits(model[4].weight).clone()
    compress = {"sparsity": 0.75, "layers": {"4": None, "0": {"bits": 3}}}
    end = 9 if schedule in ("iterative", "polynomial") else None
    config = RecipeConfig(compress, schedule, 1, end, 4, scope=scope)
    recipe = Recipe(model, config)
    recipe.prepare()
    seen = []
    for _ in range(10):  # no optimiser moves the weights: what changes, the recipe has changed
        seen.append([float(pruned_positions(model[i].weight).float().mean()) for i in (0, 3)])
        recipe.step()
    sizes = [model[0].weight.numel(), model[3].weight.numel()]
    total = sum(share * size for share, size in zip(seen[-1], sizes, strict=True)) / sum(sizes)
    assert total == pytest.approx(0.75, abs=0.002)
    if scope == "layer":
        assert seen[-1] == pytest.approx([0.75, 0.75], abs=0.005)
    else:
        assert seen[-1][0] < 0.6 < seen[-1][1]  # a convolution has the larger weights here
    assert seen[0] == [0, 0]
    if schedule == "layers":
        assert seen[4][0] > 0
        assert seen[4][1] == 0
        assert seen[5][1] > 0
    assert model[4] is skipped
    assert torch.equal(bits(skipped.weight), kept)
    recipe.finalize()
    assert model[4] is skipped
    assert torch.equal(bits(skipped.weight), kept)
    assert recipe.report().pruned == pytest.approx(0.75, abs=0.002)


def test_the_papers_threshold_prunes_again_what_fine_tuning_brings_below_it() -> None:
    model = nn.Sequential(nn.Linear(100, 20, bias=False))
    weight = model[0].weight
    config = {
        "compress": {"threshold": 0.05},
        "schedule": "iterative",
        "prune_end": 4,
        "prune_every": 2,
    }
    recipe = Recipe(model, config)
    recipe.prepare()
    assert torch.equal(weight == 0, pruned_positions(weight))
    assert weight.detach().abs()[weight != 0].min() >= 0.05
    for step in range(1, 5):
        with torch.no_grad():
            weight.mul_(0.9)
        small = (weight != 0) & (weight.abs() < 0.05)
        assert small.any()
        recipe.step()
        assert (weight.detach()[small] == 0).all() == (step % 2 == 0)


# ---- L1 ----


def test_soft_thresholding_is_the_proximal_step_of_l1() -> None:
    weight = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.05, -0.0, 0.0, 0.1000001])
    soft_threshold_(weight, 0.1)
    assert weight.tolist() == pytest.approx([0.4, -0.4, 0, 0, 0, 0, 0, 1e-7], abs=1e-8)
    # argmin of (v - w)^2 / 2 + a |v|, on a grid.
    grid = torch.linspace(-2, 2, 40001)
    for w in (1.3, -0.7, 0.02):
        best = grid[((grid - w) ** 2 / 2 + 0.3 * grid.abs()).argmin()]
        value = torch.tensor([w])
        soft_threshold_(value, 0.3)
        assert float(value) == pytest.approx(float(best), abs=2e-4)


def test_the_penalty_is_the_sum_of_magnitudes() -> None:
    weights = [torch.tensor([1.0, -2.0, 0.0], requires_grad=True), torch.full((2, 2), -0.5)]
    total = l1_norm(weights)
    total.backward()
    assert total.item() == 5.0
    assert weights[0].grad.tolist() == [1, -1, 0]
    assert float(l1_norm([])) == 0.0


@pytest.mark.parametrize("mode", ["proximal", "penalty"])
def test_l1_makes_more_weights_small_and_ends_with_the_last_pruning(mode: str) -> None:
    def run(strength: float) -> tuple[float, float]:
        torch.manual_seed(0)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = {
            "compress": {"threshold": 0.02, "layers": {"4": None}},
            "prune_begin": 20,
            "l1": strength,
            "l1_mode": mode,
        }
        recipe = Recipe(model, config, optimizer)
        recipe.prepare()
        for _ in range(20):
            assert (float(recipe.penalty().detach()) > 0) == (mode == "penalty" and strength > 0)
            train_step(model, optimizer, recipe)
        pruned = recipe.report().pruned
        assert recipe.penalty().item() == 0
        before = model[3].weight.detach().clone()
        optimizer.zero_grad()
        recipe.step()  # no gradient, no L1 after the last pruning: nothing moves
        assert torch.equal(model[3].weight, before)
        return pruned, float(before.abs().sum())

    (plain, size), (sparse, smaller) = run(0.0), run(0.03)
    assert sparse > plain + 0.1
    assert smaller < 0.9 * size


def test_the_proximal_step_takes_the_learning_rate_of_the_weights_group() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    config = {"l1": 0.2, "l1_mode": "proximal", "l1_end": 1}
    recipe = Recipe(model, config, optimizer)
    recipe.prepare()
    expected = [
        nn.functional.softshrink(model[i].weight.detach(), 0.2 * (0.5, 0.1)[i]) for i in (0, 1)
    ]
    recipe.step()
    assert torch.allclose(model[0].weight, expected[0])
    assert torch.allclose(model[1].weight, expected[1])
    recipe.step()
    assert torch.allclose(model[0].weight, expected[0])
