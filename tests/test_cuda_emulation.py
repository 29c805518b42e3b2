"""The emulated GPU: what a kernel computes on it, and that it reports what a kernel does wrong.

The kernels are in cuda_emulation/self_test.cu, and test_cuda_emulation_build.py has what sanitizers
report of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cuda_emulation.self_test import (
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    MISALIGNED,
    Emulation,
    fragments,
)
from numpy.typing import NDArray


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return Emulation()


@pytest.fixture(params=["ascending", "descending", "1", "2"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PLACEKERN_EMULATED_ORDER", request.param)
    return request.param


def words(generator: np.random.Generator, *shape: int) -> NDArray[np.uint32]:
    return generator.integers(0, 1 << 32, shape, dtype=np.uint32)


# ---- what a kernel computes ----


def test_collectives_of_a_warp(emulation: Emulation, order: str) -> None:
    x = words(np.random.default_rng(0), 96)
    x[40:70] %= 5
    out = emulation.run("collectives", x, np.zeros((96, 16), np.uint32), block=(96,))
    for first in range(0, 96, 32):
        warp, found = x[first : first + 32], out[first : first + 32].T
        lane = np.arange(32)
        expected = [
            warp[lane * 7 % 32],
            warp[lane ^ 5],
            warp[np.where(lane + 3 < 32, lane + 3, lane)],
            warp[np.where(lane >= 3, lane - 3, lane)],
            sum((int(v) & 1) << i for i, v in enumerate(warp)),
            int((warp == 0).any()),
            int((warp != 0).all()),
            [sum(int(v % 5 == own % 5) << i for i, v in enumerate(warp)) for own in warp],
            int(warp.sum(dtype=np.uint64)) % (1 << 32),
            -int((warp % 1000).sum(dtype=np.int64)) % (1 << 32),
            np.float32(31).view(np.uint32),
            warp[lane ^ 1] << 20,
            warp[lane ^ 1] >> 12,
        ]
        for name, row in enumerate(expected):
            np.testing.assert_array_equal(found[name], row, err_msg=f"result {name}")


def test_bits(emulation: Emulation) -> None:
    numbers = [0, 1, 0x80000000, 0xFFFFFFFF, 0x7FC00000, *np.float32([2.5, -3.5, -2.5, 3e9, -3e9])]
    numbers = [int(v.view(np.uint32)) if isinstance(v, np.float32) else v for v in numbers]
    generator = np.random.default_rng(0)
    for x in [*numbers, *map(int, words(generator, 50))]:
        y, z = map(int, words(generator, 2))
        both = y << 32 | x
        bytes_ = both.to_bytes(8, "little")
        picked = [
            bytes_[s & 7] if not s & 8 else 255 * (bytes_[s & 7] >> 7)
            for s in (z >> shift & 15 for shift in (0, 4, 8, 12))
        ]
        real = float(np.uint32(x).view(np.float32))
        to_int = [
            0 if real != real else int(np.clip(rounded, -(2.0**31), 2.0**31 - 1))
            for rounded in (np.rint(real), np.floor(real))
        ]
        expected = [
            x.bit_count(),
            both.bit_count(),
            (x & -x).bit_length(),
            32 - x.bit_length(),
            int(f"{x:032b}"[::-1], 2),
            int.from_bytes(bytes(picked), "little"),
            (both << z % 32) >> 32 & 0xFFFFFFFF,
            both >> z % 32 & 0xFFFFFFFF,
            to_int[0] % (1 << 32),
            to_int[1] % (1 << 32),
            int(np.minimum(np.int32(np.uint32(x)), np.int32(np.uint32(y)))) % (1 << 32),
            max(x, y),
        ]
        out = emulation.run("bits", np.uint32([x, y, z]), np.zeros(12, np.uint32), block=(1,))
        assert out.tolist() == expected, hex(x)


def test_half_and_bfloat16_of_every_pattern(emulation: Emulation) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = emulation.run(
        "widen", bits, np.zeros((1 << 16, 2), np.float32), grid=(256,), block=(256,)
    )
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(out[:, column], expected)  # NaN equals NaN


def test_rounding_to_half_bfloat16_and_tf32(emulation: Emulation) -> None:
    generator = np.random.default_rng(0)
    patterns = np.arange(1 << 16, dtype=np.uint32)
    x = np.concatenate(
        [
            words(generator, 1 << 16).view(np.float32),
            np.float32(
                generator.standard_normal(1 << 15) * 2.0 ** generator.integers(-30, 20, 1 << 15)
            ),
            # Every tie between two bfloat16 numbers, and those of halves; and beside the ties.
            *((patterns << 16 | low).view(np.float32) for low in (0x7FFF, 0x8000, 0x8001)),
            *(
                ((patterns << 13) + np.uint32(0x38000000 - (8 << 23)) + low).view(np.float32)
                for low in (0xFFF, 0x1000, 0x1001)
            ),
            np.float32([65519.99, 65520, -65520, 2.0**-25, 2.0**-25 * 1.0001, -(2.0**-26)]),
        ]
    )
    x = np.concatenate([x, np.zeros(-len(x) % 256, np.float32)])
    out = emulation.run(
        "narrow", x, np.zeros((len(x), 3), np.uint32), grid=(len(x) // 256,), block=(256,)
    )
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        found = torch.from_numpy(out[:, column].astype(np.uint16).view(np.int16)).view(dtype)
        expected = torch.from_numpy(x).to(dtype)
        np.testing.assert_array_equal(found.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])
    # Ties away from zero: half of the last place more in magnitude, cut off.
    finite = np.isfinite(x)
    exponent = np.frexp(np.float64(x[finite]))[1]
    place = 2.0 ** (np.maximum(exponent, -125) - 11)
    expected = np.trunc(np.float64(x[finite]) / place + np.copysign(0.5, x[finite])) * place
    with np.errstate(over="ignore"):
        expected = np.float32(expected)
    np.testing.assert_array_equal(out[finite, 2].view(np.float32), expected)
    np.testing.assert_array_equal(out[~finite, 2].view(np.float32), x[~finite])


@pytest.mark.parametrize(
    ("variant", "dtype"), [(0, torch.float16), (1, torch.bfloat16), (2, torch.float32)]
)
def test_products_of_the_tensor_core(
    variant: int, dtype: torch.dtype, emulation: Emulation, order: str
) -> None:
    k = 8 if dtype == torch.float32 else 16
    a, b, d = torch.randn(16, k), torch.randn(k, 8), torch.randn(16, 8)
    if dtype == torch.float32:  # the low 13 bits of an operand do not count
        a_bits, b_bits = (t.numpy().view(np.uint32) for t in (a, b))
        a, b = (
            torch.from_numpy((t & ~np.uint32(0x1FFF)).view(np.float32)) for t in (a_bits, b_bits)
        )
    else:
        a_bits, b_bits = (t.to(dtype).view(torch.int16).numpy().view(np.uint16) for t in (a, b))
        a, b = a.to(dtype), b.to(dtype)
    given = fragments(d.numpy(), a_bits, b_bits)
    out = emulation.run("product", given, np.zeros((32, 4), np.float32), variant=variant)
    expected = (d.double() + a.double() @ b.double()).numpy()
    for lane in range(32):
        for i in range(4):
            row = (lane >> 2) + (0 if i < 2 else 8)
            assert out[lane, i] == pytest.approx(expected[row, lane % 4 * 2 + (i & 1)], abs=1e-5)


def test_transposition(emulation: Emulation, order: str) -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1001
    given, expected = (np.ascontiguousarray(m).view(np.uint32) for m in (matrix, matrix.T))
    out = emulation.run("transposition", given, np.zeros((8, 4), np.uint32))
    np.testing.assert_array_equal(out, expected)


def test_matrices_from_shared_memory(emulation: Emulation, order: str) -> None:
    given = aligned(words(np.random.default_rng(0), 132))
    out = emulation.run("matrices", given, np.zeros((8, 4, 4), np.uint32), shared=512)
    expected = given.reshape(4, 8, 4)  # matrix, row, pair of columns
    np.testing.assert_array_equal(out, expected.transpose(1, 2, 0))
    out = emulation.run("matrices", given, np.zeros((8, 4, 4), np.uint32), variant=3, shared=512)
    elements = given.view(np.uint16).reshape(4, 8, 8)  # matrix, row, column
    pairs = elements.transpose(2, 1, 0).reshape(8, 4, 2, 4)  # column, pair of rows, row, matrix
    expected = pairs[:, :, 0] | pairs[:, :, 1].astype(np.uint32) << 16
    np.testing.assert_array_equal(out, expected)
    for variant, status, text in (
        (1, MISALIGNED, "shared address"),
        (2, LAUNCH_FAILURE, "outside of the launch's shared memory"),
    ):
        found = emulation.launch("matrices", given, out, variant=variant, shared=512)
        assert found == status
        assert text in emulation.text(found)


def test_indices_of_three_dimensions(emulation: Emulation, order: str) -> None:
    grid, block = (3, 2, 2), (5, 3, 2)
    out = emulation.run("indices", None, np.zeros((12, 30, 6), np.uint32), grid=grid, block=block)
    number = out[..., 0] + 3 * (out[..., 1] + 2 * out[..., 2])
    assert (number == np.arange(12)[:, None]).all()
    number = out[..., 3] + 5 * (out[..., 4] + 3 * out[..., 5])
    assert (number == np.arange(30)).all()


def test_atomics(emulation: Emulation, order: str) -> None:
    out = np.zeros(4, np.uint64)
    emulation.run("atomics", None, out, grid=(3,), block=(40,))
    assert out[0] == 120 << 32
    assert out.view(np.int32)[2:6].tolist() == [120, -sum(range(120)), 119, -119]
    assert out.view(np.float32)[6] == 60


def test_shared_memory_is_not_a_number_before_it_is_written(emulation: Emulation) -> None:
    out = emulation.run("fresh", None, np.zeros(96, np.uint32), grid=(3,), block=(32,), shared=128)
    assert (out == 0xFFFFFFFF).all()


def test_the_order_of_threads_and_blocks(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def visits(order: str | None) -> list[int]:
        if order is None:
            monkeypatch.delenv("PLACEKERN_EMULATED_ORDER", raising=False)
        else:
            monkeypatch.setenv("PLACEKERN_EMULATED_ORDER", order)
        out = emulation.run("order", None, np.zeros(1 + 4 * 64, np.int32), grid=(2,), block=(64,))
        assert out[0] == 256
        return out[1:].tolist()

    first, second = list(range(64)), list(range(64, 128))
    assert visits(None) == visits("ascending") == first + first + second + second
    down = [*second[::-1], *second[::-1], *first[::-1], *first[::-1]]
    assert visits("descending") == down
    random = {order: visits(order) for order in map(str, range(1, 9))}
    assert len({tuple(v) for v in random.values()}) == 8
    assert {v[0] // 64 for v in random.values()} == {0, 1}  # either block comes first
    for order, found in random.items():
        assert visits(order) == found
        for part in range(0, 256, 64):  # nobody passes a barrier before all have come
            assert sorted(found[part : part + 64]) in (first, second)
    monkeypatch.setenv("PLACEKERN_EMULATED_ORDER", "backwards")
    status = emulation.launch("fresh", None, np.zeros(32, np.uint32), shared=128)
    assert status == INVALID_VALUE
    assert "PLACEKERN_EMULATED_ORDER is backwards, expected ascending" in emulation.text(status)


def test_a_missing_barrier_shows_in_one_order_or_another(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = np.arange(64, dtype=np.int32)
    for order in ("ascending", "descending", "1"):
        monkeypatch.setenv("PLACEKERN_EMULATED_ORDER", order)
        outs = [
            emulation.run(
                "block_exchange", given, np.zeros(64, np.int32), variant=v, block=(64,), shared=256
            )
            for v in (0, 1)
        ]
        assert (outs[0] == given[::-1]).all()
        assert not (outs[1] == given[::-1]).all()


# ---- asynchronous copies ----


def aligned(memory: NDArray) -> NDArray:
    """128 of 132 words that start on 16 bytes."""
    return memory[-memory.ctypes.data % 16 // 4 :][:128]


def copy(emulation: Emulation, variant: int) -> tuple[int, NDArray, NDArray]:
    given = aligned(words(np.random.default_rng(0), 132))
    out = aligned(np.zeros(132, np.uint32))
    return emulation.launch("copies", given, out, variant=variant, shared=512), given, out


def test_a_copy_is_done_when_it_was_waited_for(emulation: Emulation, order: str) -> None:
    for variant in (0, 7):
        status, given, out = copy(emulation, variant)
        assert status == 0
        np.testing.assert_array_equal(out, given)
    status, _, out = copy(emulation, 3)  # outside of the array: zeros
    assert status == 0
    assert (out == 0).all()


def test_a_copy_that_was_not_waited_for_is_an_error(emulation: Emulation) -> None:
    status, _, out = copy(emulation, 2)  # waits, but after it has read
    assert status == 0
    assert (out == 0xFFFFFFFF).all()
    status, *_ = copy(emulation, 1)
    assert status == LAUNCH_FAILURE
    assert "leaves with 1 asynchronous copies that it never waited for" in emulation.text(status)


def test_a_group_of_copies_is_done_when_it_was_waited_for(emulation: Emulation, order: str) -> None:
    given = words(np.random.default_rng(0), 4 * 32)

    def run(variant: int) -> NDArray:
        return emulation.run(
            "copy_groups", given, np.zeros(4 * 32, np.uint32), variant=variant, shared=4 * 4 * 32
        )

    np.testing.assert_array_equal(run(0), given)
    for variant in (1, 2):  # one group too few, and what is in no group
        assert (run(variant) == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("variant", "status", "words"),
    [
        (4, MISALIGNED, "shared address"),
        (5, MISALIGNED, "global address"),
        (6, LAUNCH_FAILURE, "outside of the launch's shared memory"),
        (8, MISALIGNED, "prefetch_to_l2 at"),
    ],
)
def test_a_copy_from_or_to_a_wrong_place_is_an_error(
    variant: int, status: int, words: str, emulation: Emulation
) -> None:
    found, *_ = copy(emulation, variant)
    assert found == status
    assert words in emulation.text(found)
    assert "self_test.cu:" in emulation.text(found)


def test_turing_has_neither_bfloat16_nor_tf32(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACEKERN_EMULATED_CAPABILITY", "7.5")
    assert [emulation.library.device_attribute(a) for a in (75, 76)] == [7, 5]
    given, out = np.zeros((32, 10), np.uint32), np.zeros((32, 4), np.float32)
    assert emulation.launch("product", given, out, variant=0) == 0
    for variant in (1, 2):
        status = emulation.launch("product", given, out, variant=variant)
        assert status == LAUNCH_FAILURE
        assert "devices before Ampere have none" in emulation.text(status)
    status, given, out = copy(emulation, 2)  # no asynchronous copies either: they are done at once
    assert status == 0
    np.testing.assert_array_equal(out, given)


# ---- launches and barriers that fail ----


def test_a_barrier_of_the_host_is_refused(emulation: Emulation) -> None:
    assert emulation.library.barrier_of_the_host() == 1


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            0,
            (
                "deadlock in block (0, 0, 0)",
                "63 of 64 threads wait at __syncthreads",
                "1 have left",
            ),
        ),
        (1, ("wait at different places", "at __ballot_sync", "at __syncwarp")),
        (2, ("wait at different places", "thread 32 at __syncthreads")),
        (3, ("mask 0x0000ffff", "whole warps")),
        (4, ("__shfl_sync of width 16", "32 is the only width")),
        (5, ("__trap()",)),
        (6, ("deadlock", "31 of 64 threads wait at __shfl_xor_sync", "33 have left")),
    ],
)
def test_misuse_ends_the_launch_with_a_reason(
    variant: int, words: Sequence[str], emulation: Emulation
) -> None:
    status = emulation.launch("misuse", np.zeros(25), np.zeros(1), variant=variant, block=(64,))
    assert status == LAUNCH_FAILURE
    assert all(word in emulation.text(status) for word in (*words, "self_test.cu:")), (
        emulation.text(status)
    )
    assert emulation.library.last_error() == LAUNCH_FAILURE
    assert emulation.library.last_error() == 0  # told once
    test_collectives_of_a_warp(emulation, "ascending")  # and the next launch is a good one


def test_a_warp_that_is_not_whole_has_no_collectives(emulation: Emulation) -> None:
    given, out = np.zeros(48, np.uint32), np.zeros((48, 16), np.uint32)
    status = emulation.launch("collectives", given, out, block=(48,))
    assert status == LAUNCH_FAILURE
    assert "in a warp of 16 threads" in emulation.text(status)


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ({"block": (1025,)}, INVALID_CONFIGURATION),
        ({"block": (32, 33)}, INVALID_CONFIGURATION),
        ({"block": (1, 1, 65)}, INVALID_CONFIGURATION),
        ({"block": (0,)}, INVALID_CONFIGURATION),
        ({"grid": (0,)}, INVALID_CONFIGURATION),
        ({"grid": (1, 65536)}, INVALID_CONFIGURATION),
        ({"shared": 48 * 1024 + 1}, INVALID_VALUE),  # more has to be asked for
        ({"shared": 227 * 1024 + 1, "allowed": 227 * 1024}, INVALID_VALUE),
        ({"shared": 227 * 1024 + 1, "allowed": 227 * 1024 + 1}, INVALID_VALUE),
    ],
)
def test_a_launch_past_the_limits_is_refused(
    sizes: dict[str, object], status: int, emulation: Emulation
) -> None:
    out = np.zeros(2048, np.uint32)
    assert emulation.launch("order", None, out, **sizes) == status
    assert "invalid" in emulation.text(status)
    assert emulation.library.last_error() == status
    assert emulation.library.last_error() == 0
    assert not out.any()


def test_a_launch_at_the_limits_runs(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    out = np.zeros(2049, np.uint32)
    most = 227 * 1024
    emulation.run("order", None, out, block=(1024,), shared=most, allowed=most)
    assert out[0] == 2048
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", "65536")  # Turing's
    assert emulation.library.device_attribute(97) == 65536
    emulation.run("fresh", None, out, shared=65536, allowed=65536)
    assert emulation.launch("fresh", None, out, shared=65537, allowed=65537) == INVALID_VALUE
    assert emulation.launch("fresh", None, out, shared=65537) == INVALID_VALUE


def test_fibers_switch_fast_enough_for_thousands_of_launches(emulation: Emulation) -> None:
    # Not a benchmark: a hundred times this speed is usual.
    given = np.zeros(256, np.float32)
    start = time.process_time()
    emulation.run("speed", given, np.zeros(256, np.float32), variant=2000, block=(256,))
    assert time.process_time() - start < 2
