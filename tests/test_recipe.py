"""The recipe: phases, the optimiser's groups, trained codebooks, grids, and exact resume."""

from __future__ import annotations

import copy
import ctypes
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import placekern
from placekern import (
    CompressConfig,
    QuantSparseConv2d,
    QuantSparseLinear,
    Recipe,
    RecipeConfig,
    compress_,
)
from placekern.compress.prune import pruned_positions
from placekern.compress.trained import TrainedCodebook, project


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 12),
        nn.Linear(12, 3),
    )


CONFIG: dict[str, Any] = {
    "compress": {"bits": 4, "sparsity": 0.5, "layers": {"5": None}},
    "schedule": "polynomial",
    "prune_begin": 1,
    "prune_end": 5,
    "prune_every": 2,
    "quantize_at": 8,
}


def made(config: dict[str, Any], seed: int = 0, optimizer: str = "SGD") -> Recipe:
    torch.manual_seed(seed)
    model = network()
    if optimizer == "SGD":
        own = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    else:
        own = torch.optim.AdamW(model.parameters(), lr=0.01)
    recipe = Recipe(model, config, own)
    recipe.prepare()
    return recipe


def train_step(recipe: Recipe, seed: int) -> bool:
    """One step on a batch that the seed fixes."""
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    loss = (recipe.model(x) - 1).square().mean() + recipe.penalty()
    recipe.optimizer.zero_grad()
    loss.backward()
    recipe.optimizer.step()
    return recipe.step()


# ---- phases ----


def test_the_recipe_prunes_then_quantizes_then_trains_codebooks() -> None:
    recipe = made(CONFIG)
    model, skipped = recipe.model, recipe.model[5]
    swaps = [step for step in range(1, 9) if train_step(recipe, step)]
    assert swaps == [8]
    assert type(model[0]) is QuantSparseConv2d
    assert type(model[4]) is QuantSparseLinear
    assert model[5] is skipped
    entries = [layer.codebook.detach().clone() for layer in (model[0], model[4])]
    mask = model[4].weight.to_dense() != 0
    assert not train_step(recipe, 9)
    for layer, before in zip((model[0], model[4]), entries, strict=True):
        assert not torch.equal(layer.codebook, before)
        assert layer.weight.density == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model[4].weight.to_dense() != 0, mask)
    report = recipe.report()
    assert (report.phase, report.steps, report.layers[0].bits) == ("codebook", 9, 4)
    assert recipe.finalize() is model
    assert recipe.report().phase == "final"
    assert "4" in str(recipe.report())
    with pytest.raises(RuntimeError, match="finalized"):
        recipe.step()


def test_quantizing_at_the_swap_is_what_compress_does_to_the_pruned_weights() -> None:
    recipe = made(CONFIG)
    for step in range(1, 8):
        train_step(recipe, step)
    free = copy.deepcopy(recipe.model)
    recipe.finalize()
    compress_(free, CompressConfig(bits=4, layers={"5": None}))
    for own, expected in zip(recipe.model.parameters(), free.parameters(), strict=True):
        assert torch.equal(own, expected)
    assert torch.equal(recipe.model[4].codes, free[4].codes)


def test_finalize_prunes_to_the_target_where_training_was_shorter_than_the_schedule() -> None:
    recipe = made(CONFIG | {"prune_end": 500, "quantize_at": None})
    for step in range(1, 4):
        train_step(recipe, step)
    assert recipe.report().pruned < 0.1
    recipe.finalize()
    assert recipe.report().pruned == pytest.approx(0.5, abs=0.01)


def test_step_0_quantizes_a_trained_network_at_once() -> None:
    recipe = made({"compress": {"bits": 5, "sparsity": 0.8}, "quantize_at": 0})
    assert recipe.phase == "codebook"
    assert type(recipe.model[5]) is QuantSparseLinear
    train_step(recipe, 1)
    recipe.finalize()


def test_layers_that_share_a_weight_share_its_codebook() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    config = {"compress": {"bits": 3, "sparsity": 0.25}, "quantize_at": 1, "reassign_every": 1}
    recipe = Recipe(model, config, optimizer)
    recipe.prepare()
    for _ in range(4):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        recipe.step()
    assert model[0].codebook is model[2].codebook
    assert model[0].codes is model[2].codes
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 5  # two codebooks and three biases, each once
    assert len({id(p) for p in held}) == 5


# ---- the optimiser ----


@pytest.mark.parametrize("named", [False, True])
def test_the_swap_rewrites_the_parameter_groups_and_keeps_other_state(named: bool) -> None:
    model = network()
    parameters = list(model.named_parameters())
    first, rest = parameters[:1], parameters[1:]
    if not named:
        first, rest = [p for _, p in first], [p for _, p in rest]
    groups = [{"params": first, "lr": 0.5, "weight_decay": 0.1}, {"params": rest}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    recipe = Recipe(model, CONFIG | {"codebook_lr": 0.1}, optimizer)
    recipe.prepare()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    dense = [model[0].weight, model[4].weight]
    bias = model[4].bias
    for step in range(1, 9):
        train_step(recipe, step)
        scheduler.step()
    scale = 0.5**8
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 6, 1, 1]
    assert optimizer.param_groups[2]["params"][0] is model[0].codebook
    assert optimizer.param_groups[3]["params"][0] is model[4].codebook
    rates = [group["lr"] / scale for group in optimizer.param_groups]
    assert rates == pytest.approx([0.5, 0.01, 0.05, 0.001])
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.1, 0, 0.1, 0]
    if named:
        assert optimizer.param_groups[3]["param_names"] == ["4.codebook"]
        assert "4.weight" not in optimizer.param_groups[1]["param_names"]
    assert not any(weight in optimizer.state for weight in dense)
    assert optimizer.state[bias]["step"] == 8  # Adam goes on where it was
    train_step(recipe, 9)
    scheduler.step()
    assert optimizer.state[bias]["step"] == 9
    assert optimizer.state[model[4].codebook]["step"] == 1


def test_a_frozen_weight_gives_a_frozen_codebook() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    recipe = Recipe(model, CONFIG | {"codebook_gradient": "mean"}, optimizer)
    recipe.prepare()
    for step in range(1, 11):
        train_step(recipe, step)
    assert not model[4].codebook.requires_grad
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model[4].codebook) not in held
    assert id(model[0].codebook) in held


# ---- trained quantization ----


def dense_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of sum(y^2) for the dense weight, and the codes of its kept positions."""
    weight = layer.weight.to_dense().detach().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    row_ptr, col_ind, codes = layer.weight.to_csr()
    rows = torch.repeat_interleave(torch.arange(len(row_ptr) - 1), row_ptr.diff().long())
    return weight.grad[rows, col_ind.long()], codes.long()


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_the_codebook_gradient_is_the_sum_or_mean_over_the_weights_of_a_code(
    gradient: str,
) -> None:
    config = {"compress": {"bits": 3, "sparsity": 0.4}, "quantize_at": 0}
    recipe = made(config | {"codebook_gradient": gradient})
    layer, x = recipe.model[4], torch.randn(7, 96)
    each, codes = dense_gradient(layer, x)
    expected = torch.zeros(8).index_add(0, codes, each)
    if gradient == "mean":
        expected /= codes.bincount(minlength=8)
    layer(x).square().sum().backward()
    assert torch.allclose(layer.codebook.grad, expected, rtol=1e-4, atol=1e-4)
    layer.codebook.grad = None
    recipe.finalize()
    layer(x).square().sum().backward()  # the layer is an ordinary one again
    if gradient == "mean":
        expected *= codes.bincount(minlength=8)
    assert torch.allclose(layer.codebook.grad, expected, rtol=1e-4, atol=1e-4)


def test_projections() -> None:
    book = torch.randn(256) * 3
    half = project(book, "bfloat16")
    assert torch.equal(half, half.bfloat16().float())
    assert torch.allclose(half, book, rtol=2**-8)
    eight = project(book, "int8")
    scale = book.abs().max().double() / 127
    steps = eight.double() / scale
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.abs().max() == pytest.approx(127)
    assert (eight.double() - book.double()).abs().max() <= scale / 2 * 1.0001
    for grid, value in (("bfloat16", half), ("int8", eight), (None, book)):
        assert torch.equal(project(value, grid), value)
    assert torch.equal(project(torch.zeros(4), "int8"), torch.zeros(4))
    with pytest.raises(ValueError, match="grid is 'int4'"):
        project(book, "int4")


@pytest.mark.parametrize("grid", ["bfloat16", "int8"])
def test_entries_stay_on_their_grid_and_small_steps_add_up(grid: str) -> None:
    recipe = made({"compress": {"bits": 4}, "quantize_at": 0, "grid": grid})
    layer = recipe.model[4]
    group = next(g for g in recipe.optimizer.param_groups if layer.codebook in set(g["params"]))
    group.update(lr=1.0, momentum=0.0, weight_decay=0.0)
    others = [g for g in recipe.optimizer.param_groups if g is not group]
    for other in others:
        other.update(lr=0.0, momentum=0.0, weight_decay=0.0)
    start = layer.codebook.detach().clone()
    at = int((start - 0.5 * start.max()).abs().argmin())
    size = float(start.abs().max()) / 127 if grid == "int8" else float(start[at]) * 2**-7
    update = torch.zeros(16)
    update[at] = 0.05 * size  # a twentieth of the grid's step is lost if the step is taken alone
    assert torch.equal(project(start + update, grid), start)
    moved = []
    for _ in range(40):
        assert torch.equal(project(layer.codebook.detach(), grid), layer.codebook.detach())
        recipe.optimizer.zero_grad()
        layer.codebook.grad = -update
        recipe.optimizer.step()
        recipe.step()
        moved.append(float(layer.codebook.detach()[at] - start[at]))
    assert moved[-1] == pytest.approx(2 * size, abs=1.1 * size)
    rest = torch.arange(16) != at
    assert torch.equal(layer.codebook.detach()[rest], start[rest])


def test_a_grid_needs_float32_entries() -> None:
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="int8 grid are kept in float32"):
        Recipe(model, {"quantize_at": 0, "grid": "int8"}, optimizer).prepare()


def test_codes_are_assigned_anew_by_real_values_that_move_with_their_entries() -> None:
    recipe = made(CONFIG | {"reassign_every": 3})
    for step in range(1, 8):
        train_step(recipe, step)
    dense = recipe.model[4].weight
    train_step(recipe, 8)
    layer = recipe.model[4]
    values = dense.detach()[dense != 0].double()  # at step 8, when layers were quantized
    before = layer.codebook.detach().double().clone()
    codes = layer.weight.to_csr()[2].long()
    changed = 0
    for step in range(9, 21):
        train_step(recipe, step)
        entries = layer.codebook.detach().double()
        values = values + (entries - before)[codes]  # each weight's update is its entry's
        before = entries.clone()
        if (step - 8) % 3 == 0:
            nearest = (values[:, None] - entries).abs().argmin(1)
            changed += int((nearest != codes).sum())
            codes = nearest
        own = layer.weight.to_csr()[2].long()
        distance = (values - entries[own]).abs() - (values - entries[codes]).abs()
        assert distance.max() < 1e-6  # equally near entries may be taken either way
        codes = own
    assert changed > 10
    assert layer.weight.nnz == len(values)


def test_values_need_the_dense_weight() -> None:
    book = TrainedCodebook([QuantSparseLinear(4, 4)])
    with pytest.raises(ValueError, match="no offsets"):
        book.values()


# ---- stopping and going on ----


def saved(recipe: Recipe) -> bytes:
    file = io.BytesIO()
    torch.save(recipe.state_dict(), file)
    return file.getvalue()


def restored(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=True)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: -0.0 differs from 0.0 here."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def assert_same(own: Any, expected: Any, where: str = "") -> None:
    """Equal values of equal types, tensors bit by bit."""
    assert type(own) is type(expected), where
    if isinstance(own, Tensor):
        assert own.dtype == expected.dtype, where
        assert torch.equal(bits(own), bits(expected)), where
    elif isinstance(own, dict):
        assert own.keys() == expected.keys(), where
        for key in own:
            assert_same(own[key], expected[key], f"{where}.{key}")
    elif isinstance(own, list | tuple):
        assert len(own) == len(expected), where
        for at, (a, b) in enumerate(zip(own, expected, strict=True)):
            assert_same(a, b, f"{where}.{at}")
    else:
        assert own == expected, where


RESUMED = {
    "plain": CONFIG,
    "L1": CONFIG | {"l1": 0.01, "prune_begin": 3},
    "proximal": CONFIG | {"l1": 0.3, "l1_mode": "proximal", "prune_begin": 3},
    "global": CONFIG | {"scope": "global", "schedule": "iterative", "codebook_gradient": "mean"},
    "grid": CONFIG | {"grid": "int8", "reassign_every": 2, "codebook_lr": 0.1},
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name: str, optimizer: str) -> None:
    whole = made(RESUMED[name], 0, optimizer)
    states = {}
    for step in range(1, 15):
        states[step - 1] = saved(whole)
        train_step(whole, step)
    expected = restored(saved(whole))
    for stop in (0, 2, 6, 8, 11):
        resumed = made(RESUMED[name], 1, optimizer)  # other weights, all of which are replaced
        resumed.load_state_dict(restored(states[stop]))
        assert_same(restored(saved(resumed)), restored(states[stop]))
        for step in range(stop + 1, 15):
            train_step(resumed, step)
        assert_same(restored(saved(resumed)), expected)
        assert str(resumed.report()) == str(whole.report())


def test_a_state_holds_each_weight_once_and_no_mask() -> None:
    model = nn.Sequential(nn.Linear(300, 400, bias=False))
    recipe = Recipe(model, CONFIG | {"compress": {"sparsity": 0.5}, "quantize_at": None})
    recipe.prepare()
    for _ in range(6):
        recipe.step()
    assert pruned_positions(model[0].weight).float().mean() == 0.5
    assert list(model.state_dict()) == ["0.weight"]
    assert not list(model.buffers())
    assert len(saved(recipe)) < 4 * 300 * 400 + 8000  # a packed mask would add 15,000


def test_states_of_other_runs_are_refused() -> None:
    recipe = made(CONFIG)
    state = restored(saved(recipe))
    with pytest.raises(ValueError, match="saved with prune_end = 5, but this recipe has 6"):
        made(CONFIG | {"prune_end": 6}).load_state_dict(state)
    with pytest.raises(ValueError, match="format None"):
        recipe.load_state_dict({})
    quantized = made(CONFIG | {"quantize_at": 5})
    before = restored(saved(quantized))
    for step in range(1, 6):
        train_step(quantized, step)
    with pytest.raises(ValueError, match="of dense layers"):
        quantized.load_state_dict(before)
    unprepared = Recipe(network(), {"compress": {"sparsity": 0.5}})
    for call in (unprepared.step, unprepared.finalize, unprepared.penalty, unprepared.state_dict):
        with pytest.raises(RuntimeError, match="prepare"):
            call()
    with pytest.raises(RuntimeError, match="prepared already"):
        recipe.prepare()


# ---- config ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bit": 5}, "unknown key 'bit'"),
        ({"compress": {"bits": 9}}, "bits is 9"),
        ({"schedule": "cubic"}, "schedule is 'cubic'"),
        ({"prune_begin": 1.5}, "prune_begin is 1.5"),
        ({"prune_every": 0}, "prune_every is 0"),
        ({"quantize_at": True}, "quantize_at is True"),
        ({"l1": float("nan")}, "l1 is nan"),
        ({"l1_mode": "hard"}, "l1_mode is 'hard'"),
        ({"codebook_gradient": "max"}, "codebook_gradient is 'max'"),
        ({"grid": "int4"}, "grid is 'int4'"),
        ({"scope": "global"}, "needs a sparsity"),
        ({"scope": "global", "schedule": "layers", "compress": {"sparsity": 0.5}}, "all layers at"),
        ({"reassign_every": 3}, "needs quantize_at"),
        ({"prune_begin": 5, "quantize_at": 4}, "quantize after pruning"),
    ],
)
def test_a_config_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecipeConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"compress": {"layers": {"fc": None}}}, ValueError, "fits no layer"),
        ({"compress": {"layers": {"Conv2d": None, "Linear": None}}}, ValueError, "no layer to"),
        ({"quantize_at": 3}, ValueError, "give it"),
        ({"l1": 0.1}, ValueError, "not train 0"),
        (
            {"compress": {"sparsity": 0.5}, "l1": 0.1, "l1_mode": "penalty"},
            ValueError,
            "act on no step",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_at_once(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Recipe(network(), {"l1_mode": "proximal"} | settings)


def test_more_refusals() -> None:
    with pytest.raises(TypeError, match="itself in place"):
        Recipe(nn.Linear(2, 2), {})
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {
        "compress": {"sparsity": 0.5},
        "schedule": "layers",
        "prune_every": 5,
        "quantize_at": 9,
    }
    with pytest.raises(ValueError, match="last of 3 is pruned at step 10"):
        Recipe(model, settings, optimizer)
    model[5].weight = nn.Parameter(torch.randn(3, 12))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0 and 1 share a weight"):
        Recipe(tied, {"compress": {"sparsity": 0.5, "layers": {"1": {"sparsity": 0.6}}}})


def test_a_config_comes_from_json_or_yaml_and_goes_back_to_plain_values(tmp_path: Path) -> None:
    config = RecipeConfig.from_dict(CONFIG)
    assert config.compress == CompressConfig(bits=4, sparsity=0.5, layers={"5": None})
    (tmp_path / "recipe.json").write_text(json.dumps(CONFIG))
    assert RecipeConfig.from_file(tmp_path / "recipe.json") == config
    again = RecipeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="does not parse"):
        RecipeConfig.from_file(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, expected a mapping"):
        RecipeConfig.from_file(tmp_path / "recipe.json")
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(ValueError, match=r"\.toml"):
        RecipeConfig.from_file(tmp_path / "recipe.toml")


def test_a_config_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("quantize_at: 7\ncompress:\n  bits: 5\n  layers: {'conv*': null}\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyyaml, or write JSON"):
        RecipeConfig.from_file(path)
    monkeypatch.undo()
    pytest.importorskip("yaml")
    expected = RecipeConfig(CompressConfig(bits=5, layers={"conv*": None}), quantize_at=7)
    assert RecipeConfig.from_file(path) == expected
    path.write_text("a: [")
    with pytest.raises(ValueError, match="does not parse"):
        RecipeConfig.from_file(path)


def test_the_example_of_the_docs_runs() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "training.md"
    if not page.is_file():
        pytest.skip("the docs are not beside the tests")
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(page), "exec"), names)
    assert names["recipe"].report().pruned == 0.75
    assert type(names["model"][0]) is QuantSparseLinear


# ---- memory ----

CHILD = """
import ctypes, json
import torch
from torch import nn
from placekern import Recipe

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def added(run):
    "Bytes by which the peak rises above what is in use before."
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = run()
    return status("VmHWM") - before, result

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
dense = model[0].weight.nbytes
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
config = {"compress": {"bits": 5, "sparsity": 0.7}, "quantize_at": 0, "codebook_gradient": "mean"}
recipe = Recipe(model, config | {"grid": "bfloat16"}, optimizer)
recipe.prepare()

def train():
    for _ in range(3):
        loss = model(torch.randn(4, 4096)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert model[0].codebook.grad.any()
        optimizer.step()
        recipe.step()

train()
rise, _ = added(train)
seen, _ = added(lambda: torch.ones(dense // 4 // 5))
print(json.dumps({"rise": rise, "seen": seen, "dense": dense}))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK)
    or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only Linux can set the peak back, and only glibc gives back what was freed",
)
def test_training_codebooks_adds_less_than_a_tenth_of_the_dense_weight() -> None:
    pytest.importorskip("zstandard")  # in another process, where nothing skips
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(placekern.__file__).parents[1],
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["seen"] > 0.19 * result["dense"], result
    assert result["rise"] < 0.1 * result["dense"], result
