"""Training on labelled places: the loss is the paper's, it falls, and runs repeat."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from placekern.compress import CompressConfig, compress_
from placekern.vpr.city import City
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
