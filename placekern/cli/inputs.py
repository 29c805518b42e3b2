"""What commands open: networks and data sets, from their arguments; and what they fit of them.

The surprise: a file of weights says by its ending what it leaves open. A .npz brings a backbone, a
.mat also NetVLAD's clusters and perhaps the whitening, a .safetensors is a whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

import placekern as pk

from ..vpr import PlaceDataset, fit_, load, load_corridor, load_folders, whiten_


def open_network(network: str, weights: Path | None) -> nn.Module:
    """A network by its name and a file of weights, or from a .safetensors; in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as `placekern.load` and `placekern.vpr.load`; weights given
            beside a .safetensors.
    """
    if network.endswith(".safetensors"):
        if weights is not None:
            raise ValueError(f"{network} has weights of its own: leave --weights out")
        return pk.load(network).eval()
    return load(network, weights)


def open_dataset(
    dataset: Path | None,
    queries: Path | None,
    references: Path | None,
    ground_truth: Path | None,
    distance: float,
    size: tuple[int, int] | None,
) -> PlaceDataset:
    """A data set in one folder, or from two folders of images.

    Raises:
        FileNotFoundError, ValueError: as `load_corridor` and `load_folders`; neither or both given.
    """
    if dataset is not None and (queries or references):
        raise ValueError("give either --dataset or --queries and --references")
    if dataset is not None:
        return load_corridor(dataset, size)
    if queries is None or references is None:
        raise ValueError("give --dataset, or both --queries and --references")
    return load_folders(queries, references, ground_truth, distance, size)


def missing_parts(model: nn.Module, network: str, weights: Path | None) -> tuple[str, ...]:
    """What weights leave open and images have to say: "NetVLAD" and "whitening", or fewer.

    Args:
        model: of `open_network`.
        network, weights: as they were given to it.
    """
    suffix = "" if weights is None else weights.suffix.lower()
    if network.endswith(".safetensors") or suffix == ".safetensors":
        return ()
    if suffix == ".mat":
        return ("whitening",) if model.whiten is None else ()
    return ("NetVLAD", "whitening")


def fit_what_is_missing(
    model: nn.Module,
    network: str,
    weights: Path | None,
    images: Sequence[Tensor],
    dim: int | Literal["auto"] | None = "auto",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> bool:
    """Fits NetVLAD's clusters and the whitening, in place, where the weights bring none.

    Args:
        model: of `open_network`.
        network, weights: as they were given to it.
        images, dim, seed, progress: as in `placekern.vpr.fit_`.

    Returns:
        Whether anything was fitted.

    Raises:
        ValueError: as `placekern.vpr.fit_`.
    """
    missing = missing_parts(model, network, weights)
    if "NetVLAD" in missing:
        fit_(model, images, dim, seed=seed, progress=progress)
    elif missing:
        whiten_(model, images, dim, seed=seed, progress=progress)
    return bool(missing)


def check_folder(*paths: Path | None) -> None:
    """Raises where a file cannot be written for want of a folder: better now than after the work.

    Raises:
        FileNotFoundError: names the first such folder.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
