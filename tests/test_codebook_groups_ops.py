"""linear and conv2d with codebooks for groups of output channels, at every ISA level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONVOLUTIONS, exact_copies, random_weight, relative_error, with_codebook
from torch import Tensor
from torch.library import opcheck

from placekern import QuantSparseWeight, _native, ops, reference

GROUPS = [(33, 2), (33, 11), (33, 33), (70, 9), (17, 6)]
"""M and G: G = 2, G = M, and M that is no multiple of group_size."""


def dense_of(weight: QuantSparseWeight, codebook: Tensor) -> Tensor:
    return reference.decode(*weight.to_csr(), codebook, weight.shape)


@pytest.mark.parametrize(("M", "G"), GROUPS)
@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("density", [0.05, 0.4])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 70])
def test_linear_agrees_with_plain_torch(
    isa: str, M: int, G: int, bits: int, density: float, N: int
) -> None:
    K = 2200 if N == 1 else 300
    weight = random_weight(M, K, density, bits, codebooks=G)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(N, K, requires_grad=True)
    bias = torch.randn(M, requires_grad=True)
    y = ops.linear(x, with_codebook(weight, codebook), bias)
    exact = exact_copies(x, codebook, bias)
    expected = F.linear(exact[0], dense_of(weight, exact[1]), exact[2])
    assert relative_error(y, expected) < 1e-5

    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    assert codebook.grad.shape == (G, 1 << bits)
    for leaf, other in zip((x, codebook, bias), exact, strict=True):
        assert relative_error(leaf.grad, other.grad) < 1e-4


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_identity_gives_each_row_the_entries_of_its_own_codebook(
    isa: str, bits: int, density: float
) -> None:
    for M, G in GROUPS:
        weight = random_weight(M, 200, density, bits, codebooks=G)
        dense = dense_of(weight, weight.codebook)
        assert torch.equal(ops.linear(torch.eye(200), weight), dense.T)
        assert torch.equal(ops.linear(torch.eye(200)[7:8], weight)[0], dense[:, 7])


@pytest.fixture(params=["direct", "decode"])
def way(request: pytest.FixtureRequest, any_way: None) -> str:
    _native.force_way(request.param)
    return request.param


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("density", [0.08, 0.4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_agrees_with_plain_torch(
    isa: str, way: str, case: dict[str, Any], density: float, memory_format: torch.memory_format
) -> None:
    sizes = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | case
    channels, M, size = sizes.pop("channels"), sizes.pop("M"), sizes.pop("size")
    kernel = sizes["kernel_size"]
    K = channels // sizes["groups"] * kernel[0] * kernel[1]
    pad = sizes["padding"]
    top, bottom, left, right = pad if len(pad) == 4 else (pad[0], pad[0], pad[1], pad[1])
    # One, two, three rows a codebook: groups of codebooks end inside those of the convolution, and
    # the other way round.
    for G in sorted({-(-M // size) for size in (1, 2, 3, max(1, M // 2))} - {1}):
        weight = random_weight(M, K, density, 5, codebooks=G)
        codebook = weight.codebook.clone().requires_grad_()
        x = torch.randn(3, channels, *size).contiguous(memory_format=memory_format)
        leaf = x.requires_grad_()
        y = ops.conv2d(leaf, with_codebook(weight, codebook), **sizes)
        exact = exact_copies(leaf, codebook)
        expected = F.conv2d(
            F.pad(exact[0], (left, right, top, bottom)),
            dense_of(weight, exact[1]).view(M, -1, *kernel),
            None,
            sizes["stride"],
            0,
            sizes["dilation"],
            sizes["groups"],
        )
        assert relative_error(y, expected) < 1e-5
        grad_y = torch.randn_like(y)
        y.backward(grad_y)
        expected.backward(grad_y.double())
        assert codebook.grad.shape == (G, 32)
        assert relative_error(leaf.grad, exact[0].grad) < 1e-4
        assert relative_error(codebook.grad, exact[1].grad) < 1e-4


def test_float64_layers_are_exact() -> None:
    weight = random_weight(12, 36, 0.5, 3, torch.float64, codebooks=4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    dense = dense_of(weight, weight.codebook)
    y = ops.conv2d(x, weight, kernel_size=(3, 3))
    assert relative_error(y, F.conv2d(x, dense.view(12, 4, 3, 3))) < 1e-13
    assert (
        relative_error(
            ops.linear(x.view(-1, 5)[:, :1].expand(-1, 36), weight),
            (x.view(-1, 5)[:, :1].expand(-1, 36) @ dense.T),
        )
        < 1e-13
    )


def gradients(weight: QuantSparseWeight, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """y, and the gradients of x and of the codebooks."""
    arrays = ops.common.arrays(weight)
    if x.dim() == 2:
        y = ops.linear(x, weight)
        back = torch.ops.placekern.linear_backward(grad_y, x, *arrays, [True, True])
    else:
        sizes = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 2)
        y = torch.ops.placekern.conv2d(x, *arrays, None, *sizes, False)
        back = torch.ops.placekern.conv2d_backward(grad_y, x, *arrays, *sizes, [True, True])
    return (y, *back)


def check_against_dense(weight: QuantSparseWeight, x: Tensor, grad_y: Tensor) -> None:
    """The gradient of the codebooks, against the dense one's."""
    G = grad_y.double().T @ x.double()
    book = weight.codebook.double().requires_grad_()
    (expected,) = torch.autograd.grad(dense_of(weight, book), book, G)
    assert relative_error(gradients(weight, x, grad_y)[2], expected) < 1e-4


@pytest.mark.parametrize(("M", "G"), [(100, 3), (100, 100)])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, M: int, G: int) -> None:
    cases = [
        (random_weight(M, 3000, 0.3, 8, codebooks=G), torch.randn(n, 3000), torch.randn(n, M))
        for n in (1, 30)
    ]
    conv = random_weight(M, 16 * 9, 0.3, 8, codebooks=G)
    cases.append((conv, torch.randn(5, 32, 7, 6), torch.randn(5, M, 7, 6)))
    before = torch.get_num_threads()
    for weight, x, grad_y in cases:
        results = []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(gradients(weight, x, grad_y))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_many_codebooks_share_the_memory_of_partial_sums() -> None:
    # 20 windows and 2 x 20 images: more than the sixteen sums that 2,048 codebooks are given.
    weight = random_weight(2048, 20 * 128, 0.02, 8, codebooks=2048)
    check_against_dense(weight, torch.randn(2, 20 * 128), torch.randn(2, 2048))

    conv = random_weight(2048, 2 * 9, 0.3, 8, codebooks=1024)
    x, grad_y = torch.randn(20, 4, 3, 4), torch.randn(20, 2048, 3, 4)
    got = gradients(conv, x, grad_y)[2]
    leaf = conv.codebook.double().requires_grad_()
    dense = dense_of(conv, leaf).view(2048, 2, 3, 3)
    y = F.conv2d(x.double(), dense, padding=1, groups=2)
    (expected,) = torch.autograd.grad(y, leaf, grad_y.double())
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_opcheck(density: float) -> None:
    weight = random_weight(6, 36, density, 5, codebooks=3)
    arrays = (weight.row_ptr, weight.positions, weight.codes)
    sizes = (36, 5, int(weight.layout), 1)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(2, 36, requires_grad=True)
    opcheck(torch.ops.placekern.linear.default, (x, *arrays, codebook, *sizes, None, True))
    image = torch.randn(2, 4, 9, 8, requires_grad=True)
    conv = ([3, 3], [2, 1], [1, 0, 1, 1], [1, 1], 1)
    opcheck(
        torch.ops.placekern.conv2d.default, (image, *arrays, codebook, *sizes, None, *conv, False)
    )
    for wanted in ([True, True], [True, False], [False, True]):
        args = (torch.randn(2, 6), x.detach(), *arrays, codebook.detach(), *sizes, wanted)
        opcheck(torch.ops.placekern.linear_backward.default, args)
        args = (torch.randn(2, 6, 4, 8), image.detach(), *arrays, codebook.detach())
        opcheck(torch.ops.placekern.conv2d_backward.default, (*args, *sizes, *conv, wanted))


def test_codebooks_that_do_not_fit_are_refused_on_every_call() -> None:
    weight = random_weight(10, 30, 0.5, 5, codebooks=5)
    x = torch.zeros(2, 30)
    for shape, message in (
        ((5, 16), r"linear: codebook has shape \(5, 16\), expected \(32,\) for 5 bits"),
        ((8, 32), r"linear: codebook has shape \(8, 32\), but M = 10 .* make 8 groups"),
        ((1, 32), r"linear: codebook has shape \(1, 32\), expected \(32,\) where all"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear(x, with_codebook(weight, torch.zeros(shape)))
