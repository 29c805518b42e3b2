"""The networks against their published shapes, and the parts against oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from placekern.vpr.backbones import BACKBONES, squeezenet
from placekern.vpr.models import PlaceNet, build
from placekern.vpr.preprocess import Preprocess
from placekern.vpr.weights import load


def conv_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]


def count(module: nn.Module, suffix: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith(suffix))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Preprocessing


def test_caffe_preprocessing_is_bgr_minus_the_mean() -> None:
    image = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    out = Preprocess([104, 117, 123], order="bgr")(image)
    expected = torch.tensor([76.5 - 104, 51 - 117, 25.5 - 123]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    torch.testing.assert_close(out, expected)


def test_imagenet_preprocessing_is_the_usual_standardisation() -> None:
    image = torch.rand(1, 3, 4, 5)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    out = Preprocess(**BACKBONES["alexnet"].preprocess)(image)
    torch.testing.assert_close(out, (image - mean) / std, rtol=1e-5, atol=1e-5)


def test_preprocessing_refuses_bytes_and_other_shapes() -> None:
    preprocess = Preprocess([0, 0, 0])
    with pytest.raises(TypeError, match=r"images\.float\(\) / 255"):
        preprocess(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    for shape in ((3, 4, 4), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            preprocess(torch.zeros(shape))
    with pytest.raises(ValueError, match="order"):
        Preprocess([0, 0, 0], order="grb")
    for mean in ([0, 0], [0, 0, float("nan")]):
        with pytest.raises(ValueError, match="three finite numbers"):
            Preprocess(mean)


# Backbones


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_their_channels_down_to_their_minimum_size(name: str) -> None:
    spec = BACKBONES[name]
    model = build(f"{name}-netvlad", clusters=2)
    with torch.no_grad():
        smallest = model.features(torch.rand(1, 3, spec.minimum_size, spec.minimum_size + 40))
        assert smallest.shape[1] == spec.channels
        assert smallest.shape[2] == 1
        wide = model.features(torch.rand(1, 3, 64, 64 + 10 * spec.stride)).shape[3]
        assert wide - model.features(torch.rand(1, 3, 64, 64)).shape[3] == 10
        small = torch.rand(1, 3, spec.minimum_size - 1, 64)
        with pytest.raises(RuntimeError):
            model.backbone(model.preprocess(small))
        with pytest.raises(ValueError, match=f"at least {spec.minimum_size} pixels"):
            model(small)


@pytest.mark.parametrize(
    ("name", "weights", "biases"),
    [
        ("caffenet", 2_332_704, 1_376),
        ("alexnet", 2_468_544, 1_152),
        ("vgg16", 14_710_464, 4_224),
        ("squeezenet1_0", 1_244_448 - 512_000, 3_976 - 1_000),
        ("squeezenet1_1", 1_235_496 - 513_000 - 2_944, 2_944),
    ],
)
def test_backbones_have_the_published_number_of_parameters(
    name: str, weights: int, biases: int
) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name].build()
    assert (count(backbone, "weight"), count(backbone, "bias")) == (weights, biases)


@pytest.mark.parametrize(("name", "total"), [("caffenet", 69_479_808), ("vgg16", 149_002_048)])
def test_whole_networks_have_the_published_number_of_parameters(name: str, total: int) -> None:
    with torch.device("meta"):
        model = build(f"{name}-netvlad", clusters=64, dim=4096)
    assert count(model) == total
    assert model.descriptor_dim == 4096


@pytest.mark.parametrize("name", BACKBONES)
def test_networks_consist_of_plain_layers_that_compression_knows(name: str) -> None:
    with torch.device("meta"):
        model = build(f"{name}-netvlad", clusters=2, dim=3)
    assert type(model.whiten) is nn.Linear
    owners = {type(module) for module in model.modules() if list(module.parameters(recurse=False))}
    assert {owner.__name__ for owner in owners} == {"Conv2d", "NetVLAD", "Linear"}


def test_squeezenet_convolutions_come_in_prototxt_order(data_dir: Path) -> None:
    table = (data_dir / "squeezenet_deep_compression/layers.txt").read_text().splitlines()[1:27]
    names, shapes = zip(*(line.split()[:2] for line in table), strict=True)
    net = squeezenet("1.0", classifier=True)
    modules = dict(net.named_modules())
    assert len(conv_names(net)) == 26
    kinds = {"conv1x1_1": "squeeze1x1", "conv1x1_2": "expand1x1", "conv3x3_2": "expand3x3"}
    for ours, theirs, shape in zip(conv_names(net), names, shapes, strict=True):
        assert list(modules[ours].weight.shape) == [int(side) for side in shape.split("x")]
        if theirs.startswith("fire"):
            fire, kind = theirs.split("/")
            assert ours == f"{fire}.{kinds[kind]}"
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 1000)
    with pytest.raises(ValueError, match=r"'1\.0' or '1\.1'"):
        squeezenet("1.2")


def test_caffenet_is_the_reference_network() -> None:
    model = build("caffenet-netvlad", clusters=2)
    images = torch.rand(1, 3, 90, 110, generator=torch.Generator().manual_seed(0))
    weights = {name: getattr(model.backbone, name) for name in conv_names(model.backbone)}
    torch.testing.assert_close(
        model.features(images),
        caffenet_oracle(images, {name: (conv.weight, conv.bias) for name, conv in weights.items()}),
        rtol=1e-4,
        atol=1e-3,
    )


def caffenet_oracle(images: Tensor, weights: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    # Written out from the deploy.prototxt, with its own pooling and response normalisation.
    def pool(x: Tensor) -> Tensor:
        below, right = (-(side - 3) % 2 for side in x.shape[2:])
        return F.max_pool2d(F.pad(x, (0, right, 0, below), value=-torch.inf), 3, 2)

    def norm(x: Tensor) -> Tensor:
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * squares) ** 0.75

    mean = torch.tensor([117.3785, 117.6438, 110.1771]).view(3, 1, 1)
    x = F.conv2d(255 * images - mean, *weights["conv1"], stride=4)
    x = F.conv2d(norm(pool(x.relu())), *weights["conv2"], padding=2, groups=2)
    x = F.conv2d(norm(pool(x.relu())), *weights["conv3"], padding=1)
    x = F.conv2d(x.relu(), *weights["conv4"], padding=1, groups=2)
    return F.conv2d(x.relu(), *weights["conv5"], padding=1, groups=2)


# Whole networks


def test_descriptors_have_unit_length_at_any_size() -> None:
    for dim, length in ((None, 6 * 128), (10, 10)):
        model = build("tiny-netvlad", clusters=6, dim=dim)
        assert not model.training
        assert model.descriptor_dim == length
        for shape in ((2, 3, 33, 70), (1, 3, 120, 47)):
            out = model(torch.rand(shape))
            assert out.shape == (shape[0], length)
            torch.testing.assert_close(out.norm(dim=1), torch.ones(shape[0]))


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build("tiny-netvlad", 4, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)
    assert all(torch.isfinite(p).all() for p in first.parameters())


def test_architecture_survives_json_and_rebuilds_the_network() -> None:
    settings = {"mean": [1.1, 2.2, 3.3], "scale": 0.1, "order": "bgr"}
    model = build("tiny-netvlad", clusters=5, preprocess=settings, seed=3)
    model.set_whitening(torch.randn(7, 640), torch.randn(7))
    record = json.loads(json.dumps(model.architecture))
    assert record["name"] == "tiny-netvlad"
    twin = build(record["name"], **record["kwargs"])
    assert twin.architecture == model.architecture
    twin.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 40, 40)
    assert torch.equal(twin(images), model(images))


def test_whitening_can_be_replaced_and_taken_out() -> None:
    model = build("tiny-netvlad", clusters=2, dim=4)
    weight, bias = torch.randn(3, 256), torch.randn(3)
    images = torch.rand(2, 3, 40, 40)
    plain = model.set_whitening(None)(images)
    assert model.architecture["kwargs"]["dim"] is None
    model.set_whitening(weight, bias)
    assert model.descriptor_dim == 3
    torch.testing.assert_close(model(images), F.normalize(plain @ weight.T + bias, dim=1))
    for bad in ((weight[:, :-1], bias), (weight, bias[:-1]), (weight, None)):
        with pytest.raises(ValueError, match=r"weight \[dim, 256\] and a bias \[dim\]"):
            model.set_whitening(*bad)


def test_unknown_names_and_numbers_are_refused() -> None:
    for make in (build, load):
        with pytest.raises(
            ValueError, match=r"unknown network 'vgg19-netvlad': choose from .*vgg16"
        ):
            make("vgg19-netvlad")
    with pytest.raises(ValueError, match="unknown backbone"):
        PlaceNet("vgg19")
    with pytest.raises(ValueError, match="dim must be"):
        build("tiny-netvlad", dim=0)
