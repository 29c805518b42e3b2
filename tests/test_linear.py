"""linear and its backward against plain torch, at every ISA level."""

from __future__ import annotations

import pytest
import torch
from helpers import exact_copies, random_weight, relative_error, squared_copies, with_codebook
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import placekern as pk
from placekern import ops, reference

RANDOM_LAYERS = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@RANDOM_LAYERS
@given(
    M=st.integers(1, 70),
    K=st.one_of(st.integers(0, 300), st.integers(1900, 2300)),
    N=st.one_of(st.integers(0, 6), st.integers(60, 70), st.just(300)),
    density=st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.5, 1.0]),
    bits=st.integers(1, 8),
    bias=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
    seed=st.integers(0, 1 << 30),
)
def test_random_layers_agree_with_the_reference(
    isa: str,
    M: int,
    K: int,
    N: int,
    density: float,
    bits: int,
    bias: bool,
    relu: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(M, K, density, bits, dtype)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(N, K, dtype=dtype, requires_grad=True)
    b = torch.randn(M, dtype=dtype, requires_grad=True) if bias else None
    y = ops.linear(x, with_codebook(weight, codebook), b, relu=relu)

    def run_reference(x: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
        result = reference.linear(x, with_codebook(weight, codebook).to_dense(), bias)
        # ReLU by our own signs: rounding may move an output across zero.
        return torch.where(y.detach() > 0, result, 0) if relu else result

    leaves = (x, codebook, b)
    exact, squares = exact_copies(*leaves), squared_copies(*leaves)
    expected, terms = run_reference(*exact), run_reference(*squares)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert y.dtype == dtype
    assert relative_error(y, expected, terms) < tolerance

    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    terms.backward(grad_y.double().square())
    for actual, wanted, term in zip(leaves, exact, squares, strict=True):
        if actual is not None:
            assert relative_error(actual.grad, wanted.grad, term.grad) < 10 * tolerance


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_identity_and_one_hot_inputs_are_exact(isa: str, density: float) -> None:
    for bits in (3, 5, 8):
        weight = random_weight(33, 200, density, bits)
        dense = weight.to_dense()
        assert torch.equal(ops.linear(torch.eye(200), weight), dense.T)
        for k in (0, 63, 64, 127, 128, 199):
            one_hot = torch.zeros(1, 200)
            one_hot[0, k] = 1
            assert torch.equal(ops.linear(one_hot, weight)[0], dense[:, k])


def test_backward_of_one_hot_gradients_is_exact(isa: str) -> None:
    weight = random_weight(9, 150, 0.4, 5)
    x = torch.zeros(9, 150, requires_grad=True)
    ops.linear(x, weight).backward(torch.eye(9))
    assert torch.equal(x.grad, weight.to_dense())


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    for N in (1, 3, 40):
        weight = random_weight(100, 1000, 0.3, 8)
        results = []
        before = torch.get_num_threads()
        x = torch.randn(N, 1000)
        grad_y = torch.randn(N, 100)
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                codebook = weight.codebook.clone().requires_grad_()
                y = ops.linear(leaf, with_codebook(weight, codebook))
                y.backward(grad_y)
                results.append((y.detach(), leaf.grad, codebook.grad))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert torch.equal(one, other)


def test_nan_in_x_comes_out_and_relu_lets_it_through(isa: str) -> None:
    weight = random_weight(4, 64, 1.0, 5)
    x = torch.randn(1, 64)
    x[0, 3] = float("nan")
    assert ops.linear(x, weight, relu=True).isnan().all()


def test_any_leading_shape_and_strides() -> None:
    weight = random_weight(8, 30, 0.5, 5)
    dense = weight.to_dense()
    x = torch.randn(30, 4, 3, 2).permute(3, 1, 2, 0)
    assert ops.linear(x, weight).shape == (2, 4, 3, 8)
    assert relative_error(ops.linear(x, weight), x @ dense.T) < 1e-5
    assert relative_error(ops.linear(x[0, 0, 0], weight), x[0, 0, 0] @ dense.T) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_gives_low_precision_output(dtype: torch.dtype) -> None:
    weight = random_weight(16, 300, 0.5, 8)
    x = torch.randn(5, 300).to(dtype)
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    # Sums are float32: only the output is rounded.
    assert torch.equal(y, ops.linear(x.float(), weight).to(dtype))


def test_autocast_keeps_the_codebook_exact() -> None:
    weight = random_weight(16, 300, 0.5, 8)
    x = torch.randn(5, 300)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.linear(x.bfloat16(), weight))


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(density: float, relu: bool) -> None:
    weight = random_weight(6, 140, density, 5)
    arrays = (weight.row_ptr, weight.positions, weight.codes)
    sizes = (140, 5, int(weight.layout), 1)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(2, 3, 140, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    opcheck(torch.ops.placekern.linear.default, (x, *arrays, codebook, *sizes, bias, relu))
    for wanted in ([True, True], [True, False], [False, True]):
        args = (torch.randn(2, 3, 6), x.detach(), *arrays, codebook.detach(), *sizes, wanted)
        opcheck(torch.ops.placekern.linear_backward.default, args)


def test_gradcheck() -> None:
    weight = random_weight(5, 70, 0.4, 3, torch.float64)
    codebook = weight.codebook.clone().requires_grad_()
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, c, b: ops.linear(x, with_codebook(weight, c), b), (x, codebook, bias)
    )


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 29), None, r"x has shape \(2, 29\), expected \[..., K = 30\]"),
        (torch.zeros(()), None, "x has shape"),
        (torch.zeros(2, 30, dtype=torch.int32), None, "x has dtype torch.int32"),
        (torch.zeros(2, 30), torch.zeros(9), r"bias has shape \(9,\), expected \(8,\)"),
        (torch.zeros(2, 30, device="meta"), None, "row_ptr is on cpu, but x is on meta"),
    ],
)
def test_bad_input_is_refused(x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear(x, random_weight(8, 30, 0.5, 5), bias)


def test_threads_of_python_may_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = random_weight(64, 1000, 0.4, 5)
    xs = [torch.randn(3, 1000) for _ in range(16)]
    expected = [ops.linear(x, weight) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for actual, wanted in zip(
            pool.map(lambda x: ops.linear(x, weight), xs), expected, strict=True
        ):
            assert torch.equal(actual, wanted)


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="PLACEKERN_ISA=mmx is not a level; this processor has"):
        pk.set_isa("mmx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": 7}, r"layout is 7, expected \[0, 1, 2, 3\]"),
        ({"codes": torch.zeros(1, dtype=torch.uint8)}, "codes has 1 bytes"),
        ({"positions": torch.zeros(99, dtype=torch.uint8)}, "positions has 99 bytes"),
        ({"codes": torch.zeros(999, dtype=torch.uint8)[::2]}, r"codes has strides \(2,\)"),
    ],
)
def test_bare_arrays_that_cannot_be_a_weight_are_refused(
    changes: dict[str, object], message: str
) -> None:
    weight = random_weight(8, 80, 0.5, 5)
    names = ("row_ptr", "positions", "codes", "codebook")
    arrays = {name: getattr(weight, name) for name in names}
    arrays |= {"K": 80, "bits": 5, "layout": 0, "taps": 1}
    with pytest.raises(ValueError, match=message):
        torch.ops.placekern.linear(torch.zeros(1, 80), **(arrays | changes), bias=None, relu=False)


def test_a_gradient_of_a_gradient_is_refused_rather_than_wrong() -> None:
    weight = random_weight(7, 20, 0.5, 5)
    x = torch.randn(3, 20, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.square().sum().backward()


def test_another_default_device_does_not_matter() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(200, 70))
    with torch.device("meta"):
        pk.compress_(layer, {"bits": 4})
        y = layer(torch.zeros(1, 200, device="cpu"))
        own = pk.QuantSparseLinear(20, 7, device="cpu")
    assert y.shape == (1, 70)
    assert own(torch.zeros(1, 20)).shape == (1, 7)
