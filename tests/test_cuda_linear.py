"""linear on CUDA against plain torch: the kernels' own source, on the emulator or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import random_weight, relative_error, with_codebook
from torch import Tensor

import placekern as pk
from placekern import QuantSparseWeight, _native, device, ops
from placekern.packing import Layout

if TYPE_CHECKING:
    from conftest import Gpu

ROUNDING = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
LAYOUTS = [Layout.DENSE, Layout.PAIRS]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Lets float32 products be rounded to TF32, as torch would."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def expected(
    x: Tensor, weight: QuantSparseWeight, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """The result in float64, and the squares of the terms of each output."""
    exact, dense = x.cpu().double(), weight.to_dense().cpu().double()
    offset = 0 if bias is None else bias.cpu().double()
    y = exact @ dense.T + offset
    return (y.relu() if relu else y), exact.square() @ dense.square().T


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["direct", "decode"])
@pytest.mark.parametrize(
    ("M", "K", "N", "density", "bits"),
    [
        (1, 1, 1, 1.0, 8),
        (16, 64, 1, 0.5, 5),
        (17, 65, 2, 0.3, 8),
        (70, 250, 3, 0.3, 5),
        (33, 1000, 5, 0.15, 8),
        (130, 300, 17, 0.5, 8),
        (20, 500, 40, 1.0, 3),
        (40, 130, 70, 0.4, 8),
        (5, 0, 3, 0.5, 8),
        (0, 7, 3, 0.5, 8),
        (9, 64, 0, 0.5, 8),
        (9, 300, 4, 0.0, 8),
        (3, 2600, 2, 0.02, 6),
    ],
)
def test_agrees_with_plain_torch(
    gpu: Gpu,
    any_way: None,
    layout: Layout,
    dtype: torch.dtype,
    way: str,
    M: int,
    K: int,
    N: int,
    density: float,
    bits: int,
) -> None:
    weight = random_weight(M, K, density, bits)
    x = torch.randn(N, K).to(dtype)
    bias = torch.randn(M) if N % 2 else None
    relu = N > 2
    _native.force_way(way)
    y = ops.linear(
        gpu.tensor(x),
        gpu.weight(weight, layout),
        None if bias is None else gpu.tensor(bias),
        relu=relu,
    )
    wanted, squares = expected(x, weight, bias, relu)
    assert y.dtype == dtype
    assert y.shape == (N, M)
    assert relative_error(y.cpu(), wanted, squares) < ROUNDING[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [4, 20, 64])
def test_tf32_is_used_when_torch_allows_it(gpu: Gpu, tf32: None, layout: Layout, N: int) -> None:
    if _native.device_properties(0).capability < 80:
        pytest.skip("this GPU has no TF32")
    weight = random_weight(40, 520, 0.4, 8)
    x = torch.randn(N, 520)
    y = ops.linear(gpu.tensor(x), gpu.weight(weight, layout)).cpu()
    error = relative_error(y, *expected(x, weight, None, False))
    assert 1e-6 < error < 1e-3  # products of numbers with ten bits after the point


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_identity_is_exact(gpu: Gpu, layout: Layout, dtype: torch.dtype) -> None:
    for bits in (1, 5, 8):
        weight = random_weight(35, 80, 0.4, bits)
        weight.codebook = weight.codebook.to(dtype).float()  # numbers that dtype holds
        y = ops.linear(gpu.tensor(torch.eye(80, dtype=dtype)), gpu.weight(weight, layout))
        assert torch.equal(y.cpu().float(), weight.to_dense().T)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 2, 9])
def test_splits_of_the_columns_add_up_in_a_fixed_order(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, layout: Layout, N: int
) -> None:
    weight = random_weight(20, 1500, 0.4, 8)
    moved = gpu.weight(weight, layout)
    x = torch.randn(N, 1500).bfloat16()
    wanted, squares = expected(x, weight, None, False)
    for splits in (1, 2, 3, 7):
        monkeypatch.setattr(device, "_direct_splits", lambda *_, s=splits: s)
        monkeypatch.setattr(device, "_matmul_splits", lambda *_, s=splits: s)
        results = [ops.linear(gpu.tensor(x), moved) for _ in range(2)]
        assert torch.equal(*results)
        assert relative_error(results[0].cpu(), wanted, squares) < 1.2e-2


def test_a_long_sum_in_one_block_with_escapes_far_apart(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 80 units, the first half has an escape here and there, the second one many.
    monkeypatch.setattr(device, "_matmul_splits", lambda *_: 1)
    mask = torch.rand(40, 64 * 80) < 0.3
    mask[:, : 64 * 40] &= torch.rand(40, 64 * 40) < 0.002
    codes = torch.randint(0, 2, (int(mask.sum()),), dtype=torch.uint8)
    weight = QuantSparseWeight.from_mask(mask, codes, torch.tensor([-1.5, 2.0]))
    moved = gpu.weight(weight, Layout.DENSE)
    for N in (9, 40):
        x = torch.randn(N, 64 * 80).bfloat16()
        wanted, squares = expected(x, weight, None, False)
        assert relative_error(ops.linear(gpu.tensor(x), moved).cpu(), wanted, squares) < 1.2e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_that_share_a_sum_run_at_once(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    if gpu.device.type == "cuda":
        pytest.skip("a real device holds what its registers allow")
    K = 64 * 80  # 80 units, 21 windows

    def splits(M: int, N: int, groups: int = 0) -> int:
        _native.matmul_splits.cache_clear()
        return _native.matmul_splits(M, K, 8, layout, torch.bfloat16, N, groups, 0)

    # Four multiprocessors, and of small blocks four on each; pairs: three, but the twelfth would
    # get none of the windows.
    assert splits(64, 16) == (16 if layout == Layout.DENSE else 11)
    assert splits(2048, 16) == 1
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", "101376")
    assert splits(64, 16) == 4
    assert splits(64, 64) == 4
    assert splits(64, 128) == 2  # another block for the other columns
    assert splits(64, 16, groups=1) >= 1
    assert splits(64, 64, groups=4) == 1  # a block for each


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("limit", "least"), [("SCRATCH_BYTES", 1), ("_DECODED_ROWS", 16)])
def test_decoded_slices_of_rows_are_put_together(
    gpu: Gpu, any_way: None, monkeypatch: pytest.MonkeyPatch, layout: Layout, limit: str, least: int
) -> None:
    monkeypatch.setattr(device, limit, least)
    _native.force_way("decode")
    weight = random_weight(50, 100, 0.5, 8)
    x, bias = torch.randn(6, 100), torch.randn(50)
    y = ops.linear(gpu.tensor(x), gpu.weight(weight, layout), gpu.tensor(bias), relu=True)
    assert relative_error(y.cpu(), expected(x, weight, bias, True)[0]) < 1e-5


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("K", [16_384, 20_000, 33_000])
def test_escapes_are_found_far_behind_the_first_columns(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, N: int, K: int
) -> None:
    monkeypatch.setattr(device, "_direct_splits", lambda *_: 1)
    weight = random_weight(18, K, 0.5, 5)
    codes = torch.randint(31, (weight.nnz,), dtype=torch.uint8)
    codes[:: K // 5] = 31  # the rarest stands for "pruned", so these are escapes
    weight = QuantSparseWeight.from_mask(weight.to_dense() != 0, codes, torch.randn(32))
    x = torch.randn(N, K)
    y = ops.linear(gpu.tensor(x), gpu.weight(weight, Layout.DENSE))
    assert relative_error(y.cpu(), *expected(x, weight, None, False)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codebooks_and_biases_of_other_dtypes(gpu: Gpu, layout: Layout) -> None:
    weight = random_weight(20, 100, 0.5, 5)
    weight.codebook = weight.codebook.bfloat16()
    bias = torch.randn(20).half()
    for N in (1, 10):
        x = torch.randn(N, 100).half()
        y = ops.linear(gpu.tensor(x), gpu.weight(weight, layout), gpu.tensor(bias))
        exact = x.double() @ weight.to_dense().double().T + bias.double()
        assert relative_error(y.cpu(), exact) < 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize(
    ("M", "K", "density", "first"),
    [(40, 264, 0.3, 16), (37, 251, 1.0, 32), (16, 2500, 0.4, 0), (17, 9920, 0.05, 16)],
)
def test_decoding_writes_every_element_and_none_behind(
    gpu: Gpu,
    layout: Layout,
    dtype: torch.dtype,
    bits: int,
    M: int,
    K: int,
    density: float,
    first: int,
) -> None:
    weight = random_weight(M, K, density, bits)
    scratch = gpu.tensor(torch.full((M - first + 1, K), float("nan"), dtype=dtype))
    native = ops.common.weight(*ops.common.arrays(gpu.weight(weight, layout)))
    _native.device_decode(native, first, scratch[:-1])
    assert torch.equal(scratch[:-1].cpu(), weight.to_dense()[first:].to(dtype))
    assert scratch[-1].isnan().all()


def test_strided_and_misaligned_x(gpu: Gpu) -> None:
    weight = random_weight(20, 128, 0.5, 8)
    moved, dense = gpu.weight(weight), weight.to_dense()
    x = torch.randn(2, 3, 128)
    for view in (
        gpu.tensor(torch.randn(128, 3, 2)).permute(2, 1, 0),
        gpu.tensor(torch.randn(2 * 3 * 128 + 1))[1:].view(2, 3, 128),
        gpu.tensor(x)[:, ::2],
    ):
        y = ops.linear(view, moved)
        assert y.shape == (*view.shape[:-1], 20)
        assert relative_error(y.cpu(), view.cpu() @ dense.T) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 6])
def test_nan_in_x_comes_out_and_relu_lets_it_through(gpu: Gpu, layout: Layout, N: int) -> None:
    weight = random_weight(4, 64, 1.0, 5)
    x = torch.randn(N, 64).bfloat16()
    x[0, 3] = float("nan")
    y = ops.linear(gpu.tensor(x), gpu.weight(weight, layout), relu=True).cpu()
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


def test_x_too_wide_for_shared_memory_is_gathered(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", str(64 << 10))
    weight = random_weight(18, 40_000, 0.01, 8)
    x = torch.randn(2, 40_000)
    y = ops.linear(gpu.tensor(x), gpu.weight(weight, Layout.PAIRS))
    assert relative_error(y.cpu(), expected(x, weight, None, False)[0]) < 1e-5


@pytest.mark.parametrize("N", [1, 5])
def test_a_refused_launch_says_its_sizes_and_spoils_nothing(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, N: int
) -> None:
    if gpu.device.type == "cuda":
        pytest.skip("a real device has enough shared memory")
    weight = gpu.weight(random_weight(20, 128, 0.5, 8), Layout.DENSE)
    x = torch.randn(N, 128).half()
    expected = ops.linear(x, weight)
    with monkeypatch.context() as small:
        small.setenv("PLACEKERN_EMULATED_SHARED", "16384")
        with pytest.raises((RuntimeError, ValueError), match="20, K = 128"):
            ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_turing_has_its_own_ways(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, layout: Layout, dtype: torch.dtype
) -> None:
    if gpu.device.type == "cuda":
        pytest.skip("this is about another GPU")
    monkeypatch.setenv("PLACEKERN_EMULATED_CAPABILITY", "7.5")
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", "65536")
    weight = random_weight(40, 300, 0.4, 8)
    weight.codebook = weight.codebook.to(dtype).float().requires_grad_()
    moved = gpu.weight(weight, layout)
    for N in (1, 20, 80):
        x = torch.randn(N, 300).to(dtype)
        moved.codebook.grad = None
        y = ops.linear(x, moved)
        y.backward(torch.ones_like(y))
        wanted, squares = expected(x, weight, None, False)
        assert relative_error(y, wanted, squares) < ROUNDING[dtype]
        dense = weight.to_dense()
        gradient = torch.autograd.grad(dense, weight.codebook, x.float().sum(0).expand(40, 300))[0]
        assert relative_error(moved.codebook.grad, gradient) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_codebook(gpu: Gpu, layout: Layout) -> None:
    weight, x = random_weight(40, 300, 0.5, 5), torch.randn(3, 300)
    moved = gpu.weight(weight, layout)
    strided = torch.stack([moved.codebook, moved.codebook + 1], 1)[:, 0].requires_grad_()
    y = ops.linear(gpu.tensor(x), with_codebook(moved, strided))
    assert relative_error(y.detach().cpu(), x @ weight.to_dense().T) < 1e-5
    y.sum().backward()
    weight.codebook.requires_grad_()
    dense = weight.to_dense()
    gradient = torch.autograd.grad(dense, weight.codebook, x.sum(0).expand(40, 300))[0]
    assert relative_error(strided.grad.cpu(), gradient) < 1e-4


@pytest.mark.parametrize("name", ["positions", "codes"])
def test_arrays_between_two_multiples_of_16_bytes_are_refused(gpu: Gpu, name: str) -> None:
    moved = gpu.weight(random_weight(40, 300, 0.5, 5))
    arrays = {"positions": moved.positions, "codes": moved.codes}
    arrays[name] = torch.cat([arrays[name][:4], arrays[name]])[4:]
    weight = QuantSparseWeight.trusted(
        moved.shape, 5, moved.layout, moved.nnz, moved.row_ptr, **arrays, codebook=moved.codebook
    )
    with pytest.raises(ValueError, match=r"a part of another tensor .* clone\(\) them"):
        ops.linear(gpu.tensor(torch.zeros(1, 300)), weight)


def test_float64_is_refused(gpu: Gpu) -> None:
    with pytest.raises(NotImplementedError, match="x is float64, which runs on the CPU only; use"):
        ops.linear(gpu.tensor(torch.zeros(1, 8).double()), gpu.weight(random_weight(4, 8, 1, 5)))


def test_without_the_cuda_module_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.cuda, "_cuda", None)
    with pytest.raises(RuntimeError, match="built without CUDA; reinstall it with PLACEKERN_CUDA"):
        device.check("linear", torch.zeros(1, 8))


def test_a_layout_of_the_other_device_is_refused_and_to_repairs_it() -> None:
    layer = pk.QuantSparseLinear(8, 4, bits=5)
    x = torch.randn(2, 8)
    expected = layer(x)
    layer.weight = layer.weight.to_layout(Layout.DENSE)
    with pytest.raises(ValueError, match=r"layout DENSE, which is not for cpu; move the layer wit"):
        layer(x)
    layer.to("cpu")
    assert torch.equal(layer(x), expected)


def test_modules_change_their_layout_with_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    layer = pk.QuantSparseLinear(100, 40, bits=8)
    x = torch.randn(3, 100)
    before = layer(x)
    layer.cuda()
    assert layer.weight.layout == Layout.DENSE
    assert relative_error(layer(x.cuda()).cpu(), before) < 1e-5
    state = layer.state_dict()
    other = pk.QuantSparseLinear(100, 40, bits=8)
    other.load_state_dict(state)
    assert torch.equal(other(x), before)
    assert torch.equal(layer.cpu()(x), before)
