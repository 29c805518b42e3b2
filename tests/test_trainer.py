"""fit: the same bits after any number of kills, whole checkpoints, equal codebooks on all ranks."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import child, on_two_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from placekern import QuantSparseLinear, Recipe, compress_
from placekern.compress import fit
from placekern.compress.fine_tune import FineTune

# The run of these tests: 24 samples in batches of 5 are 5 steps an epoch, 6 epochs are 30 steps.
COMMON = """
import json, os, random, signal, sys
import numpy as np, torch
from torch import nn
from torch.utils.data import Dataset
from placekern import Recipe
from placekern.compress import fit

torch.set_num_threads(1)

class Noisy(Dataset):
    "Augments with every generator there is: a resumed run must draw the same."
    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.x = torch.randn(24, 12, generator=g)
        self.y = self.x[:, :3].sum(1, keepdim=True).sin()
    def __len__(self):
        return 24
    def __getitem__(self, i):
        noise = 0.1 * (torch.rand(12) + np.random.normal() + random.random())
        return self.x[i] + noise, self.y[i]

CONFIG = {
    "compress": {"bits": 3, "sparsity": 0.5}, "schedule": "polynomial", "prune_end": 12,
    "quantize_at": 17, "grid": "int8", "reassign_every": 4, "l1": 1e-3, "l1_mode": "penalty",
}

def made(seed=0):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Recipe(model, CONFIG, optimizer)

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 31)

def run(recipe, **options):
    settings = dict(epochs=6, batch_size=5, scheduler=schedule, progress=False) | options
    return fit(recipe, Noisy(), loss, **settings)
"""

KILLED = (
    COMMON
    + """
folder, how, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
recipe = made(seed=int(sys.argv[4]))

def progress(phase, step, steps):
    if how == "step" and step == at:
        os.kill(os.getpid(), signal.SIGKILL)

if how == "save":
    save = torch.save
    def killed_half_way(state, path):
        save(state, path)
        if recipe.steps == at:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = killed_half_way

record = run(recipe, checkpoint=f"{folder}/run.pt", checkpoint_every=4, progress=progress)
torch.save(recipe.model.state_dict(), f"{folder}/final.pt")
print(json.dumps([record.steps, record.resumed_at, len(record.losses)]))
"""
)


def finished(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode, out


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(COMMON, scope)
    recipe = scope["made"]()
    record = scope["run"](recipe)
    assert (record.steps, record.resumed_at, len(record.losses)) == (30, 0, 30)
    expected = recipe.model.state_dict()

    # While dense, in the middle of an epoch; while a checkpoint is written; in codebook training.
    for how, at in (("step", 7), ("save", 16), ("step", 19), ("save", 24)):
        code, _ = finished(child(KILLED, tmp_path, how, at, at if at > 7 else 0))
        assert code == -signal.SIGKILL
        assert not (tmp_path / "final.pt").exists()
        checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
        assert checkpoint["recipe"]["steps"] == (at - 1) // 4 * 4  # the one before, whole
    code, out = finished(child(KILLED, tmp_path, "none", 0, 99))
    assert (code, json.loads(out)) == (0, [30, 20, 10])
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    assert final.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(final[key], value), key

    # A run that is done is finalized without a step, and leaves the same again.
    code, out = finished(child(KILLED, tmp_path, "none", 0, 98))
    assert (code, json.loads(out)) == (0, [30, 30, 0])
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    assert all(torch.equal(final[key], value) for key, value in expected.items())


RANK = (
    COMMON
    + """
CONFIG |= {"schedule": "iterative", "prune_every": 6}  # prunes before the first step, too
recipe = made(seed=rank)  # other weights on each rank: those of rank 0 are to count
trained = []
def progress(phase, step, steps):
    name = "codebook" if phase == "codebook" else "weight"
    trained.append([getattr(layer, name).detach().clone() for layer in recipe.model[::3]])
record = run(recipe, progress=progress, batch_size=3, checkpoint=f"{folder}/run{rank}.pt")
leave([recipe.model.state_dict(), trained, recipe.steps])
"""
)


def test_codebooks_are_bit_equal_on_all_ranks_and_rank_0_alone_saves(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")  # in another process, where nothing skips
    first, second = on_two_ranks(RANK, tmp_path)
    assert first[2] == second[2] == 24  # 24 samples are 4 steps of 2 x 3
    assert [step[0].numel() for step in first[1]] == [12 * 16] * 16 + [8] * 8
    for own, other in zip(first[1], second[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert not torch.equal(first[1][16][0], first[1][-1][0])  # they were trained
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    assert (tmp_path / "run0.pt").exists()
    assert not (tmp_path / "run1.pt").exists()
    state = torch.load(tmp_path / "run0.pt", weights_only=True)
    assert len(state["generators"]) == 2
    assert not torch.equal(state["generators"][0]["torch"], state["generators"][1]["torch"])


def test_making_a_bar_draws_from_no_generator() -> None:
    source = """
import random, sys
from placekern.compress.train import _bars
assert "rich.progress" not in sys.modules
random.seed(0)
before = random.getstate()
assert _bars() is not None and "rich.progress" in sys.modules
assert random.getstate() == before
"""
    pytest.importorskip("rich")
    assert finished(child(source))[0] == 0


# ---- in this process ----


def regression() -> tuple[TensorDataset, Callable[[nn.Module, Any], Tensor]]:
    x = torch.randn(40, 8)
    y = x @ torch.randn(8, 2)
    return TensorDataset(x, y), lambda model, batch: (model(batch[0]) - batch[1]).square().mean()


def recipe_for(config: dict[str, Any]) -> Recipe:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    return Recipe(model, config, torch.optim.Adam(model.parameters(), lr=0.01))


def test_fit_trains_compresses_and_reports_progress() -> None:
    data, loss = regression()
    recipe = recipe_for({"compress": {"bits": 4, "sparsity": 0.3}, "quantize_at": 60})
    recipe.model.eval()
    seen: list[tuple[str, int, int]] = []
    before = torch.get_rng_state()
    record = fit(
        recipe, data, loss, epochs=30, batch_size=16, progress=lambda *step: seen.append(step)
    )
    assert torch.equal(torch.get_rng_state(), before)  # the order has a generator of its own
    assert [step for _, step, _ in seen] == list(range(1, 91))
    assert {total for _, _, total in seen} == {90}
    assert [phase for phase, _, _ in seen] == ["dense"] * 59 + ["codebook"] * 31
    assert sum(record.losses[-5:]) < 0.5 * sum(record.losses[:5])
    assert type(recipe.model[0]) is QuantSparseLinear
    assert recipe.phase == "final"
    assert not recipe.model.training


def test_each_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    data = TensorDataset(torch.arange(40.0)[:, None].expand(40, 8))
    seen: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(batch[0][:, 0].tolist())
        return model(batch[0]).square().mean()

    fit(recipe_for({}), data, loss, epochs=2, batch_size=16)
    first, second = seen[:40], seen[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_checkpoints_of_other_runs_and_broken_files_are_refused(tmp_path: Path) -> None:
    data, loss = regression()
    path = tmp_path / "run.pt"
    config = {"compress": {"sparsity": 0.5}}

    def run(settings: dict[str, Any] = config, **options: Any) -> None:
        keywords = {"epochs": 1, "batch_size": 16, "checkpoint": path} | options
        fit(recipe_for(settings), data, loss, **keywords)

    run()
    with pytest.raises(
        ValueError, match=r"run\.pt is of a run with seed = 0, but this one has seed = 1;"
    ):
        run(seed=1)
    with pytest.raises(ValueError, match="with batch_size = 16, but this one has batch_size = 8"):
        run(batch_size=8)
    with pytest.raises(ValueError, match="saved with compress"):
        run({"compress": {"sparsity": 0.6}})
    with pytest.raises(ValueError, match="do not both have a scheduler"):
        run(scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="no checkpoint that can be read"):
        run()
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        run()
    torch.save(nn.Linear(2, 2), path)  # a pickled object: never built
    with pytest.raises(RuntimeError, match="no checkpoint that can be read"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ],
)
def test_sizes_below_1_are_refused(options: dict[str, int], message: str) -> None:
    data, loss = regression()
    with pytest.raises(ValueError, match=message):
        fit(recipe_for({}), data, loss, **({"epochs": 1, "batch_size": 4} | options))


def test_more_refusals() -> None:
    data, loss = regression()
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        fit(
            recipe_for({}),
            data,
            lambda model, batch: loss(model, batch) * float("nan"),
            epochs=1,
            batch_size=4,
        )
    with pytest.raises(ValueError, match="has none"):
        fit(Recipe(nn.Sequential(nn.Linear(8, 2)), {}), data, loss, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match="0 samples"):
        fit(recipe_for({}), TensorDataset(torch.zeros(0, 8)), loss, epochs=1, batch_size=4)


# ---- batches in order, limits of time, and training without compressing ----


class Numbered(TensorDataset):
    """Batches of its own making: item i holds i."""

    def __init__(self) -> None:
        super().__init__(torch.arange(6.0)[:, None, None].expand(6, 2, 8))


def numbers_seen(into: list[int], limit: int | None = None) -> Callable[..., Tensor]:
    """A loss that notes the batches; it raises at the one numbered `limit`."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        (x,) = batch
        assert x.shape == (2, 8)
        into.append(int(x[0, 0]))
        if into[-1] == limit:
            raise InterruptedError
        return model(x / 6).square().mean()

    return loss


def test_samples_that_are_batches_come_in_order(tmp_path: Path) -> None:
    whole: list[int] = []
    steps = []
    options = {"epochs": 2, "batch_size": None, "shuffle": False}
    record = fit(recipe_for({}), Numbered(), numbers_seen(whole), on_step=steps.append, **options)
    assert whole == [*range(6), *range(6)]
    assert [step.loss for step in steps] == record.losses
    assert [(step.step, step.steps) for step in steps] == [(i + 1, 12) for i in range(12)]

    parts: list[int] = []
    options |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2, "epochs": 1}
    with pytest.raises(InterruptedError):
        fit(recipe_for({}), Numbered(), numbers_seen(parts, limit=5), **options)
    fit(recipe_for({}), Numbered(), numbers_seen(parts), **options)
    assert parts == [0, 1, 2, 3, 4, 5, 4, 5]


def test_a_limit_of_seconds_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loss = regression()
    config = {"compress": {"sparsity": 0.5}}
    options = {"epochs": 2, "batch_size": 10, "checkpoint": tmp_path / "run.pt"}
    with monkeypatch.context() as patch:
        # A clock that goes one second each time it is looked at.
        clock = SimpleNamespace(perf_counter=iter(range(100)).__next__)
        patch.setattr("placekern.compress.train.time", clock)
        stopped = recipe_for(config)
        record = fit(stopped, data, loss, seconds=3.5, **options)
    assert (record.steps, record.finished) == (3, False)
    assert stopped.phase == "final"
    assert stopped.report().pruned == pytest.approx(0.5, abs=0.02)
    record = fit(recipe_for(config), data, loss, **options)
    assert (record.steps, record.resumed_at, record.finished) == (8, 3, True)


def test_a_checkpoint_with_other_settings_is_refused(tmp_path: Path) -> None:
    data, loss = regression()
    options = {"epochs": 1, "batch_size": 10, "checkpoint": tmp_path / "run.pt"}
    fit(recipe_for({}), data, loss, settings={"rate": 0.5, "kind": "a"}, **options)
    with pytest.raises(ValueError, match=r"a run with rate = 0\.5, but this one has rate = 0\.25;"):
        fit(recipe_for({}), data, loss, settings={"rate": 0.25, "kind": "a"}, **options)
    with pytest.raises(ValueError, match="but this one has shuffle = False"):
        fit(
            recipe_for({}), data, loss, settings={"rate": 0.5, "kind": "a"}, shuffle=False,
            **options,
        )  # fmt: skip
    fine = fine_tune()
    with pytest.raises(ValueError, match="trained = 'Recipe', but this one has trained = 'FineTun"):
        fit(fine, data, loss, settings={"rate": 0.5, "kind": "a"}, **options)


def fine_tune(keep_zeros: bool = True) -> FineTune:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[0].bias.zero_()
        model[2].weight[0, 0] = -0.0  # a zero of either sign is pruned
    return FineTune(model, torch.optim.AdamW(model.parameters(), lr=0.01), keep_zeros)


def test_fine_tuning_keeps_zeros_only_where_asked() -> None:
    data, loss = regression()
    kept, free = fine_tune(), fine_tune(keep_zeros=False)
    for run in (kept, free):
        record = fit(run, data, loss, epochs=10, batch_size=10)
        assert sum(record.losses[-4:]) < sum(record.losses[:4])
        assert type(run.model[0]) is nn.Linear
    zero = torch.zeros(32, 8, dtype=torch.bool)
    zero[:, ::2] = True
    assert torch.equal(kept.model[0].weight == 0, zero)
    assert (kept.model[2].weight == 0).nonzero().tolist() == [[0, 0]]
    assert (kept.model[0].bias != 0).any()
    assert (free.model[0].weight[:, ::2] != 0).any()


def test_fine_tuning_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    data, loss = regression()
    whole = fine_tune()
    fit(whole, data, loss, epochs=3, batch_size=10)

    def stop(step: Any) -> None:
        if step.step == 6:
            raise InterruptedError

    options = {"epochs": 3, "batch_size": 10, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(InterruptedError):
        fit(fine_tune(), data, loss, checkpoint_every=5, on_step=stop, **options)
    parts = fine_tune()
    assert fit(parts, data, loss, **options).resumed_at == 5
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in parts.model.state_dict().items())


def test_fine_tuning_is_prepared_once() -> None:
    for keep_zeros in (True, False):
        run = fine_tune(keep_zeros)
        run.prepare()
        with pytest.raises(RuntimeError, match="the run is prepared already"):
            run.prepare()


def test_zeros_of_codebooks_are_free() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    compress_(model, {"bits": 2, "layers": {"1": None}})
    with torch.no_grad():
        model[0].codebook = nn.Parameter(torch.zeros(2, 4))  # of two groups: no weight either
        model[1].weight[0] = 0
    run = FineTune(model, torch.optim.SGD(model.parameters(), lr=0.1), keep_zeros=True)
    run.prepare()
    with torch.no_grad():  # what an optimiser's step may do
        model[0].codebook.fill_(1.0)
        model[1].weight.fill_(1.0)
    run.step()
    assert (model[0].codebook == 1).all()
    assert model[1].weight.tolist() == [[0.0] * 4, [1.0] * 4]


FINE_TUNED_RANK = (
    COMMON
    + """
from placekern.compress.fine_tune import FineTune
torch.manual_seed(rank)
model = nn.Linear(12, 1)
with torch.no_grad():
    model.weight[0, rank::2] = 0  # what is zero on rank 0 counts
seen = []
def noted(model, batch):
    seen.append(float(batch[1]))
    return loss(model, batch)
recipe = FineTune(model, torch.optim.SGD(model.parameters(), lr=0.01), keep_zeros=True)
record = fit(recipe, Noisy(), noted, epochs=1, batch_size=None, shuffle=False, progress=False,
             seconds=(1e9, -1)[rank])  # rank 0's clock counts
leave([model.state_dict(), seen, record.steps])
"""
)


def test_fine_tuning_on_ranks(tmp_path: Path) -> None:
    first, second = on_two_ranks(FINE_TUNED_RANK, tmp_path)
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    assert (first[0]["weight"][0] == 0).tolist() == [True, False] * 6
    scope: dict[str, Any] = {}
    exec(COMMON, scope)
    answers = [float(y) for y in scope["Noisy"]().y]
    assert first[1:] == [answers[0::2], 12]
    assert second[1:] == [answers[1::2], 12]
