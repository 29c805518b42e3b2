"""The layouts of GPU memory: what goes in comes out, and the sizes keep to the budget."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placekern import QuantSparseWeight, _cpu, device_packing
from placekern.packing import READ_PADDING, Layout


@settings(max_examples=200, deadline=None)
@given(
    M=st.integers(0, 40),
    K=st.one_of(st.integers(0, 130), st.integers(240, 260), st.integers(490, 1100)),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    bits=st.integers(1, 8),
    layout=st.sampled_from([Layout.DENSE, Layout.PAIRS]),
    seed=st.integers(0, 1 << 30),
)
def test_what_goes_in_comes_out(
    M: int, K: int, density: float, bits: int, layout: Layout, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(M, K, density, bits)
    packed = weight.to_layout(layout)
    assert packed.layout == layout
    for before, after in zip(weight.to_csr(), packed.to_csr(), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    assert len(packed.positions) % 16 == len(packed.codes) % 16 == 0
    back = packed.to_layout(weight.layout)
    assert torch.equal(back.positions, weight.positions)
    assert torch.equal(back.codes, weight.codes)


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize(("channels", "taps"), [(40, 9), (7, 6), (300, 2), (1, 5), (0, 9)])
def test_columns_tap_by_tap_are_those_of_a_filter_in_channels_last(
    layout: Layout, channels: int, taps: int
) -> None:
    weight = random_weight(20, channels * taps, 0.4, 8)
    filters = weight.to_dense().view(20, channels, taps).transpose(1, 2).reshape(20, -1)
    packed = weight.to_layout(layout, taps)
    assert (packed.layout, packed.taps) == (layout, taps)
    reordered = QuantSparseWeight.from_dense(filters, weight.codebook).to_layout(layout)
    assert torch.equal(packed.positions, reordered.positions)
    assert torch.equal(packed.codes, reordered.codes)
    for before, after in zip(weight.to_csr(), packed.to_csr(), strict=True):
        assert torch.equal(before, after)
    back = packed.to_layout(weight.layout, taps)
    assert back.taps == 1
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(packed.to_layout(layout, 1).positions, weight.to_layout(layout).positions)
    assert packed.to_layout(layout) is packed


@pytest.mark.parametrize("taps", [0, -1, 4])
def test_taps_divide_the_columns(taps: int) -> None:
    with pytest.raises(ValueError, match=f"taps is {taps}, expected a divisor of K = 10"):
        random_weight(3, 10, 0.4, 8).to_layout(Layout.DENSE, taps)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.5, 0.9])
def test_bytes_keep_to_the_budget(density: float, bits: int) -> None:
    M, K = 64, 16_384
    mask = torch.rand(M, K) < density
    # As k-means leaves it: the outer centroids have few weights.
    codes = (torch.randn(int(mask.sum())) / 3 + 0.5).clamp(0, 1) * ((1 << bits) - 1)
    weight = QuantSparseWeight.from_mask(mask, codes.to(torch.uint8), torch.randn(1 << bits))
    packed = weight.to_layout(weight.best_layout("cuda"))
    used = packed.positions.numel() + packed.codes.numel() - 2 * READ_PADDING
    assert used <= (1.05 if density > 0.1 else 1.27) * M * K * min(bits, 18 * weight.density) / 8
    assert packed.layout == (Layout.DENSE if 18 * density > bits else Layout.PAIRS)


class Pairs(NamedTuple):
    """A weight in PAIRS: first chunk of each row, chunks of each run, window and places of each."""

    chunk_ptr: NDArray[np.int64]
    counts: NDArray[np.int64]
    window: NDArray[np.int64]
    places: NDArray[np.int64]

    @staticmethod
    def of(packed: QuantSparseWeight) -> Pairs:
        M, K = packed.shape
        runs = M * device_packing.windows(K)
        positions = packed.positions.numpy()
        chunk_ptr = positions[: 4 * (M + 1)].view("<i4").astype(np.int64)
        total = chunk_ptr[M]
        counts, window = np.split(positions[4 * (M + 1) :][: runs + total].astype(np.int64), [runs])
        places = packed.codes.numpy()[: 16 * total].reshape(total, 2, 8)[:, 0].astype(np.int64)
        return Pairs(chunk_ptr, counts.reshape(M, -1), window, places)


def wavefronts(words: NDArray[np.int64]) -> int:
    """How often shared memory is used for what the lanes of a warp want at once: [lanes] words.

    Lanes that want the same word share it; different words of a bank come in turn.
    """
    return int(np.bincount(np.unique(words) % 32).max())


def test_a_bank_is_used_once_for_each_of_its_words() -> None:
    lanes = np.arange(32)
    wanted = [lanes, lanes * 2, lanes * 0, lanes // 2 * 32]
    assert [wavefronts(words) for words in wanted] == [1, 2, 1, 16]


@pytest.mark.parametrize(("density", "reading", "writing"), [(0.3, 2.2, 1.9), (0.15, 2.8, 1.9)])
def test_pairs_that_a_warp_takes_at_once_lie_in_different_banks(
    density: float, reading: float, writing: float
) -> None:
    M, K = 16, 16_384
    packed = random_weight(M, K, density, 8).to_layout(Layout.PAIRS)
    chunk_ptr, counts, window, places = Pairs.of(packed)

    # Lane l of direct_pairs has chunk l of 32 that follow each other in a row, and looks x up for
    # pair j of all of them at once; x has 16 bits, and a window 256 slots.
    slots = (window[:, None] * 256 + places) * 2 // 4
    read = [
        wavefronts(slots[begin : begin + 32, j])
        for first, end in itertools.pairwise(chunk_ptr)
        for begin in range(first, end - 31, 32)
        for j in range(8)
    ]
    assert np.mean(read) < reading

    # Lanes 2 r and 2 r + 1 of matmul_pairs have two chunks of row r, and write pair j of both to
    # that row of a tile at once; it has 16 bits, and a row 264 slots.
    first_of_run = chunk_ptr[:-1, None] + np.cumsum(counts, 1) - counts
    written = []
    for w in range(counts.shape[1]):
        for step in range(0, counts[:, w].max(), 2):
            own = [
                (first_of_run[m, w] + c, m)
                for m in range(M)
                for c in range(step, min(step + 2, counts[m, w]))
            ]
            chunk, row = np.array(own).T
            slots = (row[:, None] * 264 + places[chunk]) * 2 // 4
            written.extend(wavefronts(slots[:, j]) for j in range(8))
    assert np.mean(written) < writing


def test_no_place_of_a_run_is_taken_twice() -> None:
    packed = random_weight(16, 700, 0.3, 8).to_layout(Layout.PAIRS)
    _, counts, _, places = Pairs.of(packed)
    ends = np.cumsum(counts)
    padding = 0
    for begin, end in zip(ends - counts.ravel(), ends, strict=True):
        run = np.sort(places[begin:end].ravel())
        assert (np.diff(run) > 0).all()  # else two lanes would write to one place
        padding += (run >= device_packing.PAIRS_WINDOW).sum()
    assert padding == 8 * ends[-1] - packed.nnz


def test_the_core_packs_the_same_windows() -> None:
    assert _cpu.PAIRS_WINDOW == device_packing.PAIRS_WINDOW


def test_pairs_do_not_depend_on_the_number_of_threads() -> None:
    weight = random_weight(70, 3000, 0.3, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = weight.to_layout(Layout.PAIRS)
        torch.set_num_threads(3)
        together = weight.to_layout(Layout.PAIRS)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.codes, together.codes)


def test_many_columns_are_dense_always() -> None:
    K = device_packing.MAX_PAIRS_K + 1
    weight = random_weight(2, K, 0.01, 8)
    assert weight.best_layout("cuda") == Layout.DENSE
    assert torch.equal(weight.to_layout(Layout.DENSE).to_dense(), weight.to_dense())
    with pytest.raises(ValueError, match="PAIRS numbers at most 63488 columns, the weight has 6"):
        weight.to_layout(Layout.PAIRS)


def test_the_rarest_code_stands_for_pruned() -> None:
    mask = torch.ones(16, 64, dtype=torch.bool)
    mask[0, 0] = False
    codes = torch.zeros(16 * 64 - 1, dtype=torch.uint8)
    codes[1:4] = torch.tensor([3, 2, 1])
    codes[10:20], codes[20:30] = 1, 2
    weight = QuantSparseWeight.from_mask(mask, codes, torch.arange(4.0)).to_layout(Layout.DENSE)
    head = weight.positions.numpy()[:14].view("<i2")
    assert head.tolist() == [3, 0, 0, 0, 1, 0, 2]  # code 3; one escape, in row 0, column 2
    assert np.array_equal(weight.to_csr()[2].numpy(), codes.numpy())
