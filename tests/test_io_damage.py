"""Files that are not ours, damaged or of another model are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import zstandard
from io_files import (
    Network,
    compressed,
    into_compressed,
    into_meta,
    rewrite,
)
from torch import Tensor, nn

import placekern as pk
from placekern.io import read_header


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


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_reported(where: float, model: Network, path: Path) -> None:
    pk.save(model, path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(where * (len(content) - start))] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: its checksum is [0-9a-f]{8}, but"):
        pk.load(path)


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
