"""What other tools get: scipy, Matrix Market, Deep Compression and Core ML, read back here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from helpers import random_weight
from test_deep_compression import decode, squeezenet
from torch import nn
from typer.testing import CliRunner

import placekern as pk
from placekern.cli.app import app
from placekern.io import (
    export_coreml,
    export_layers,
    load_deep_compression,
    save_deep_compression,
    save_matrix_market,
    save_npz,
)
from placekern.nn import quant_sparse_layers


def network(bits: int = 5) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    pk.compress_(model, {"bits": bits, "sparsity": 0.8, "layers": {"3": {"sparsity": 0.99}}})
    return model.eval()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.6])
def test_matrices_come_back_exactly(density: float, tmp_path: Path) -> None:
    weight = random_weight(30, 200, density, 5)
    save_npz(weight, tmp_path / "a.npz")
    save_matrix_market(weight, tmp_path / "a.mtx")
    for matrix in (
        scipy.sparse.load_npz(tmp_path / "a.npz"),
        scipy.io.mmread(tmp_path / "a.mtx").tocsr(),
    ):
        assert matrix.shape == (30, 200)
        assert matrix.nnz == weight.nnz
        dense = torch.from_numpy(np.asarray(matrix.todense(), np.float32))
        assert torch.equal(dense, weight.to_dense())


@pytest.mark.parametrize(("form", "suffix"), [("csr", ".npz"), ("mtx", ".mtx")])
def test_a_file_a_layer(form: str, suffix: str, tmp_path: Path) -> None:
    files = export_layers(network(), tmp_path / "new" / "folder", form)
    assert [file.name for file in files] == [f"0{suffix}", f"3{suffix}"]
    assert sorted(files[0].parent.iterdir()) == files
    assert export_layers(network()[3], tmp_path, form) == [tmp_path / f"weight{suffix}"]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="form is 'onnx'"):
        export_layers(network(), tmp_path, "onnx")
    dense = nn.Sequential(nn.Linear(3, 4))
    for call in (
        lambda: export_layers(dense, tmp_path, "csr"),
        lambda: save_deep_compression(dense, tmp_path / "a.net"),
        lambda: export_coreml(dense),
    ):
        with pytest.raises(ValueError, match="has no compressed layers; compress_ it first"):
            call()
    with pytest.raises(ValueError, match="put it in a Sequential"):
        export_coreml(network()[3])
    assert list(tmp_path.iterdir()) == []


# ---- Deep Compression ----


@pytest.mark.parametrize("bits", [1, 5, 7, 8])
def test_deep_compression_files_are_read_back(bits: int, tmp_path: Path) -> None:
    model = network(bits)
    size = save_deep_compression(model, tmp_path / "a.net")
    assert size == (tmp_path / "a.net").stat().st_size
    layers = decode((tmp_path / "a.net").read_bytes(), [(8, 3, 3, 3), (10, 288)])
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    back = load_deep_compression(tmp_path / "a.net", fresh)
    for (dense, bias, _), index in zip(layers, (0, 3), strict=True):
        expected = model[index].weight.to_dense()
        assert torch.equal(torch.from_numpy(dense).reshape(expected.shape), expected)
        assert torch.equal(torch.from_numpy(bias.copy()), model[index].bias)
        assert torch.equal(back[index].weight.to_dense(), expected)


def test_the_real_file_is_written_byte_for_byte(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "squeezenet_deep_compression" / "compressed_SqueezeNet.net"
    if not path.is_file():
        pytest.skip("the Deep Compression SqueezeNet is not here")
    save_deep_compression(load_deep_compression(path, squeezenet()), tmp_path / "a.net")
    assert (tmp_path / "a.net").read_bytes() == path.read_bytes()


def test_deep_compression_has_room_for_255_codes(tmp_path: Path) -> None:
    layer = pk.QuantSparseLinear(300, 4, bits=8)
    codes = torch.arange(1200).remainder(256).to(torch.uint8)
    book = torch.arange(1.0, 257.0)
    full = torch.ones(4, 300, dtype=torch.bool)
    layer.weight = pk.QuantSparseWeight.from_mask(full, codes, book)
    with pytest.raises(ValueError, match=r"uses all of its 256 codes, .* 7 bits"):
        save_deep_compression(nn.Sequential(layer), tmp_path / "a.net")
    codes[codes == 77] = 0  # which frees a code for what was code 0
    layer.weight = pk.QuantSparseWeight.from_mask(full, codes, book)
    save_deep_compression(nn.Sequential(layer), tmp_path / "a.net")
    back = load_deep_compression(tmp_path / "a.net", nn.Sequential(nn.Linear(300, 4)))
    assert torch.equal(back[0].weight.to_dense(), layer.weight.to_dense())
    layer.bias = None
    with pytest.raises(ValueError, match="0 has no bias"):
        save_deep_compression(nn.Sequential(layer), tmp_path / "b.net")


# ---- Core ML ----


@pytest.mark.parametrize(("bits", "entries"), [(1, 2), (4, 16), (5, 64), (6, 64), (7, 256)])
def test_buffers_by_the_names_that_core_ml_reads(bits: int, entries: int) -> None:
    model = network(bits)
    model[0].relu = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = export_coreml(model)
    state = dense.state_dict()
    assert state["_COREML_/metadata_version"].tolist() == 1
    for name, rank in (("0.0", 4), ("3", 2)):
        assert state[f"{name}._COREML_/weight/compression_type"].tolist() == [1, 2]
        lut = state[f"{name}._COREML_/weight/lut"]
        assert lut.shape == (*[1] * rank, entries, 1)
        weight = state[f"{name}.weight"]
        assert weight.dim() == rank
        assert set(weight[weight != 0].tolist()) <= set(lut.flatten().tolist())
    assert len(state) == 1 + 2 * 4  # weight, bias and the two buffers
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(dense(x), model(x))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert len(list(quant_sparse_layers(dense))) == 0


# ---- the command ----


def test_the_command(tmp_path: Path) -> None:
    model = pk.vpr.build("squeezenet1_1-netvlad", clusters=4)
    pk.compress_(model, {"bits": 5, "sparsity": 0.9})
    file = tmp_path / "model.safetensors"
    pk.save(model, file)
    for to in ("csr", "mtx", "net"):
        done = CliRunner().invoke(app, ["export", str(file), "--to", to, "-o", str(tmp_path / to)])
        assert done.exit_code == 0, done.output
    layers = [name for name, _ in quant_sparse_layers(model)]
    assert {p.name for p in (tmp_path / "csr").iterdir()} == {f"{name}.npz" for name in layers}
    assert (tmp_path / "net").is_file()
    refused = CliRunner().invoke(app, ["export", str(file), "--to", "onnx", "-o", str(tmp_path)])
    assert isinstance(refused.exception, ValueError)
