"""Image normalisation inside the network, so that every model takes float RGB in [0, 1].

The surprise: `mean` is in pixel units of 0 to 255 and in the network's own channel order, as the
original releases print it, while the images that come in are RGB in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from placekern.module import default_device

_ORDERS = ("rgb", "bgr")


class Preprocess(nn.Module):
    """`(255 * image - mean) * scale`, with the channels in the order the network was trained on.

    Args:
        mean: three floats in 0..255, in the order named by `order`.
        scale: one float, or three in the order named by `order`; 1 / (255 * std) for networks
            trained on standardised images, 1 for the Caffe and MatConvNet ones.
        order: "rgb" or "bgr", the channel order of what leaves this module.

    Raises:
        ValueError: a mean or scale that is not three finite numbers, or an unknown order.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, mean: Sequence[float], scale: float | Sequence[float] = 1.0, order: str = "rgb"
    ) -> None:
        super().__init__()
        if order not in _ORDERS:
            raise ValueError(f"preprocess order must be one of {_ORDERS}, got {order!r}")
        scales = [scale] * 3 if isinstance(scale, int | float) else list(scale)
        self.order = order
        # The exact Python floats are kept for the architecture record: a float32 round trip would
        # change them.
        self._settings = {
            "mean": _three("mean", list(mean)),
            "scale": _three("scale", scales),
            "order": order,
        }
        for name in ("mean", "scale"):
            values = torch.tensor(self._settings[name], dtype=torch.float32, device=real_device())
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def settings(self) -> dict[str, object]:
        """The constructor's arguments as JSON values, mean and scale as lists of three floats."""
        return {
            "mean": list(self._settings["mean"]),
            "scale": list(self._settings["scale"]),
            "order": self.order,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: [B, 3, H, W], floating point, RGB in [0, 1].

        Returns:
            [B, 3, H, W] in the dtype of `images`.

        Raises:
            TypeError: integer images.
            ValueError: any other shape.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], got {images.dtype}: "
                "convert with images.float() / 255"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        if self.order == "bgr":
            images = images.flip(1)
        return (255.0 * images - self.mean.to(images.dtype)) * self.scale.to(images.dtype)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return ", ".join(f"{key}={value!r}" for key, value in self._settings.items())


def real_device() -> torch.device:
    """The default device, or the CPU where that is "meta".

    A network that is built on the meta device to be filled from a file gets its parameters from
    there, but the preprocessing is no part of a state dict.
    """
    device = default_device()
    return torch.device("cpu") if device.type == "meta" else device


def _three(name: str, values: list[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"preprocess {name} must be three finite numbers, got {values}")
    return numbers
