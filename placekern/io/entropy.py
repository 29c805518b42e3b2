"""What a layer's file could weigh at best: the order-0 entropy of its positions and codes.

Order 0 means that every position and every code is taken for itself: the bits of the mask at the
layer's density, and the codes with the frequencies that they have. An entropy coder that knows
nothing else cannot go below it; structure, such as empty rows, can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import packing
from ..packing import DEVICE_LAYOUTS
from ..weight import QuantSparseWeight
from . import streams
from .streams import entropy_bits


@dataclass(frozen=True)
class EntropyReport:
    """Bytes of a weight's streams, and the least that order-0 entropy allows.

    Attributes:
        positions_bytes: of the positions as they are written.
        codes_bytes: of the codes as they are written.
        positions_bound: binary entropy of the mask at the layer's density, in bytes.
        codes_bound: entropy of the codes, in bytes.
        coding: how the positions are written, "mask" or "gaps".
    """

    positions_bytes: int
    codes_bytes: int
    positions_bound: float
    codes_bound: float
    coding: str

    @property
    def bytes(self) -> int:
        """Of all streams."""
        return self.positions_bytes + self.codes_bytes

    @property
    def bound(self) -> float:
        """The least that both can take, in bytes."""
        return self.positions_bound + self.codes_bound

    @property
    def excess(self) -> float:
        """Share of bytes above the bound; 0 where the bound is 0."""
        return self.bytes / self.bound - 1 if self.bound else 0.0


def code_counts(weight: QuantSparseWeight) -> NDArray[np.int64]:
    """How often each code occurs, int64 [2^bits]."""
    if weight.layout in DEVICE_LAYOUTS:
        weight = weight.to_layout(weight.best_layout("cpu"))
    codes = packing.unpack_codes(weight.codes.cpu().numpy(), weight.nnz, weight.bits)
    return np.bincount(codes, minlength=1 << weight.bits)


def entropy_bytes(weight: QuantSparseWeight) -> tuple[float, float]:
    """The least bytes of a weight's positions and of its codes, by order-0 entropy."""
    M, K = weight.shape
    positions = entropy_bits([weight.nnz, M * K - weight.nnz])
    return positions / 8, entropy_bits(code_counts(weight)) / 8


def entropy_report(weight: QuantSparseWeight) -> EntropyReport:
    """Encodes a weight and sets what it takes beside the least that it can take."""
    encoded = streams.encode(weight)
    positions, codes = entropy_bytes(weight)
    size = encoded.positions.numel()
    return EntropyReport(size, encoded.nbytes - size, positions, codes, encoded.coding)
