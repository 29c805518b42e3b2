"""What is timed: the real layers on a GPU, and small stand-ins for a dry run on the emulator."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import WHITENING, ConvShape, LinearShape

ALEXNET = (
    ConvShape("conv1", 3, 96, 11, 227, stride=4),
    ConvShape("conv2", 96, 256, 5, 27, padding=2, groups=2),
    ConvShape("conv3", 256, 384, 3, 13, padding=1),
    ConvShape("conv4", 384, 384, 3, 13, padding=1, groups=2),
    ConvShape("conv5", 384, 256, 3, 13, padding=1, groups=2),
)


def _vgg16() -> tuple[ConvShape, ...]:
    layers, channels, size = [], 3, 224
    for stage, (count, M) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
        for i in range(1, count + 1):
            layers.append(ConvShape(f"conv{stage}_{i}", channels, M, 3, size, padding=1))
            channels = M
        size //= 2
    return tuple(layers)


VGG16 = _vgg16()


@dataclass(frozen=True)
class Sizes:
    """Layers, batches and numbers of points."""

    linear: tuple[LinearShape, ...]
    networks: dict[str, tuple[ConvShape, ...]]
    conv_batches: tuple[int, ...]
    trained: tuple[ConvShape, ...]  # whose gradients are timed
    points: int
    copied_bytes: int
    product: int  # rows and columns of the matrix product that measures tensor cores
    sweep_columns: tuple[int, ...]
    rounds: int


FULL = Sizes(
    linear=WHITENING,
    networks={"AlexNet": ALEXNET, "VGG16": VGG16},
    conv_batches=(1, 8, 32),
    trained=tuple(shape for shape in VGG16 if shape.name in ("conv3_2", "conv5_2")),
    points=1 << 26,
    copied_bytes=2 << 30,
    product=8192,
    sweep_columns=(1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    rounds=25,
)

TINY = Sizes(
    linear=(LinearShape("small", 520, 64),),
    networks={
        "Small": (ConvShape("conv1", 3, 16, 3, 9, padding=1), ConvShape("conv2", 16, 32, 3, 5))
    },
    conv_batches=(1, 2),
    trained=(ConvShape("conv2", 16, 32, 3, 5, padding=1),),
    points=5000,
    copied_bytes=1 << 16,
    product=64,
    sweep_columns=(1, 4, 20),
    rounds=1,
)
