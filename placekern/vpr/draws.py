"""Batches for training, drawn from a seed: item i of such a data set is the batch of step i.

The surprise: all batches come from one generator, in turn, and it is wound forward to the one that
is asked for. So a run that is resumed at step i, or whose images are read by several processes,
gets the batches that an uninterrupted one in a single process gets. Winding costs microseconds a
step, as no image is read for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset


class _Draws(Dataset[Any]):
    """Item i is made of the i-th choice that one generator gives."""

    def __init__(self, images: Tensor | Sequence[Tensor], steps: int, seed: int) -> None:
        self._images = images
        self._steps = steps
        self._seed = seed
        # Made when it is first used: a generator cannot be sent to another process.
        self._generator: Generator | None = None
        self._drawn = 0

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Any:
        if self._generator is None or step < self._drawn:
            self._generator = torch.Generator().manual_seed(self._seed)
            self._drawn = 0
        while self._drawn < step:
            self._choose(self._generator)
            self._drawn += 1
        self._drawn += 1
        return self._make(self._choose(self._generator))

    def _choose(self, generator: Generator) -> Any:
        raise NotImplementedError

    def _make(self, choice: Any) -> Any:
        raise NotImplementedError

    def _gather(self, rows: Tensor) -> Tensor:
        """Images [len(rows), 3, H, W].

        Raises:
            ValueError: they are of several sizes.
        """
        if isinstance(self._images, Tensor):
            return self._images[rows]
        images = [self._images[row] for row in rows.tolist()]
        for row, image in zip(rows.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                first, other = (f"{i.shape[-2]}x{i.shape[-1]}" for i in (images[0], image))
                raise ValueError(
                    f"image {int(rows[0])} is {first} pixels and image {row} is {other}, but the "
                    "images of a batch must be of one size: resize them all to one"
                )
        return torch.stack(images)


class PlaceDraws(_Draws):
    """Labelled batches: some places, some views of each.

    Args:
        images: float32 [n, 3, H, W], or a sequence of [3, H, W] of one size.
        members: of each place, the rows of its images, int64.
        places: in a batch; mirrored ones are places of their own.
        views: of each place; fewer where it has fewer.
        steps: batches.
        seed: of the draws.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        members: Sequence[Tensor],
        places: int,
        views: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(images, steps, seed)
        self._members = members
        self._places = places
        self._views = views

    def _choose(self, generator: Generator) -> list[tuple[int, Tensor]]:
        count = len(self._members)
        chosen = []
        for place in torch.randperm(2 * count, generator=generator)[: self._places].tolist():
            rows = self._members[place % count]
            rows = rows[torch.randperm(len(rows), generator=generator)[: self._views]]
            chosen.append((place, rows))
        return chosen

    def _make(self, choice: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """Images [b, 3, H, W] and labels [b]; place i + len(members) is place i mirrored."""
        images = self._gather(torch.cat([rows for _, rows in choice]))
        parts = images.split([len(rows) for _, rows in choice])
        mirrored = [
            part.flip(3) if place >= len(self._members) else part
            for (place, _), part in zip(choice, parts, strict=True)
        ]
        labels = [place for place, rows in choice for _ in rows]
        return torch.cat(mirrored), torch.tensor(labels)


class ImageDraws(_Draws):
    """Batches of images without labels, half of the batches mirrored.

    Args:
        images: float32 [n, 3, H, W], n >= 1, or a sequence of [3, H, W] of one size.
        batch_size: images of a batch, drawn with replacement.
        steps: batches.
        seed: of the draws.
    """

    def __init__(
        self, images: Tensor | Sequence[Tensor], batch_size: int, steps: int, seed: int
    ) -> None:
        super().__init__(images, steps, seed)
        self._batch_size = batch_size

    def _choose(self, generator: Generator) -> tuple[Tensor, bool]:
        rows = torch.randint(len(self._images), (self._batch_size,), generator=generator)
        return rows, bool(torch.rand(1, generator=generator) < 0.5)

    def _make(self, choice: tuple[Tensor, bool]) -> Tensor:
        rows, mirrored = choice
        images = self._gather(rows)
        return images.flip(3) if mirrored else images
