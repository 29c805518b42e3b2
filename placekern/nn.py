"""QuantSparseConv2d and QuantSparseLinear: modules that hold and run compressed weights.

They take the arguments of `nn.Conv2d` and `nn.Linear`. Their parameters are `codebook` and `bias`;
the packed arrays are buffers, not parameters (placekern.module).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .memory_format import is_channels_last
from .module import QuantSparseModule
from .weight import QuantSparseWeight

__all__ = ["QuantSparseConv2d", "QuantSparseLinear", "quant_sparse_layers", "replace_module"]


class QuantSparseLinear(QuantSparseModule):
    """`nn.Linear` on a compressed weight.

    Args:
        in_features: K.
        out_features: M.
        bias: adds a trainable bias [M].
        device: where the layer lives; "meta" makes one that is only good for loading into.
        dtype: of codebook and bias, float32 by default.
        bits: of a code, 1 to 8.
        group_size: the most output features that share a codebook; None: all. The codebook is
            [ceil(M / group_size), 2^bits] where that is more than one, and groups are made equal.
        relu: applies ReLU to the output in the same pass.

    Shape: x [..., K] -> y [..., M], in x's dtype.

    Raises:
        ValueError: bits is not 1 to 8, group_size is below 1, or (in forward) a size, dtype or
            device does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        relu: bool = False,
    ) -> None:
        if in_features < 0 or out_features < 0:
            raise ValueError(
                f"in_features = {in_features} and out_features = {out_features}, expected >= 0"
            )
        super().__init__((out_features, in_features), bits, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.relu = relu
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self._initialise(bound, device, dtype)
        self.bias: nn.Parameter | None
        if bias:
            self._make_bias(out_features, bound, device, dtype)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, module: nn.Linear, config: Any) -> QuantSparseLinear:
        """Compresses an `nn.Linear`.

        Args:
            module: the dense layer; left as it is. Its bias parameter is shared.
            config: a `placekern.CompressConfig`.
        """
        return cls.from_weight(config.compress_tensor(module.weight), module)

    @classmethod
    def from_weight(cls, weight: QuantSparseWeight, module: nn.Linear) -> QuantSparseLinear:
        """A layer with this weight [out, in], and bias and sizes of the dense `module`."""
        layer = cls(
            module.in_features, module.out_features, False, device="meta", **_code_arguments(weight)
        )
        return _adopt(layer, weight, module)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features]."""
        return ops.linear_op(x, *self._arrays(), self.bias, self.relu)

    def to_dense(self) -> nn.Linear:
        """The same layer as an `nn.Linear`, weights decoded."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _decode(layer, self)

    def extra_repr(self) -> str:
        """Sizes, bits and density."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {_describe(self)}"
        )


class QuantSparseConv2d(QuantSparseModule):
    """`nn.Conv2d` on a compressed weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `nn.Conv2d`.
        bits: of a code, 1 to 8.
        group_size: the most output channels that share a codebook; None: all. The codebook is
            [ceil(M / group_size), 2^bits] where that is more than one, and groups are made equal.
            It has nothing to do with `groups`.
        relu: applies ReLU to the output in the same pass.

    Shape: x [batch, C, height, width] or [C, height, width] -> y alike, in x's dtype and memory
    format.

    `to(memory_format=torch.channels_last)` is for images in that format on a GPU, as with
    `nn.Conv2d`: there the columns of the weight are packed in its order. Other images work too, by
    copies.

    Raises:
        ValueError: an argument that `nn.Conv2d` refuses too, bits not 1 to 8, group_size below 1,
            or (in forward) a size, dtype or device that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        relu: bool = False,
    ) -> None:
        if not isinstance(kernel_size, int) and len(kernel_size) != 2:
            raise ValueError(f"kernel_size is {kernel_size}, expected an int or (height, width)")
        # nn.Conv2d checks and normalises the arguments, and knows what 'same' means.
        like = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            False,
            padding_mode,
            device="meta",
        )
        taps = like.kernel_size[0] * like.kernel_size[1]
        K = in_channels // groups * taps
        super().__init__((out_channels, K), bits, group_size, taps)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = like.kernel_size
        self.stride = like.stride
        self.padding = like.padding
        self.dilation = like.dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.relu = relu
        left, right, top, bottom = like._reversed_padding_repeated_twice
        self._padding = (top, bottom, left, right)
        bound = 1 / math.sqrt(K) if K else 0.0
        self._initialise(bound, device, dtype)
        self.bias: nn.Parameter | None
        if bias:
            self._make_bias(out_channels, bound, device, dtype)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, module: nn.Conv2d, config: Any) -> QuantSparseConv2d:
        """Compresses an `nn.Conv2d`.

        Args:
            module: the dense layer; left as it is. Its bias parameter is shared.
            config: a `placekern.CompressConfig`.
        """
        return cls.from_weight(config.compress_tensor(module.weight), module)

    @classmethod
    def from_weight(cls, weight: QuantSparseWeight, module: nn.Conv2d) -> QuantSparseConv2d:
        """A layer with this weight [M, K]; the rest is as in `module`, dense or compressed."""
        arguments = _conv_arguments(module) | _code_arguments(weight)
        layer = cls(**arguments, bias=False, device="meta")
        layer._channels_last = (
            module._channels_last
            if isinstance(module, QuantSparseModule)
            else is_channels_last(module.weight)
        )
        return _adopt(layer, weight, module)

    def forward(self, x: Tensor) -> Tensor:
        """y [batch, out_channels, out_h, out_w] of x [batch, in_channels, h, w]."""
        if x.dim() not in (3, 4):
            raise ValueError(
                f"QuantSparseConv2d: x has shape {tuple(x.shape)}, expected [batch, C, height, "
                "width] or [C, height, width]"
            )
        image = x if x.dim() == 4 else x.unsqueeze(0)
        padding = self._padding
        if self.padding_mode != "zeros":
            top, bottom, left, right = padding
            image = F.pad(image, (left, right, top, bottom), mode=self.padding_mode)
            padding = (0, 0, 0, 0)
        y = ops.conv2d_op(
            image,
            *self._arrays(),
            self.bias,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.relu,
        )
        return y if x.dim() == 4 else y.squeeze(0)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as an `nn.Conv2d`, weights decoded."""
        layer = nn.Conv2d(**_conv_arguments(self), bias=self.bias is not None, device="meta")
        return _decode(layer, self)

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, bits and density."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, bias={self.bias is not None}, {_describe(self)}"


COMPRESSED_KINDS: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantSparseConv2d,
    nn.Linear: QuantSparseLinear,
}
"""Which module takes the place of which dense one."""


def quant_sparse_layers(model: nn.Module) -> Iterator[tuple[str, QuantSparseModule]]:
    """Name and module of each compressed layer, in the model's order, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantSparseModule):
            yield name, module


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `model` holds `old`, under every name that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _conv_arguments(module: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(module, name) for name in (*names, "groups", "padding_mode")}


def _code_arguments(weight: QuantSparseWeight) -> dict[str, Any]:
    groups = {"group_size": weight.group_size} if weight.codebooks > 1 else {}
    return {"bits": weight.bits, **groups}


def _adopt(layer: Any, weight: QuantSparseWeight, module: nn.Module) -> Any:
    layer.weight = weight
    layer.bias = module.bias
    layer.train(module.training)
    return layer


def _decode(layer: Any, module: Any) -> Any:
    dense = module.weight.to_dense().detach().reshape(layer.weight.shape)
    if module._channels_last and dense.dim() == 4:
        dense = dense.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(dense)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().clone())
    layer.train(module.training)
    return nn.Sequential(layer, nn.ReLU()) if module.relu else layer


def _describe(module: QuantSparseModule) -> str:
    text = f"bits={module.bits}"
    if module.codebooks > 1:
        text += f", group_size={module.group_size}"
    if not module.codebook.is_meta:
        text += f", density={module.weight.density:.3f}"
    return text + (", relu=True" if module.relu else "")
