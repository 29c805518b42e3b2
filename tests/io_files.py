"""What the tests of files share: a network of many kinds of layers, and changes to its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import placekern as pk


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


def built(**kwargs: Any) -> Network:
    model = Network(**kwargs)
    model.architecture = {"name": "network", "kwargs": kwargs}
    return model


def compressed_network() -> Network:
    """Compressed, with running statistics that are not the initial ones."""
    model = built(width=8)
    pk.compress_(model, CONFIG)
    model(torch.randn(4, 3, 9, 9) + 1)
    model.conv.relu = True
    return model.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


def same(one: nn.Module, other: nn.Module) -> None:
    """Every tensor of both is equal, in value and dtype."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert states[1][name].dtype == tensor.dtype, name
        assert torch.equal(states[1][name], tensor), name


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


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Changes tensors and header of a file in place."""
    with safetensors.safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["placekern"])
    del header["crc32"]  # as a tool that does not know it would: what is behind it must hold alone
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, metadata={"placekern": json.dumps(header)})


def compressed(data: bytes) -> Tensor:
    """A zstd frame of `data`, as a tensor of bytes."""
    import zstandard  # not everywhere that this file is imported

    return torch.frombuffer(bytearray(zstandard.ZstdCompressor().compress(data)), dtype=torch.uint8)
