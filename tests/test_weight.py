"""QuantSparseWeight: exact conversions, bytes within the budget, malformed input refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from placekern import QuantSparseWeight, _cpu
from placekern.packing import READ_PADDING, WINDOW, Layout

CODEBOOK = torch.tensor([-2.0, -1.0, 1.0, 2.0])


def csr(**changes: object) -> dict[str, object]:
    """A sound 3 x 6 weight, with some arguments replaced."""
    return {
        "row_ptr": np.array([0, 2, 2, 5], np.int32),
        "col_ind": np.array([1, 4, 0, 2, 5], np.uint16),
        "codes": np.array([0, 3, 1, 2, 3], np.uint8),
        "codebook": CODEBOOK,
        "shape": (3, 6),
        "bits": 2,
    } | changes


@settings(max_examples=150, deadline=None)
@given(
    M=st.integers(0, 20),
    K=st.integers(0, 400),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.13, 0.5, 1.0]),
    bits=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_csr_round_trip(M: int, K: int, density: float, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(M, K) < density
    codes = torch.randint(0, 1 << bits, (int(mask.sum()),), dtype=torch.uint8)
    weight = QuantSparseWeight.from_mask(mask, codes, torch.randn(1 << bits))
    row_ptr, col_ind, unpacked = weight.to_csr()
    assert row_ptr.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert col_ind.long().tolist() == mask.nonzero()[:, 1].tolist()
    assert torch.equal(unpacked, codes)
    again = QuantSparseWeight.from_csr(
        row_ptr, col_ind, unpacked, weight.codebook, weight.shape, bits
    )
    for name in ("row_ptr", "positions", "codes", "codebook"):
        assert torch.equal(getattr(again, name), getattr(weight, name))
    # The packed arrays pass their own proofs.
    QuantSparseWeight((M, K), bits, weight.row_ptr, weight.positions, weight.codes, weight.codebook)


def test_to_dense_places_each_value() -> None:
    weight = QuantSparseWeight.from_csr(**csr())
    expected = [[0, -2, 0, 0, 2, 0], [0] * 6, [-1, 0, 1, 0, 0, 2]]
    assert weight.to_dense().tolist() == expected
    assert weight.density == pytest.approx(5 / 18)


def test_from_dense_takes_the_nearest_entry_and_keeps_only_the_mask() -> None:
    dense = torch.tensor([[0.9, -1.6, 0.0, 5.0], [1.5, 0.1, -0.1, -9.0]])
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    weight = QuantSparseWeight.from_dense(dense, CODEBOOK, mask)
    # 1.5 lies midway between 1 and 2: the smaller is taken.
    assert weight.to_dense().tolist() == [[1, -2, 0, 2], [1, 0, -1, -2]]
    assert QuantSparseWeight.from_dense(dense, CODEBOOK).nnz == 7


def test_from_dense_with_an_unsorted_codebook() -> None:
    codebook = torch.tensor([2.0, -1.0, 1.0, -2.0])
    weight = QuantSparseWeight.from_dense(torch.tensor([[1.9, -1.1, -3.0]]), codebook)
    assert weight.to_csr()[2].tolist() == [0, 1, 3]


def test_scipy_round_trip_is_exact() -> None:
    weight = random_weight(7, 300, 0.3, 4)
    matrix = weight.to_scipy()
    assert isinstance(matrix, scipy.sparse.csr_matrix)
    again = QuantSparseWeight.from_scipy(matrix)
    assert again.bits <= 4
    assert torch.equal(again.to_dense(), weight.to_dense())
    rounded = QuantSparseWeight.from_scipy(matrix, codebook=weight.codebook)
    assert torch.equal(rounded.to_dense(), weight.to_dense())


def test_scipy_with_too_many_values_asks_for_a_codebook() -> None:
    matrix = scipy.sparse.random(40, 40, 0.5, format="csr", random_state=0)
    with pytest.raises(ValueError, match=r"distinct values.*give a codebook"):
        QuantSparseWeight.from_scipy(matrix)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("density", [0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(512, 4608), (256, 16384), (128, 576)])
def test_resident_bytes_stay_in_the_budget(
    shape: tuple[int, int], density: float, bits: int
) -> None:
    weight = random_weight(*shape, density, bits)
    positions = shape[0] * shape[1]
    budget = 1.05 * (1 + bits * weight.density) / 8 * positions
    assert weight.nbytes <= budget + 2 * READ_PADDING + 4 * 2**bits


@pytest.mark.parametrize("density", [0.01, 0.03, 0.06, 0.1])
def test_below_a_density_of_an_eighth_the_mask_gives_way(density: float) -> None:
    weight = random_weight(256, 8192, density, 5)
    mask_form = (1 + 5 * weight.density) / 8 * 256 * 8192
    assert weight.layout == Layout.WINDOW
    assert weight.nbytes < mask_form


def test_repr_says_what_a_person_wants_to_know() -> None:
    text = repr(random_weight(64, 1000, 0.5, 5))
    for part in ("[64, 1000]", "5 bits", "density 0.5", "mask layout", "% of float32", "cpu"):
        assert part in text


MALFORMED = [
    ({"row_ptr": np.array([0, 3, 2, 5], np.int32)}, r"row_ptr\[2\] is 2, below row_ptr\[1\] = 3"),
    ({"row_ptr": np.array([1, 2, 2, 5], np.int32)}, r"row_ptr\[0\] is 1, expected 0"),
    ({"row_ptr": np.array([0, 2, 5], np.int32)}, r"row_ptr has shape \(3,\)"),
    ({"row_ptr": np.array([0, 2, 2, 4], np.int32)}, r"row_ptr\[3\] = 4 promises"),
    ({"col_ind": np.array([1, 4, 2, 0, 5], np.uint16)}, r"col_ind\[3\] is 0 and is below"),
    ({"col_ind": np.array([1, 4, 2, 2, 5], np.uint16)}, r"col_ind\[3\] is 2 and repeats"),
    ({"col_ind": np.array([1, 4, 0, 2, 6], np.uint16)}, r"col_ind\[4\] is 6, .* K = 6"),
    ({"col_ind": np.array([-1, 4, 0, 2, 5], np.int32)}, r"col_ind\[0\] is -1"),
    ({"codes": np.array([0, 3, 1, 4, 3], np.uint8)}, r"codes\[3\] is 4, expected < 2\^2"),
    ({"codes": np.array([0, 3, 1, 2], np.uint8)}, r"codes has shape \(4,\)"),
    ({"codebook": torch.tensor([0.0, 1.0, float("nan"), 2.0])}, r"codebook\[2\] is nan"),
    ({"codebook": torch.tensor([0.0, float("inf"), 1.0, 2.0])}, r"codebook\[1\] is inf"),
    ({"codebook": torch.zeros(3)}, r"codebook has shape \(3,\), expected \(4,\)"),
    ({"bits": 0}, "bits is 0"),
    ({"bits": 9}, "bits is 9"),
    ({"shape": (3, -6)}, "expected .M, K."),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_malformed_csr_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSparseWeight.from_csr(**csr(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_ptr": np.array([0, 2, 2, 5], np.float32)}, "row_ptr has dtype float32"),
        ({"col_ind": np.array([1, 4, 0, 2, 5], np.int8)}, "col_ind has dtype int8"),
        ({"codes": np.array([0, 3, 1, 2, 3], np.int64)}, "codes has dtype int64"),
        ({"codebook": torch.arange(4)}, "codebook has dtype torch.int64"),
        ({"codebook": CODEBOOK.double()}, "codebook has dtype torch.float64"),
    ],
)
def test_wrong_dtypes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantSparseWeight.from_csr(**csr(**changes))


def packed(layout: Layout) -> dict[str, torch.Tensor | int | tuple[int, int]]:
    weight = random_weight(5, 203, 0.5 if layout == Layout.MASK else 0.05, 3)
    assert weight.layout == layout
    return {
        "shape": weight.shape,
        "bits": weight.bits,
        "row_ptr": weight.row_ptr.clone(),
        "positions": weight.positions.clone(),
        "codes": weight.codes.clone(),
        "codebook": weight.codebook,
    }


@pytest.mark.parametrize("layout", [Layout.MASK, Layout.WINDOW])
def test_packed_arrays_are_proven(layout: Layout) -> None:
    QuantSparseWeight(**packed(layout))

    arrays = packed(layout)
    arrays["codes"] = arrays["codes"][:-1]
    with pytest.raises(ValueError, match="codes has shape"):
        QuantSparseWeight(**arrays)

    arrays = packed(layout)
    arrays["positions"][0] ^= 1
    with pytest.raises(ValueError, match=r"positions hold .* entries in row 0"):
        QuantSparseWeight(**arrays)

    arrays = packed(layout)
    arrays["row_ptr"][2] = arrays["row_ptr"][1] - 1
    with pytest.raises(ValueError, match=r"row_ptr\[2\]"):
        QuantSparseWeight(**arrays)


def test_mask_bits_past_the_last_column_are_refused() -> None:
    arrays = packed(Layout.MASK)
    row = int(arrays["positions"][:26].numpy().view(np.uint8)[25])
    assert row < 8  # 203 = 25 * 8 + 3
    arrays["positions"][25] = row | 8
    arrays["row_ptr"][1:] += 1
    arrays["codes"] = torch.zeros(
        (int(arrays["row_ptr"][-1]) * 3 + 7) // 8 + READ_PADDING, dtype=torch.uint8
    )
    with pytest.raises(ValueError, match="row 0 has mask bits at or past column K = 203"):
        QuantSparseWeight(**arrays)


def test_places_outside_their_window_are_refused() -> None:
    arrays = packed(Layout.WINDOW)
    first = 5 * 2  # five rows of two windows come before the places
    arrays["positions"][first] = 200
    with pytest.raises(ValueError, match="place 0 is 200, expected < 128"):
        QuantSparseWeight(**arrays)


def test_weights_that_are_not_finite_are_refused() -> None:
    dense = torch.ones(3, 4)
    dense[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is nan"):
        QuantSparseWeight.from_dense(dense, CODEBOOK)


def test_past_65536_columns_the_index_is_wider() -> None:
    weight = random_weight(2, 70_000, 0.01, 8)
    row_ptr, col_ind, codes = weight.to_csr()
    assert col_ind.dtype == torch.int32
    again = QuantSparseWeight.from_csr(
        row_ptr.long(), col_ind, codes, weight.codebook, weight.shape, 8
    )
    assert torch.equal(again.to_dense(), weight.to_dense())


@pytest.mark.parametrize("name", ["row_ptr", "positions", "codes"])
def test_strided_arrays_are_refused(name: str) -> None:
    arrays = packed(Layout.MASK)
    array = arrays[name]
    arrays[name] = torch.stack([array, array], 1)[:, 0]
    with pytest.raises(ValueError, match=rf"{name} has strides \(2,\), expected contiguous"):
        QuantSparseWeight(**arrays)


def test_a_row_ptr_whose_differences_overflow_is_refused() -> None:
    row_ptr = np.array([0, 2**63 - 1, -2, 5], np.int64)
    with pytest.raises(ValueError, match=r"row_ptr\[2\] is -2, below"):
        QuantSparseWeight.from_csr(**csr(row_ptr=row_ptr))


def test_the_kernels_and_the_packing_agree_on_their_constants() -> None:
    assert (_cpu.WINDOW, _cpu.READ_PADDING) == (WINDOW, READ_PADDING)
