"""How a QuantSparseWeight is made from other forms: CSR arrays, dense tensors, masks, scipy.

Everything given is proven here; what is made is packed for the device that the codebook is on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import packing, proofs
from .codebook import bits_of, nearest

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightMaking:
    """The constructors of QuantSparseWeight."""

    _pack: Callable[..., Self]
    """QuantSparseWeight's own, from proven CSR arrays."""

    @classmethod
    def from_csr(
        cls,
        row_ptr: Any,
        col_ind: Any,
        codes: Any,
        codebook: Any,
        shape: tuple[int, int],
        bits: int,
    ) -> Self:
        """From CSR arrays (numpy arrays or torch tensors), the logical form.

        Args:
            row_ptr: int32 or int64 [M + 1], monotone from 0 to nnz.
            col_ind: uint16, int32 or int64 [nnz], strictly increasing in each row, < K.
            codes: uint8 [nnz], each < 2^bits.
            codebook: float32 [2^bits] or [G, 2^bits], finite.
            shape: (M, K).
            bits: 1 to 8.

        Raises:
            TypeError: an array has the wrong dtype.
            ValueError: an array is malformed; the message names it, the position and the value.
        """
        M, K = proofs.prove_shape(shape)
        proofs.prove_bits(bits)
        rows = proofs.as_numpy("row_ptr", row_ptr, np.int32, np.int64).astype(np.int64)
        columns = proofs.as_numpy("col_ind", col_ind, np.uint16, np.int32, np.int64)
        code = proofs.as_numpy("codes", codes, np.uint8)
        book = codebook if isinstance(codebook, Tensor) else torch.as_tensor(np.asarray(codebook))
        proofs.prove_codebook(book, bits, M)
        if book.dtype != torch.float32:
            raise TypeError(f"codebook has dtype {book.dtype}, expected torch.float32")
        proofs.prove_row_ptr(rows, M)
        nnz = int(rows[-1])
        for name, array in (("col_ind", columns), ("codes", code)):
            if array.shape != (nnz,):
                raise ValueError(
                    f"{name} has shape {array.shape}, but row_ptr[{M}] = {nnz} promises ({nnz},)"
                )
        proofs.prove_columns(rows, columns, K)
        proofs.prove_codes(code, bits)
        return cls._pack(rows, columns, code, book, (M, K), bits)

    @classmethod
    def from_dense(cls, weight: Tensor, codebook: Tensor, mask: Tensor | None = None) -> Self:
        """From a dense tensor, each kept value replaced by its nearest codebook entry.

        Args:
            weight: floating, [M, ...]; dimensions after the first are flattened to K.
            codebook: float32 [2^bits] or [G, 2^bits], in any order; its last size gives the bits.
                A weight takes the nearest entry of its own row's codebook; of two equally near,
                the smaller.
            mask: bool, of the weight's shape, True where a weight is kept; None keeps the
                non-zeros.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a kept weight is not finite, the mask has another shape, the last size of
                the codebook is no power of two from 2 to 256, or M output channels do not make
                its G groups.
        """
        if not weight.is_floating_point():
            raise TypeError(f"weight has dtype {weight.dtype}, expected a floating dtype")
        bits = bits_of(codebook)
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but weight has {tuple(weight.shape)}"
            )
        if mask is not None:
            proofs.prove_dtype("mask", mask, torch.bool)
        matrix = as_matrix(weight.detach())
        proofs.prove_codebook(codebook, bits, matrix.shape[0])
        keep = matrix != 0 if mask is None else mask.reshape(matrix.shape)
        values = matrix[keep].float().cpu()
        if not torch.isfinite(values).all():
            bad = (keep & ~torch.isfinite(matrix)).nonzero()[0].tolist()
            raise ValueError(
                f"weight[{bad[0]}, {bad[1]}] is {matrix[bad[0], bad[1]].item()}, "
                "expected finite weights"
            )
        codes = nearest(values, codebook, packing.row_ptr_of(keep.cpu().numpy()))
        return cls.from_mask(keep, codes, codebook.to(weight.device))

    @classmethod
    def from_mask(cls, mask: Tensor, codes: Tensor, codebook: Tensor) -> Self:
        """From the mask of kept positions and the codes of the kept weights, in row order.

        Args:
            mask: bool [M, K].
            codes: uint8 [nnz], each < 2^bits.
            codebook: float32 [2^bits] or [G, 2^bits]; its last size gives the bits.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: the number of codes is not the number of kept positions, a code is too
                large, or M output channels do not make G groups.
        """
        proofs.prove_dtype("mask", mask, torch.bool)
        bits = bits_of(codebook)
        M, K = proofs.prove_shape(tuple(mask.shape))
        proofs.prove_codebook(codebook, bits, M)
        code = proofs.as_numpy("codes", codes, np.uint8)
        proofs.prove_codes(code, bits)
        kept = mask.cpu().numpy()
        row_ptr = packing.row_ptr_of(kept)
        if code.shape != (row_ptr[-1],):
            raise ValueError(
                f"codes has shape {code.shape}, but the mask keeps {row_ptr[-1]} positions"
            )
        dtype = np.uint16 if K <= 1 << 16 else np.int32
        columns = [np.nonzero(kept[rows])[1].astype(dtype) for rows in packing.row_chunks(M, K)]
        col_ind = np.concatenate(columns) if columns else np.zeros(0, dtype)
        return cls._pack(row_ptr, col_ind, code, codebook, (M, K), bits)

    @classmethod
    def from_scipy(
        cls, matrix: Any, codebook: Tensor | NDArray | None = None, bits: int | None = None
    ) -> Self:
        """From a `scipy.sparse.csr_matrix` (or `csr_array`) of values.

        Args:
            matrix: float [M, K], columns sorted and not repeated.
            codebook: float32 [2^bits] or [G, 2^bits], to whose entries the values are moved;
                None: the distinct values of the matrix are the codebook and nothing is lost.
            bits: with codebook None, the width to use; default the smallest that fits.

        Raises:
            ValueError: more than 2^bits distinct values and no codebook, or a malformed matrix.
        """
        values = np.asarray(matrix.data, np.float32)
        if codebook is None:
            distinct = np.unique(values)
            needed = max(1, int(len(distinct) - 1).bit_length())
            bits = needed if bits is None else bits
            if needed > bits or needed > 8:
                raise ValueError(
                    f"matrix has {len(distinct)} distinct values, too many for "
                    f"{min(bits, 8)} bits; give a codebook to round them to"
                )
            last = distinct[-1] if len(distinct) else np.float32(0)
            codebook = np.concatenate(
                [distinct, np.full((1 << bits) - len(distinct), last, np.float32)]
            )
        book = torch.as_tensor(np.asarray(codebook, np.float32))
        bits = bits_of(book)
        proofs.prove_codebook(book, bits, matrix.shape[0])
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"matrix.data[{at}] is {values[at]}, expected finite values")
        codes = nearest(torch.from_numpy(values), book, matrix.indptr.astype(np.int64))
        return cls.from_csr(matrix.indptr, matrix.indices, codes, book, matrix.shape, bits)


def as_matrix(weight: Tensor) -> Tensor:
    """[M, ...] as [M, K]: the dimensions after the first, of any size, become one.

    Raises:
        ValueError: the weight has no dimension.
    """
    if weight.dim() == 0:
        raise ValueError("weight has no dimensions, expected [M, ...]")
    return weight.reshape(weight.shape[0], weight.shape[1:].numel())
