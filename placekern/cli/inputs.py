"""What commands open: networks and data sets, from their arguments."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import placekern as pk

from ..vpr import PlaceDataset, load, load_corridor, load_folders


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
