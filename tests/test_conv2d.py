"""conv2d and its backward against plain torch, at every ISA level, on hostile shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import exact_copies, random_weight, relative_error, squared_copies, with_codebook
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from placekern import _native, ops, reference


@pytest.fixture(params=["direct", "decode"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Computes every convolution one way, whatever its density."""
    _native.force_way(request.param)
    yield request.param
    _native.force_way("auto")


KERNELS = [(1, 1), (3, 3), (5, 5), (11, 11), (1, 3), (7, 2), (2, 1)]
FORMATS = ["contiguous", "channels_last", "strided"]


def image(batch: int, channels: int, height: int, width: int, layout: str, dtype: Any) -> Tensor:
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.randn(batch, channels, height, 2 * width + 1, dtype=dtype)[..., 1::2]
    return x


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_random_layers_agree_with_the_reference(isa: str, way: str, data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 9))
    M = groups * draw(st.integers(1, 20))
    kernel = draw(st.sampled_from(KERNELS))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, 6)) for _ in range(4))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    assume(height + padding[0] + padding[1] > dilation[0] * (kernel[0] - 1))
    assume(width + padding[2] + padding[3] > dilation[1] * (kernel[1] - 1))
    batch = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    bits = draw(st.integers(1, 8))
    density = draw(st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.5, 1.0]))
    relu = draw(st.booleans())

    weight = random_weight(M, channels // groups * kernel[0] * kernel[1], density, bits, dtype)
    codebook = weight.codebook.clone().requires_grad_()
    layout = draw(st.sampled_from(FORMATS))
    x = image(batch, channels, height, width, layout, dtype).requires_grad_()
    bias = torch.randn(M, dtype=dtype, requires_grad=True) if draw(st.booleans()) else None
    y = ops.conv2d(
        x,
        with_codebook(weight, codebook),
        bias,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        relu=relu,
    )

    def run_reference(x: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
        dense = with_codebook(weight, codebook).to_dense()
        result = reference.conv2d(x, dense, bias, kernel, stride, padding, dilation, groups)
        # ReLU by our own signs: rounding may move an output across zero.
        return torch.where(y.detach() > 0, result, 0) if relu else result

    leaves = (x, codebook, bias)
    exact, squares = exact_copies(*leaves), squared_copies(*leaves)
    expected, terms = run_reference(*exact), run_reference(*squares)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert relative_error(y, expected, terms) < tolerance
    if layout == "channels_last" and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)

    grad_y = torch.randn_like(y)
    if draw(st.booleans()):
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    terms.backward(grad_y.double().square())
    for actual, wanted, term in zip(leaves, exact, squares, strict=True):
        if actual is not None:
            assert relative_error(actual.grad, wanted.grad, term.grad) < 10 * tolerance


@pytest.mark.parametrize("layout", FORMATS)
def test_one_hot_images_are_exact(isa: str, way: str, layout: str) -> None:
    weight = random_weight(17, 3 * 9, 0.5, 8)
    dense = weight.to_dense().reshape(17, 3, 3, 3)
    x = torch.zeros_like(image(1, 3, 9, 9, layout, torch.float32))
    x[0, 1, 4, 4] = 1
    y = ops.conv2d(x, weight, kernel_size=(3, 3), padding=(1, 1))
    assert torch.equal(y[0, :, 3:6, 3:6], dense[:, 1].flip(1, 2))
    assert y.count_nonzero() == dense[:, 1].count_nonzero()


def test_identity_weights_copy_the_image(isa: str, way: str) -> None:
    from placekern import QuantSparseWeight

    weight = QuantSparseWeight.from_dense(torch.eye(5), torch.tensor([1.0, 2.0]))
    x = torch.randn(2, 5, 13, 11)
    assert torch.equal(ops.conv2d(x, weight, kernel_size=(1, 1)), x)


def test_more_rows_than_a_tile_holds(isa: str, way: str) -> None:
    weight = random_weight(1100, 40, 0.3, 5)
    x = torch.randn(1, 40, 5, 5)
    y = ops.conv2d(x, weight, kernel_size=(1, 1))
    expected = weight.to_dense().double() @ x.double().reshape(40, 25)
    assert relative_error(y.reshape(1100, 25), expected) < 1e-5


def test_results_do_not_depend_on_the_number_of_threads(isa: str, way: str) -> None:
    weight = random_weight(96, 32 * 9, 0.3, 8)
    x = torch.randn(3, 32, 15, 14)
    grad_y = torch.randn(3, 96, 15, 14)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            codebook = weight.codebook.clone().requires_grad_()
            y = ops.conv2d(
                leaf, with_codebook(weight, codebook), kernel_size=(3, 3), padding=(1, 1)
            )
            y.backward(grad_y)
            results.append((y.detach(), leaf.grad, codebook.grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str) -> None:
    weight = random_weight(6, 36, 0.4, 5)
    arrays = (weight.row_ptr, weight.positions, weight.codes)
    sizes = (36, 5, int(weight.layout), 1)
    conv = ([3, 3], [2, 1], [1, 0, 1, 1], [1, 1], 1)
    codebook = weight.codebook.clone().requires_grad_()
    x = image(2, 4, 9, 8, layout, torch.float32).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    args = (x, *arrays, codebook, *sizes, bias, *conv, True)
    opcheck(torch.ops.placekern.conv2d.default, args)
    for wanted in ([True, True], [True, False], [False, True]):
        args = (torch.randn(2, 6, 4, 8), x.detach(), *arrays, codebook.detach())
        opcheck(torch.ops.placekern.conv2d_backward.default, (*args, *sizes, *conv, wanted))


def test_gradcheck() -> None:
    weight = random_weight(4, 2 * 6, 0.5, 2, torch.float64)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, c, b: ops.conv2d(
            x,
            with_codebook(weight, c),
            b,
            kernel_size=(3, 2),
            stride=(2, 1),
            padding=(1, 0, 1, 2),
            groups=2,
        ),
        (x, codebook, bias),
    )


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (torch.zeros(1, 5, 9, 9), {}, "x has 5 channels, expected"),
        (torch.zeros(4, 9, 9), {}, "expected \\[batch, C, height, width\\]"),
        (torch.zeros(1, 4, 2, 9), {}, "does not fit into the padded image of 2 x 9 pixels"),
        (torch.zeros(1, 4, 9, 9), {"stride": (0, 1)}, r"stride is \(0, 1\), expected at least 1"),
        (torch.zeros(1, 4, 9, 9), {"padding": (-1, 0)}, "padding is"),
        (torch.zeros(1, 20, 9, 9), {"groups": 5}, "M = 6 output channels do not divide into 5"),
        (torch.zeros(1, 4, 9, 9, dtype=torch.int64), {}, "x has dtype torch.int64"),
    ],
)
def test_bad_input_is_refused(x: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.conv2d(x, random_weight(6, 36, 0.5, 5), **({"kernel_size": (3, 3)} | changes))
