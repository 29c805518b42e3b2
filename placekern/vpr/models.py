"""Place-recognition networks: preprocessing, backbone, NetVLAD and PCA whitening in one module.

The surprise: the whitening layer, 16,384 or 32,768 -> 4,096, holds 90 to 97 % of a full network's
weights, and is what compression is for. A network is built without it (`dim=None`) until `fit_` or
an importer supplies one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placekern.module import default_device
from placekern.vpr.backbones import BACKBONES, BackboneSpec
from placekern.vpr.netvlad import NetVLAD, normalize
from placekern.vpr.preprocess import Preprocess, real_device

__all__ = ["ARCHITECTURES", "BACKBONES", "BackboneSpec", "PlaceNet", "build"]

_SUFFIX = "-netvlad"


class PlaceNet(nn.Module):
    """An image to one unit-length place descriptor (Arandjelovic et al. 2016, Saha et al. 2017).

    Args:
        backbone: a name of `BACKBONES`.
        clusters: K of NetVLAD.
        dim: outputs of the PCA whitening, or None for a network without it, whose descriptors have
            D * K values.
        preprocess: arguments of `Preprocess` when the weights expect others than the backbone's
            usual ones.
        seed: of the random initial weights; the global generator is neither read nor moved.

    Attributes:
        preprocess: `Preprocess`.
        backbone: `nn.Sequential`.
        netvlad: `NetVLAD`.
        whiten: `nn.Linear`, or None without whitening.
        architecture: {"name", "kwargs"} in JSON values, from which `build` makes the same network.

    Raises:
        ValueError: an unknown backbone, or a number that is not positive.
    """

    def __init__(
        self,
        backbone: str,
        clusters: int = 64,
        dim: int | None = None,
        preprocess: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}: choose from {', '.join(BACKBONES)}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be a positive number of outputs or None, got {dim}")
        spec = BACKBONES[backbone]
        generator = torch.Generator(real_device()).manual_seed(seed)
        self.minimum_size = spec.minimum_size
        self.preprocess = Preprocess(**(spec.preprocess if preprocess is None else preprocess))
        self.backbone = _materialise(spec.build, generator)
        self.netvlad = _materialise(partial(NetVLAD, clusters, spec.channels), generator)
        self.whiten: nn.Module | None = None
        if dim is not None:
            self.whiten = _materialise(partial(nn.Linear, clusters * spec.channels, dim), generator)
        self.architecture = {
            "name": backbone + _SUFFIX,
            "kwargs": {"clusters": clusters, "dim": dim, "preprocess": self.preprocess.settings()},
        }

    @property
    def descriptor_dim(self) -> int:
        """Length of a descriptor: `dim`, or K * D without whitening."""
        dim = self.architecture["kwargs"]["dim"]
        return self.netvlad.clusters * self.netvlad.dim if dim is None else dim

    def features(self, images: Tensor) -> Tensor:
        """Local descriptors, not normalised.

        Args:
            images: [B, 3, H, W], floating point, RGB in [0, 1], any H and W of at least
                `minimum_size` pixels.

        Returns:
            [B, D, h, w].

        Raises:
            TypeError, ValueError: images of another type, shape, or too small.
        """
        x = self.preprocess(images)
        if min(x.shape[2:]) < self.minimum_size:
            raise ValueError(
                f"images must be at least {self.minimum_size} pixels high and wide for this "
                f"backbone, got {x.shape[2]}x{x.shape[3]}: resize them"
            )
        return self.backbone(x)

    def forward(self, images: Tensor) -> Tensor:
        """Describe images.

        Args:
            images: as in `features`.

        Returns:
            [B, descriptor_dim] of unit length.
        """
        descriptors = self.netvlad(self.features(images))
        return descriptors if self.whiten is None else normalize(self.whiten(descriptors))

    def set_whitening(self, weight: Tensor | None, bias: Tensor | None = None) -> PlaceNet:
        """Put in a fitted whitening layer, or take it out with None.

        The record in `architecture` follows.

        Args:
            weight: [dim, K * D], the columns in this package's D-major order.
            bias: [dim].

        Raises:
            ValueError: shapes that do not fit this network.
        """
        if weight is None:
            self.whiten = None
            self.architecture["kwargs"]["dim"] = None
            return self
        inputs = self.netvlad.clusters * self.netvlad.dim
        if (
            bias is None
            or weight.ndim != 2
            or weight.shape[1] != inputs
            or bias.shape != weight.shape[:1]
        ):
            raise ValueError(
                f"whitening must be a weight [dim, {inputs}] and a bias [dim], got "
                f"{list(weight.shape)} and {None if bias is None else list(bias.shape)}"
            )
        like = self.netvlad.centroids
        linear = nn.Linear(inputs, len(weight), device="meta")
        linear.weight = nn.Parameter(weight.detach().to(like).contiguous())
        linear.bias = nn.Parameter(bias.detach().to(like).contiguous())
        self.whiten = linear
        self.architecture["kwargs"]["dim"] = len(weight)
        return self


def build(
    name: str,
    clusters: int = 64,
    dim: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PlaceNet:
    """Build a network with random weights, in evaluation mode.

    Args:
        name: "<backbone>-netvlad", the backbone one of `BACKBONES`.
        clusters, dim, preprocess, seed: as in `PlaceNet`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(ARCHITECTURES)}")
    return PlaceNet(name.removesuffix(_SUFFIX), clusters, dim, preprocess, seed).eval()


ARCHITECTURES: tuple[str, ...] = tuple(backbone + _SUFFIX for backbone in BACKBONES)


def _materialise(construct: Any, generator: torch.Generator) -> Any:
    # Built on the meta device and filled once: torch's own initialisation would draw from the
    # global generator, and takes seconds on a whitening layer that an importer then overwrites.
    device = default_device()
    with torch.device("meta"):
        module = construct()
    module = module.to_empty(device=device)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            follows = "relu" if isinstance(layer, nn.Conv2d) else "linear"
            nn.init.kaiming_normal_(layer.weight, nonlinearity=follows, generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, NetVLAD):
            layer.reset_parameters(generator)
    return module
