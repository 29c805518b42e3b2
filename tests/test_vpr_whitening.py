"""The whitening fit: identity covariance, the dual form, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from placekern.vpr.whitening import fit_whitening


def descriptors(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, dim)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return (torch.randn(n, dim, generator=generator) * spread) @ mixing + 0.3


def covariance(x: torch.Tensor) -> torch.Tensor:
    x = x.double() - x.double().mean(0)
    return x.T @ x / (len(x) - 1)


@pytest.mark.parametrize(
    ("n", "inputs", "dim"),
    [
        (200, 30, 30),  # primal, every direction
        (200, 30, 8),
        (20, 50, 19),  # dual, as many outputs as the data can carry
        (20, 50, 5),
        (30, 30, 12),  # the border: primal
    ],
)
def test_whitened_descriptors_have_zero_mean_and_identity_covariance(
    n: int, inputs: int, dim: int
) -> None:
    x = descriptors(n, inputs)
    weight, bias = fit_whitening(x, dim)
    assert weight.shape == (dim, inputs)
    assert bias.shape == (dim,)
    assert weight.dtype == bias.dtype == torch.float32
    y = x.double() @ weight.T.double() + bias.double()
    torch.testing.assert_close(y.mean(0), torch.zeros(dim).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance(y), torch.eye(dim).double(), rtol=0, atol=2e-3)


def test_wide_and_long_data_pass_block_by_block() -> None:
    for x in (torch.rand(12, 9000), torch.rand(9000, 5)):
        weight, bias = fit_whitening(x, 5)
        y = x.double() @ weight.T.double() + bias.double()
        torch.testing.assert_close(covariance(y), torch.eye(5).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close(y.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("n", "inputs"), [(8, 40), (40, 8)])
def test_the_smaller_matrix_is_decomposed(
    n: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh = torch.linalg.eigh
    shapes = []

    def recorded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append((tuple(matrix.shape), matrix.dtype))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    fit_whitening(descriptors(n, inputs), 4)
    assert shapes == [((8, 8), torch.float64)]


def test_dual_and_primal_agree() -> None:
    x = descriptors(40, 30)
    primal_weight, primal_bias = fit_whitening(x, 12)
    # Zero columns change no direction but make the data wider than it is long.
    wide = torch.cat([x, torch.zeros(40, 30)], dim=1)
    dual_weight, dual_bias = fit_whitening(wide, 12)
    torch.testing.assert_close(dual_weight[:, :30], primal_weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(dual_weight[:, 30:], torch.zeros(12, 30), rtol=0, atol=1e-6)
    torch.testing.assert_close(dual_bias, primal_bias, rtol=0, atol=1e-4)


def test_hand_worked_example() -> None:
    # Variances 8/3 and 2/3 along the axes, mean (1, 5).
    x = torch.tensor([[3.0, 5.0], [-1.0, 5.0], [1.0, 6.0], [1.0, 4.0]])
    weight, bias = fit_whitening(x, 2)
    first, second = math.sqrt(3 / 8), math.sqrt(3 / 2)
    torch.testing.assert_close(weight, torch.tensor([[first, 0.0], [0.0, second]]))
    torch.testing.assert_close(bias, torch.tensor([-first, -5 * second]))


def test_outputs_come_in_order_of_variance_so_fewer_are_a_prefix() -> None:
    x = descriptors(100, 20)
    weight, bias = fit_whitening(x, 15)
    fewer_weight, fewer_bias = fit_whitening(x, 4)
    torch.testing.assert_close(weight[:4], fewer_weight)
    torch.testing.assert_close(bias[:4], fewer_bias)
    # A row is a unit direction over the root of its variance, so the norms grow.
    assert (weight.norm(dim=1).diff() > 0).all()


def test_signs_are_fixed() -> None:
    x = descriptors(60, 10)
    weight, _ = fit_whitening(x, 10)
    mirrored, _ = fit_whitening(x.flip(0), 10)
    torch.testing.assert_close(weight, mirrored, rtol=1e-4, atol=1e-4)
    assert (weight.gather(1, weight.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("x", "dim", "message"),
    [
        (torch.rand(10, 30), 10, "at least 11 descriptors"),
        (torch.rand(50, 8), 9, "at least 9 values, got 50 of 8"),
        (torch.rand(50, 8), 0, "whitening to 0 outputs"),
        (torch.rand(30), 1, r"n >= 2, got \[30\]"),
        (torch.full((10, 4), torch.inf), 2, "finite"),
        (torch.ones(10, 4), 2, "span only 0 directions"),
        (torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).repeat(5, 1), 8, "only 3 "),
        (
            torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) @ torch.rand(2, 9),
            4,
            "2 d",
        ),
    ],
)
def test_refuses_what_the_data_cannot_support(x: torch.Tensor, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_whitening(x, dim)
