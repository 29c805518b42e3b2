"""Weights from files: real SqueezeNet weights, synthetic NetVLAD releases, saved networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor, nn

from placekern.compress import CompressConfig, compress_
from placekern.io import save
from placekern.vpr.backbones import BACKBONES, squeezenet
from placekern.vpr.datasets import list_images, read_image
from placekern.vpr.models import ARCHITECTURES, build
from placekern.vpr.preprocess import Preprocess
from placekern.vpr.weights import load, load_npz_, read_mat

SQUEEZENET = "squeezenet_coreml/squeezenet_v11_fp16.npz"


def conv_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Core ML SqueezeNet


def test_squeezenet_recognises_real_photographs(data_dir: Path) -> None:
    net = squeezenet("1.1", classifier=True).eval()
    load_npz_(net, data_dir / SQUEEZENET)
    preprocess = Preprocess(**BACKBONES["squeezenet1_1"].preprocess)
    confidences = []
    for path in list_images(data_dir / "landmarks_small/sacre_coeur"):
        image = read_image(path, 256)
        top, left = ((side - 227) // 2 for side in image.shape[1:])
        image = image[None, :, top : top + 227, left : left + 227]
        with torch.no_grad():
            probabilities = net(preprocess(image)).softmax(1)[0]
        # A domed basilica: ImageNet's classes are 663 monastery and 668 mosque.
        assert probabilities.argmax().item() in (663, 668)
        confidences.append(probabilities.max().item())
    assert len(confidences) == 10
    assert np.mean(confidences) > 0.55


def test_squeezenet_backbone_is_the_front_of_the_classifier(data_dir: Path) -> None:
    net = load_npz_(squeezenet("1.1", classifier=True).eval(), data_dir / SQUEEZENET)
    model = load("squeezenet1_1-netvlad", weights=data_dir / SQUEEZENET, clusters=4)
    assert conv_names(model.backbone) == conv_names(net)[:25]
    images = torch.rand(1, 3, 60, 70)
    front = net[: len(model.backbone)](model.preprocess(images))
    assert torch.equal(model.features(images), front)
    assert model.netvlad.clusters == 4


def test_npz_of_another_kind_is_refused(data_dir: Path, tmp_path: Path) -> None:
    lookup = data_dir / "squeezenet_coreml/squeezenet_v11_lut8.npz"
    with pytest.raises(ValueError, match=r"has no array conv1\.weight"):
        load("squeezenet1_1-netvlad", weights=lookup)
    with pytest.raises(ValueError, match=r"conv1\.weight: expected .*\(96, 3, 7, 7\)"):
        load("squeezenet1_0-netvlad", weights=data_dir / SQUEEZENET)
    whole = (data_dir / SQUEEZENET).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04not a zip"):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
            load("squeezenet1_1-netvlad", weights=tmp_path / "cut.npz")
    flipped = bytearray(whole)
    flipped[50_000] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
        load("squeezenet1_1-netvlad", weights=tmp_path / "flipped.npz")


# NetVLAD's .mat


class Release:
    """A synthetic release: MATLAB layouts, written as the struct copies of the originals are."""

    def __init__(self, backbone: str, clusters: int, outputs: int | None, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)

        def random(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (scale * generator.standard_normal(shape)).astype(np.float32)

        spec = BACKBONES[backbone]
        with torch.device("meta"):
            convs = {
                name: layer
                for name, layer in spec.build().named_modules()
                if isinstance(layer, nn.Conv2d)
            }
        self.convs = {}
        for name, conv in convs.items():
            out, per_group, height, width = conv.weight.shape
            spread = (2 / (per_group * height * width)) ** 0.5
            self.convs[name] = random(height, width, per_group, out, scale=spread), random(1, out)
        self.mean = np.array([117.0, 118.0, 110.0], np.float32)
        self.assign = random(spec.channels, clusters, scale=5)
        self.negated = random(spec.channels, clusters, scale=0.1)
        self.whitening = None
        if outputs is not None:
            self.whitening = random(1, 1, spec.channels * clusters, outputs), random(1, outputs)

    def layers(self) -> list[dict[str, Any]]:
        layers: list[dict[str, Any]] = []
        for name, weights in self.convs.items():
            layers.append({"name": name, "type": "conv", "weights": cell(*weights)})
            layers.append({"name": name.replace("conv", "relu"), "type": "relu"})
        layers.append({"name": "preL2", "type": "normalize"})
        layers.append(
            {"name": "vlad:core", "type": "custom", "weights": cell(self.assign, self.negated)}
        )
        if self.whitening is not None:
            layers.append({"name": "WPCA", "type": "conv", "weights": cell(*self.whitening)})
        return layers

    def write(self, path: Path, layers: list[dict[str, Any]] | None = None) -> Path:
        # A real mean image: only its top-left pixel counts.
        average = np.full((5, 5, 3), 999.0, np.float32)
        average[0, 0] = self.mean
        normalization = {"averageImage": average}
        net = {
            "layers": cell(*(self.layers() if layers is None else layers)),
            "meta": {"normalization": normalization},
        }
        savemat(path, {"net": net})
        return path


def cell(*items: object) -> np.ndarray:
    array = np.empty((1, len(items)), dtype=object)
    for index, item in enumerate(items):
        array[0, index] = item
    return array


def matlab_descriptor(release: Release, features: Tensor) -> np.ndarray:
    # layerVLAD in the release's own arrays: weights D x K, the second added, output [1, K, D]
    # stored column by column, then the whitening as a 1x1 convolution.
    x = features.detach().flatten(1).double().numpy()
    x /= np.sqrt((x**2).sum(0) + 1e-12)
    scores = release.assign.T.astype(np.float64) @ x
    a = np.exp(scores - scores.max(0))
    a /= a.sum(0)
    v = np.einsum("kn,dkn->kd", a, x[:, None] + release.negated.astype(np.float64)[:, :, None])
    v /= np.sqrt((v**2).sum(1, keepdims=True) + 1e-12)
    flat = v.flatten(order="F")  # element k + K * d
    flat /= np.linalg.norm(flat)
    if release.whitening is not None:
        matrix, bias = release.whitening
        flat = flat @ matrix[0, 0].astype(np.float64) + bias[0]
        flat /= np.linalg.norm(flat)
    return flat


@pytest.mark.parametrize("outputs", [None, 12])
def test_release_of_caffenet_gives_matlabs_descriptor(tmp_path: Path, outputs: int | None) -> None:
    release = Release("caffenet", clusters=3, outputs=outputs)
    model = load("caffenet-netvlad", weights=release.write(tmp_path / "release.mat"))
    assert model.architecture["kwargs"]["preprocess"]["mean"] == [117.0, 118.0, 110.0]
    assert model.descriptor_dim == (outputs or 3 * 256)
    for name, (weight, bias) in release.convs.items():
        conv = getattr(model.backbone, name)
        assert np.array_equal(conv.weight.detach().numpy(), np.moveaxis(weight, (2, 3), (1, 0)))
        assert np.array_equal(conv.bias.detach().numpy(), bias[0])
    images = torch.rand(1, 3, 80, 96, generator=torch.Generator().manual_seed(0))
    expected = matlab_descriptor(release, model.features(images)[0])
    np.testing.assert_allclose(model(images)[0].detach().numpy(), expected, atol=2e-5)


def test_release_of_vgg16_is_matched_by_layer_name(tmp_path: Path) -> None:
    release = Release("vgg16", clusters=2, outputs=5)
    layers = release.layers()
    # Order in the file does not matter; one-cluster-wide arrays and unused layers are no trouble.
    path = release.write(tmp_path / "release.mat", layers[::-1])
    model = load("vgg16-netvlad", weights=path, dim=3)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = matlab_descriptor(release, model.features(images)[0])[:3]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(model(images)[0].detach().numpy(), expected, atol=2e-5)
    assert model.whiten.weight.untyped_storage().nbytes() == 3 * 1024 * 4


def test_faulty_releases_are_explained(tmp_path: Path) -> None:
    release = Release("caffenet", clusters=2, outputs=4)
    path = release.write(tmp_path / "release.mat")
    with pytest.raises(ValueError, match="has 2 clusters, got clusters=64"):
        load("caffenet-netvlad", weights=path, clusters=64)
    with pytest.raises(ValueError, match="whitening of 4 outputs, got dim=5"):
        load("caffenet-netvlad", weights=path, dim=5)
    with pytest.raises(ValueError, match="no layer conv1_1, so it is not vgg16"):
        load("vgg16-netvlad", weights=path)
    with pytest.raises(
        ValueError, match=r"conv1 weight: expected floating point \(64, 3, 11, 11\)"
    ):
        load("alexnet-netvlad", weights=path)

    unwhitened = Release("caffenet", clusters=2, outputs=None)
    with pytest.raises(ValueError, match="has no whitening, got dim=4"):
        load("caffenet-netvlad", weights=unwhitened.write(tmp_path / "plain.mat"), dim=4)

    headless = [layer for layer in release.layers() if layer["name"] != "vlad:core"]
    with pytest.raises(ValueError, match="no layer vlad:core"):
        read_mat(release.write(tmp_path / "headless.mat", headless))

    weightless = [*release.layers()[1:], {"name": "conv1", "type": "conv"}]
    with pytest.raises(ValueError, match="conv1: expected two weight arrays, got 0"):
        read_mat(release.write(tmp_path / "weightless.mat", weightless))

    savemat(tmp_path / "objects.mat", {"net": {"layers": np.zeros(3), "meta": 0}})
    with pytest.raises(ValueError, match="struct form"):
        read_mat(tmp_path / "objects.mat")
    savemat(tmp_path / "other.mat", {"data": np.zeros(3)})
    with pytest.raises(ValueError, match="struct form"):
        read_mat(tmp_path / "other.mat")
    for content in (path.read_bytes()[:100_000], b"nothing of the kind", b""):
        (tmp_path / "cut.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or no \.mat file"):
            read_mat(tmp_path / "cut.mat")


# Saved networks


@pytest.mark.parametrize("bits", [None, 5])
def test_saved_network_loads_by_name(tmp_path: Path, bits: int | None) -> None:
    settings = {"mean": [1.0, 2.0, 3.0], "scale": 0.01, "order": "bgr"}
    model = build("tiny-netvlad", clusters=3, dim=6, preprocess=settings, seed=9)
    if bits is not None:
        compress_(model, CompressConfig(bits=bits, threshold=0.01))
    path = tmp_path / "model.safetensors"
    save(model, path)
    twin = load("tiny-netvlad", weights=path)
    images = torch.rand(1, 3, 48, 40)
    torch.testing.assert_close(twin(images), model(images), rtol=0, atol=1e-5)
    assert load("tiny-netvlad", weights=path, clusters=3, dim=6).descriptor_dim == 6
    with pytest.raises(ValueError, match="holds tiny-netvlad, not alexnet-netvlad"):
        load("alexnet-netvlad", weights=path)
    with pytest.raises(ValueError, match="saved with clusters=3, got clusters=64"):
        load("tiny-netvlad", weights=path, clusters=64)
    with pytest.raises(ValueError, match="its own preprocessing"):
        load("tiny-netvlad", weights=path, preprocess=settings)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere\.npz"):
        load("tiny-netvlad", weights=tmp_path / "nowhere.npz")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"\.npz, \.mat or \.safetensors"):
        load("tiny-netvlad", weights=tmp_path / "weights.pth")


def test_random_weights_need_no_file() -> None:
    model = load("tiny-netvlad", clusters=2, dim=5, seed=4)
    twin = build("tiny-netvlad", clusters=2, dim=5, seed=4)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert load("tiny-netvlad").netvlad.clusters == 64
    assert len(ARCHITECTURES) == len(BACKBONES)
