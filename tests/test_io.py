"""save and load: exact round trips into every kind of model, and damaged files refused in words."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import zstandard
from helpers import random_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import placekern as pk
from placekern.io import architectures, file, read_header, register_architecture
from placekern.nn import quant_sparse_layers
from placekern.packing import Layout


class Network(nn.Module):
    """A bit of everything: norms and their buffers, tied and shared layers, a dense head."""

    def __init__(self, width: int = 8, head: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.narrow = nn.Conv2d(width, 4, 1, bias=False)
        self.wide = nn.Linear(4, 300)
        self.first = nn.Linear(300, 300)
        self.second = nn.Linear(300, 300, bias=False)
        self.second.weight = self.first.weight
        self.again = self.wide
        self.head = nn.Linear(300, 5) if head else None
        self.embedding = nn.Embedding(7, 5)
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("offset", torch.full((5,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.norm(self.conv(x)).relu()).mean((2, 3))
        x = self.again(x).tanh()
        x = self.second(self.first(x).tanh())
        return self.decoder(self.head(x) + self.offset)


CONFIG = pk.CompressConfig(
    bits=5,
    sparsity=0.3,
    layers={
        "first": {"bits": 3, "sparsity": 0.97},  # window layout
        "second": {"bits": 3, "sparsity": 0.97},
        "wide": {"bits": 8},
        "head": None,
        "decoder": None,
    },
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_BUILDERS", dict(architectures._BUILDERS))
    register_architecture("network", Network)


def built(**kwargs: Any) -> Network:
    model = Network(**kwargs)
    model.architecture = {"name": "network", "kwargs": kwargs}
    return model


@pytest.fixture
def model() -> Network:
    """Compressed, with running statistics that are not the initial ones."""
    model = built(width=8)
    pk.compress_(model, CONFIG)
    model(torch.randn(4, 3, 9, 9) + 1)
    model.conv.relu = True
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def image() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


def same(one: nn.Module, other: nn.Module) -> None:
    """Every tensor of both is equal, in value and dtype."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert states[1][name].dtype == tensor.dtype, name
        assert torch.equal(states[1][name], tensor), name


def check_loaded(loaded: nn.Module, model: nn.Module) -> None:
    same(loaded, model)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.eval()(image()), model(image()))
    assert loaded.conv.relu
    assert loaded.again is loaded.wide
    assert loaded.first.codebook is loaded.second.codebook
    assert loaded.first.codes is loaded.second.codes
    loaded(image()).sum().backward()
    assert loaded.first.codebook.grad is not None


# ---- round trips ----


def into_dense() -> nn.Module:
    return Network()


def into_compressed() -> nn.Module:
    target = Network()
    pk.compress_(target, {"bits": 2, "layers": {"head": None, "decoder": None}})
    return target


def into_half_compressed() -> nn.Module:
    target = Network()
    pk.compress_(target, {"bits": 8, "layers": {"conv": None, "head": None, "decoder": None}})
    return target


def into_meta() -> nn.Module:
    with torch.device("meta"):
        return Network()


def into_compressed_meta() -> nn.Module:
    return into_compressed().to("meta")


TARGETS = [into_dense, into_compressed, into_half_compressed, into_meta, into_compressed_meta]


@pytest.mark.parametrize("target", TARGETS)
def test_load_into_a_model(target: Callable[[], nn.Module], model: Network, path: Path) -> None:
    assert pk.save(model, path) == path.stat().st_size
    fresh = target()
    loaded = pk.load(path, fresh)
    assert loaded is fresh
    check_loaded(loaded, model)


def test_load_by_the_name_of_the_architecture(model: Network, path: Path) -> None:
    pk.save(model, path)
    loaded = pk.load(path)
    assert not any(module.training for module in loaded.modules())
    assert loaded.architecture == {"name": "network", "kwargs": {"width": 8}}
    check_loaded(loaded, model)


def test_saving_what_was_loaded_gives_the_same_bytes(model: Network, path: Path) -> None:
    pk.save(model, path)
    first = path.read_bytes()
    for target in (None, into_dense(), into_compressed(), into_meta()):
        loaded = pk.load(path, target)
        loaded.architecture = model.architecture
        other = path.with_name("again")
        pk.save(loaded, other)
        assert other.read_bytes() == first
    pk.save(model, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("target", [*TARGETS, lambda: None])
def test_tied_dense_weights_are_still_one_parameter(
    target: Callable[[], nn.Module | None], model: Network, path: Path
) -> None:
    pk.save(model, path)
    loaded = pk.load(path, target())
    assert loaded.decoder.weight is loaded.embedding.weight
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_training_mode_of_a_given_model_is_left_alone(model: Network, path: Path) -> None:
    pk.save(model, path)
    assert all(module.training for module in pk.load(path, Network().train()).modules())
    assert not any(module.training for module in pk.load(path, Network().eval()).modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [into_dense, into_compressed, into_meta])
def test_the_dtype_is_kept(
    target: Callable[[], nn.Module], dtype: torch.dtype, model: Network, path: Path
) -> None:
    model.to(dtype)
    with torch.no_grad():
        model.first.codebook.mul_(1.1)  # off the float32 grid, where the dtype is wider
    pk.save(model, path)
    same(pk.load(path, target().to(dtype)), model)


@pytest.mark.parametrize("target", [into_dense, into_compressed])
def test_a_target_of_another_dtype_keeps_its_own(
    target: Callable[[], nn.Module], model: Network, path: Path
) -> None:
    # As load_state_dict copies values into the parameters that are there.
    pk.save(model, path)
    loaded = pk.load(path, target().double())
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    decoded = loaded.wide.to_dense()
    assert decoded(torch.randn(2, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("build", [lambda: nn.Linear(40, 30), lambda: nn.Conv2d(4, 6, 3)])
def test_a_single_layer_round_trip(build: Callable[[], nn.Module], path: Path) -> None:
    kind = pk.QuantSparseLinear if type(build()) is nn.Linear else pk.QuantSparseConv2d
    layer = kind.from_float(build(), pk.CompressConfig(bits=4, sparsity=0.5))
    pk.save(layer, path)
    same(pk.load(path, kind.from_float(build(), pk.CompressConfig(bits=4))), layer)
    # A dense layer cannot be swapped in place when it is the model itself.
    with pytest.raises((ValueError, TypeError)):
        pk.load(path, build())


def test_models_without_compressed_layers_are_saved_too(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), model)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_every_density_and_width(density: float, bits: int, path: Path) -> None:
    model = nn.Sequential(pk.QuantSparseLinear(203, 9, bits=bits))
    model[0].weight = random_weight(9, 203, density, bits)
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(203, 9))), model)


def test_trained_codebooks_out_of_order_are_kept(model: Network, path: Path) -> None:
    with torch.no_grad():
        model.wide.codebook.copy_(torch.randn(256))
    pk.save(model, path)
    check_loaded(pk.load(path), model)


def test_ties_survive_a_state_dict_and_a_copy(model: Network, path: Path) -> None:
    for other in (copy.deepcopy(model), Network()):
        if not list(quant_sparse_layers(other)):
            pk.compress_(other, CONFIG)
            other.load_state_dict(model.state_dict())
            other.conv.relu = True
        pk.save(other.eval(), path)
        check_loaded(pk.load(path, Network()), model)


def test_layers_that_share_codes_but_not_the_codebook_keep_both(path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    pk.compress_(model)
    model[1].codebook = nn.Parameter(model[0].codebook.detach() * 2)
    pk.save(model, path)
    same(pk.load(path, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))), model)


def test_buffers_that_are_not_saved_are_still_there_after_a_rebuild(path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4))
            self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * self.scale

    register_architecture("scaled", Scaled)
    model = architectures.build_architecture("scaled", {}).eval()
    pk.compress_(model)
    pk.save(model, path)
    x = torch.randn(2, 4)
    assert torch.equal(pk.load(path)(x), model(x))


def test_frozen_parameters_of_the_target_stay_frozen(model: Network, path: Path) -> None:
    pk.save(model, path)
    for target in (Network(), into_meta()):
        target.norm.requires_grad_(False)
        assert not pk.load(path, target).norm.weight.requires_grad
        assert target.head.weight.requires_grad


# ---- the file ----


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


# ---- files that are not ours, or no longer sound ----


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            pk.load(path)
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0", bytes(8), b"\xff" * 100, b"PK\x03\x04", b"{}" * 50, bytes(1000)]
)
def test_files_of_another_kind(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        pk.load(path, Network())


def test_safetensors_files_of_others(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"but not one written by placekern\.save"):
        pk.load(path, Network())
    safetensors.torch.save_file({"a": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"but not one written by placekern\.save"):
        read_header(path)


HEADERS = [
    "",
    "null",
    "1",
    '"text"',
    "[]",
    "{}",
    "{",
    "[" * 200_000,
    '{"format": 1}',
    '{"format": 1, "layers": {}, "aliases": {}}',
    '{"format": 1, "layers": [], "aliases": []}',
    '{"format": 1, "layers": [1], "aliases": {}}',
    '{"format": 1, "layers": [], "aliases": {}, "architecture": "network"}',
    '{"format": 1, "layers": [], "aliases": {}, "architecture": {"name": "network"}}',
    '{"format": 1' + "0" * 5000 + "}",
    '{"format": "1"}',
    '{"format": [1]}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_damaged_headers(header: str, path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3)}, path, metadata={"placekern": header})
    for read in (read_header, pk.load, lambda path: pk.load(path, Network())):
        with pytest.raises(ValueError, match=r"header|format|digits"):
            read(path)


def test_a_newer_format_asks_for_a_newer_placekern(model: Network, path: Path) -> None:
    pk.save(model, path)
    rewrite(path, lambda tensors, header: header.update(format=3))
    with pytest.raises(ValueError, match=r"has format 3, .* reads 1 to 2; install a newer"):
        pk.load(path)


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


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_reported(where: float, model: Network, path: Path) -> None:
    pk.save(model, path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(where * (len(content) - start))] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: its checksum is [0-9a-f]{8}, but"):
        pk.load(path)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Changes tensors and header of a file in place."""
    with safetensors.safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["placekern"])
    del header["crc32"]  # as a tool that does not know it would: what is behind it must hold alone
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, metadata={"placekern": json.dumps(header)})


def entry(**changes: Any) -> Callable[..., None]:
    return lambda tensors, header: header["layers"][0].update(changes)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda tensors, header: tensors.update({name: change(tensors[name])})


def gap_bytes(change: Callable[[bytes], bytes]) -> Callable[..., None]:
    """Positions of `first`, which are gaps, unpacked, changed and packed."""

    def run(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        stream = tensors["first.positions"].numpy().tobytes()
        raw = zstandard.ZstdDecompressor().decompress(stream)
        tensors["first.positions"] = compressed(change(raw))

    return run


def without(name: str) -> Callable[..., None]:
    return lambda tensors, header: tensors.pop(name)


def alias(source: Any) -> Callable[..., None]:
    return lambda tensors, header: header.update(aliases={"embedding.weight": source})


def compressed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor().compress(data)), dtype=torch.uint8)


def streamed(data: bytes) -> Tensor:
    """A frame that does not say how large its content is."""
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return torch.frombuffer(bytearray(packer.compress(data) + packer.flush()), dtype=torch.uint8)


def lying(size: int, data: bytes) -> Tensor:
    """A frame of `data` whose header promises `size` bytes (both must need a 4-byte field)."""
    frame = bytearray(zstandard.ZstdCompressor().compress(data))
    assert frame[4] >> 6 == 2
    at = 5 if frame[4] & 0x20 else 6
    frame[at : at + 4] = size.to_bytes(4, "little")
    return torch.frombuffer(frame, dtype=torch.uint8)


DAMAGED: dict[str, tuple[Callable[..., None], str]] = {
    "layer of another kind": (entry(kind="Linear"), "conv is a compressed Linear, but the model"),
    "layer of no kind": (entry(kind="Conv3d"), "header"),
    "kind that is a list": (entry(kind=[]), "header"),
    "kind that is an object": (entry(kind={"a": 1}), "header"),
    "name that is not there": (entry(name="nothing"), "nothing is a compressed Conv2d"),
    "name that is a number": (entry(name=1), "header"),
    "shape of another layer": (entry(shape=[8, 28]), "conv is .*but the model's is"),
    "shape that is huge": (entry(shape=[1 << 40, 1 << 40]), "conv is"),
    "shape that is negative": (entry(shape=[-8, -27]), "conv is"),
    "shape of three": (entry(shape=[8, 3, 9]), "header"),
    "shape of floats": (entry(shape=[8.0, 27.0]), "header"),
    "bits of another codebook": (entry(bits=4), "conv"),
    "bits out of range": (entry(bits=9), "header"),
    "bits that are true": (entry(bits=True), "header"),
    "nnz one too many": (lambda t, h: h["layers"][0].update(nnz=h["layers"][0]["nnz"] + 1), "conv"),
    "nnz of nothing": (entry(nnz=0), "conv.positions"),
    "nnz in the other layout": (entry(nnz=3), "conv.positions are a mask, but 3 entries"),
    "nnz that is negative": (entry(nnz=-1), "conv: nnz is -1"),
    "nnz that is huge": (entry(nnz=10**30), "conv: nnz is 10"),
    "nnz that is a float": (entry(nnz=1.0), "header"),
    "nnz that is not there": (lambda t, h: h["layers"][0].pop("nnz"), "header"),
    "shares with nobody": (entry(shares="nobody"), "conv shares the weight of an unknown layer"),
    "shares with itself": (entry(shares="conv"), "conv shares the weight of an unknown layer"),
    "shares with another shape": (
        lambda t, h: h["layers"][1].update(shares="conv"),
        r"\[8, 27\]",
    ),
    "shares with a number": (entry(shares=1), "header"),
    "alias of a list": (alias([]), "."),
    "alias of an object": (alias({}), "."),
    "alias of a number": (alias(1), "."),
    "alias of nothing": (alias("nothing"), "missing in the file"),
    "alias of another shape": (alias("offset"), "embedding.weight"),
    "alias by another name": (
        lambda t, h: h["aliases"].update(nothing="offset"),
        "missing in the model",
    ),
    "codes too large": (
        lambda t, h: t.update({"conv.codes": compressed(bytes([32]) * h["layers"][0]["nnz"])}),
        r"conv.codes\[0\] is 32, expected < 32",
    ),
    "codes of another count": (tensor("conv.codes", lambda t: compressed(bytes(5))), "conv.codes"),
    "codes that unpack to 200 MB": (
        tensor("conv.codes", lambda t: compressed(bytes(200_000_000))),
        "conv.codes unpacks to 200000000 bytes, expected",
    ),
    "codes of unknown size": (
        lambda t, h: t.update({"conv.codes": streamed(bytes(h["layers"][0]["nnz"]))}),
        "conv.codes",
    ),
    "codes that are no frame": (tensor("conv.codes", lambda t: t + 1), "conv.codes"),
    "codes cut short": (tensor("conv.codes", lambda t: t[:-3]), "conv.codes"),
    "codes of nothing": (tensor("conv.codes", lambda t: t[:0]), "conv.codes"),
    "codes in bfloat16": (
        lambda t, h: t.update({"wide.codes": even(t["wide.codes"]).view(torch.bfloat16)}),
        "wide.codes",
    ),
    "positions in bfloat16": (
        tensor("conv.positions", lambda t: t.to(torch.bfloat16)),
        "conv.positions",
    ),
    "positions in float8": (
        tensor("conv.positions", lambda t: t.view(torch.float8_e4m3fn)),
        "conv.positions",
    ),
    "positions all set": (
        tensor("conv.positions", lambda t: compressed(b"\xff" * 32)),
        "conv.positions hold",
    ),
    "positions of no kind": (entry(positions="list"), "positions of conv as 'list'"),
    "positions of a kind that is a list": (entry(positions=[]), "positions of conv as"),
    "positions of unnamed kind": (lambda t, h: h["layers"][0].pop("positions"), "positions of"),
    "mask for gaps": (entry(positions="gaps"), "conv.positions"),
    "window for a mask": (entry(positions="window"), "conv.positions are a window"),
    "gaps for a mask": (
        lambda t, h: h["layers"][3].update(positions="mask"),
        "first.positions are a mask",
    ),
    "gaps out of the matrix": (gap_bytes(lambda raw: b"\xfe" * len(raw)), "lead to position"),
    "gaps that end early": (
        gap_bytes(lambda raw: bytes(2699) + b"\xff" * (len(raw) - 2699)),
        "first.positions mark [0-9]+ positions, expected",
    ),
    "gaps and one more": (
        gap_bytes(lambda raw: raw + b"\0"),
        "first.positions mark more than|lead to position",
    ),
    "gaps of too many bytes": (gap_bytes(lambda raw: raw * 2), "first.positions unpacks to"),
    "codebook with NaN": (tensor("conv.codebook", lambda t: t / 0), "conv: codebook"),
    "codebook cut short": (tensor("conv.codebook", lambda t: t[:-1]), "conv: codebook has shape"),
    "codebook of integers": (tensor("conv.codebook", lambda t: t.int()), "conv: codebook"),
    "codebook in float8": (
        tensor("conv.codebook", lambda t: t.to(torch.float8_e4m3fn)),
        "conv: codebook",
    ),
    "no codebook": (without("conv.codebook"), "has no tensor conv.codebook"),
    "no codes": (without("conv.codes"), "has no tensor conv.codes"),
    "no positions": (without("conv.positions"), "has no tensor conv.positions"),
    "no bias": (without("conv.bias"), r"missing in the file \['conv.bias'\]"),
    "no buffer": (without("norm.running_var"), r"missing in the file \['norm.running_var'\]"),
    "one tensor more": (
        lambda t, h: t.update(more=torch.ones(1)),
        r"missing in the model \['more'\]",
    ),
    "bias of another size": (tensor("conv.bias", lambda t: t[:3]), "size mismatch for conv.bias"),
    "a layer left out of the table": (lambda t, h: h["layers"].pop(0), "conv"),
}


def even(stream: Tensor) -> Tensor:
    return torch.cat([stream, torch.zeros(len(stream) % 2, dtype=torch.uint8)])


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, model: Network, path: Path) -> None:
    change, message = DAMAGED[case]
    pk.save(model, path)
    rewrite(path, change)
    for target in (Network(), into_meta(), into_compressed()):
        with pytest.raises(ValueError, match=message):
            pk.load(path, target)


def test_a_stream_that_unpacks_to_more_than_it_promises_is_stopped(path: Path) -> None:
    model = nn.Sequential(nn.Linear(500, 400, bias=False))
    pk.compress_(model)
    pk.save(model, path)
    bomb = lying(200_000, bytes(300_000_000))
    assert zstandard.frame_content_size(bomb.numpy().tobytes()) == 200_000
    rewrite(path, tensor("0.codes", lambda t: bomb))
    with pytest.raises(ValueError, match=r"0\.codes"):
        pk.load(path, nn.Sequential(nn.Linear(500, 400, bias=False)))


ARCHITECTURES = {
    "unknown": {"name": "unheard of", "kwargs": {}},
    "unknown argument": {"name": "network", "kwargs": {"depth": 5}},
    "argument of another type": {"name": "network", "kwargs": {"width": "eight"}},
    "other sizes": {"name": "network", "kwargs": {"width": 9}},
    "negative size": {"name": "network", "kwargs": {"width": -8}},
    "size zero": {"name": "network", "kwargs": {"width": 0}},
    "huge size": {"name": "network", "kwargs": {"width": 1 << 60}},
    "other layers": {"name": "network", "kwargs": {"head": False}},
    "none": None,
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architectures_that_do_not_fit_the_file(case: str, model: Network, path: Path) -> None:
    pk.save(model, path)
    rewrite(path, lambda tensors, header: header.update(architecture=ARCHITECTURES[case]))
    with pytest.raises(ValueError, match=r"architecture|model"):
        pk.load(path)


def test_a_compressed_layer_that_the_file_does_not_have_is_missed(path: Path) -> None:
    pk.save(nn.Sequential(nn.Identity()), path)
    target = nn.Sequential(pk.QuantSparseLinear(3, 4, bias=False))
    with pytest.raises(ValueError, match="missing in the file"):
        pk.load(path, target)


def test_another_model_is_refused(model: Network, path: Path) -> None:
    pk.save(model, path)
    for other in (Network(width=9), Network(head=False), nn.Sequential(nn.Linear(3, 4))):
        with pytest.raises(ValueError, match=r"model"):
            pk.load(path, other)


# ---- random damage ----


RANDOM_DAMAGE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    torch.manual_seed(0)
    model = small()
    pk.compress_(model, {"bits": 3, "layers": {"2": {"sparsity": 0.95}}})
    path = tmp_path_factory.mktemp("damage") / "small.safetensors"
    pk.save(model, path)
    return path, path.read_bytes()


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 6))


def load_damaged(path: Path, content: bytes) -> None:
    """Either a sentence, or a model that runs: damage to a value cannot be seen."""
    path.write_bytes(content)
    with suppress(ValueError):
        model = pk.load(path, small())
        assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 6)


@RANDOM_DAMAGE
@given(keep=st.floats(0, 1, exclude_max=True))
def test_files_cut_short(small_file: tuple[Path, bytes], keep: float) -> None:
    path, content = small_file
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        pk.load(path, small())


@RANDOM_DAMAGE
@given(data=st.data(), checked=st.booleans())
def test_files_with_bytes_flipped(
    small_file: tuple[Path, bytes], data: st.DataObject, checked: bool
) -> None:
    path, content = small_file
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
    if checked and bytes(damaged) != content and b'{\\"crc32\\": \\"' in damaged:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|sound|format|header|not one written"):
            pk.load(path, small())
        return
    load_damaged(path, without_checksum(bytes(damaged)))


def without_checksum(content: bytes) -> bytes:
    """The same file with its checksum renamed: what stands behind it must hold alone."""
    return content.replace(b"crc32", b"crc33", 1)


@RANDOM_DAMAGE
@given(data=st.data())
def test_files_with_numbers_of_the_header_changed(
    small_file: tuple[Path, bytes], data: st.DataObject
) -> None:
    # Flips that keep the header's JSON sound: they reach the code behind the parsers.
    path, content = small_file
    end = 8 + int.from_bytes(content[:8], "little")
    digits = [i for i in range(8, end) if content[i : i + 1].isdigit()]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789")))
    load_damaged(path, without_checksum(bytes(damaged)))


STREAMS = ["0.positions", "0.codes", "2.positions", "2.codes"]


@RANDOM_DAMAGE
@given(raw=st.binary(max_size=400), name=st.sampled_from(STREAMS))
def test_streams_of_random_bytes(small_file: tuple[Path, bytes], raw: bytes, name: str) -> None:
    # Well-formed zstd of the size that is expected, with any content.
    path, content = small_file
    path.write_bytes(content)

    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        old = zstandard.ZstdDecompressor().decompress(tensors[name].numpy().tobytes())
        tensors[name] = compressed((raw + old[len(raw) :])[: len(old)])

    rewrite(path, change)
    load_damaged(path, path.read_bytes())


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_a_weight_of_a_gpu_is_written_as_one_of_the_cpu(tmp_path: Path, layout: Layout) -> None:
    torch.manual_seed(0)
    layer = pk.QuantSparseLinear(70, 20, bits=8)
    layer.weight = random_weight(20, 70, 0.4, 8)
    pk.save(layer, tmp_path / "cpu.safetensors")
    layer.weight = layer.weight.to_layout(layout)
    pk.save(layer, tmp_path / "gpu.safetensors")
    cpu, gpu = (tmp_path / f"{name}.safetensors" for name in ("cpu", "gpu"))
    assert cpu.read_bytes() == gpu.read_bytes()
    state = layer.state_dict()
    other = pk.QuantSparseLinear(70, 20, bits=8)
    other.load_state_dict(state)
    x = torch.randn(2, 70)
    assert torch.equal(other(x), pk.load(cpu, pk.QuantSparseLinear(70, 20, bits=8))(x))
