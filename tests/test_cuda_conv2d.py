"""conv2d on CUDA against plain torch: the kernels' own source, on the emulator or on a GPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONVOLUTIONS, random_weight, relative_error

import placekern as pk
from placekern import QuantSparseWeight, _native, device, ops
from placekern.ops import common
from placekern.packing import Layout

if TYPE_CHECKING:
    from conftest import Gpu

ROUNDING = {torch.float32: 2e-3, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("by_tap", [False, True])
@pytest.mark.parametrize("way", ["direct", "decode"])
@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_plain_torch(
    gpu: Gpu,
    any_way: None,
    case: dict[str, Any],
    by_tap: bool,
    way: str,
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    sizes = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | case
    channels, M, size = sizes.pop("channels"), sizes.pop("M"), sizes.pop("size")
    kernel = sizes["kernel_size"]
    K = channels // sizes["groups"] * kernel[0] * kernel[1]
    weight = random_weight(M, K, 0.4, 8)
    batch = 3
    x = torch.randn(batch, channels, *size).to(dtype)
    bias = torch.randn(M)
    dense = weight.to_dense().double().view(M, -1, *kernel)
    pad = sizes["padding"]
    top, bottom, left, right = pad if len(pad) == 4 else (pad[0], pad[0], pad[1], pad[1])
    image = F.pad(x.double(), (left, right, top, bottom))
    wanted = F.conv2d(
        image, dense, bias.double(), sizes["stride"], 0, sizes["dilation"], sizes["groups"]
    )
    _native.force_way(way)
    moved = gpu.weight(weight, layout, kernel[0] * kernel[1] if by_tap else 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for relu in (False, True):
            y = ops.conv2d(
                gpu.tensor(x).contiguous(memory_format=memory_format),
                moved,
                gpu.tensor(bias),
                relu=relu,
                **sizes,
            )
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=memory_format)
            error = relative_error(y.cpu(), wanted.relu() if relu else wanted)
            assert error < ROUNDING[dtype]


# Channels of which 16 bytes hold those of one tap, while windows and units begin within a tap; then
# what hinders that: too few channels, and an image that starts between 16 bytes.
@pytest.mark.parametrize(("channels", "offset"), [(40, 0), (64, 0), (20, 0), (18, 0), (40, 1)])
@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_in_channels_last_is_copied_by_16_bytes(
    gpu: Gpu,
    any_way: None,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    offset: int,
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(device, "_tf32_conv", lambda: True)
    _native.force_way("direct")
    weight = random_weight(36, channels * 9, 0.4, 8)
    memory = gpu.tensor(torch.randn(2 * 11 * 12 * channels + offset).to(dtype))
    x = memory[offset:].view(2, 11, 12, channels).permute(0, 3, 1, 2)
    dense = weight.to_dense().double().view(36, channels, 3, 3)
    for sizes in ({"padding": (1, 1)}, {"padding": (2, 0), "stride": (2, 1), "dilation": (1, 2)}):
        y = ops.conv2d(x, gpu.weight(weight, layout, 9), kernel_size=(3, 3), **sizes)
        assert relative_error(y.cpu(), F.conv2d(x.cpu().double(), dense, **sizes)) < ROUNDING[dtype]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize(("M", "groups"), [(96, 2), (48, 3), (288, 2), (60, 3)])
def test_groups_on_tensor_cores(
    gpu: Gpu,
    any_way: None,
    memory_format: torch.memory_format,
    layout: Layout,
    M: int,
    groups: int,
) -> None:
    _native.force_way("direct")
    weight = random_weight(M, 16 * 9, 0.4, 8)
    x = torch.randn(2, 16 * groups, 5, 6).bfloat16()
    bias = torch.randn(M)
    filters = weight.to_dense().double().view(M, 16, 3, 3)
    wanted = F.conv2d(x.double(), filters, bias.double(), padding=1, groups=groups)
    taps = 9 if memory_format == torch.channels_last else 1
    y = ops.conv2d(
        gpu.tensor(x).contiguous(memory_format=memory_format),
        gpu.weight(weight, layout, taps),
        gpu.tensor(bias),
        kernel_size=(3, 3),
        padding=(1, 1),
        groups=groups,
    )
    assert relative_error(y.cpu(), wanted) < 1.2e-2


def test_the_work_of_a_convolution_chooses_the_way() -> None:
    def small(
        shape: tuple[int, ...],
        M: int,
        kernel: int,
        form: torch.memory_format,
        layout: Layout = Layout.PAIRS,
    ) -> bool:
        batch, channels, height, width = shape
        taps = kernel**2 if form == torch.channels_last else 1
        weight = common.weight(*common.arrays(random_weight(M, channels * kernel**2, 0.3, 8)))
        weight = weight._replace(layout=layout, taps=taps)
        x = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=form)
        shape = _native.ConvShape(
            batch, 1, channels, height, width, height, width, kernel, kernel, 1, 1, 1, 1, 1, 1
        )
        return device._products(weight, shape, x) <= device._most_products(weight, shape, x)

    deep, early = ((1, 512, 14, 14), 512, 3), ((1, 64, 224, 224), 64, 3)
    assert small(*deep, torch.channels_last)
    assert not small(*deep, torch.contiguous_format)
    assert not small(*early, torch.channels_last)
    middle = ((1, 256, 56, 56), 256, 3)
    assert small(*middle, torch.channels_last, Layout.DENSE)
    assert not small(*middle, torch.channels_last, Layout.PAIRS)
    assert small((1, 64, 14, 14), 64, 3, torch.contiguous_format)
    assert not small((1, 18, 40, 40), 512, 3, torch.channels_last)  # 18 channels: no 16 bytes


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_taps_belong_to_one_kernel_size(gpu: Gpu, layout: Layout) -> None:
    weight = gpu.weight(random_weight(5, 36, 0.4, 8), layout, 9)
    x = gpu.tensor(torch.randn(1, 9, 4, 4))
    with pytest.raises(ValueError, match=r"lie by 9 taps, but kernel_size \(2, 2\) has 4"):
        ops.conv2d(x, weight, kernel_size=(2, 2))
    with pytest.raises(ValueError, match="linear: the weight's columns lie by the 9 taps"):
        ops.linear(gpu.tensor(torch.randn(1, 36)), weight)


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_a_layer_in_channels_last_has_its_columns_tap_by_tap(gpu: Gpu, layout: Layout) -> None:
    dense = torch.nn.Conv2d(16, 20, 3, padding=1).to(memory_format=torch.channels_last)
    layer = pk.QuantSparseConv2d.from_float(dense, pk.CompressConfig(bits=8, threshold=0.03))
    portable = {name: array.clone() for name, array in layer.state_dict().items()}
    weight = layer.weight
    assert weight.taps == 1  # the CPU has one order
    x = torch.randn(2, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    filters = weight.to_dense().detach().view(20, 16, 3, 3)
    wanted = F.conv2d(x.double(), filters.double(), dense.bias.detach().double(), 1, 1)
    packed = gpu.weight(weight, layout, 9)
    layer.to(gpu.device)
    layer.weight = packed
    x = gpu.tensor(x)
    calls = mock.Mock(wraps=device.conv2d)
    with mock.patch.object(device, "conv2d", calls):
        y = layer(x)
    assert calls.call_args.args[0].taps == 9
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.cpu(), wanted) < 1.2e-2
    for name in ("row_ptr", "positions", "codes"):
        assert torch.equal(layer.state_dict()[name].cpu(), portable[name])
    for own in (layer, copy.deepcopy(layer)):
        decoded = own.to_dense().weight
        assert decoded.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(decoded.cpu(), filters)


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_an_image_in_both_formats_takes_that_of_the_filters(gpu: Gpu, layout: Layout) -> None:
    weight = random_weight(8, 9, 0.6, 8)
    filters = weight.to_dense().double().view(8, 1, 3, 3)
    x = torch.randn(2, 1, 7, 7).bfloat16()
    for taps, form in ((1, torch.contiguous_format), (9, torch.channels_last)):
        y = ops.conv2d(gpu.tensor(x), gpu.weight(weight, layout, taps), kernel_size=(3, 3))
        assert y.is_contiguous(memory_format=form)
        assert relative_error(y.cpu(), F.conv2d(x.double(), filters)) < 1.2e-2
    x = torch.randn(3, 16, 1, 1).bfloat16()  # here strides of 1 stand for nothing
    weight = random_weight(8, 16 * 9, 0.4, 8)
    filters = weight.to_dense().double().view(8, 16, 3, 3)
    image = gpu.tensor(x).as_strided(x.shape, (16, 1, 1, 1))
    y = ops.conv2d(image, gpu.weight(weight, layout, 9), kernel_size=(3, 3), padding=(1, 1))
    assert relative_error(y.cpu(), F.conv2d(x.double(), filters, padding=1)) < 1.2e-2


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_splits_of_the_columns_add_up(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    memory_format: torch.memory_format,
) -> None:
    weight = random_weight(40, 64 * 9, 0.4, 8)
    taps = 9 if memory_format == torch.channels_last else 1
    x = torch.randn(1, 64, 5, 6).bfloat16()
    wanted = F.conv2d(x.double(), weight.to_dense().double().view(40, 64, 3, 3), padding=1)
    image = gpu.tensor(x).contiguous(memory_format=memory_format)
    for splits in (1, 2, 3):
        monkeypatch.setattr(device, "_matmul_splits", lambda *_, s=splits: s)
        moved = gpu.weight(weight, layout, taps)
        y = ops.conv2d(image, moved, kernel_size=(3, 3), padding=(1, 1))
        assert relative_error(y.cpu(), wanted) < 1.2e-2


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_columns_behind_the_last_are_in_no_image(gpu: Gpu, layout: Layout) -> None:
    # In memory NaN follows the channels, and the image is taller than a short number can say.
    channels, M = 10, 20
    memory = gpu.tensor(torch.full((channels + 80, 40_000, 1), float("nan")).bfloat16())
    x = memory[None, :channels]
    x.copy_(torch.randn(x.shape))
    weight = random_weight(M, channels * 3, 0.4, 8)
    y = ops.conv2d(x, gpu.weight(weight, layout), kernel_size=(3, 1), stride=(7000, 1))
    dense = weight.to_dense().double().view(M, channels, 3, 1)
    assert y.shape == (1, M, 6, 1)
    assert relative_error(y.cpu(), F.conv2d(x.cpu().double(), dense, stride=(7000, 1))) < 1.2e-2


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
def test_a_kernel_that_reaches_far(gpu: Gpu, layout: Layout) -> None:
    weight = random_weight(20, 6, 0.6, 8)
    x = torch.randn(1, 3, 40_010, 1).bfloat16()

    def run(weight: QuantSparseWeight) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # it need not have an engine for that
            return ops.conv2d(gpu.tensor(x), weight, kernel_size=(2, 1), dilation=(40_000, 1))

    y = run(gpu.weight(weight, layout))
    wanted = F.conv2d(
        x.double(), weight.to_dense().double().view(20, 3, 2, 1), None, 1, 0, (40_000, 1)
    )
    assert relative_error(y.cpu(), wanted) < 1.2e-2
    leaf = gpu.weight(weight, layout)
    leaf.codebook.requires_grad_()
    y = run(leaf)
    with pytest.raises(ValueError, match="dilation 40000 x 1 reaches over more than 32,767 pixels"):
        y.sum().backward()


@pytest.mark.parametrize("groups", [1, 3])
def test_decoded_slices_of_rows_are_put_together(
    gpu: Gpu, any_way: None, exact_conv: None, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    monkeypatch.setattr(device, "SCRATCH_BYTES", 1)  # slices of 16 rows; a group has 20
    _native.force_way("decode")
    weight = random_weight(60, 2 * 9, 0.5, 8)
    x, bias = torch.randn(2, 2 * groups, 6, 5), torch.randn(60)
    moved = gpu.weight(weight)
    y = ops.conv2d(
        gpu.tensor(x), moved, gpu.tensor(bias), kernel_size=(3, 3), groups=groups, relu=True
    )
    dense = weight.to_dense().view(60, 2, 3, 3)
    assert relative_error(y.cpu(), F.conv2d(x, dense, bias, groups=groups).relu()) < 1e-5


@pytest.mark.parametrize("layout", [Layout.DENSE, Layout.PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "kernel", "G"), [(150, (3, 3), 1), (3, (1, 2), 1), (70, (5, 3), 4)]
)
def test_filters_are_decoded_in_the_order_of_the_image(
    gpu: Gpu, layout: Layout, dtype: torch.dtype, channels: int, kernel: tuple[int, int], G: int
) -> None:
    weight = random_weight(20, channels * kernel[0] * kernel[1], 0.4, 8, codebooks=G)
    native = common.weight(*common.arrays(gpu.weight(weight, layout)))
    by_tap = gpu.weight(weight, layout, kernel[0] * kernel[1])
    shape = _native.ConvShape(1, 1, channels, 9, 9, 1, 1, *kernel, 1, 1, 0, 0, 1, 1)
    x = gpu.tensor(torch.zeros(1, channels, 9, 9, dtype=dtype))
    tapped = common.weight(*common.arrays(by_tap))
    ((_, _, filters, _),) = device.group_slices(tapped, shape, x)
    assert torch.equal(filters.cpu(), weight.to_dense(dtype).view(20, channels, *kernel))
    assert filters.is_contiguous(memory_format=torch.channels_last)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(1, channels, 9, 9, dtype=dtype).contiguous(memory_format=memory_format)
        ((_, _, filters, _),) = device.group_slices(native, shape, gpu.tensor(x))
        assert torch.equal(filters.cpu(), weight.to_dense(dtype).view(20, channels, *kernel))
        if layout == Layout.PAIRS:
            assert filters.is_contiguous(memory_format=memory_format)
