"""Gradients on CUDA against plain torch: the kernels' own source, emulated or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONVOLUTIONS, random_weight, relative_error, with_codebook
from torch import Tensor

from placekern import QuantSparseWeight, _native, device, device_backward, ops
from placekern.packing import Layout

if TYPE_CHECKING:
    from conftest import Gpu

LAYOUTS = [Layout.DENSE, Layout.PAIRS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounded(weight: QuantSparseWeight, dtype: torch.dtype) -> QuantSparseWeight:
    """The weight with entries that dtype holds, so that only sums and results are rounded."""
    return with_codebook(weight, weight.codebook.to(dtype).float())


def codebook_gradient(weight: QuantSparseWeight, dense: Tensor) -> Tensor:
    """The dense gradient [M, K] summed by code, in float64."""
    row_ptr, columns, codes = weight.to_csr()
    rows = torch.repeat_interleave(torch.arange(weight.shape[0]), row_ptr.diff().long())
    sums = torch.zeros(1 << weight.bits, dtype=torch.float64)
    return sums.index_add(0, codes.long(), dense[rows, columns.long()].double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["auto", "decode"])
@pytest.mark.parametrize(
    ("M", "K", "N", "density", "bits"),
    [
        (1, 1, 1, 1.0, 8),
        (17, 65, 2, 0.3, 8),
        (70, 250, 3, 0.3, 5),
        (33, 1000, 17, 0.15, 8),
        (40, 300, 33, 0.5, 8),
        (20, 130, 70, 1.0, 3),
        (5, 0, 3, 0.5, 8),
        (9, 64, 0, 0.5, 8),
        (9, 300, 4, 0.0, 8),
    ],
)
def test_linear_agrees_with_plain_torch(
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
    weight = rounded(random_weight(M, K, density, bits), dtype)
    x, grad_y = torch.randn(N, K).to(dtype), torch.randn(N, M).to(dtype)
    _native.force_way(way)
    leaf = gpu.tensor(x.clone()).requires_grad_()
    moved = gpu.weight(weight, layout)
    codebook = moved.codebook.clone().requires_grad_()
    bias = gpu.tensor(torch.randn(M)).requires_grad_()
    ops.linear(leaf, with_codebook(moved, codebook), bias).backward(gpu.tensor(grad_y))

    dense = weight.to_dense().double()
    G = grad_y.double().T @ x.double()
    squares = grad_y.double().square().T @ x.double().square()
    error = relative_error(
        codebook.grad.cpu(), codebook_gradient(weight, G), codebook_gradient(weight, squares)
    )
    assert error < 1e-5
    terms = grad_y.double().square() @ dense.square()
    precision = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(leaf.grad.cpu(), grad_y.double() @ dense, terms) < precision
    assert relative_error(bias.grad.cpu(), grad_y.double().sum(0)) < precision


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_gradient_alone(
    gpu: Gpu, layout: Layout, wanted: tuple[bool, bool], dtype: torch.dtype
) -> None:
    weight = gpu.weight(random_weight(30, 200, 0.4, 8), layout)
    x, grad_y = gpu.tensor(torch.randn(20, 200).to(dtype)), torch.randn(20, 30).to(dtype)
    results = []
    for both in (False, True):
        leaf = x.clone().requires_grad_(both or wanted[0])
        codebook = weight.codebook.clone().requires_grad_(both or wanted[1])
        ops.linear(leaf, with_codebook(weight, codebook)).backward(gpu.tensor(grad_y))
        results.append((leaf.grad, codebook.grad))
    for alone, together, asked in zip(*results, wanted, strict=True):
        if asked:
            assert relative_error(alone, together) < 1e-5
        else:
            assert alone is None


def test_gradients_are_the_same_every_time(gpu: Gpu) -> None:
    weight = gpu.weight(random_weight(100, 700, 0.5, 8))
    for dtype in DTYPES:
        x, grad_y = torch.randn(24, 700).to(dtype), torch.randn(24, 100).to(dtype)
        results = []
        for _ in range(3):
            leaf = gpu.tensor(x).requires_grad_()
            codebook = weight.codebook.clone().requires_grad_()
            y = ops.linear(leaf, with_codebook(weight, codebook), relu=True)
            y.backward(gpu.tensor(grad_y))
            results.append((leaf.grad, codebook.grad))
        for result in results[1:]:
            assert torch.equal(result[0], results[0][0])
            assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("kilobytes", [227, 102])  # the latter for two warps of 8-bit pairs
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (640, 248, 20),  # many blocks have steps of one window
        (16, 2300, 40),  # a block has steps of many windows, of both chunks
        (100, 749, 33),  # windows begin and end within blocks; columns are not vectors
        (208, 1000, 16),
        (30, 3, 1),
    ],
)
def test_partial_sums_that_nobody_wrote_are_not_read(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    bits: int,
    kilobytes: int,
    M: int,
    K: int,
    N: int,
) -> None:
    if gpu.device.type == "cpu":
        monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", str(kilobytes * 1024))
    weight = rounded(random_weight(M, K, 0.3, bits), torch.float16)
    native = ops.common.weight(*ops.common.arrays(gpu.weight(weight, layout)))
    x, grad_y = torch.randn(N, K).half(), torch.randn(N, M).half()
    plan = _native.device_linear_backward_plan(native, gpu.tensor(x), (True, True))
    assert plan.warps > 0
    empty = torch.empty

    def filled(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(*size, dtype=dtype, device=device).fill_(255)  # bytes of NaN

    monkeypatch.setattr(torch, "empty", filled)
    grad_x, sums = device_backward.linear_backward(
        native, gpu.tensor(x), gpu.tensor(grad_y), (True, True)
    )
    dense = weight.to_dense().double()
    terms = grad_y.double().square() @ dense.square()
    assert relative_error(grad_x.cpu(), grad_y.double() @ dense, terms) < 1e-3
    G = codebook_gradient(weight, grad_y.double().T @ x.double())
    squares = codebook_gradient(weight, grad_y.double().square().T @ x.double().square())
    assert relative_error(sums.cpu(), G, squares) < 1e-5


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("by_tap", [False, True])
def test_conv2d_agrees_with_plain_torch(
    gpu: Gpu,
    exact_conv: None,
    case: dict[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    by_tap: bool,
) -> None:
    sizes = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | case
    channels, M, size = sizes.pop("channels"), sizes.pop("M"), sizes.pop("size")
    kernel = sizes["kernel_size"]
    K = channels // sizes["groups"] * kernel[0] * kernel[1]
    weight = rounded(random_weight(M, K, 0.4, 8), dtype)
    x = torch.randn(3, channels, *size).to(dtype)

    leaf = gpu.tensor(x.clone(memory_format=memory_format)).requires_grad_()
    moved = gpu.weight(weight, layout, kernel[0] * kernel[1] if by_tap else 1)
    codebook = moved.codebook.clone().requires_grad_()
    y = ops.conv2d(leaf, with_codebook(moved, codebook), **sizes)
    grad_y = torch.randn(y.shape).to(dtype)
    y.backward(gpu.tensor(grad_y).contiguous(memory_format=memory_format))

    pad = sizes["padding"]
    top, bottom, left, right = pad if len(pad) == 4 else (pad[0], pad[0], pad[1], pad[1])

    def gradients(x: Tensor, dense: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        x, dense = x.detach().requires_grad_(), dense.detach().requires_grad_()
        image = F.pad(x, (left, right, top, bottom))
        view = dense.view(M, -1, *kernel)
        F.conv2d(
            image, view, None, sizes["stride"], 0, sizes["dilation"], sizes["groups"]
        ).backward(grad_y)
        return x.grad, dense.grad

    dense = weight.to_dense().double()
    grad_x, G = gradients(x.double(), dense, grad_y.double())
    terms, squares = gradients(x.double().square(), dense.square(), grad_y.double().square())
    error = relative_error(
        codebook.grad.cpu(), codebook_gradient(weight, G), codebook_gradient(weight, squares)
    )
    assert error < 1e-5
    precision = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert leaf.grad.is_contiguous(memory_format=memory_format)
    assert relative_error(leaf.grad.cpu(), grad_x, terms) < precision


# Rows and channels in eights: the gradient of the codebook copies its operands by 16 bytes.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("M", "K", "N"), [(136, 600, 70), (40, 250, 530), (8, 24, 9000)])
def test_operands_of_linear_copied_by_16_bytes(
    gpu: Gpu, layout: Layout, bits: int, dtype: torch.dtype, M: int, K: int, N: int
) -> None:
    weight = random_weight(M, K, 0.5, bits)
    moved = gpu.weight(weight, layout)
    codebook = moved.codebook.clone().requires_grad_()
    x, grad_y = torch.randn(N, K).to(dtype), torch.randn(N, M).to(dtype)
    ops.linear(gpu.tensor(x), with_codebook(moved, codebook)).backward(gpu.tensor(grad_y))
    G = codebook_gradient(weight, grad_y.double().T @ x.double())
    squares = codebook_gradient(weight, grad_y.double().square().T @ x.double().square())
    assert relative_error(codebook.grad.cpu(), G, squares) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize(
    ("channels", "M", "groups", "offset", "kernel", "sizes"),
    [
        (40, 136, 1, 0, (3, 3), {"padding": (1, 1)}),
        (16, 24, 1, 0, (5, 3), {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}),
        (48, 48, 3, 0, (3, 3), {"padding": (1, 1)}),
        (64, 8, 1, 0, (1, 1), {}),
        (16, 24, 1, 1, (3, 3), {}),  # x starts between 16 bytes, and is gathered
    ],
)
def test_operands_of_conv2d_copied_by_16_bytes(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    bits: int,
    channels: int,
    M: int,
    groups: int,
    offset: int,
    kernel: tuple[int, int],
    sizes: dict[str, tuple[int, int]],
) -> None:
    seen: list[Any] = []
    native = _native.device_codebook_gradient

    def noted(weight: Any, source: Any, grad_y: Any, *rest: Any) -> Tensor:
        seen.append(grad_y.row_stride)
        return native(weight, source, grad_y, *rest)

    monkeypatch.setattr(_native, "device_codebook_gradient", noted)
    weight = random_weight(M, channels // groups * kernel[0] * kernel[1], 0.5, bits)
    moved = gpu.weight(weight, layout, kernel[0] * kernel[1])
    codebook = moved.codebook.clone().requires_grad_()
    memory = torch.randn(2 * 11 * 9 * channels + offset).bfloat16()
    x = gpu.tensor(memory)[offset:].view(2, 11, 9, channels).permute(0, 3, 1, 2)
    options = {"kernel_size": kernel, "groups": groups, **sizes}
    y = ops.conv2d(x, with_codebook(moved, codebook), **options)
    grad_y = torch.randn(y.shape).bfloat16()
    y.backward(gpu.tensor(grad_y))
    assert seen == [1] * groups
    x = x.cpu()

    def gradient(x: Tensor, grad_y: Tensor) -> Tensor:
        shape = (M, channels // groups, *kernel)
        G = torch.nn.grad.conv2d_weight(x, shape, grad_y, groups=groups, **sizes)
        return codebook_gradient(weight, G.reshape(M, -1))

    wanted = gradient(x.double(), grad_y.double())
    squares = gradient(x.double().square(), grad_y.double().square())
    assert relative_error(codebook.grad.cpu(), wanted, squares) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("kilobytes", [64, 99, 163])
def test_codebook_gradient_on_devices_with_less_shared_memory(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, layout: Layout, bits: int, kilobytes: int
) -> None:
    if gpu.device.type == "cuda":
        pytest.skip("a real GPU has the memory it has")
    monkeypatch.setenv("PLACEKERN_EMULATED_SHARED", str(kilobytes * 1024))
    weight = random_weight(150, 600, 0.6, bits)
    moved = gpu.weight(weight, layout)
    codebook = moved.codebook.clone().requires_grad_()
    x, grad_y = torch.randn(70, 600), torch.randn(70, 150)
    ops.linear(x, with_codebook(moved, codebook)).backward(grad_y)
    G = codebook_gradient(weight, grad_y.double().T @ x.double())
    squares = codebook_gradient(weight, grad_y.double().square().T @ x.double().square())
    assert relative_error(codebook.grad, G, squares) < 1e-5


@pytest.mark.parametrize("groups", [1, 3])
def test_slices_of_rows_add_up(
    gpu: Gpu, exact_conv: None, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    monkeypatch.setattr(device, "SCRATCH_BYTES", 1)  # slices of 16 rows; a group has 20
    weight = random_weight(60, 2 * 9, 0.5, 8)
    x = torch.randn(2, 2 * groups, 6, 5, requires_grad=True)
    leaf = gpu.tensor(x.detach()).requires_grad_()
    y = ops.conv2d(leaf, gpu.weight(weight), kernel_size=(3, 3), groups=groups)
    grad_y = torch.randn(y.shape)
    y.backward(gpu.tensor(grad_y))
    F.conv2d(x, weight.to_dense().view(60, 2, 3, 3), groups=groups).backward(grad_y)
    assert relative_error(leaf.grad.cpu(), x.grad) < 1e-5

    rows = torch.randn(70, 18).requires_grad_()
    leaf = gpu.tensor(rows.detach()).requires_grad_()
    y = ops.linear(leaf, gpu.weight(weight))
    grad_rows = torch.randn(y.shape)
    y.backward(gpu.tensor(grad_rows))
    assert relative_error(leaf.grad.cpu(), grad_rows @ weight.to_dense()) < 1e-5
