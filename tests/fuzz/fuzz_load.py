"""Fuzzes the readers of files with atheris: `make fuzz`.

A file either loads into a model that runs, or is refused in a sentence: any exception but
ValueError is a find, as is a crash, a run of ten seconds, or 2 GB. The surprise: inputs are no
files, but say how to change a sound one (header, streams, single bytes), since random bytes would
never come past the first parser. The checksum is left out for the same reason.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["placekern.io", "placekern.packing", "placekern.proofs"]):
    import placekern as pk
    from placekern.io import file as _file  # noqa: F401, instrumented
    from placekern.io import load_deep_compression

import torch
import zstandard
from torch import nn

torch.set_num_threads(1)
FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "fuzzed"


def network() -> nn.Sequential:
    """One layer of each kind, and of each way that positions are written."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 60), nn.ReLU(), nn.Linear(60, 6)
    )


def sound_file() -> bytes:
    """A file of `network` as it is saved."""
    torch.manual_seed(0)
    model = network()
    layers = {
        "0": {"group_size": 2},  # several codebooks
        "2": {"bits": 5, "entropy_lambda": 0.3},  # digits and rare codes
        "4": {"sparsity": 0.95},  # gaps
    }
    pk.compress_(model, {"bits": 3, "sparsity": 0.5, "layers": layers})
    pk.save(model, PATH)
    return PATH.read_bytes()


def parts(content: bytes) -> tuple[dict, dict, bytes]:
    """Table of tensors, our header, and data."""
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    header = json.loads(table.pop("__metadata__")["placekern"])
    header.pop("crc32", None)
    return table, header, content[end:]


TABLE, HEADER, DATA = parts(sound_file())
STREAMS = [name for name, entry in TABLE.items() if entry["dtype"] == "U8"]
FIELDS = ["nnz", "bits", "shape", "positions", "kind", "name", "common", "shares", "relu"]
assert "2.rare" in STREAMS
assert [entry["positions"] for entry in HEADER["layers"]] == ["mask", "mask", "gaps"]
VALUES = [0, 1, -1, 3, 8, 9, 2**31, 2**63, 10**30, 1.5, None, True]
WORDS = ["gaps", "mask", "window", "Linear"]
LISTS = [[4, 18], [1 << 40, 1 << 40], [0, 1, 2], [30, 31, 300], []]


def whole(table: dict, header: dict, data: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps({"__metadata__": {"placekern": json.dumps(header)}, **table}).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(provider: atheris.FuzzedDataProvider) -> bytes:
    """The sound file with fields, streams or bytes changed."""
    table, header = json.loads(json.dumps(TABLE)), json.loads(json.dumps(HEADER))
    tensors = {n: DATA[slice(*entry["data_offsets"])] for n, entry in table.items()}
    for _ in range(provider.ConsumeIntInRange(0, 3)):
        entry = provider.PickValueInList(header["layers"])
        value = provider.PickValueInList([*VALUES, *WORDS, *LISTS])
        entry[provider.PickValueInList(FIELDS)] = value
    for _ in range(provider.ConsumeIntInRange(0, 2)):
        name = provider.PickValueInList(STREAMS)
        raw = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 600))
        if provider.ConsumeBool():  # sound zstd of any content, of the old length or another
            old = zstandard.ZstdDecompressor().decompress(
                DATA[slice(*TABLE[name]["data_offsets"])], max_output_size=10_000
            )
            raw = raw if provider.ConsumeBool() else (raw + old[len(raw) :])[: len(old)]
            raw = zstandard.ZstdCompressor().compress(raw)
        tensors[name] = raw
    data, at = b"", 0
    for name, entry in table.items():
        content = tensors[name]
        if entry["dtype"] == "U8":
            entry["shape"] = [len(content)]
        entry["data_offsets"] = [at, at + len(content)]
        data, at = data + content, at + len(content)
    content = bytearray(whole(table, header, data))
    for _ in range(provider.ConsumeIntInRange(0, 3)):
        at = provider.ConsumeIntInRange(0, len(content) - 1)
        content[at] ^= provider.ConsumeIntInRange(0, 255)
    return bytes(content)


def one_input(data: bytes) -> None:
    """Loads what the bytes describe."""
    provider = atheris.FuzzedDataProvider(data)
    choice = provider.ConsumeIntInRange(0, 9)
    try:
        if choice == 0:
            PATH.write_bytes(provider.ConsumeBytes(4000))
            load_deep_compression(PATH, network())
            return
        PATH.write_bytes(provider.ConsumeBytes(4000) if choice == 1 else mutated(provider))
        with torch.device("meta"):
            model = network()
        model = pk.load(PATH, model)
    except ValueError:
        return
    with torch.no_grad():
        assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 6)
    again = PATH.with_name("again")
    pk.save(model, again)
    first = again.read_bytes()
    pk.save(pk.load(again, network()), again)
    assert again.read_bytes() == first, "save, load, save gives other bytes"


if __name__ == "__main__":
    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=1500", "-len_control=0"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one_input)
    atheris.Fuzz()
