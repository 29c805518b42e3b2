"""Compressed layers as they come out of compression, made in seconds whatever their size.

Weights are heavy-tailed and pruned by size, and the codebook is fitted by k-means, so that the
rarest code is as rare as in practice. The surprise: a large layer repeats some rows of its own.
Drawing, pruning and packing all of them would take longer than what is timed; what a GPU reads is
as long, and as random, as if every row were another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from placekern import QuantSparseWeight
from placekern.compress.quantize import fit_kmeans
from placekern.device_packing import UNIT_ROWS, choose_device_layout, units, windows
from placekern.packing import READ_PADDING, Layout

DISTINCT_ROWS = 128
_SAMPLE = 1 << 18  # values that the codebook is fitted to


class Layer:
    """A weight [M, K] on a device in a GPU layout, and the few rows on the CPU that it repeats."""

    def __init__(
        self,
        rows: QuantSparseWeight,
        repeats: int,
        device: torch.device,
        layout: Layout | None,
        taps: int = 1,
    ) -> None:
        self._rows = rows
        self._repeats = repeats
        M, K = rows.shape[0] * repeats, rows.shape[1]
        if layout is None:
            layout = choose_device_layout(M, K, rows.nnz * repeats, rows.bits)
        self.device = device
        self.weight = _repeated(_moved(rows.to_layout(layout, taps), device), repeats)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [M, K]."""
        return self._rows.to_dense().to(self.device, dtype).repeat(self._repeats, 1)

    def indices(self) -> Tensor:
        """Of each position the place of its entry in the codebook, 2^bits where pruned; int64."""
        row_ptr, columns, codes = self._rows.to_csr()
        rows = torch.repeat_interleave(torch.arange(len(row_ptr) - 1), row_ptr.diff().long())
        full = torch.full(self._rows.shape, 1 << self._rows.bits)
        full[rows, columns.long()] = codes.long()
        return full.to(self.device).repeat(self._repeats, 1)

    def in_layout(self, layout: Layout) -> Layer:
        """The same layer in another layout."""
        return Layer(self._rows, self._repeats, self.device, layout)

    def by_tap(self, taps: int) -> Layer:
        """The same layer in the same layout, for a convolution of images in channels_last."""
        return Layer(self._rows, self._repeats, self.device, self.weight.layout, taps)


def make_layer(
    M: int,
    K: int,
    density: float,
    bits: int,
    device: torch.device,
    layout: Layout | None = None,
    seed: int = 0,
) -> Layer:
    """A layer [M, K] in `layout`, or in the one that a weight of these sizes takes on a GPU."""
    repeats = next(r for r in range(max(1, M // DISTINCT_ROWS), 0, -1) if M % r == 0)
    if M // repeats % UNIT_ROWS:
        repeats = 1  # units of the dense layout would hold rows of two copies
    generator = torch.Generator().manual_seed(seed)
    rows = M // repeats
    values = torch.randn(rows, K, generator=generator)
    values *= (0.7 * torch.randn(rows, K, generator=generator)).exp_().mul_(0.02)
    kept = round(density * values.numel())
    mask = values.abs() > values.abs().flatten().kthvalue(values.numel() - kept).values
    chosen = values[mask]
    codebook = fit_kmeans(chosen[:: max(1, len(chosen) // _SAMPLE)], 1 << bits)
    weight = QuantSparseWeight.from_dense(values, codebook, mask)
    return Layer(weight, repeats, device, layout)


def _moved(weight: QuantSparseWeight, device: torch.device) -> QuantSparseWeight:
    # `to` would take the layout that is best on the device.
    arrays = (weight.row_ptr, weight.positions, weight.codes, weight.codebook)
    return QuantSparseWeight.trusted(
        weight.shape,
        weight.bits,
        weight.layout,
        weight.nnz,
        *(a.to(device) for a in arrays),
        weight.taps,
    )


def _repeated(weight: QuantSparseWeight, times: int) -> QuantSparseWeight:
    """The rows of a weight in a GPU layout, again and again; see csrc/cuda/args.h for the bytes."""
    if times == 1:
        return weight
    M, K = weight.shape
    positions, codes = weight.positions, weight.codes[:-READ_PADDING]
    if weight.layout == Layout.DENSE:
        blocks, columns = units(M, K)
        split = 4 + 4 * (blocks * columns + 1)
        own = positions[4:split].view(torch.int32)
        starts = _repeated_starts(own, times)
        escapes = positions[split : split + 2 * int(own[-1])]
        parts = [positions[:4], starts.view(torch.uint8), escapes.repeat(times)]
    else:
        split = 4 * (M + 1)
        runs = split + M * windows(K)
        own = positions[:split].view(torch.int32)
        starts = _repeated_starts(own, times)
        parts = [starts.view(torch.uint8), positions[split:runs].repeat(times)]
        parts.append(positions[runs : runs + int(own[-1])].repeat(times))
    padding = codes.new_zeros(READ_PADDING)
    return QuantSparseWeight.trusted(
        (M * times, K),
        weight.bits,
        weight.layout,
        weight.nnz * times,
        _repeated_starts(weight.row_ptr, times),
        torch.cat([*parts, padding]),
        torch.cat([codes.repeat(times), padding]),
        weight.codebook,
        weight.taps,
    )


def _repeated_starts(starts: Tensor, times: int) -> Tensor:
    """[n + 1] places that end with a total, as [times * n + 1]."""
    total = starts[-1]
    steps = torch.arange(times, device=starts.device, dtype=starts.dtype)[:, None] * total
    return torch.cat([(starts[:-1] + steps).flatten(), (total * times)[None].to(starts.dtype)])
