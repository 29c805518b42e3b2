"""A .safetensors file opened for reading: its header, its tensors, and single streams in pieces.

The surprise: the safetensors package maps the whole file, and pages that were read stay in memory
for as long as it is open. Streams are read past it, by their offsets, so that loading needs no room
for the file beside the model.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

METADATA = "placekern"
"""The entry of the safetensors header that holds ours."""

_PIECE = 1 << 20
_CHECKSUM = re.compile(rb'"placekern":"\{\\"crc32\\": \\"([0-9a-f]{8})\\"')
NO_CHECKSUM = "0" * 8


class Section(io.RawIOBase):
    """Some bytes of a file, or of a tensor, as a file of their own."""

    def __init__(self, source: io.BufferedIOBase, start: int, size: int) -> None:
        super().__init__()
        self.size = size
        self._source = source
        self._start = start
        self._at = 0

    @classmethod
    def of(cls, name: str, stream: Tensor | Section) -> Section:
        """A section as it is; a flat uint8 tensor as one.

        Raises:
            ValueError: a tensor of another kind.
        """
        if isinstance(stream, Section):
            return stream
        check_stream(name, str(stream.dtype), stream.shape)
        return cls(io.BytesIO(stream.numpy().tobytes()), 0, stream.numel())

    def readable(self) -> bool:
        """Always."""
        return True

    def peek(self, size: int) -> bytes:
        """The next bytes, which `read` will give again."""
        at = self._at
        data = self.read(size)
        self._at = at
        return data

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer at the end."""
        left = self.size - self._at
        self._source.seek(self._start + self._at)
        data = self._source.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def check_stream(name: str, dtype: str, shape: Any) -> None:
    """Raises ValueError unless a tensor is flat and of uint8, as every stream is."""
    if dtype not in ("U8", "torch.uint8") or len(shape) != 1:
        raise ValueError(f"{name} is {dtype} {tuple(shape)}, expected a flat torch.uint8 tensor")


class StoredFile:
    """A context manager for reading one file.

    Attributes:
        path: as it was given.
        names: of all tensors.
        metadata: our entry of the header, as text; None in a file that is not ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a sound safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        self._raw = Path(path).open("rb")  # noqa: SIM115, closed by `close`
        try:
            # It proves that the tensors lie side by side and end where the file ends.
            self._mapped = safe_open(path, framework="pt")
            self.names = set(self._mapped.keys())
            self.metadata = (self._mapped.metadata() or {}).get(METADATA)
            self._data = 8 + int.from_bytes(self._raw.read(8), "little")
            self._header = self._raw.read(self._data - 8)
            self._table = json.loads(self._header)
        except (SafetensorError, ValueError, RecursionError) as error:
            self._raw.close()
            raise ValueError(f"{path} is not a sound safetensors file ({error})") from None

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; () where there is none of this name."""
        return tuple(self._table[name]["shape"]) if name in self.names else ()

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from the file.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.names:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._mapped.get_tensor(name)

    def section(self, name: str) -> Section:
        """The bytes of a stream.

        Raises:
            ValueError: there is none of this name, or it is not a flat uint8 tensor.
        """
        if name not in self.names:
            raise ValueError(f"{self.path} has no tensor {name}")
        entry = self._table[name]
        check_stream(name, entry["dtype"], entry["shape"])
        start, end = entry["data_offsets"]
        return Section(self._raw, self._data + start, end - start)

    def check(self) -> None:
        """Compares the file with its checksum, when it has one.

        Raises:
            ValueError: a bit of the file is not as it was written.
        """
        found = _CHECKSUM.search(self._header)
        if found is None and not (self.metadata or "").startswith('{"crc32"'):
            return  # format 1, or written anew by another tool
        expected = found[1].decode() if found else "something else"
        actual = checksum(self._raw)[0]
        if actual != expected:
            raise ValueError(
                f"{self.path} is damaged: its checksum is {actual}, but {expected} was written; "
                "copy or download it again"
            )


def checksum(file: Any) -> tuple[str, int | None]:
    """CRC-32 of a whole file, eight zeros in place of its own digits, and where these stand.

    Args:
        file: open for reading, binary.
    """
    file.seek(0)
    size = file.read(8)
    header = bytearray(file.read(int.from_bytes(size, "little")))
    found = _CHECKSUM.search(header)
    if found:
        header[found.start(1) : found.end(1)] = NO_CHECKSUM.encode()
    crc = zlib.crc32(header, zlib.crc32(size))
    while piece := file.read(_PIECE):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}", 8 + found.start(1) if found else None


def write_checksum(path: str | os.PathLike[str]) -> None:
    """Puts the checksum where the header has kept room for it."""
    with Path(path).open("r+b") as file:
        digits, at = checksum(file)
        if at is not None:
            file.seek(at)
            file.write(digits.encode())
