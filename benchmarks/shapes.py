"""The layers that the benchmarks time: real ones, by name, with random weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """x [batch, K] -> y [batch, M]."""

    name: str
    K: int
    M: int


@dataclass(frozen=True)
class ConvShape:
    """x [batch, channels, size, size] -> y [batch, M, ., .]."""

    name: str
    channels: int
    M: int
    kernel: int
    size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


WHITENING = (
    LinearShape("AlexNet whitening", 16_384, 4096),
    LinearShape("VGG16 whitening", 32_768, 4096),
)

CONVOLUTIONS = (
    ConvShape("AlexNet conv1", 3, 96, 11, 227, stride=4),
    ConvShape("AlexNet conv2", 96, 256, 5, 27, padding=2, groups=2),
    ConvShape("AlexNet conv3", 256, 384, 3, 13, padding=1),
    ConvShape("VGG16 conv1_1", 3, 64, 3, 224, padding=1),
    ConvShape("VGG16 conv1_2", 64, 64, 3, 224, padding=1),
    ConvShape("VGG16 conv3_2", 256, 256, 3, 56, padding=1),
    ConvShape("VGG16 conv5_2", 512, 512, 3, 14, padding=1),
    ConvShape("SqueezeNet fire9 squeeze", 512, 64, 1, 14),
)

DENSITIES = (0.5, 0.3, 0.15)
BITS = (8, 5)
