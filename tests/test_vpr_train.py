"""Training on labelled places: the loss is the paper's, it falls, and runs repeat."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_two_ranks
from torch import nn
from torch.utils.data import DataLoader

from placekern import QuantSparseConv2d
from placekern.compress import CompressConfig, compress_
from placekern.vpr.city import City
from placekern.vpr.datasets import ImageList
from placekern.vpr.draws import ImageDraws, PlaceDraws
from placekern.vpr.models import build
from placekern.vpr.retrieve import describe
from placekern.vpr.train import distill, multi_similarity_loss, train


@pytest.fixture(autouse=True)
def _one_thread():
    """Images this small gain nothing from threads, and sums are then the same on all cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def places():
    return City(seed=5, size=(48, 64)).training(places=4, views=4)


@pytest.fixture
def model():
    return build("tiny-netvlad", clusters=8, seed=1)


def test_the_loss_is_that_of_the_paper():
    # Wang et al. 2019, equations 8, 9 and 15, pair by pair in plain Python.
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.normalize(torch.randn(9, 4, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    alpha, beta, base, margin = 2.0, 40.0, 0.5, 0.1
    similarity = (x @ x.T).tolist()
    total = 0.0
    for i in range(9):
        alike = [similarity[i][j] for j in range(9) if j != i and labels[j] == labels[i]]
        other = [similarity[i][j] for j in range(9) if labels[j] != labels[i]]
        pull = [s for s in alike if s - margin < max(other)]
        push = [s for s in other if not alike or s + margin > min(alike)]
        if not alike:
            push = []
        total += math.log1p(sum(math.exp(-alpha * (s - base)) for s in pull)) / alpha
        total += math.log1p(sum(math.exp(beta * (s - base)) for s in push)) / beta
    loss = multi_similarity_loss(x, labels, alpha, beta, base, margin)
    assert loss.item() == pytest.approx(total / 9, rel=1e-9)


def test_the_loss_has_finite_gradients_at_its_ends():
    # Perfect and identical descriptors leave no pair, or every pair: neither may give a NaN.
    labels = torch.tensor([0, 0, 1, 1])
    perfect = torch.eye(4)[[0, 0, 1, 1]].requires_grad_()
    loss = multi_similarity_loss(perfect, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(perfect.grad).all()
    same = torch.eye(4)[[0, 0, 0, 0]].requires_grad_()
    loss = multi_similarity_loss(same, labels)
    loss.backward()
    assert loss.item() > 0.4
    assert torch.isfinite(same.grad).all()


def test_training_lowers_the_loss_and_separates_places(model, places):
    def measure():
        descriptors = describe(model, places.images)
        similarity = descriptors @ descriptors.T
        same = places.labels[:, None] == places.labels[None, :]
        other = ~same
        same.fill_diagonal_(False)
        separation = similarity[same].mean() - similarity[other].mean()
        return multi_similarity_loss(descriptors, places.labels).item(), separation.item()

    # The initialisation alone, for what training adds to it.
    train(model, places.images, places.labels, steps=1, learning_rate=0.0)
    loss, separation = measure()
    seen = []
    record = train(
        model,
        places.images,
        places.labels,
        steps=40,
        places=4,
        views=3,
        learning_rate=1e-3,
        initialise=False,
        progress=lambda *report: seen.append(report),
    )
    assert record.steps == len(record.losses) == 40
    assert record.finished
    assert sum(record.losses[-5:]) < 0.8 * sum(record.losses[:5])
    assert measure()[0] < 0.7 * loss
    assert measure()[1] > separation + 0.04
    assert seen[0] == ("train", 1, 40)
    assert seen[-1] == ("train", 40, 40)
    assert not model.training


def test_training_repeats_by_seed(model, places):
    runs = []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(model)
        torch.rand(3)  # the global generator must not matter
        options = {"steps": 2, "places": 3, "views": 2, "seed": seed}
        runs.append(train(twin, places.images, places.labels, **options).losses)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_only_what_requires_a_gradient_is_trained(model, places):
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, places.images, places.labels, steps=2, places=3, views=2, initialise=False)
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"netvlad.assign", "netvlad.centroids"}


def test_seconds_end_a_run_early(model, places):
    record = train(model, places.images, places.labels, steps=50, places=2, views=2, seconds=0.0)
    assert record.steps == 0
    assert not record.finished


def test_pruned_weights_stay_zero_only_when_asked(model, places):
    weight = model.backbone.conv3.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    pruned = weight == 0
    options = {"steps": 2, "places": 3, "views": 2, "initialise": False}
    train(model, places.images, places.labels, keep_zeros=True, **options)
    assert torch.equal(weight == 0, pruned)
    train(model, places.images, places.labels, **options)
    assert (weight[pruned] != 0).any()


def test_distillation_repairs_a_pruned_network(model, places):
    teacher = copy.deepcopy(model)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for name in ("conv2", "conv3", "conv4"):
            weight = getattr(model.backbone, name).weight
            weight[weight.abs() < weight.abs().median()] = 0
    pruned = model.backbone.conv4.weight == 0
    seen = []
    record = distill(
        model,
        teacher,
        places.images,
        steps=25,
        batch_size=8,
        progress=lambda *report: seen.append(report),
    )
    assert sum(record.losses[-3:]) < 0.5 * sum(record.losses[:3])
    assert torch.equal(model.backbone.conv4.weight == 0, pruned)
    assert seen[-1] == ("fine-tune", 25, 25)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher's {name} moved"


def test_compressed_networks_are_trained_by_their_codebooks(model, places):
    teacher = copy.deepcopy(model)
    compress_(model, CompressConfig(bits=3, sparsity=0.3))
    parameters = dict(model.named_parameters())
    assert "backbone.conv4.codebook" in parameters
    before = {name: value.detach().clone() for name, value in parameters.items()}
    density = (model.backbone.conv4.to_dense().weight != 0).float().mean()
    record = distill(model, teacher, places.images, steps=20, batch_size=8)
    assert sum(record.losses[-3:]) < 0.8 * sum(record.losses[:3])
    train(model, places.images, places.labels, steps=2, places=3, views=2, initialise=False)
    assert not torch.equal(before["backbone.conv4.codebook"], parameters["backbone.conv4.codebook"])
    values = model.backbone.conv4.to_dense().weight
    assert (values != 0).float().mean() == density
    assert len(values.unique()) <= 1 + 2**3


def test_descriptors_of_two_lengths_cannot_be_matched(model, places):
    teacher = build("tiny-netvlad", clusters=4)
    with pytest.raises(ValueError, match="1024 values and the teacher's 512"):
        distill(model, teacher, places.images, steps=1, batch_size=2)


def test_bad_arguments_are_named(model, places):
    with pytest.raises(ValueError, match=r"a label each, got \[16, 3, 48, 64\] and \[3\]"):
        train(model, places.images, places.labels[:3])
    with pytest.raises(ValueError, match="got 0 such places"):
        train(model, places.images, torch.arange(16))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="parameter that requires a gradient, got 1 steps and 0"):
        train(frozen, places.images, places.labels, steps=1)
    with pytest.raises(ValueError, match="positive batch_size"):
        distill(model, model, places.images, batch_size=0)


def test_descriptors_that_are_not_finite_stops_the_run(model, places):
    with torch.no_grad():
        model.netvlad.centroids.fill_(math.nan)
    with pytest.raises(ValueError, match="descriptors hold NaN or infinity"):
        train(model, places.images, places.labels, steps=2, places=2, views=2, initialise=False)


# ---- with a recipe, and from a checkpoint ----

RECIPE: dict[str, Any] = {
    "compress": {"bits": 4, "sparsity": 0.5},
    "schedule": "polynomial",
    "prune_end": 6,
    "prune_every": 2,
    "quantize_at": 8,
}


class StoppedError(Exception):
    """A run that ends in the middle."""


def stop_at(step: int):
    def on_step(done: Any) -> None:
        if done.step == step:
            raise StoppedError

    return on_step


def trained(model, places, **options: Any):
    """A small run on labelled places, of 12 steps."""
    settings = {"steps": 12, "places": 3, "views": 2, "initialise": False} | options
    return train(model, places.images, places.labels, **settings)


def distilled(model, places, **options: Any):
    """A small run that learns from the model as it is before, of 12 steps."""
    settings = {"steps": 12, "batch_size": 6} | options
    return distill(model, copy.deepcopy(model), places.images, **settings)


@pytest.mark.parametrize("run", [trained, distilled])
def test_a_recipe_compresses_while_it_trains(model, places, run) -> None:
    seen = []
    record = run(
        model,
        places,
        recipe=RECIPE,
        on_step=lambda done: seen.append((done.step, done.steps, done.phase, done.loss)),
    )
    assert record.report.phase == "final"
    assert record.report.pruned == pytest.approx(0.5, abs=0.01)
    assert [row[2] for row in seen] == ["dense"] * 7 + ["codebook"] * 5
    assert [row[0] for row in seen] == list(range(1, 13))
    assert [row[3] for row in seen] == record.losses
    layer = model.backbone.conv4
    assert type(layer) is QuantSparseConv2d
    assert layer.bits == 4
    assert not model.training


def test_training_on_ranks(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")  # in another process, where nothing skips
    source = f"""
from placekern.vpr.city import City
from placekern.vpr.models import build
from placekern.vpr.train import train
places = City(seed=5, size=(48, 64)).training(places=6, views=4)
model = build("tiny-netvlad", clusters=8, seed=1)
record = train(model, places.images, places.labels, steps=12, places=3, views=2, seed=3,
               recipe={RECIPE!r}, checkpoint=folder + "/run.pt", checkpoint_every=4)
leave([model.state_dict(), record.losses, record.report.phase])
"""
    first, second = on_two_ranks(source, tmp_path)
    assert first[2] == second[2] == "final"
    assert len(first[1]) == len(second[1]) == 12
    assert first[1] != second[1]  # each has batches of its own
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


def test_a_recipe_repairs_what_one_shot_breaks(model, places) -> None:
    trained(model, places, steps=40)
    shot, teacher = copy.deepcopy(model), copy.deepcopy(model)
    config = {"bits": 4, "sparsity": 0.7}
    compress_(shot, CompressConfig(**config))
    recipe = RECIPE | {"compress": config, "prune_end": 15, "quantize_at": 18}
    distill(model, teacher, places.images, steps=30, batch_size=8, recipe=recipe)

    def error(network) -> float:
        pairs = (describe(m, places.images) for m in (network, teacher))
        return float((1 - torch.mul(*pairs).sum(1)).mean())

    assert error(model) < 0.6 * error(shot)


@pytest.mark.parametrize("recipe", [RECIPE, None])
@pytest.mark.parametrize("run", [trained, distilled])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(
    model, places, run, recipe, tmp_path: Path
) -> None:
    weight = model.backbone.conv3.weight
    with torch.no_grad():
        weight[:, ::2] = 0  # these stay zero, in the resumed run too
    options = {"recipe": recipe, "keep_zeros": True}
    whole = copy.deepcopy(model)
    losses = run(whole, places, **options).losses
    options |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 3}
    for stop in (5, 10):
        with pytest.raises(StoppedError):
            run(copy.deepcopy(model), places, on_step=stop_at(stop), **options)
    record = run(model, places, **options)
    assert (record.steps, record.resumed_at) == (12, 9)
    assert record.losses == losses[9:]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    if recipe is None:
        kept = model.backbone.conv3.weight
        assert (kept[:, ::2] == 0).all()
        assert (kept[:, 1::2] != 0).all()


def test_a_checkpoint_of_another_run_is_refused(model, places, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    trained(copy.deepcopy(model), places, steps=2, checkpoint=path)
    for options, message in (
        ({"learning_rate": 1e-4}, "learning_rate = 0.002, but this one has learning_rate = 0.0001"),
        ({"views": 3}, "views = 2, but this one has views = 3"),
        ({"steps": 3}, "steps = 2, samples = 2, but this one has steps = 3, samples = 3"),
        ({"keep_zeros": True}, "keep_zeros = False, but this run has True"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(copy.deepcopy(model), places, **{"steps": 2, "checkpoint": path, **options})
    with pytest.raises(ValueError, match=r"loss = 'places'.* but this one has loss = 'distill'"):
        distilled(model, places, steps=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"labels = .* but this one has labels = "):
        train(model, places.images, places.labels.flip(0), steps=2, checkpoint=path)

    path.unlink()
    teachers = [copy.deepcopy(model) for _ in range(2)]
    teachers[1].netvlad.centroids.data[0, 0] += 1
    options = {"steps": 1, "batch_size": 4, "checkpoint": path}
    distill(model, teachers[0], places.images, **options)
    with pytest.raises(ValueError, match=r"teacher = .* but this one has teacher = "):
        distill(model, teachers[1], places.images, **options)
    with pytest.raises(ValueError, match=r"image = .* but this one has image = \[3, 40, 56\]"):
        distill(model, teachers[0], places.images[..., :40, :56], **options)


def test_seconds_end_a_run_that_can_go_on(model, places, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    record = trained(copy.deepcopy(model), places, seconds=0.0, recipe=RECIPE, checkpoint=path)
    assert (record.steps, record.finished) == (0, False)
    assert record.report.pruned == pytest.approx(0.5, abs=0.01)  # compressed all the same
    record = trained(model, places, recipe=RECIPE, checkpoint=path)
    assert (record.steps, record.finished) == (12, True)


def test_batches_are_the_same_in_any_order_and_in_any_process(places) -> None:
    members = [torch.nonzero(places.labels == label).flatten() for label in range(4)]
    for draws in (
        PlaceDraws(places.images, members, 3, 2, 6, seed=4),
        ImageDraws(places.images, 5, 6, seed=4),
    ):
        in_turn = [draws[i] for i in range(6)]
        alone = [draws[i] for i in (5, 0, 3)]
        workers = DataLoader(draws, batch_size=None, num_workers=2)
        for batches, rows in ((alone, (5, 0, 3)), (workers, range(6))):
            for batch, row in zip(batches, rows, strict=True):
                pairs = zip(batch, in_turn[row], strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)
        assert not torch.equal(in_turn[0][0], in_turn[1][0])


def test_images_may_be_a_sequence_that_is_read_as_it_goes(model, places) -> None:
    twin = copy.deepcopy(model)
    losses = trained(model, places, steps=2).losses
    options = {"steps": 2, "places": 3, "views": 2, "initialise": False}
    assert train(twin, ImageList(places.images), places.labels, **options).losses == losses
    odd = [*places.images[:-1], torch.rand(3, 40, 64)]
    with pytest.raises(ValueError, match="of a batch must be of one size"):
        train(model, odd, places.labels, **(options | {"steps": 9}))


def test_a_recipe_that_does_not_fit_the_run_is_refused(model, places) -> None:
    with pytest.raises(ValueError, match="until step 8, but the run has 7 steps"):
        trained(model, places, steps=7, recipe=RECIPE)
    with pytest.raises(ValueError, match="unknown key 'bits'"):
        trained(model, places, recipe={"bits": 4})
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        distill(model, model, places.images, steps=1)
