"""QuantSparseWeight: a pruned matrix whose remaining values are codes into a small codebook.

The surprise: only the packed form is kept. CSR arrays, the logical form, are made on request; they
would cost three to eight bytes an entry where the packed form costs little more than the code.
Soundness is proven here, once, when a weight is made or loaded; the kernels rely on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import device_packing, packing, proofs
from .codebook import codebooks_of, entry_index, group_size_of, midpoints
from .packing import DEVICE_LAYOUTS, READ_PADDING, Layout
from .weight_making import WeightMaking, as_matrix

__all__ = ["Layout", "QuantSparseWeight", "as_matrix", "midpoints"]


class QuantSparseWeight(WeightMaking):
    """A matrix [M, K] in packed form; the value of a non-zero is `codebook[code]`.

    There may be several codebooks, one for each group of `group_size` neighbouring output channels
    (rows): then the value is `codebook[row // group_size, code]`.

    A convolution's weight [M, C / groups, kernel_h, kernel_w] is the matrix with
    K = C / groups * kernel_h * kernel_w. Pruned positions are absent: no code is spent on zero.

    Attributes:
        shape: (M, K).
        bits: of a code, 1 to 8.
        layout: how columns and codes are kept: on the CPU `Layout.MASK` or `Layout.WINDOW`, on a
            GPU `Layout.DENSE` or `Layout.PAIRS`, whichever is smaller.
        taps: of a filter whose columns lie tap by tap in a GPU layout, as a filter in channels_last
            has them; 1: as everywhere else, k = (channel * kernel_h + ky) * kernel_w + kx.
        row_ptr: int32 [M + 1] (int64 past 2^31 non-zeros), where each row's entries start.
        positions: uint8, the columns in `layout`, with read padding.
        codes: uint8, the codes in `layout`, with read padding.
        codebook: float32 [2^bits], or [G, 2^bits] for G >= 2 groups of output channels; may be a
            `torch.nn.Parameter`.

    Make one with `from_dense`, `from_csr` or `from_scipy`; the constructor takes the packed
    arrays of a CPU layout, as a state_dict has them, and proves them.

    Raises:
        TypeError: an array has the wrong dtype.
        ValueError: an array is malformed; the message names it, the position and the value.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        row_ptr: Tensor,
        positions: Tensor,
        codes: Tensor,
        codebook: Tensor,
    ) -> None:
        M, K = proofs.prove_shape(shape)
        proofs.prove_bits(bits)
        proofs.prove_dtype("positions", positions, torch.uint8)
        proofs.prove_dtype("codes", codes, torch.uint8)
        proofs.prove_dtype("row_ptr", row_ptr, torch.int32, torch.int64)
        devices = {str(t.device) for t in (row_ptr, positions, codes, codebook)}
        if len(devices) > 1:
            raise ValueError(
                f"row_ptr, positions, codes and codebook are on different devices "
                f"({', '.join(sorted(devices))}); move them to one first"
            )
        proofs.prove_codebook(codebook, bits, M)
        for name, tensor in (("row_ptr", row_ptr), ("positions", positions), ("codes", codes)):
            proofs.prove_contiguous(name, tensor)
        rows = row_ptr.detach().cpu().numpy().astype(np.int64)
        proofs.prove_row_ptr(rows, M)
        nnz = int(rows[-1])
        layout = packing.choose_layout(M, K, nnz)
        expected = packing.position_bytes(layout, M, K, nnz) + READ_PADDING
        proofs.prove_size("positions", positions, expected, f"{layout.name.lower()} layout")
        proofs.prove_size(
            "codes",
            codes,
            packing.code_bytes(nnz, bits) + READ_PADDING,
            f"{nnz} codes of {bits} bits",
        )
        proofs.prove_positions(layout, positions.detach().cpu().numpy(), rows, M, K)
        self._assign(shape, bits, layout, nnz, row_ptr, positions, codes, codebook)
        if self.device.type == "cuda":
            packed = self.to_layout(self.best_layout("cuda"))
            self._assign(
                shape, bits, packed.layout, nnz, row_ptr, packed.positions, packed.codes, codebook
            )

    def _assign(
        self,
        shape: tuple[int, int],
        bits: int,
        layout: Layout,
        nnz: int,
        row_ptr: Tensor,
        positions: Tensor,
        codes: Tensor,
        codebook: Tensor,
        taps: int = 1,
    ) -> QuantSparseWeight:
        self.shape = (int(shape[0]), int(shape[1]))
        self.bits = bits
        self.layout = layout
        self.nnz = nnz
        self.row_ptr = row_ptr
        self.positions = positions
        self.codes = codes
        self.codebook = codebook
        self.taps = taps
        return self

    @classmethod
    def trusted(
        cls,
        shape: tuple[int, int],
        bits: int,
        layout: Layout,
        nnz: int,
        row_ptr: Tensor,
        positions: Tensor,
        codes: Tensor,
        codebook: Tensor,
        taps: int = 1,
    ) -> QuantSparseWeight:
        """Puts together arrays that came out of a proven weight, without proving them again."""
        return cls.__new__(cls)._assign(
            shape, bits, layout, nnz, row_ptr, positions, codes, codebook, taps
        )

    @classmethod
    def _pack(
        cls,
        row_ptr: NDArray[np.int64],
        col_ind: NDArray,
        codes: NDArray[np.uint8],
        codebook: Tensor,
        shape: tuple[int, int],
        bits: int,
        layout: Layout | None = None,
        taps: int = 1,
    ) -> QuantSparseWeight:
        M, K = shape
        nnz = int(row_ptr[-1])
        device = codebook.device
        if layout is None:
            layout = device_packing.best_layout(device.type, M, K, nnz, bits)
        if layout in DEVICE_LAYOUTS:
            positions, packed = device_packing.pack(
                layout, row_ptr, col_ind, codes, M, K, bits, taps
            )
        else:
            positions = packing.pack_positions(layout, row_ptr, col_ind, M, K)
            packed = packing.pack_codes(codes, bits)
        index = torch.int32 if nnz < 1 << 31 else torch.int64
        return cls.trusted(
            shape,
            bits,
            layout,
            nnz,
            torch.from_numpy(row_ptr).to(device, index),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(packed).to(device),
            codebook,
            taps,
        )

    # ---- reading one ----

    def to_csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """The logical form: (row_ptr, col_ind, codes).

        row_ptr is int32 or int64 [M + 1], col_ind uint16 (int32 when K > 65,536) [nnz], codes
        uint8 [nnz]; all on the weight's device.
        """
        _, columns, codes = self._unpack()
        device = self.device
        return (
            self.row_ptr.clone(),
            torch.from_numpy(columns).to(device),
            torch.from_numpy(codes).to(device),
        )

    def _unpack(self) -> tuple[NDArray[np.int64], NDArray, NDArray[np.uint8]]:
        M, K = self.shape
        rows = self.row_ptr.cpu().numpy().astype(np.int64)
        positions, codes = self.positions.cpu().numpy(), self.codes.cpu().numpy()
        if self.layout in DEVICE_LAYOUTS:
            columns, codes = device_packing.unpack(
                self.layout, positions, codes, rows, M, K, self.bits, self.taps
            )
        else:
            columns = packing.unpack_positions(self.layout, positions, rows, M, K)
            codes = packing.unpack_codes(codes, self.nnz, self.bits)
        return rows, columns, codes

    def entry_index(self) -> Tensor:
        """Which entry of `codebook.flatten()` each non-zero has, int64 [nnz] in CSR order.

        That is group * 2^bits + code, and the code itself where there is one codebook.
        """
        rows, _, codes = self._unpack()
        return torch.from_numpy(entry_index(rows, codes, self.codebook.shape)).to(self.device)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_matrix` of float32 values."""
        from scipy.sparse import csr_matrix

        rows, columns, codes = self._unpack()
        entries = self.codebook.detach().float().cpu().numpy().ravel()
        values = entries[entry_index(rows, codes, self.codebook.shape)]
        rows = self.row_ptr.cpu().numpy()
        return csr_matrix((values, columns.astype(np.int64), rows), shape=self.shape)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [M, K], by default in the codebook's dtype; differentiable in it."""
        row_ptr, columns, codes = self._unpack()
        M, K = self.shape
        rows = np.repeat(np.arange(M), np.diff(row_ptr))
        entries = entry_index(row_ptr, codes, self.codebook.shape)
        device = self.device
        places = tuple(torch.from_numpy(i).to(device) for i in (rows, columns.astype(np.int64)))
        dense = torch.zeros(M, K, dtype=self.codebook.dtype, device=device).index_put(
            places, self.codebook.flatten()[torch.from_numpy(entries).to(device)]
        )
        return dense if dtype is None else dense.to(dtype)

    def to(self, device: torch.device | str, taps: int | None = None) -> QuantSparseWeight:
        """The same weight on another device, in the layout that is best there.

        Args:
            device: where to.
            taps: kernel_h * kernel_w of a filter: on a GPU columns lie tap by tap, which is quicker
                where images are in channels_last. None: as they are.
        """
        packed = self.to_layout(self.best_layout(torch.device(device).type), taps)
        return self.trusted(
            self.shape,
            self.bits,
            packed.layout,
            self.nnz,
            self.row_ptr.to(device),
            packed.positions.to(device),
            packed.codes.to(device),
            self.codebook.to(device),
            packed.taps,
        )

    def best_layout(self, device_type: str) -> Layout:
        """The layout that a weight of these sizes has on "cpu" or "cuda"."""
        return device_packing.best_layout(device_type, *self.shape, self.nnz, self.bits)

    def to_layout(self, layout: Layout, taps: int | None = None) -> QuantSparseWeight:
        """The same weight with its arrays in another layout, on the same device.

        `to` chooses the right one; this is for writing files and for tests. The codebook is
        shared.

        Args:
            layout: any.
            taps: see the attribute; None: as they are. Without meaning in the CPU's layouts.

        Raises:
            ValueError: PAIRS was asked for with more than 63,488 columns, or K is no multiple of
                taps.
        """
        taps = self.taps if taps is None else taps
        if layout not in DEVICE_LAYOUTS:
            taps = 1
        if taps < 1 or self.shape[1] % taps:
            raise ValueError(
                f"taps is {taps}, expected a divisor of K = {self.shape[1]}: kernel_h * kernel_w "
                "of the filter"
            )
        if (layout, taps) == (self.layout, self.taps):
            return self
        if layout == Layout.PAIRS and self.shape[1] > device_packing.MAX_PAIRS_K:
            raise ValueError(
                f"PAIRS numbers at most {device_packing.MAX_PAIRS_K} columns, the weight has "
                f"{self.shape[1]}; use DENSE"
            )
        arrays = self._unpack()
        return self._pack(*arrays, self.codebook, self.shape, self.bits, layout, taps)

    @property
    def codebooks(self) -> int:
        """How many there are: one for each group of output channels."""
        return codebooks_of(self.codebook.shape)

    @property
    def group_size(self) -> int:
        """Output channels that share a codebook: M when there is one."""
        return group_size_of(self.shape[0], self.codebook.shape)

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.codes.device

    @property
    def density(self) -> float:
        """Non-zeros / positions; 0 for an empty matrix."""
        return self.nnz / (self.shape[0] * self.shape[1]) if 0 not in self.shape else 0.0

    @property
    def nbytes(self) -> int:
        """Resident bytes of everything: positions, codes, row_ptr, codebook and padding."""
        tensors = (self.row_ptr, self.positions, self.codes, self.codebook)
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A shortcut of torch that wants a layer's dense weight (nn.TransformerEncoderLayer has one)
        # sees by this method that it is no plain tensor, and calls the layer instead.
        raise TypeError(
            f"{getattr(func, '__name__', func)} does not take a QuantSparseWeight; call the layer, "
            "or decode it with to_dense()"
        )

    def __repr__(self) -> str:
        M, K = self.shape
        dense = 4 * M * K
        share = f", {self.nbytes / dense:.1%} of float32" if dense else ""
        groups = f"group_size {self.group_size}, " if self.codebooks > 1 else ""
        return (
            f"QuantSparseWeight([{M}, {K}], {self.bits} bits, {groups}density {self.density:.3f}, "
            f"{self.nnz:,} non-zeros, {self.layout.name.lower()} layout, "
            f"{self.nbytes:,} bytes{share}, device={self.device})"
        )
