"""Random damage to a file: a sentence, or a model that runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_files import (
    compressed,
    rewrite,
)
from torch import Tensor, nn

import placekern as pk

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
