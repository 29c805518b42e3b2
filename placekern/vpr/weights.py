"""Loading published or saved weights into a network.

Three kinds of file: the Core ML SqueezeNet as .npz (a backbone only), a NetVLAD release as .mat,
and what `placekern.save` wrote. The surprise is in the .mat: the centroids are stored negated and
the layers must be MATLAB structs, since objects of MATLAB classes load empty outside MATLAB.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from placekern.io import load as load_saved
from placekern.vpr.models import ARCHITECTURES, PlaceNet, build


def load(
    name: str,
    weights: str | Path | None = None,
    clusters: int | None = None,
    dim: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PlaceNet:
    """A network by name, with weights from a file.

    Args:
        name: "<backbone>-netvlad", the backbone one of `BACKBONES`.
        weights: None for random weights, or a file:
            .npz, float arrays `<layer>.weight` OIHW and `<layer>.bias` of a SqueezeNet's
            convolutions, "/" between a Fire module and its layer. Only the backbone is set; call
            `fit_` on reference images for the rest.
            .mat, the struct form of the NetVLAD release (MATLAB 7): convolutions matched by layer
            name, NetVLAD, the whitening if it is there, and the mean pixel.
            .safetensors, a network saved by `placekern.save`, compressed or not.
        clusters: K, 64 by default; with a .mat or .safetensors it must agree with the file.
        dim: outputs of the whitening. With a .mat the first `dim` of the file's outputs are kept,
            which needs no refitting (whitened outputs are in order of variance); with a
            .safetensors it must agree with the file.
        preprocess: replaces the backbone's or the file's.
        seed: of weights that do not come from the file.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, a file of another kind, damaged, or of another network.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(ARCHITECTURES)}")
    if weights is None:
        return build(name, 64 if clusters is None else clusters, dim, preprocess, seed)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        model = build(name, 64 if clusters is None else clusters, dim, preprocess, seed)
        load_npz_(model.backbone, path)
        return model
    if suffix == ".mat":
        return _from_mat(name, path, clusters, dim, preprocess, seed)
    if suffix == ".safetensors":
        return _from_saved(name, path, clusters, dim, preprocess)
    raise ValueError(f"weights must be a .npz, .mat or .safetensors file, got {path}")


def load_npz_(backbone: nn.Module, path: str | Path) -> nn.Module:
    """Set the convolutions of a SqueezeNet, in place, from arrays named after its layers.

    Args:
        backbone: made by `squeezenet`, with or without its classifier.
        path: .npz with `<layer>.weight` OIHW and `<layer>.bias` in a floating type, "/" for the dot
            of a layer's name. Further arrays are left alone.

    Raises:
        ValueError: a damaged file, or an array that is missing or of another shape or type.
    """
    try:
        with zipfile.ZipFile(path):  # np.load would take another kind of file for a pickle
            pass
        with np.load(path, allow_pickle=False) as archive:
            for name, conv in _convolutions(backbone).items():
                for part in ("weight", "bias"):
                    key = f"{name.replace('.', '/')}.{part}"
                    if key not in archive:
                        raise ValueError(
                            f"{path} has no array {key}: is it another network's file?"
                        )
                    _copy_(getattr(conv, part), archive[key], f"{path}, {key}")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or no .npz file ({error}): fetch it again") from error
    return backbone


@dataclass(frozen=True)
class MatNet:
    """What a NetVLAD .mat holds, in this package's layouts, all float32.

    Attributes:
        convs: by layer name, weight OIHW and bias [O].
        assign, centroids: [K, D].
        whitening: weight [P, D * K] with D-major columns and bias [P], or None.
        mean: the pixel that is subtracted, RGB in 0..255.
    """

    convs: dict[str, tuple[np.ndarray, np.ndarray]]
    assign: np.ndarray
    centroids: np.ndarray
    whitening: tuple[np.ndarray, np.ndarray] | None
    mean: tuple[float, float, float]


def read_mat(path: str | Path) -> MatNet:
    """Read a NetVLAD release whose layers were turned into structs.

    net_class2struct of uzh-rpg/netvlad_tf_open does that, in MATLAB.

    Args:
        path: a MATLAB 5 to 7 file with a variable `net` of the fields `layers` (each with name and
            weights) and `meta.normalization.averageImage`.

    Raises:
        ValueError: a damaged file, or one of another structure.
    """
    from scipy.io import loadmat  # here, so that networks need no scipy

    try:
        net = loadmat(path, variable_names=["net"], struct_as_record=False, squeeze_me=True)["net"]
        layers = {str(layer.name): layer for layer in np.atleast_1d(net.layers)}
        mean = np.asarray(net.meta.normalization.averageImage, dtype=np.float64).reshape(-1, 3)[0]
    except NotImplementedError as error:
        raise ValueError(f"{path} is a MATLAB 7.3 file: save it with -v7") from error
    except (KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no NetVLAD network in struct form ({error}): the original release stores "
            "MATLAB objects, which only MATLAB can read; use a copy with its layers as structs"
        ) from error
    except Exception as error:  # scipy raises many types on a truncated or foreign file
        raise ValueError(f"{path} is damaged or no .mat file ({error}): fetch it again") from error
    if "vlad:core" not in layers:
        raise ValueError(f"{path} has no layer vlad:core, its layers are {', '.join(layers)}")
    convs = {
        name: (_ohwi_to_oihw(_weights(layer, path)[0]), _weights(layer, path)[1].reshape(-1))
        for name, layer in layers.items()
        if name.startswith("conv")
    }
    assign, negated = _weights(layers["vlad:core"], path)  # both D x K
    whitening = None
    if "WPCA" in layers:
        matrix, bias = _weights(layers["WPCA"], path)
        bias = bias.reshape(-1)
        whitening = (np.ascontiguousarray(matrix.reshape(-1, len(bias)).T), bias)
    return MatNet(convs, assign.T, -negated.T, whitening, tuple(mean.tolist()))


def _from_mat(
    name: str,
    path: Path,
    clusters: int | None,
    dim: int | None,
    preprocess: Mapping[str, Any] | None,
    seed: int,
) -> PlaceNet:
    net = read_mat(path)
    found = len(net.assign)
    if clusters not in (None, found):
        raise ValueError(f"{path} has {found} clusters, got clusters={clusters}: leave it out")
    if preprocess is None:
        preprocess = {"mean": net.mean, "scale": 1.0, "order": "rgb"}
    model = build(name, found, None, preprocess, seed)
    for layer, conv in _convolutions(model.backbone).items():
        if layer not in net.convs:
            raise ValueError(
                f"{path} has no layer {layer}, so it is not {name}; it has {', '.join(net.convs)}"
            )
        weight, bias = net.convs[layer]
        _copy_(conv.weight, weight, f"{path}, {layer} weight")
        _copy_(conv.bias, bias, f"{path}, {layer} bias")
    _copy_(model.netvlad.assign, net.assign, f"{path}, vlad:core weight")
    _copy_(model.netvlad.centroids, net.centroids, f"{path}, vlad:core centres")
    if net.whitening is not None:
        weight, bias = (torch.from_numpy(array) for array in net.whitening)
        if dim is not None and not 1 <= dim <= len(weight):
            raise ValueError(f"{path} has a whitening of {len(weight)} outputs, got dim={dim}")
        # Cloned, as a slice would keep the rows that are left out alive.
        model.set_whitening(
            *((weight, bias) if dim is None else (weight[:dim].clone(), bias[:dim]))
        )
    elif dim is not None:
        raise ValueError(f"{path} has no whitening, got dim={dim}: load without and call fit_")
    return model


def _from_saved(
    name: str,
    path: Path,
    clusters: int | None,
    dim: int | None,
    preprocess: Mapping[str, Any] | None,
) -> PlaceNet:
    model = load_saved(path)
    if not isinstance(model, PlaceNet) or model.architecture["name"] != name:
        found = getattr(model, "architecture", {}).get("name", type(model).__name__)
        raise ValueError(f"{path} holds {found}, not {name}")
    saved = model.architecture["kwargs"]
    for key, value in (("clusters", clusters), ("dim", dim)):
        if value is not None and value != saved[key]:
            raise ValueError(f"{path} was saved with {key}={saved[key]}, got {key}={value}")
    if preprocess is not None:
        raise ValueError(f"{path} carries its own preprocessing: leave preprocess out")
    return model.eval()


def _convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}


def _weights(layer: Any, path: str | Path) -> list[np.ndarray]:
    stored = np.atleast_1d(getattr(layer, "weights", np.empty(0)))
    arrays = [np.asarray(array, dtype=np.float32) for array in stored]
    if len(arrays) != 2:
        raise ValueError(f"{path}, {layer.name}: expected two weight arrays, got {len(arrays)}")
    return arrays


def _ohwi_to_oihw(weight: np.ndarray) -> np.ndarray:
    if weight.ndim != 4:
        raise ValueError(f"a convolution's weight must have four dimensions, got {weight.shape}")
    return weight.transpose(3, 2, 0, 1)


def _copy_(target: Tensor, array: np.ndarray, where: str) -> None:
    if array.shape != tuple(target.shape) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{where}: expected floating point {tuple(target.shape)}, "
            f"got {array.dtype} {array.shape}"
        )
    with torch.no_grad():
        target.copy_(torch.from_numpy(array.astype(np.float32)))
