"""Codebooks for groups of output channels: the weight's conversions, and layers that hold them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_weight
from torch import Tensor, nn

import placekern as pk
from placekern import QuantSparseWeight, reference
from placekern.codebook import codebook_shape, group_size_of
from placekern.packing import Layout

SIZES = [(10, 2), (10, 3), (10, 10), (7, 2), (33, 11), (64, 4)]
"""M and G; in the second, third and fourth the last group is smaller or of one row."""


def by_rows(weight: QuantSparseWeight) -> Tensor:
    """The dense weight, one row after the other from the logical form."""
    row_ptr, columns, codes = weight.to_csr()
    M, K = weight.shape
    dense = torch.zeros(M, K)
    for m in range(M):
        for e in range(int(row_ptr[m]), int(row_ptr[m + 1])):
            book = weight.codebook[m // weight.group_size]
            dense[m, int(columns[e])] = book[int(codes[e])]
    return dense


@pytest.mark.parametrize(("M", "G"), SIZES)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_each_row_looks_up_its_own_codebook(M: int, G: int, density: float) -> None:
    weight = random_weight(M, 40, density, 3, codebooks=G)
    assert (weight.codebooks, weight.group_size) == (G, -(-M // G))
    dense = by_rows(weight)
    assert torch.equal(weight.to_dense(), dense)
    assert np.array_equal(weight.to_scipy().toarray(), dense.numpy())
    decoded = reference.decode(*weight.to_csr(), weight.codebook, weight.shape)
    assert torch.equal(decoded, dense)
    for layout in Layout:
        assert torch.equal(weight.to_layout(layout).to_dense(), dense)


def test_entries_are_numbered_over_all_codebooks() -> None:
    weight = random_weight(9, 30, 0.4, 2, codebooks=3)
    row_ptr, _, codes = weight.to_csr()
    group = torch.arange(9).repeat_interleave(row_ptr.diff()) // 3
    assert weight.entry_index().dtype == torch.int64
    assert torch.equal(weight.entry_index(), 4 * group + codes)
    one = random_weight(9, 30, 0.4, 2)
    assert torch.equal(one.entry_index(), one.to_csr()[2].long())


def test_to_dense_is_differentiable_in_every_codebook() -> None:
    weight = random_weight(10, 20, 0.6, 2, torch.float64, codebooks=5)
    book = weight.codebook.requires_grad_()
    G = torch.randn(10, 20, dtype=torch.float64)
    weight.to_dense().backward(G)
    _, columns, codes = weight.to_csr()
    rows = torch.arange(10).repeat_interleave(weight.row_ptr.diff())
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected.index_put_((rows // 2, codes.long()), G[rows, columns.long()], accumulate=True)
    assert torch.allclose(book.grad, expected)


def test_from_dense_takes_the_nearest_entry_of_the_rows_own_codebook() -> None:
    dense = torch.tensor([[0.9, 3.1], [1.1, 0.0], [0.9, 3.1]])
    codebook = torch.tensor([[1.0, 3.0], [7.0, 0.5]])
    weight = QuantSparseWeight.from_dense(dense, codebook)
    assert weight.to_dense().tolist() == [[1, 3], [1, 0], [0.5, 0.5]]
    big = torch.randn(12, 50)
    books = torch.randn(4, 8)
    got = QuantSparseWeight.from_dense(big, books).to_dense()
    for g in range(4):
        rows = slice(3 * g, 3 * g + 3)
        own = QuantSparseWeight.from_dense(big[rows], books[g]).to_dense()
        assert torch.equal(got[rows], own)


def test_csr_and_scipy_round_trips_are_exact() -> None:
    weight = random_weight(10, 300, 0.3, 4, codebooks=4)
    again = QuantSparseWeight.from_csr(*weight.to_csr(), weight.codebook, weight.shape, 4)
    assert torch.equal(again.to_dense(), weight.to_dense())
    rounded = QuantSparseWeight.from_scipy(weight.to_scipy(), codebook=weight.codebook)
    assert torch.equal(rounded.to_dense(), weight.to_dense())
    w = weight
    QuantSparseWeight(w.shape, 4, w.row_ptr, w.positions, w.codes, w.codebook)


def test_bytes_count_every_codebook_and_repr_names_the_groups() -> None:
    one, four = random_weight(64, 100, 1.0, 5), random_weight(64, 100, 1.0, 5, codebooks=4)
    assert four.nbytes - one.nbytes == 3 * 32 * 4
    assert "group_size 16" in repr(four)
    assert "group_size" not in repr(one)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8), r"shape \(1, 8\), expected \(8,\) where all output channels share one"),
        ((8, 8), r"M = 10 output channels do not make 8 groups: by ceil\(10 / 8\) = 2 .* make 5"),
        ((11, 8), r"M = 10 output channels do not make 11 groups"),
        ((2, 3), r"codebook has shape \(2, 3\)"),
        ((2, 2, 8), r"codebook has shape \(2, 2, 8\)"),
    ],
)
def test_codebooks_that_rows_cannot_share_are_refused(shape: tuple[int, ...], message: str) -> None:
    mask, codes = torch.ones(10, 4, dtype=torch.bool), torch.zeros(40, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        QuantSparseWeight.from_mask(mask, codes, torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        QuantSparseWeight.from_dense(torch.ones(10, 4), torch.zeros(shape))


def test_an_entry_that_is_not_finite_is_named_with_its_codebook() -> None:
    book = torch.zeros(2, 4)
    book[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"codebook\[1, 2\] is nan"):
        QuantSparseWeight.from_dense(torch.ones(4, 4), book)


def test_sizes_of_groups() -> None:
    for M in range(30):
        for most in range(1, 35):
            shape = codebook_shape(M, 4, most)
            size = group_size_of(M, shape)
            assert size <= max(most, 0)
            assert len(shape) == 1 or -(-M // size) == shape[0] >= 2
            assert len(shape) == 2 or most >= M
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"group_size is .*, expected None or at least 1"):
            codebook_shape(8, 4, wrong)


# ---- layers ----


LAYERS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    (pk.QuantSparseLinear, (30, 20), {}, (2, 30)),
    (pk.QuantSparseConv2d, (6, 20, 3), {"groups": 2}, (2, 6, 5, 5)),
]


@pytest.mark.parametrize(("kind", "sizes", "more", "x_shape"), LAYERS)
def test_layers_hold_codebooks_of_groups(
    kind: Any, sizes: tuple[int, ...], more: dict[str, Any], x_shape: tuple[int, ...]
) -> None:
    layer = kind(*sizes, bits=4, group_size=6, **more)
    assert layer.codebook.shape == (4, 16)
    assert (layer.group_size, layer.codebooks) == (5, 4)
    assert "bits=4, group_size=5, density=" in repr(layer)
    with torch.no_grad():
        layer.codebook += torch.randn(4, 1)
    x = torch.randn(x_shape)
    expected = layer.to_dense()(x)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))

    state = layer.state_dict()
    assert state["codebook"].shape == (4, 16)
    other = kind(*sizes, bits=4, group_size=6, **more)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = kind(*sizes, bits=4, group_size=6, **more)
    assert empty.codebook.shape == (4, 16)
    assert "group_size=5" in repr(empty)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))

    for wrong in ({}, {"group_size": 10}):
        third = kind(*sizes, bits=4, **wrong, **more)
        before = third.codebook.detach().clone()
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=r"one for each 5 output .* group_size=5"):
                third.load_state_dict(state, assign=assign)
        assert torch.equal(third.codebook, before)
        with pytest.raises(ValueError, match="make the layer with group_size=5"):
            third.weight = layer.weight
    with pytest.raises(RuntimeError, match=r"but the layer's has \(4, 16\); make .* group_size=20"):
        layer.load_state_dict(kind(*sizes, bits=4, **more).state_dict())


@pytest.mark.parametrize(("kind", "sizes", "more", "x_shape"), LAYERS)
def test_one_codebook_for_all_is_what_no_group_size_means(
    kind: Any, sizes: tuple[int, ...], more: dict[str, Any], x_shape: tuple[int, ...]
) -> None:
    for group_size in (None, 20, 100):
        layer = kind(*sizes, bits=4, group_size=group_size, **more)
        assert layer.codebook.shape == (16,)
        assert (layer.group_size, layer.codebooks) == (20, 1)
        assert "group_size" not in repr(layer)
    with pytest.raises(ValueError, match="group_size is 0"):
        kind(*sizes, bits=4, group_size=0, **more)


def test_from_weight_keeps_the_groups() -> None:
    dense = nn.Linear(30, 20)
    weight = QuantSparseWeight.from_dense(dense.weight, torch.randn(4, 8))
    layer = pk.QuantSparseLinear.from_weight(weight, dense)
    assert layer.codebook.shape == (4, 8)
    assert torch.equal(layer.weight.to_dense(), weight.to_dense())
    conv = nn.Conv2d(4, 20, 3)
    weight = QuantSparseWeight.from_dense(conv.weight, torch.randn(2, 8))
    layer = pk.QuantSparseConv2d.from_weight(weight, conv)
    assert layer.group_size == 10
