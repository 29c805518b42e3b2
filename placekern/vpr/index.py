"""Exact search among references, by torch or by faiss.

The surprise: faiss says which references are nearest, but not in which order equal distances come,
nor which of them it left out. Its answers are put in order here, and a query whose last place is
tied is searched again by torch; so either backend returns the same.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from placekern.vpr import _faiss

Backend = Literal["auto", "torch", "faiss"]

_QUERIES_AT_ONCE = 256
_ELEMENTS_AT_ONCE = 1 << 22  # of references squared or converted: 16 MiB in float32


def search_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that "auto" takes for references of a dtype on a device.

    faiss for float32 on a CUDA device where faiss has GPU support, torch for everything else. On
    the CPU torch keeps the references' squares, which faiss sums again in most searches, and has
    measured faster at most sizes up to some hundred queries at a time; faiss, for a thousand.
    """
    device = torch.device(device)
    if device.type == "cuda" and dtype == torch.float32 and not _faiss.reason_against(device):
        return "faiss"
    return "torch"


def faiss_status() -> str:
    """The version of faiss, "not installed", or why the one installed does not load."""
    return _faiss.status()


class Index:
    """References that are searched many times by Euclidean distance, exactly.

    For unit-length descriptors the order is also that of the inner product. Arithmetic is float32
    at least: float16 and bfloat16 are converted piece by piece, autocast has no effect. torch's
    products follow `torch.set_float32_matmul_precision`; below "highest", near ties may swap.

    Equal distances come in order of index, as far as the arithmetic finds them equal. A descriptor
    with NaN, infinity, or a sum of squares that overflows is infinitely far from every other: as a
    reference it comes last, as a query it finds the references in order of index.

    Args:
        references: [n, D] floating point. Kept, not copied (faiss copies what is not
            contiguous), so they must not change while the index is in use.
        backend: "torch", "faiss" (float32 on the CPU or CUDA), or "auto", see `search_backend`.
            On a GPU faiss keeps up to 1.5 GiB for its temporaries until the process ends, and
            leaves searches for more than 2,047 neighbours to torch.
        chunk: references that torch compares at once, with up to 256 queries: the bound of memory.

    Attributes:
        references: [n, D], those given.
        backend: the one in use, "torch" or "faiss".

    Raises:
        ValueError: references that are not [n, D], an unknown backend, a chunk that is not
            positive, or references of a dtype that faiss does not search.
        TypeError: references that are not floating point.
        RuntimeError: faiss was asked for, and is not there, does not load, or has no GPU support.
    """

    def __init__(self, references: Tensor, backend: Backend = "auto", chunk: int = 65_536) -> None:
        if references.ndim != 2:
            raise ValueError(f"references must be [n, D], got {list(references.shape)}")
        if not references.is_floating_point():
            raise TypeError(f"references have dtype {references.dtype}, expected a floating dtype")
        if chunk < 1:
            raise ValueError(f"chunk must be positive, got {chunk}")
        self.references = references.detach()
        self.chunk = chunk
        self.backend = _choose(backend, references)
        if self.backend == "faiss":
            self.references = self.references.contiguous()
        self._squares = _squares(self.references)
        self._finite = bool(self._squares.isfinite().all())

    def __len__(self) -> int:
        return len(self.references)

    def search(self, queries: Tensor, k: int = 10) -> Tensor:
        """Indices of the k references nearest to each query, nearest first.

        Args:
            queries: [q, D], of the dtype and on the device of the references.
            k: at most n.

        Returns:
            int64 [q, k], on the device of the references.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or k out of range.
        """
        self._check(queries, k)
        queries = queries.detach().contiguous()
        finite = self._finite and bool(_squares(queries).isfinite().all())
        # One more than asked for shows whether the last place is tied.
        wanted = min(k + 1, len(self))
        if (
            self.backend == "faiss"
            and finite
            and queries.numel()
            and not (queries.is_cuda and wanted > _faiss.MAX_K_ON_GPU)
        ):
            found = _faiss.nearest(self.references, self._squares, queries, wanted)
            return self._settle(queries, *found, k)
        return self._search_by_torch(queries, k, finite)

    def _check(self, queries: Tensor, k: int) -> None:
        references = self.references
        if queries.ndim != 2 or queries.shape[1] != references.shape[1]:
            raise ValueError(
                "references and queries must be [n, D] and [q, D], "
                f"got {list(references.shape)} and {list(queries.shape)}"
            )
        if queries.dtype != references.dtype or queries.device != references.device:
            raise ValueError(
                "references and queries must have one dtype and device, "
                f"got {references.dtype} on {references.device} "
                f"and {queries.dtype} on {queries.device}"
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} references, got {k}")

    def _settle(self, queries: Tensor, distances: Tensor, indices: Tensor, k: int) -> Tensor:
        indices, order = indices.sort(dim=1)
        distances, order = distances.gather(1, order).sort(dim=1, stable=True)
        indices = indices.gather(1, order)
        # faiss writes -1 where a distance overflows, though the squares did not.
        unsettled = (indices < 0).any(1)
        if distances.shape[1] > k:
            unsettled |= distances[:, k - 1] == distances[:, k]
        indices = indices[:, :k].contiguous()
        if unsettled.any():
            indices[unsettled] = self._search_by_torch(queries[unsettled], k, finite=True)
        return indices

    def _search_by_torch(self, queries: Tensor, k: int, finite: bool) -> Tensor:
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                block = queries[start : start + _QUERIES_AT_ONCE]
                found[start : start + len(block)] = self._search_block(block, k, finite)
        return found

    def _search_block(self, queries: Tensor, k: int, finite: bool) -> Tensor:
        queries = queries.to(self._squares.dtype)
        scores = queries.new_empty(len(queries), 0)
        indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        start = 0
        for references, squares in zip(
            self.references.split(self._rows_at_once()),
            self._squares.split(self._rows_at_once()),
            strict=True,
        ):
            # |r - q|^2 = |q|^2 - 2 (q.r - |r|^2 / 2): the largest bracket is the nearest reference.
            block = torch.addmm(squares, queries, references.to(queries.dtype).T, beta=-0.5)
            if not finite:
                near = _squares(queries).isfinite()[:, None] & squares.isfinite()
                block.masked_fill_(~near, -math.inf)
            best, positions = _largest(block, min(k, len(references)))
            scores = torch.cat([scores, best], dim=1)
            indices = torch.cat([indices, positions + start], dim=1)
            # Stable: equal scores keep the order of their indices.
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
            scores, indices = scores.gather(1, order), indices.gather(1, order)
            start += len(references)
        return indices

    def _rows_at_once(self) -> int:
        if self.references.dtype == self._squares.dtype:
            return self.chunk
        return min(self.chunk, _rows_within(_ELEMENTS_AT_ONCE, self.references))


def _choose(backend: str, references: Tensor) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "auto":
        return search_backend(references.device, references.dtype)
    if backend == "faiss":
        if references.dtype != torch.float32:
            raise ValueError(
                f"faiss searches float32, got references of {references.dtype}: "
                "convert the descriptors, or use backend='torch'"
            )
        reason = _faiss.reason_against(references.device)
        if reason is not None:
            raise RuntimeError(f"{reason}, or use backend='torch'")
    return backend


def _squares(rows: Tensor) -> Tensor:
    # Piece by piece, since the square of a large database would be a second one.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    squares = torch.empty(len(rows), dtype=dtype, device=rows.device)
    step = _rows_within(_ELEMENTS_AT_ONCE, rows)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].to(dtype)
        torch.sum(piece.square(), 1, out=squares[start : start + step])
    return squares


def _rows_within(elements: int, rows: Tensor) -> int:
    return max(1, elements // max(1, rows.shape[1]))


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # The k largest of each row, in order of position; of equal ones the first.
    if k == scores.shape[1]:
        return scores, torch.arange(k, device=scores.device).expand(len(scores), k)
    values, positions = scores.topk(k + 1, dim=1)
    positions = positions[:, :k]
    tied = values[:, k - 1] == values[:, k]
    if tied.any():
        # topk takes any of those that are as large as the last one.
        rows, last = scores[tied], values[tied, k - 1, None]
        larger, equal = rows > last, rows == last
        first = equal.cumsum(1) <= k - larger.sum(1, keepdim=True)
        positions[tied] = (larger | equal & first).nonzero()[:, 1].view(-1, k)
    positions = positions.sort(dim=1).values
    return scores.gather(1, positions), positions
