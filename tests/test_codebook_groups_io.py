"""Files and exports of layers with codebooks for groups of output channels."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import scipy.io
import scipy.sparse
import torch
from helpers import random_weight
from safetensors.torch import load_file, save_file
from torch import nn

import placekern as pk
from placekern.io import (
    entropy_report,
    export_coreml,
    export_layers,
    save_deep_compression,
    save_npz,
)


def network(group_size: int | None = 4) -> nn.Sequential:
    """A convolution with 12 output channels and a linear layer with 10, at random."""
    model = nn.Sequential(
        pk.QuantSparseConv2d(3, 12, 3, groups=3, bits=5, group_size=group_size),
        nn.ReLU(),
        nn.Flatten(),
        pk.QuantSparseLinear(12 * 16, 10, bits=3, group_size=group_size),
    )
    for layer in (model[0], model[3]):
        layer.weight = random_weight(
            *layer.weight.shape, 0.4, layer.bits, codebooks=layer.codebooks
        )
    return model


def dense() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10)
    )


def test_layers_come_back_with_their_codebooks(tmp_path: Path) -> None:
    model, x = network(), torch.randn(2, 3, 6, 6)
    file = tmp_path / "model.safetensors"
    pk.save(model, file)
    assert load_file(file)["0.codebook"].shape == (3, 32)
    with torch.device("meta"):
        empty = dense()
    for target in (dense(), network(), network(None), empty):
        loaded = pk.load(file, target)
        assert torch.equal(loaded(x), model(x))
        assert (loaded[0].group_size, loaded[3].group_size) == (4, 4)
    again = tmp_path / "again.safetensors"
    pk.save(loaded, again)
    assert again.read_bytes() == file.read_bytes()
    one = network(None)
    for a, b in ((model[0], one[0]), (model[3], one[3])):
        assert entropy_report(a.weight)  # needs no codebook
        assert b.codebooks == 1


def test_a_model_that_is_itself_a_layer_says_which_groups_it_needs(tmp_path: Path) -> None:
    layer = network()[3]
    file = tmp_path / "layer.safetensors"
    pk.save(layer, file)
    same = pk.QuantSparseLinear(12 * 16, 10, bits=3, group_size=4)
    x = torch.randn(2, 12 * 16)
    assert torch.equal(pk.load(file, same)(x), layer(x))
    with pytest.raises(ValueError, match=r"codebook for each 4 .* is for 10; .* group_size=4"):
        pk.load(file, pk.QuantSparseLinear(12 * 16, 10, bits=3))


@pytest.mark.parametrize("shape", [(1, 32), (5, 32), (13, 32), (3, 16), (3, 2, 16)])
def test_codebooks_of_an_impossible_shape_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    pk.save(network(), file)
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["placekern"])
    header.pop("crc32")
    tensors = load_file(file) | {"0.codebook": torch.zeros(shape)}
    save_file(tensors, file, metadata={"placekern": json.dumps(header)})
    with pytest.raises(ValueError, match=rf"0: codebook has shape \({shape[0]}, "):
        pk.load(file, dense())


def test_scipy_and_matrix_market_have_the_values(tmp_path: Path) -> None:
    model = network()
    for form, read in (("csr", scipy.sparse.load_npz), ("mtx", scipy.io.mmread)):
        for path, layer in zip(
            export_layers(model, tmp_path, form), (model[0], model[3]), strict=True
        ):
            values = torch.from_numpy(read(path).toarray()).float()
            assert torch.equal(values, layer.weight.to_dense())
    save_npz(model[0].weight, tmp_path / "one.npz")


def test_deep_compression_has_one_codebook_a_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 has 3 codebooks, .* compress it without group_size"):
        save_deep_compression(network(), tmp_path / "a.net")
    assert list(tmp_path.iterdir()) == []


def test_core_ml_gets_a_palette_a_group() -> None:
    model = network(6)
    model[3] = pk.QuantSparseLinear(12 * 16, 10, bits=3, group_size=5)
    state = export_coreml(model).state_dict()
    for name, layer, shape in (
        ("0", model[0], (2, 1, 1, 1, 64, 1)),
        ("3", model[3], (2, 1, 8, 1)),
    ):
        lut = state[f"{name}._COREML_/weight/lut"]
        assert lut.shape == shape
        entries = lut.reshape(2, -1)
        assert torch.equal(entries[:, : 1 << layer.bits], layer.codebook)
        rows = state[f"{name}.weight"].flatten(1)
        for m, row in enumerate(rows):
            own = entries[m // (len(rows) // 2)]
            assert set(row[row != 0].tolist()) <= set(own.tolist())


def test_core_ml_refuses_groups_of_unequal_size() -> None:
    with pytest.raises(ValueError, match=r"3: 10 output channels do not divide into 3 equal group"):
        export_coreml(network())
