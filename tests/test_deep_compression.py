"""The importer of Deep Compression's .net files: the real SqueezeNet, and small files made here.

Both are decoded a second time in this file, by the layout alone, into dense weights in numpy.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from numpy.typing import NDArray
from torch import Tensor, nn

from placekern import QuantSparseConv2d, QuantSparseLinear, load, save
from placekern.io import load_deep_compression
from placekern.nn import quant_sparse_layers

# ---- the format, written and read again by hand ----


def encode(weights: list[tuple[NDArray, NDArray, NDArray]]) -> bytes:
    """A file of layers (weight, codebook [256] that starts with 0, bias); values from the book."""
    counts, bodies = [], []
    for weight, codebook, bias in weights:
        codes, relative, last = [], [], -1
        flat = weight.ravel()
        for at in np.flatnonzero(flat):
            while at - last > 16:  # a filler bridges 15 zeros and stands on the sixteenth
                codes.append(0)
                relative.append(15)
                last += 16
            codes.append(int(np.flatnonzero(codebook == flat[at])[0]))
            relative.append(int(at - last - 1))
            last = int(at)
        nibbles = [*relative, 0][: len(relative) + len(relative) % 2]
        counts.append(len(codes))
        bodies.append(
            codebook.astype("<f4").tobytes()
            + bias.astype("<f4").tobytes()
            + bytes(codes)
            + bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))
        )
    return struct.pack(f"<{len(counts)}I", *counts) + b"".join(bodies)


def decode(data: bytes, shapes: list[tuple[int, ...]]) -> list[tuple[NDArray, NDArray, int]]:
    """Dense weight, bias and number of stored entries of each layer, one entry at a time."""
    counts = struct.unpack_from(f"<{len(shapes)}I", data)
    at, layers = 4 * len(shapes), []
    for shape, count in zip(shapes, counts, strict=True):
        codebook = np.frombuffer(data, "<f4", 256, at)
        bias = np.frombuffer(data, "<f4", shape[0], at + 1024)
        at += 1024 + 4 * shape[0]
        flat, position = np.zeros(int(np.prod(shape)), np.float32), -1
        for i in range(count):
            byte = data[at + count + i // 2]
            position += 1 + (byte >> 4 if i % 2 else byte & 15)
            flat[position] = codebook[data[at + i]]
        at += count + (count + 1) // 2
        layers.append((flat.reshape(shape), bias, count))
    assert at == len(data)
    return layers


# ---- the real file ----


class Fire(nn.Module):
    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def squeezenet() -> nn.Sequential:
    """SqueezeNet 1.0 with its classifier, as the file's prototxt has it."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 96, 7, stride=2),
        nn.ReLU(),
        pool,
        Fire(96, 16, 64),
        Fire(128, 16, 64),
        Fire(128, 32, 128),
        pool,
        Fire(256, 32, 128),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        pool,
        Fire(512, 64, 256),
        nn.Conv2d(512, 1000, 1, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    path = data_dir / "squeezenet_deep_compression"
    if not path.is_dir():
        pytest.skip("the Deep Compression SqueezeNet is not here")
    return path


@pytest.fixture(scope="module")
def compressed(folder: Path) -> nn.Sequential:
    model = squeezenet().eval()
    assert load_deep_compression(folder / "compressed_SqueezeNet.net", model) is model
    return model


@pytest.fixture(scope="module")
def dense(folder: Path) -> nn.Sequential:
    model = squeezenet().eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    data = (folder / "compressed_SqueezeNet.net").read_bytes()
    decoded = decode(data, [tuple(layer.weight.shape) for layer in layers])
    with torch.no_grad():
        for layer, (weight, bias, _) in zip(layers, decoded, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    return model


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of layers.txt: name, shape and counts as text."""
    lines = (folder / "layers.txt").read_text().splitlines()
    columns = ["layer", "shape", "weights", "stored", "nonzero", "density", "filler"]
    rows = [dict(zip(columns, line.split(), strict=False)) for line in lines[1:]]
    return [row for row in rows if "x" in row["shape"]]


def test_counts_and_densities_are_those_of_the_table(folder: Path, compressed: Any) -> None:
    rows, layers = table(folder), list(quant_sparse_layers(compressed))
    assert len(rows) == len(layers) == 26
    for row, (name, layer) in zip(rows, layers, strict=True):
        M, K = layer.weight.shape
        shape = tuple(int(extent) for extent in row["shape"].split("x"))
        assert shape == (M, *shape[1:]), name
        assert int(np.prod(shape[1:])) == K, name
        assert layer.weight.nnz == int(row["nonzero"])
        assert int(row["stored"]) - int(row["filler"]) == layer.weight.nnz
        assert f"{layer.weight.density:.4f}" == row["density"]
        assert layer.bits == 8
        assert layer.codebook[0] == 0
    assert sum(layer.weight.nnz for _, layer in layers) == 415_921


def test_every_weight_is_that_of_an_independent_decoder(compressed: Any, dense: Any) -> None:
    layers = [m for m in dense.modules() if isinstance(m, nn.Conv2d)]
    for (name, layer), expected in zip(quant_sparse_layers(compressed), layers, strict=True):
        decoded = layer.to_dense()
        assert torch.equal(decoded.weight, expected.weight), name
        assert torch.equal(decoded.bias, expected.bias), name


def test_features_are_those_of_the_dense_network(compressed: Any, dense: Any) -> None:
    x = torch.randn(1, 3, 227, 227) * 60  # BGR minus the mean, roughly
    with torch.no_grad():
        actual, expected = compressed[:13](x), dense[:13](x)
        assert actual.shape == (1, 512, 13, 13)
        assert expected.count_nonzero() > 1000
        assert relative_error(actual, expected) < 1e-4
        logits, wanted = compressed[13:](actual), dense[13:](expected)
    assert logits.shape == (1, 1000)
    assert relative_error(logits, wanted) < 1e-4
    assert torch.equal(logits.topk(3).indices, wanted.topk(3).indices)


def test_the_imported_network_is_saved_and_loaded(compressed: Any, tmp_path: Path) -> None:
    size = save(compressed, tmp_path / "squeezenet.safetensors")
    assert size < 675_763  # of the original file, whose codes are not entropy-coded
    again = load(tmp_path / "squeezenet.safetensors", squeezenet())
    for (name, tensor), other in zip(
        compressed.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_a_real_file_is_refused_by_another_network(folder: Path) -> None:
    path = folder / "compressed_SqueezeNet.net"
    model = squeezenet()
    model[13] = nn.Conv2d(512, 999, 1)
    message = "lies at position|is it the file of this model"
    check_refused(path, model, message)
    check_refused(path, nn.Sequential(nn.Conv2d(3, 96, 7)), message)


# ---- small files ----


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 700)
    )


def small_layers(model: nn.Sequential, density: float, seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    layers = []
    for layer in (model[0], model[3]):
        codebook = np.concatenate([[0], generator.permutation(np.arange(1, 256)) / 64])
        codebook = codebook.astype(np.float32)
        weight = codebook[generator.integers(1, 256, tuple(layer.weight.shape))]
        weight = np.where(generator.random(weight.shape) < density, weight, 0).astype(np.float32)
        layers.append((weight, codebook, generator.normal(size=weight.shape[0])))
    return layers


def write(path: Path, layers: list[Any]) -> Path:
    path.write_bytes(encode(layers))
    return path


def check_refused(path: Path, model: nn.Module, message: str) -> None:
    """A ValueError, and a model that is as it was, object by object."""
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_deep_compression(path, model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 1.0])
def test_weights_of_every_density(density: float, tmp_path: Path) -> None:
    for seed in range(4):
        model = small_model()
        layers = small_layers(model, density, seed)
        path = write(tmp_path / "small.net", layers)
        shapes = [tuple(weight.shape) for weight, _, _ in layers]
        stored = [count for _, _, count in decode(path.read_bytes(), shapes)]
        load_deep_compression(path, model)
        assert isinstance(model[0], QuantSparseConv2d)
        assert isinstance(model[3], QuantSparseLinear)
        for layer, (weight, codebook, bias), count in zip(
            (model[0], model[3]), layers, stored, strict=True
        ):
            assert layer.weight.nnz == np.count_nonzero(weight) <= count
            decoded = layer.to_dense()
            assert np.array_equal(decoded.weight.detach().numpy(), weight)
            assert np.array_equal(layer.codebook.detach().numpy(), codebook)
            assert np.array_equal(decoded.bias.detach().numpy(), bias.astype(np.float32))
        x = torch.randn(2, 4, 4, 4)
        expected = model[3].to_dense()(model[0].to_dense()(x).relu().flatten(1))
        assert relative_error(model(x), expected) < 1e-5
        model(x).sum().backward()
        assert model[0].codebook.grad is not None


@pytest.mark.parametrize("gap", [0, 14, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("entries", [1, 2, 3])
def test_gaps_around_a_filler(gap: int, entries: int, tmp_path: Path) -> None:
    codebook = np.arange(256, dtype=np.float32)
    weight = np.zeros((2, 400), np.float32)
    weight.ravel()[[gap + i * (gap + 1) for i in range(entries)]] = range(1, entries + 1)
    model = nn.Sequential(nn.Linear(400, 2))
    load_deep_compression(write(tmp_path / "gaps.net", [(weight, codebook, np.zeros(2))]), model)
    assert np.array_equal(model[0].weight.to_dense().detach().numpy(), weight)
    assert model[0].weight.nnz == entries


def test_the_low_nibble_comes_first(tmp_path: Path) -> None:
    # By hand: entries at 2 and 2 + 5 + 1 = 8; the third, at 10, leaves half a byte over.
    codebook = np.arange(256, dtype="<f4").tobytes()
    data = struct.pack("<I", 3) + codebook + struct.pack("<f", 0.5) + bytes([7, 9, 11, 0x52, 0xF1])
    (tmp_path / "nibbles.net").write_bytes(data)
    model = nn.Sequential(nn.Linear(12, 1))
    load_deep_compression(tmp_path / "nibbles.net", model)
    assert model[0].weight.to_dense().tolist() == [[0, 0, 7, 0, 0, 0, 0, 0, 9, 0, 11, 0]]
    assert model[0].bias.tolist() == [0.5]


def test_a_layer_that_fills_its_last_position(tmp_path: Path) -> None:
    codebook = np.arange(256, dtype=np.float32)
    weight = np.zeros((3, 50), np.float32)
    weight[-1, -1] = 255
    model = nn.Sequential(nn.Linear(50, 3))
    load_deep_compression(write(tmp_path / "last.net", [(weight, codebook, np.ones(3))]), model)
    assert np.array_equal(model[0].weight.to_dense().detach().numpy(), weight)


def cut(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position]


def patched(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


NAN = struct.pack("<f", float("nan"))
BODY = 8 + 1024 + 24  # counts, codebook and bias of the first layer
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (cut(0), "ends at byte 0, inside entry counts"),
    "half the counts": (cut(5), "inside entry counts"),
    "no codebook": (cut(8), "inside 0 codebook"),
    "half a codebook": (cut(500), "inside 0 codebook"),
    "half a bias": (cut(8 + 1024 + 10), "inside 0 bias"),
    "half the codes": (cut(BODY + 20), "inside 0 codes"),
    "half the second layer": (lambda data: data[: len(data) // 2], "inside 3"),
    "one byte short": (lambda data: data[:-1], "inside 3 positions"),
    "one byte over": (lambda data: data + b"\0", "has 1 bytes left after the last layer"),
    "twice": (lambda data: data + data, "bytes left after the last layer"),
    "count of four thousand million": (patched(0, b"\xff" * 4), "inside 0 codes"),
    "count one too large": (
        lambda data: struct.pack("<I", struct.unpack_from("<I", data)[0] + 1) + data[4:],
        "is it the file of this model|outside|lies at position|codebook",
    ),
    "codebook that does not start with zero": (
        patched(8, struct.pack("<f", 0.25)),
        r"0: codebook\[0\] is 0.25, expected 0",
    ),
    "codebook with NaN": (patched(8 + 40, NAN), r"0: codebook\[10\] is nan"),
    "codebook that starts with NaN": (patched(8, NAN), r"0: codebook\[0\] is nan"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_and_leave_the_model_unchanged(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    model, path = small_model(), tmp_path / "damaged.net"
    path.write_bytes(damage(encode(small_layers(model, 0.3))))
    check_refused(path, model, message)


def test_an_entry_outside_its_layer_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 2))
    codebook = np.arange(256, dtype="<f4").tobytes()
    for nibbles, position in (((0x99, 0x00), 20), ((0xFF, 0x0F), 31)):
        data = struct.pack("<I", 3) + codebook + bytes(8) + bytes([1, 2, 3, *nibbles])
        (tmp_path / "outside.net").write_bytes(data)
        check_refused(tmp_path / "outside.net", model, f"lies at position {position}, .* has 20")


def test_a_layer_without_bias_is_refused(tmp_path: Path) -> None:
    model = small_model()
    path = write(tmp_path / "small.net", small_layers(model, 0.3))
    model[3] = nn.Linear(24, 700, bias=False)
    check_refused(path, model, "3 has no bias, but the format gives every layer one")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_deep_compression(tmp_path / "absent.net", small_model())


def test_random_damage_never_gets_past_an_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.net"
    sound = encode(small_layers(small_model(), 0.3))
    for _ in range(60):
        data = bytearray(sound)
        for at in generator.integers(0, len(data), 3):
            data[at] = generator.integers(256)
        path.write_bytes(bytes(data))
        model = small_model()
        try:
            load_deep_compression(path, model)
        except ValueError:
            continue
        assert model(torch.zeros(1, 4, 4, 4)).shape == (1, 700)
