"""Describing images and finding the references nearest to them.

The surprise: `describe` batches only neighbours of the same size, since padding would change a
NetVLAD descriptor; a folder of photographs of mixed sizes runs one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from placekern.vpr.datasets import ImageList
from placekern.vpr.index import Backend, Index

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


def search(
    references: Tensor,
    queries: Tensor,
    k: int = 10,
    chunk: int = 65_536,
    backend: Backend = "auto",
) -> Tensor:
    """Indices of the k references nearest to each query by Euclidean distance, nearest first.

    The search is exact; `Index` says how equal and non-finite distances are ordered, and is what
    to use for references that are searched more than once.

    Args:
        references: [n, D] floating point.
        queries: [q, D], of the same dtype and device.
        k: at most n.
        chunk: references compared at once, with 256 queries: the bound of memory.
        backend: "auto", "torch" or "faiss", as in `Index`.

    Returns:
        int64 [q, k]; equal distances in order of index, as far as the arithmetic finds them equal.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or k out of range.
        TypeError: references that are not floating point.
        RuntimeError: faiss was asked for, and cannot be used.
    """
    return Index(references, backend, chunk).search(queries, k)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _batches(images: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for index in range(len(images)):
        image = images[index]
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    yield torch.stack(batch)
