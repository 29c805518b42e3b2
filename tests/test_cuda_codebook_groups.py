"""Several codebooks a weight on CUDA: the kernels' own source, on the emulator or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from helpers import exact_copies, random_weight, relative_error, with_codebook
from torch import Tensor

from placekern import QuantSparseWeight, _native, device, ops, reference
from placekern.packing import Layout

if TYPE_CHECKING:
    from conftest import Gpu

LAYOUTS = [Layout.DENSE, Layout.PAIRS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
GROUPS = [(32, 2), (40, 3), (70, 5), (70, 2), (33, 33), (40, 7)]
"""M and G. In the first two a block of 16 rows has one codebook, in the others several."""


def dense_of(weight: QuantSparseWeight, codebook: Tensor) -> Tensor:
    return reference.decode(*weight.to_csr(), codebook, weight.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["auto", "direct", "decode"])
@pytest.mark.parametrize(("M", "G"), GROUPS)
def test_linear_agrees_with_plain_torch(
    gpu: Gpu, any_way: None, layout: Layout, dtype: torch.dtype, way: str, M: int, G: int
) -> None:
    _native.force_way(way)
    for N, bits, K in ((1, 8, 300), (2, 1, 70), (3, 5, 250), (40, 8, 130)):
        weight = random_weight(M, K, 0.4, bits, codebooks=G)
        x, bias = torch.randn(N, K).to(dtype), torch.randn(M)
        y = ops.linear(gpu.tensor(x), gpu.weight(weight, layout), gpu.tensor(bias), relu=N == 3)
        dense = dense_of(weight, weight.codebook).double()
        wanted = x.double() @ dense.T + bias.double()
        squares = x.double().square() @ dense.square().T
        assert y.dtype == dtype
        assert (
            relative_error(y.cpu(), wanted.relu() if N == 3 else wanted, squares) < ROUNDING[dtype]
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("M", "G"), GROUPS)
def test_identity_is_exact(gpu: Gpu, any_way: None, layout: Layout, M: int, G: int) -> None:
    for bits in (1, 5, 8):
        weight = random_weight(M, 200, 0.6, bits, codebooks=G)
        moved, eye = gpu.weight(weight, layout), gpu.tensor(torch.eye(200))
        dense = dense_of(weight, weight.codebook)
        for way in ("direct", "decode"):
            _native.force_way(way)
            assert torch.equal(ops.linear(eye, moved).cpu(), dense.T)


def test_a_codebook_of_another_dtype_starts_where_its_rows_do(gpu: Gpu, any_way: None) -> None:
    weight = random_weight(64, 200, 0.5, 5, codebooks=4)
    weight.codebook = weight.codebook.bfloat16()
    dense = dense_of(weight, weight.codebook.float())
    for way in ("direct", "decode"):
        _native.force_way(way)
        for layout in LAYOUTS:
            y = ops.linear(gpu.tensor(torch.eye(200)), gpu.weight(weight, layout))
            assert torch.equal(y.cpu(), dense.T)


def test_which_kernel_serves_which_groups(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("device_direct", "device_matmul", "device_decode"):
        real = getattr(_native, name)
        monkeypatch.setattr(
            _native,
            name,
            lambda *a, n=name, f=real: calls.append(n.removeprefix("device_")) or f(*a),
        )
    for size, N, expected in (
        (16, 1, "direct"),
        (32, 2, "direct"),
        (24, 1, "decode"),
        (16, 5, "decode"),
        (96, 5, "matmul"),
    ):
        weight = random_weight(96, 130, 0.5, 5, codebooks=96 // size)
        calls.clear()
        ops.linear(gpu.tensor(torch.randn(N, 130).half()), gpu.weight(weight))
        assert calls == [expected], (size, N)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_of_one_codebook_refuse_several(gpu: Gpu, layout: Layout) -> None:
    weight = gpu.weight(random_weight(48, 130, 0.5, 5, codebooks=2), layout)
    native = ops.common.weight(*ops.common.arrays(weight))
    x = gpu.tensor(torch.randn(4, 130).half())
    out = device._output_rows(native, x, None, False, 1)
    with pytest.raises(ValueError, match=r"matmul: group_size is 24 of M = 48, expected one codeb"):
        _native.device_matmul(native, device.rows_of(x), out)
    with pytest.raises(ValueError, match=r"direct: group_size is 24, expected a multiple of 16"):
        _native.device_direct(native, device.rows_of(x), out)
    with pytest.raises(ValueError, match=r"linear_backward: group_size is 24 .* codebook_gradient"):
        _native.device_linear_backward_plan(native, x, (True, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "G"), GROUPS)
@pytest.mark.parametrize("N", [3, 70])
def test_gradients_of_linear(
    gpu: Gpu, layout: Layout, dtype: torch.dtype, M: int, G: int, N: int
) -> None:
    weight = random_weight(M, 150, 0.4, 8 if N == 3 else 5, codebooks=G)
    weight.codebook = weight.codebook.to(dtype).float()
    x = torch.randn(N, 150).to(dtype)
    leaf, moved = gpu.tensor(x).requires_grad_(), gpu.weight(weight, layout)
    codebook = moved.codebook.clone().requires_grad_()
    y = ops.linear(leaf, with_codebook(moved, codebook))
    grad_y = torch.randn(N, M).to(dtype)
    y.backward(gpu.tensor(grad_y))

    exact = exact_copies(x, weight.codebook)
    (exact[0] @ dense_of(weight, exact[1]).T).backward(grad_y.double())
    assert codebook.grad.shape == weight.codebook.shape
    assert relative_error(codebook.grad.cpu(), exact[1].grad) < 1e-4
    assert relative_error(leaf.grad.cpu(), exact[0].grad) < max(1e-5, ROUNDING[dtype])


CONVOLUTIONS: list[dict[str, Any]] = [
    {"M": 24, "G": 2, "channels": 4},
    {"M": 24, "G": 24, "channels": 4},
    {"M": 24, "G": 5, "channels": 6, "groups": 3},  # codebooks of 5 rows, groups of 8
    {"M": 24, "G": 2, "channels": 8, "groups": 4},  # codebooks of 12 rows, groups of 6
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_and_its_gradients(
    gpu: Gpu, layout: Layout, dtype: torch.dtype, case: dict[str, Any]
) -> None:
    M, channels, groups = case["M"], case["channels"], case.get("groups", 1)
    weight = random_weight(M, channels // groups * 9, 0.5, 5, codebooks=case["G"])
    weight.codebook = weight.codebook.to(dtype).float()
    x = torch.randn(2, channels, 7, 6).to(dtype)
    leaf, moved = gpu.tensor(x).requires_grad_(), gpu.weight(weight, layout)
    codebook = moved.codebook.clone().requires_grad_()
    y = ops.conv2d(
        leaf, with_codebook(moved, codebook), kernel_size=(3, 3), padding=(1, 1), groups=groups
    )
    grad_y = torch.randn(y.shape).to(dtype)
    y.backward(gpu.tensor(grad_y))

    exact = exact_copies(x, weight.codebook)
    dense = dense_of(weight, exact[1]).view(M, -1, 3, 3)
    wanted = F.conv2d(exact[0], dense, padding=1, groups=groups)
    wanted.backward(grad_y.double())
    tolerance = max(2e-3 if gpu.device.type == "cuda" else 1e-5, ROUNDING[dtype])
    assert relative_error(y.detach().cpu(), wanted) < tolerance
    assert relative_error(codebook.grad.cpu(), exact[1].grad) < 1e-4
    assert relative_error(leaf.grad.cpu(), exact[0].grad) < tolerance


def test_float64_codebooks_and_biases_are_refused_in_a_sentence(gpu: Gpu) -> None:
    weight = gpu.weight(random_weight(16, 64, 0.5, 5))
    x = gpu.tensor(torch.randn(2, 64))
    double = with_codebook(weight, weight.codebook.double())
    with pytest.raises(NotImplementedError, match="linear: the codebook is float64, which runs on"):
        ops.linear(x, double)
    conv = gpu.weight(random_weight(16, 8, 0.5, 5))
    conv = with_codebook(conv, conv.codebook.double())
    with pytest.raises(
        NotImplementedError, match=r"conv2d: the codebook is float64, .* float32 on"
    ):
        ops.conv2d(x.view(1, 2, 8, 8), conv, kernel_size=(2, 2))
    with pytest.raises(NotImplementedError, match="linear: the bias is float64, which runs on the"):
        ops.linear(x, weight, gpu.tensor(torch.zeros(16).double()))
    with pytest.raises(NotImplementedError, match="linear_backward: the codebook is float64"):
        torch.ops.placekern.linear_backward(
            gpu.tensor(torch.zeros(2, 16)), x, *ops.common.arrays(double), [True, True]
        )
