"""The file that save writes: what stands in it, and how it comes to the disk."""

from __future__ import annotations

import copy
import os
import signal
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import zstandard
from io_files import (
    Network,
    same,
)
from torch import nn

import placekern as pk
from placekern.io import file, read_header
from placekern.nn import quant_sparse_layers


def test_any_safetensors_reader_reads_the_file(model: Network, path: Path) -> None:
    pk.save(model, path)
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["conv.bias"], model.conv.bias)
    assert torch.equal(tensors["norm.running_mean"], model.norm.running_mean)
    assert torch.equal(tensors["norm.num_batches_tracked"], model.norm.num_batches_tracked)
    assert torch.equal(tensors["offset"], model.offset)
    assert torch.equal(tensors["head.weight"], model.head.weight)
    assert torch.equal(tensors["wide.codebook"], model.wide.codebook)
    codes = zstandard.ZstdDecompressor().decompress(tensors["wide.codes"].numpy().tobytes())
    assert list(codes) == model.wide.weight.to_csr()[2].tolist()
    # One copy of what is tied or shared.
    assert not any(name.startswith(("second.", "again.")) for name in tensors)
    assert ("decoder.weight" in tensors) + ("embedding.weight" in tensors) == 1


def test_the_header_tells_what_is_inside(model: Network, path: Path) -> None:
    pk.save(model, path)
    header = read_header(path)
    assert header["format"] == pk.io.FORMAT_VERSION == 2
    assert header["architecture"] == model.architecture
    rows = {entry["name"]: entry for entry in header["layers"]}
    assert list(rows) == ["conv", "narrow", "wide", "first", "second"]
    for name, layer in quant_sparse_layers(model):
        assert rows[name]["shape"] == list(layer.weight.shape)
        assert rows[name]["nnz"] == layer.weight.nnz
        assert rows[name]["bits"] == layer.bits


def test_the_file_follows_the_umask_and_replaces_a_longer_one(model: Network, path: Path) -> None:
    path.write_bytes(bytes(10_000_000))
    before = os.umask(0o027)
    try:
        size = pk.save(model, path)
    finally:
        os.umask(before)
    assert path.stat().st_size == size < 10_000_000
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_half_one(
    error: BaseException, model: Network, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: Any, target: Any, metadata: Any = None) -> None:
        Path(target).write_bytes(b"half of it")
        raise error

    pk.save(model, path)
    old = path.read_bytes()
    monkeypatch.setattr(file, "save_file", half)
    with pytest.raises(type(error)):
        pk.save(model, path)
    with pytest.raises(type(error)):
        pk.save(model, path.with_name("other.safetensors"))
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_rename_leaves_the_old_file_and_no_half_one(
    model: Network, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pk.save(model, path)
    old = path.read_bytes()

    def refuse(*args: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        pk.save(model, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_kill_during_save_leaves_the_old_file(model: Network, path: Path) -> None:
    pk.save(model, path)
    old = path.read_bytes()
    child = (
        "import os, signal, sys, torch, placekern as pk\n"
        "from placekern.io import stored\n"
        "stored.write_checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "for name in sys.argv[1:]:\n"
        "    pk.save(pk.QuantSparseLinear(30, 4, bits=5), name)\n"
    )
    for name in (path, path.with_name("new.safetensors")):
        killed = subprocess.run(
            [sys.executable, "-c", child, str(name)], cwd=Path(pk.__file__).parents[1], timeout=120
        )
        assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    # The half that was written has a name of its own.
    assert [p for p in path.parent.iterdir() if not p.name.startswith(".")] == [path]


def test_a_folder_that_is_not_there_is_an_os_error(model: Network, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        pk.save(model, tmp_path / "nowhere" / "model.safetensors")


def test_files_of_format_1_are_still_read(path: Path) -> None:
    # Written by an earlier version; what it computed then is below.
    old = Path(__file__).parent / "data" / "format1.safetensors"
    assert read_header(old)["format"] == 1
    layers = nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 5), nn.Linear(5, 4)
    model = pk.load(old, nn.Sequential(*layers)).eval()
    x = torch.arange(2 * 2 * 8 * 8).reshape(2, 2, 8, 8) / 100
    expected = [
        [-0.23446440696716309, 0.05547706037759781, -0.23746585845947266, -0.23437847197055817],
        [-0.25051015615463257, 0.030680639669299126, -0.26543548703193665, -0.20743389427661896],
    ]
    torch.testing.assert_close(model(x), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    pk.save(model, path)
    assert read_header(path)["format"] == 2
    same(pk.load(path, copy.deepcopy(model)), model)


def test_the_checksum_is_crc32_of_the_file_without_it(model: Network, path: Path) -> None:
    pk.save(model, path)
    content = path.read_bytes()
    written = read_header(path)["crc32"]
    assert content.count(written.encode()) == 1
    assert f"{zlib.crc32(content.replace(written.encode(), b'00000000')):08x}" == written
