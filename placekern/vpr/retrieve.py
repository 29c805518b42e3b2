"""Describing images and finding the nearest references, exactly.

The surprise: `describe` batches only neighbours of the same size, since padding would change a
NetVLAD descriptor; a folder of photographs of mixed sizes runs one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from placekern.vpr.datasets import ImageList

Progress = Callable[[str, int, int], None]


def describe(
    model: nn.Module,
    images: Sequence[Tensor] | Tensor,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Descriptors of images, in their order.

    The model runs in evaluation mode on its own device and is left in the mode it was in.

    Args:
        model: [B, 3, H, W] to [B, D].
        images: an `ImageList`, any sequence of float RGB [3, H, W] in [0, 1], or a tensor
            [n, 3, H, W].
        batch_size: at most so many images of one size at once.
        progress: called as progress("describe", done, total).

    Returns:
        [n, D] float32 on the CPU.

    Raises:
        ValueError: no images, or a batch size that is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    images = ImageList(images) if isinstance(images, Tensor) else images
    if not len(images):
        raise ValueError("there are no images to describe")
    device = device_of(model)
    descriptors: Tensor | None = None
    done = 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(images, batch_size):
                rows = model(batch.to(device)).float().cpu()
                if descriptors is None:
                    with torch.inference_mode(False):  # so that the caller gets an ordinary tensor
                        descriptors = rows.new_empty(len(images), rows.shape[1])
                descriptors[done : done + len(rows)] = rows
                done += len(rows)
                if progress is not None:
                    progress("describe", done, len(images))
    finally:
        model.train(training)
    return descriptors


def search(references: Tensor, queries: Tensor, k: int = 10, chunk: int = 65_536) -> Tensor:
    """Indices of the k references nearest to each query by Euclidean distance, nearest first.

    For unit-length descriptors this is also the order of the inner product. The search is exact;
    memory is bounded by `chunk` references times 256 queries.

    Args:
        references: [n, D] floating point.
        queries: [q, D], of the same type and device.
        k: at most n.
        chunk: references compared at once.

    Returns:
        int64 [q, k]; equal distances in order of index, as far as the arithmetic finds them equal.

    Raises:
        ValueError: shapes that do not fit, or k out of range.
    """
    if references.ndim != 2 or queries.ndim != 2 or references.shape[1] != queries.shape[1]:
        raise ValueError(
            "references and queries must be [n, D] and [q, D], "
            f"got {list(references.shape)} and {list(queries.shape)}"
        )
    if not 1 <= k <= len(references):
        raise ValueError(f"k must be between 1 and the {len(references)} references, got {k}")
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    half_squares = 0.5 * references.square().sum(1)
    found = [
        _search_block(references, half_squares, block, k, chunk) for block in queries.split(256)
    ]
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _search_block(
    references: Tensor, half_squares: Tensor, queries: Tensor, k: int, chunk: int
) -> Tensor:
    # |r - q|^2 = |q|^2 - 2 (q.r - |r|^2 / 2): the largest bracket is the nearest reference.
    scores = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(references), chunk):
        block = queries @ references[start : start + chunk].T - half_squares[start : start + chunk]
        best = block.topk(min(k, block.shape[1]), dim=1, sorted=False)
        # Sorted by index, then stably by score: equal scores keep the order of their indices.
        positions, order = best.indices.sort(dim=1)
        scores = torch.cat([scores, best.values.gather(1, order)], dim=1)
        indices = torch.cat([indices, positions + start], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        scores, indices = scores.gather(1, order), indices.gather(1, order)
    return indices


def _batches(images: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for index in range(len(images)):
        image = images[index]
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    yield torch.stack(batch)
