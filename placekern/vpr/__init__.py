"""Place recognition: networks, data, retrieval and evaluation around the compressed layers.

The surprise: importing this package makes its networks known to `placekern.load`, which rebuilds a
network from the name in a file. What draws is imported when it is first used: it needs Pillow.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from placekern.io import register_architecture
from placekern.vpr.backbones import BACKBONES, BackboneSpec, squeezenet
from placekern.vpr.city import City
from placekern.vpr.datasets import (
    ImageList,
    PlaceDataset,
    list_images,
    load_corridor,
    load_folders,
    read_image,
)
from placekern.vpr.evaluate import (
    Evaluation,
    Row,
    compare,
    evaluate,
    label_of,
    latency_ms,
    recall_at,
)
from placekern.vpr.fit import fit_, init_netvlad_, whiten_
from placekern.vpr.index import Index
from placekern.vpr.models import ARCHITECTURES, PlaceNet, build
from placekern.vpr.netvlad import NetVLAD
from placekern.vpr.places import TrainingImages, load_places
from placekern.vpr.preprocess import Preprocess
from placekern.vpr.retrieve import describe, search
from placekern.vpr.train import TrainingRecord, distill, multi_similarity_loss, train
from placekern.vpr.weights import load, load_npz_, read_mat
from placekern.vpr.whitening import fit_whitening

if TYPE_CHECKING:
    from placekern.vpr.figure import Retrieval, retrieval_sheet, save_sheet

__all__ = [
    "ARCHITECTURES",
    "BACKBONES",
    "BackboneSpec",
    "City",
    "Evaluation",
    "ImageList",
    "Index",
    "NetVLAD",
    "PlaceDataset",
    "PlaceNet",
    "Preprocess",
    "Retrieval",
    "Row",
    "TrainingImages",
    "TrainingRecord",
    "build",
    "compare",
    "describe",
    "distill",
    "evaluate",
    "fit_",
    "fit_whitening",
    "init_netvlad_",
    "label_of",
    "latency_ms",
    "list_images",
    "load",
    "load_corridor",
    "load_folders",
    "load_npz_",
    "load_places",
    "multi_similarity_loss",
    "read_image",
    "read_mat",
    "recall_at",
    "retrieval_sheet",
    "save_sheet",
    "search",
    "squeezenet",
    "train",
    "whiten_",
]


def __getattr__(name: str) -> Any:
    if name in ("Retrieval", "retrieval_sheet", "save_sheet"):
        from placekern.vpr import figure

        return getattr(figure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _name in ARCHITECTURES:
    register_architecture(_name, partial(build, _name))
