"""Fitting a network to references without training: NetVLAD's clusters, then the whitening.

The surprise: only references are used, never queries. A map's own images are known when a system is
set up, so this does not look at the test; still, a whitening fitted on the references that are then
searched is a choice to report beside the numbers. Both steps are also offered alone, since a
trained network keeps its clusters and is whitened last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from placekern.vpr.datasets import ImageList
from placekern.vpr.models import PlaceNet
from placekern.vpr.retrieve import Progress, describe, device_of
from placekern.vpr.whitening import fit_whitening

# What the NetVLAD release uses: 100 descriptors of each of 500 images to cluster, 10,000 images and
# 4,096 outputs to whiten.
_CLUSTER_IMAGES = 500
_WHITENING_IMAGES = 10_000
_WHITENING_OUTPUTS = 4096


def fit_(
    model: PlaceNet,
    references: Sequence[Tensor] | Tensor,
    dim: int | Literal["auto"] | None = "auto",
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> PlaceNet:
    """Initialise NetVLAD and fit the whitening, in place: `init_netvlad_`, then `whiten_`.

    Args:
        model: a network whose backbone has meaningful weights.
        references: the map's images, [3, H, W] float RGB in [0, 1] each.
        dim: as in `whiten_`.
        seed: of every random choice.
        batch_size: as in `describe`.
        progress: called as progress(label, done, total).

    Returns:
        `model`.

    Raises:
        ValueError: as the two steps.
    """
    init_netvlad_(model, references, seed=seed, progress=progress)
    return whiten_(model, references, dim, seed, batch_size, progress)


def init_netvlad_(
    model: PlaceNet,
    references: Sequence[Tensor] | Tensor,
    descriptors_per_image: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> PlaceNet:
    """Set NetVLAD's clusters, in place, from local descriptors of at most 500 references.

    A whitening that was fitted to the former clusters no longer applies and is taken out.

    Args:
        model, references, seed, progress: as in `fit_`.
        descriptors_per_image: drawn without replacement, fewer where an image has fewer.

    Returns:
        `model`.

    Raises:
        ValueError: fewer local descriptors than clusters, or images that are all alike.
    """
    images = ImageList(references) if isinstance(references, Tensor) else references
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = _draw(len(images), _CLUSTER_IMAGES, generator)
    device = device_of(model)
    samples = []
    with torch.no_grad():
        for done, index in enumerate(chosen, 1):
            features = (
                model.features(images[index][None].to(device))[0].flatten(1).T.cpu()
            )  # [N, D]
            samples.append(features[_draw(len(features), descriptors_per_image, generator)])
            if progress is not None:
                progress("local descriptors", done, len(chosen))
    if not samples:
        raise ValueError("there are no references to fit to")
    model.netvlad.init_(torch.cat(samples), seed)
    return model.set_whitening(None)


def whiten_(
    model: PlaceNet,
    references: Sequence[Tensor] | Tensor,
    dim: int | Literal["auto"] | None = "auto",
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> PlaceNet:
    """Fit the PCA whitening, in place, on the descriptors of at most 10,000 references.

    An earlier whitening is replaced.

    Args:
        model, references, seed, batch_size, progress: as in `fit_`.
        dim: outputs. "auto" takes a third of the number of references, at most 4,096. Past that,
            whitening raises directions whose small variance is an accident of the sample, until
            at one output fewer than references all of them are equally far apart: on the 111
            images of VPR-Bench's corridor recall@1 is 0.86 at 37 outputs and 0.59 at 110. None
            takes the whitening out.

    Returns:
        `model`.

    Raises:
        ValueError: `dim` above what the references can support.
    """
    model.set_whitening(None)
    if dim is None:
        return model
    images = ImageList(references) if isinstance(references, Tensor) else references
    if len(images) > _WHITENING_IMAGES:
        generator = torch.Generator("cpu").manual_seed(seed)
        images = _Subset(images, _draw(len(images), _WHITENING_IMAGES, generator))
    descriptors = describe(model, images, batch_size, progress)
    if dim == "auto":
        dim = auto_dim(len(descriptors), descriptors.shape[1])
    return model.set_whitening(*fit_whitening(descriptors, dim))


def auto_dim(references: int, inputs: int) -> int:
    """The outputs that "auto" stands for in `whiten_`.

    Args:
        references: how many there are.
        inputs: length of a descriptor before the whitening.
    """
    return max(1, min(min(references, _WHITENING_IMAGES) // 3, inputs, _WHITENING_OUTPUTS))


class _Subset(Sequence[Tensor]):
    def __init__(self, images: Sequence[Tensor], indices: list[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.indices[index]]


def _draw(population: int, limit: int, generator: torch.Generator) -> list[int]:
    if population <= limit:
        return list(range(population))
    return sorted(torch.randperm(population, generator=generator, device="cpu")[:limit].tolist())
