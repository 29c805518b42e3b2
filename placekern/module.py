"""QuantSparseModule: what the compressed layers share, a weight as buffers and its codebook.

The packed arrays have a size that depends on the density and a layout that depends on the device:
loading a state_dict makes room of the right size first, `to` packs them anew, and a state_dict
always holds the CPU's layout, so that what a GPU saved loads anywhere. A filter follows
`to(memory_format=...)` as the weight of nn.Conv2d does, which shows on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .codebook import codebook_shape, codebooks_of, group_size_of
from .memory_format import is_channels_last
from .packing import DEVICE_LAYOUTS, Layout
from .weight import QuantSparseWeight

_BUFFERS = ("row_ptr", "positions", "codes")


def default_device() -> torch.device:
    """Where torch puts a tensor now, also inside `with torch.device(...)`.

    torch.get_default_device does not see such a block before torch 2.7.
    """
    return torch.empty(0).device


class QuantSparseModule(nn.Module):
    """What both modules share: the compressed weight as buffers and a trainable codebook."""

    row_ptr: Tensor
    positions: Tensor
    codes: Tensor

    def __init__(
        self, shape: tuple[int, int], bits: int, group_size: int | None = None, taps: int = 1
    ) -> None:
        """An empty layer [M, K]; `taps`: kernel_h * kernel_w of a filter."""
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"bits is {bits!r}, expected an integer from 1 to 8")
        self.bits = bits
        self._shape = shape
        self._layout = Layout.MASK
        self._nnz = 0
        self._filter_taps = taps
        self._channels_last = False  # a bool, as a torch.memory_format cannot be pickled
        self._taps = 1  # by which the columns of the arrays lie
        for name in _BUFFERS:
            self.register_buffer(name, None)
        # Its shape says what the codebooks are; `_initialise` gives it its entries.
        size = codebook_shape(shape[0], bits, group_size)
        self.codebook = nn.Parameter(torch.empty(size, device="meta"))

    @property
    def group_size(self) -> int:
        """Output channels that share a codebook: all of them when there is one."""
        return group_size_of(self._shape[0], self.codebook.shape)

    @property
    def codebooks(self) -> int:
        """How many there are: one for each group of output channels."""
        return codebooks_of(self.codebook.shape)

    @property
    def weight(self) -> QuantSparseWeight:
        """The compressed weight; shares its arrays and the codebook with the module."""
        return QuantSparseWeight.trusted(
            self._shape,
            self.bits,
            self._layout,
            self._nnz,
            self.row_ptr,
            self.positions,
            self.codes,
            self.codebook,
            self._taps,
        )

    @weight.setter
    def weight(self, weight: QuantSparseWeight) -> None:
        if weight.shape != self._shape or weight.bits != self.bits:
            raise ValueError(
                f"weight is {list(weight.shape)} with {weight.bits} bits, expected "
                f"{list(self._shape)} with {self.bits} bits"
            )
        if weight.codebook.shape != self.codebook.shape:
            raise ValueError(f"weight: {self._other_groups(weight)}")
        self._hold(weight)
        book = weight.codebook
        self.codebook = book if isinstance(book, nn.Parameter) else nn.Parameter(book)

    def _hold(self, weight: QuantSparseWeight) -> None:
        """Takes the arrays of a weight, but not its codebook."""
        self._layout, self._taps, self._nnz = weight.layout, weight.taps, weight.nnz
        for name in _BUFFERS:
            setattr(self, name, getattr(weight, name))

    def _wanted_taps(self) -> int:
        """By which the columns should lie on a GPU."""
        return self._filter_taps if self._channels_last else 1

    def _arrays(self) -> tuple[Any, ...]:
        """The weight as the ops take it; `weight` makes an object, which a call has no use for."""
        buffers = self._buffers
        return (
            buffers["row_ptr"],
            buffers["positions"],
            buffers["codes"],
            self.codebook,  # by name: torch's parametrizations put an attribute in its place
            self._shape[1],
            self.bits,
            int(self._layout),
            self._taps,
        )

    def _other_groups(self, weight: QuantSparseWeight) -> str:
        """Why a weight with codebooks of another shape does not fit, and what to do."""
        own, size = tuple(self.codebook.shape), weight.group_size
        return (
            f"codebook has shape {tuple(weight.codebook.shape)}, one for each {size} output "
            f"channels, but the layer's has {own}; make the layer with group_size={size}"
        )

    def _initialise(self, bound: float, device: Any, dtype: torch.dtype | None) -> None:
        """Uniform weights in +-bound, at full density, on a uniform codebook."""
        dtype = dtype or torch.get_default_dtype()
        if torch.device(device or default_device()).type == "meta":
            self.codebook = nn.Parameter(self.codebook.to("meta", dtype))
            for name in _BUFFERS:
                kind = torch.int32 if name == "row_ptr" else torch.uint8
                setattr(self, name, torch.empty(0, dtype=kind, device="meta"))
            return
        dense = torch.empty(self._shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound)
        codebook = torch.linspace(-bound, bound, 1 << self.bits, device="cpu")
        codebook = codebook.expand(self.codebook.shape).contiguous()
        keep = torch.ones_like(dense, dtype=torch.bool)
        self.weight = QuantSparseWeight.from_dense(dense, codebook, keep)
        self.to(device=device or default_device(), dtype=dtype)

    def _make_bias(self, size: int, bound: float, device: Any, dtype: torch.dtype | None) -> None:
        bias = torch.empty(size, device=device, dtype=dtype)
        self.bias = nn.Parameter(bias.uniform_(-bound, bound))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The arrays have the size that the file's density gives them: make room of that size, after
        # proving them, and let torch copy or assign as it does for any buffer.
        incoming = [state_dict.get(prefix + name) for name in (*_BUFFERS, "codebook")]
        missing = [
            name
            for name, tensor in zip((*_BUFFERS, "codebook"), incoming, strict=True)
            if tensor is None
        ]
        if 0 < len(missing) < len(incoming):
            # torch would copy what is there, and the kernels would read past the end of the rest.
            error_msgs.append(
                f"{prefix.rstrip('.') or type(self).__name__}: the state_dict lacks "
                f"{', '.join(missing)}; a compressed weight is loaded whole or not at all"
            )
            return
        if not missing:
            try:
                proven = QuantSparseWeight(self._shape, self.bits, *incoming)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
            if proven.codebook.shape != self.codebook.shape:
                reason = self._other_groups(proven)
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {reason}")
                return
            assigned = local_metadata.get("assign_to_params_buffers", False)
            device = proven.device if assigned else self.codebook.device
            packed = proven.to_layout(proven.best_layout(device.type), self._wanted_taps())
            self._layout, self._taps, self._nnz = packed.layout, packed.taps, packed.nnz
            arrays = {prefix + name: getattr(packed, name) for name in _BUFFERS}
            state_dict = {**state_dict, **arrays}
            for name in _BUFFERS:
                own, tensor = getattr(self, name), getattr(packed, name)
                # Kept where it fits: layers that share a weight go on sharing it.
                if (own.shape, own.dtype, own.device) != (tensor.shape, tensor.dtype, device):
                    setattr(self, name, torch.empty_like(tensor, device=device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Always in the CPU's layout, so that what a GPU saved loads anywhere.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout in DEVICE_LAYOUTS and not self.codebook.is_meta:
            weight = self.weight
            portable = weight.to_layout(weight.best_layout("cpu"))
            for name in _BUFFERS:
                destination[prefix + name] = getattr(portable, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantSparseModule:
        # `to`, `cuda` and `cpu` come this way: the arrays change their layout with the device, and
        # a filter's their order with the memory format that a small image gets.
        size = (1, 2, 2, 2) if self._filter_taps > 1 else (1,)
        before = torch.full(size, 77, dtype=torch.uint8, device=self.codes.device)
        if self._channels_last:
            before = before.contiguous(memory_format=torch.channels_last)
        after = fn(before)
        self._channels_last = is_channels_last(after)
        filled = not (before.is_meta or after.is_meta)
        other_device = (self._layout in DEVICE_LAYOUTS) != after.is_cuda
        other_order = after.is_cuda and self._taps != self._wanted_taps()
        # `to_empty` moves no content, and there is none to repack until a state_dict is loaded.
        if filled and (other_device or other_order) and int(after.flatten()[0]) == 77:
            weight = self.weight
            layout = weight.best_layout(after.device.type) if other_device else weight.layout
            self._hold(weight.to_layout(layout, self._wanted_taps()))
        super()._apply(fn, recurse)
        return self

    @property
    def resident_bytes(self) -> int:
        """Bytes of the compressed weight and the bias."""
        bias = self.bias
        return self.weight.nbytes + (0 if bias is None else bias.numel() * bias.element_size())
