"""The convolutional backbones, from normalised pixels to local descriptors.

Every backbone is an `nn.Sequential` of plain layers whose names are those of the original release
(`conv3_2`, `fire5`), because importers match weights by name. The surprise: "AlexNet" in the
place-recognition papers is Caffe's reference network, here `caffenet`; `alexnet` is torchvision's
different one. AlexNet and VGG16 are cut before the last ReLU, as NetVLAD is trained on signed
features, but the SqueezeNets after it, since a Fire module ends in one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_CAFFE_BGR = {"mean": [104.0, 117.0, 123.0], "scale": 1.0, "order": "bgr"}
# The top-left pixel of CaffeNet's mean image, which is what NetVLAD subtracted in training
# (Relja/netvlad issue 18).
_CAFFENET_RGB = {"mean": [117.3785, 117.6438, 110.1771], "scale": 1.0, "order": "rgb"}
_VGG_RGB = {"mean": [123.68, 116.779, 103.939], "scale": 1.0, "order": "rgb"}
_IMAGENET_RGB = {
    "mean": [123.675, 116.28, 103.53],
    "scale": [1 / 58.395, 1 / 57.12, 1 / 57.375],
    "order": "rgb",
}
_CENTRED_RGB = {"mean": [127.5, 127.5, 127.5], "scale": 1 / 64, "order": "rgb"}


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone by name.

    Attributes:
        build: returns the layers, weights unset beyond torch's own initialisation.
        channels: D, the length of a local descriptor.
        stride: pixels of the image between two local descriptors.
        minimum_size: the smallest image height and width, in pixels, that leaves one local
            descriptor.
        preprocess: arguments of `Preprocess` that the published weights expect.
        summary: one line for people.
    """

    build: Callable[[], nn.Sequential]
    channels: int
    stride: int
    minimum_size: int
    preprocess: Mapping[str, Any] = field(repr=False)
    summary: str


class Fire(nn.Module):
    """SqueezeNet's module (Iandola et al. 2016): squeeze by 1x1, expand by 1x1 and by 3x3.

    Args:
        in_channels: channels that come in.
        squeeze: channels between.
        expand: channels of each expansion; 2 * expand leave, those of the 1x1 first.
    """

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(in_channels, squeeze, 1)
        self.squeeze_relu = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, 2 * expand, H, W]."""
        squeezed = self.squeeze_relu(self.squeeze1x1(x))
        expanded = torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], dim=1)
        return self.expand_relu(expanded)


def squeezenet(version: str, classifier: bool = False) -> nn.Sequential:
    """SqueezeNet 1.0 or 1.1 (Iandola et al., arXiv 1602.07360), from BGR pixels minus the mean.

    `named_modules()` yields the convolutions in prototxt order: conv1, then per Fire module
    squeeze1x1, expand1x1, expand3x3, and with `classifier` conv10 last (26 in all).

    Args:
        version: "1.0" (7x7 first convolution, pools after conv1, fire4, fire8) or "1.1" (3x3;
            conv1, fire3, fire5).
        classifier: False cuts after fire9, 512 channels; True goes on to the logits of the 1,000
            ImageNet classes, [B, 1000] (ReLU and global average pooling after conv10, as released).

    Raises:
        ValueError: another version.
    """
    if version == "1.0":
        first, channels, pools = nn.Conv2d(3, 96, 7, stride=2), 96, (4, 8)
    elif version == "1.1":
        first, channels, pools = nn.Conv2d(3, 64, 3, stride=2), 64, (3, 5)
    else:
        raise ValueError(f"SqueezeNet version must be '1.0' or '1.1', got {version!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=first, relu1=nn.ReLU(), pool1=_pool())
    for index in range(2, 10):
        squeeze, expand = 16 * (index // 2), 64 * (index // 2)
        layers[f"fire{index}"] = Fire(channels, squeeze, expand)
        channels = 2 * expand
        if index in pools:
            layers[f"pool{index}"] = _pool()
    if classifier:
        layers["drop9"] = nn.Dropout(0.5)
        # The prototxt of 1.0 pads its 1x1 classifier by one pixel, so zeros enter the average; 1.1
        # does not.
        layers["conv10"] = nn.Conv2d(channels, 1000, 1, padding=1 if version == "1.0" else 0)
        layers["relu10"] = nn.ReLU()
        layers["pool10"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def caffenet() -> nn.Sequential:
    """Caffe's reference network up to conv5: the "AlexNet" of the NetVLAD release.

    Groups of two in conv2, conv4 and conv5; ceil-mode pooling before local response normalisation.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 96, 11, stride=4),
            relu1=nn.ReLU(),
            pool1=_pool(),
            norm1=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
            conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
            relu2=nn.ReLU(),
            pool2=_pool(),
            norm2=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
            conv3=nn.Conv2d(256, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
        )
    )


def alexnet() -> nn.Sequential:
    """torchvision's AlexNet (Krizhevsky 2014) up to conv5: no groups, no normalisation."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 11, stride=4, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(64, 192, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(192, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 256, 3, padding=1),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(256, 256, 3, padding=1),
        )
    )


def vgg16() -> nn.Sequential:
    """VGG16 (Simonyan and Zisserman 2015, configuration D) up to conv5_3."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage, (depth, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
        for index in range(1, depth + 1):
            layers[f"conv{stage}_{index}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{stage}_{index}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2, 2)
    del layers["relu5_3"], layers["pool5"]
    return nn.Sequential(layers)


def tiny() -> nn.Sequential:
    """A network for images of about 100 pixels, small enough to train from nothing on a CPU."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 24, 5, stride=2, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, 2),
            conv2=nn.Conv2d(24, 48, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2, 2),
            conv3=nn.Conv2d(48, 96, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(96, 128, 3, padding=1),
        )
    )


def _pool() -> nn.MaxPool2d:
    # Caffe rounds the pooled size up; MatConvNet imitates it with padding on the right and at the
    # bottom.
    return nn.MaxPool2d(3, 2, ceil_mode=True)


BACKBONES: dict[str, BackboneSpec] = {
    "squeezenet1_0": BackboneSpec(
        lambda: squeezenet("1.0"), 512, 16, 21, _CAFFE_BGR, "SqueezeNet 1.0 to fire9, 0.7 M weights"
    ),
    "squeezenet1_1": BackboneSpec(
        lambda: squeezenet("1.1"), 512, 16, 17, _CAFFE_BGR, "SqueezeNet 1.1 to fire9, 0.7 M weights"
    ),
    "caffenet": BackboneSpec(
        caffenet, 256, 16, 23, _CAFFENET_RGB, "the papers' AlexNet to conv5, 2.3 M weights"
    ),
    "alexnet": BackboneSpec(
        alexnet, 256, 16, 31, _IMAGENET_RGB, "torchvision's AlexNet to conv5, 2.5 M weights"
    ),
    "vgg16": BackboneSpec(vgg16, 512, 16, 16, _VGG_RGB, "VGG16 to conv5_3, 14.7 M weights"),
    "tiny": BackboneSpec(tiny, 128, 8, 7, _CENTRED_RGB, "the demo's network, 0.2 M weights"),
}
