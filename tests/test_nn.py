"""QuantSparseConv2d and QuantSparseLinear as modules: arguments, state, training, torch's tools.

The dense twin of a layer is an `nn.Conv2d` or `nn.Linear` made from the same arguments, filled with
the decoded weight, so that a wrong argument cannot hide in both.
"""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import random_weight, relative_error
from torch import Tensor, nn

from placekern import (
    CompressConfig,
    QuantSparseConv2d,
    QuantSparseLinear,
    QuantSparseWeight,
    compress_,
    ops,
)
from placekern.packing import Layout

CONV_FORMS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "three positional": ((4, 6, 3), {}),
    "all positional": ((4, 6, (3, 2), (2, 1), (1, 2), (2, 1), 2, True, "zeros", "cpu"), {}),
    "dtype positional": ((4, 6, 3, 1, 1, 1, 1, True, "zeros", None, torch.float64), {}),
    "all by keyword": (
        (),
        {
            "in_channels": 4,
            "out_channels": 8,
            "kernel_size": (2, 3),
            "stride": (1, 2),
            "padding": (2, 1),
            "dilation": (3, 1),
            "groups": 4,
            "bias": False,
            "padding_mode": "replicate",
            "device": torch.device("cpu"),
            "dtype": torch.float64,
        },
    ),
    "valid": ((4, 6, 3), {"padding": "valid", "stride": 2}),
    "same": ((4, 6, 3), {"padding": "same"}),
    "same, even kernel": ((4, 6, (4, 2)), {"padding": "same"}),
    "same, even kernel, dilated": ((4, 6, (2, 4)), {"padding": "same", "dilation": (3, 1)}),
    "same, circular": ((4, 6, (3, 4)), {"padding": "same", "padding_mode": "circular"}),
    "same, reflect": ((4, 6, (2, 5)), {"padding": "same", "padding_mode": "reflect"}),
    "valid, replicate": ((4, 6, 3), {"padding": "valid", "padding_mode": "replicate"}),
    "reflect": ((4, 6, 3, 2), {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": ((4, 6, 3), {"padding": (1, 2), "padding_mode": "replicate", "dilation": 2}),
    "circular": ((4, 6, 3), {"padding": (1, 3), "padding_mode": "circular", "groups": 2}),
    "padding of a list": ((4, 6, 3), {"padding": [1, 2], "stride": [2, 1]}),
    "more padding than kernel": ((4, 6, 1), {"padding": 3}),
    "depthwise": ((4, 8, 3), {"padding": 1, "groups": 4}),
    "no bias": ((4, 6, 3, 1, 0, 1, 1, False), {}),
}

LINEAR_FORMS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "two positional": ((20, 7), {}),
    "all positional": ((20, 7, False, "cpu", torch.float64), {}),
    "all by keyword": (
        (),
        {"in_features": 20, "out_features": 7, "bias": True, "device": "cpu", "dtype": None},
    ),
    "one of each": ((1, 1), {}),
}


def dense_twin(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """torch's layer from the same arguments, with the decoded weight."""
    kind = nn.Conv2d if isinstance(layer, QuantSparseConv2d) else nn.Linear
    twin = kind(*args, **kwargs)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.to_dense().reshape(twin.weight.shape))
        if twin.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def sparse_linear(
    K: int = 64, M: int = 12, density: float = 0.5, bits: int = 5, **kwargs: Any
) -> QuantSparseLinear:
    """A layer with a random weight of that density."""
    layer = QuantSparseLinear(K, M, bits=bits, **kwargs)
    layer.weight = random_weight(M, K, density, bits)
    return layer


def prove(layer: Any) -> None:
    """Raises unless the layer's arrays are a sound weight and agree with what it says of them."""
    weight = layer.weight
    proven = QuantSparseWeight(
        weight.shape,
        weight.bits,
        weight.row_ptr,
        weight.positions,
        weight.codes,
        weight.codebook,
    )
    assert (proven.nnz, proven.layout) == (weight.nnz, weight.layout)


# ---- constructors ----


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("form", CONV_FORMS)
def test_conv2d_takes_the_arguments_of_torch(form: str) -> None:
    args, kwargs = CONV_FORMS[form]
    layer = QuantSparseConv2d(*args, **kwargs)
    twin = dense_twin(layer, args, kwargs)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(twin, name), name
    assert layer.codebook.dtype == twin.weight.dtype
    assert (layer.bias is None) == (twin.bias is None)
    assert layer.bias is None or layer.bias.dtype == twin.bias.dtype

    tolerance = 1e-12 if twin.weight.dtype == torch.float64 else 1e-5
    x = torch.randn(2, 4, 11, 9, dtype=twin.weight.dtype)
    for image in (x, x.to(memory_format=torch.channels_last), x[0], x[:0]):
        y = layer(image)
        expected = twin(image)
        assert y.shape == expected.shape
        assert y.dtype == expected.dtype
        assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_linear_takes_the_arguments_of_torch(form: str) -> None:
    args, kwargs = LINEAR_FORMS[form]
    layer = QuantSparseLinear(*args, **kwargs)
    twin = dense_twin(layer, args, kwargs)
    assert (layer.in_features, layer.out_features) == (twin.in_features, twin.out_features)
    assert layer.codebook.dtype == twin.weight.dtype
    assert (layer.bias is None) == (twin.bias is None)
    x = torch.randn(2, 3, layer.in_features, dtype=twin.weight.dtype)
    for inputs in (x, x[0], x[0, 0], x[:0]):
        assert layer(inputs).shape == twin(inputs).shape
        assert relative_error(layer(inputs), twin(inputs)) < 1e-5


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_new_layers_are_spread_like_those_of_torch(bits: int) -> None:
    layer = QuantSparseLinear(400, 50, bits=bits)
    values = layer.weight.to_dense().detach()
    assert layer.codebook.shape == (1 << bits,)
    assert values.abs().max() <= 1 / 20 + 1e-6
    assert layer.bias.abs().max() <= 1 / 20 + 1e-6
    if bits == 8:
        assert values.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_default_dtype_and_device_are_followed() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = QuantSparseConv2d(3, 4, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.codebook.dtype == layer.bias.dtype == torch.float64
    with torch.device("meta"):
        layer = QuantSparseConv2d(3, 4, 3)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize(("K", "M"), [(0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_work_as_in_torch(K: int, M: int) -> None:
    x = torch.randn(2, K)
    layer = QuantSparseLinear(K, M)
    assert torch.equal(layer(x), layer.bias.expand(2, M))
    again = QuantSparseLinear.from_float(nn.Linear(K, M), CompressConfig())
    assert again(x).shape == (2, M)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((4, 6, 3), {"groups": 3}),
        ((4, 6, 3), {"groups": 0}),
        ((4, 6, 3), {"groups": -2}),
        ((6, 4, 3), {"groups": 6}),
        ((4, 6, 3), {"padding": "same", "stride": 2}),
        ((4, 6, 3), {"padding": "full"}),
        ((4, 6, 3), {"padding_mode": "wrap"}),
        ((4, 6, 3), {"dtype": torch.int32}),
        ((4, 6, 3), {"kernel": 3}),
        ((4, 6), {}),
    ],
)
def test_conv2d_refuses_what_torch_refuses(args: Any, kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        nn.Conv2d(*args, **kwargs)
    with pytest.raises((ValueError, TypeError)):
        QuantSparseConv2d(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((-3, 2), {}), ((3, -2), {}), ((3, 2), {"dtype": torch.int32}), ((3,), {})],
)
def test_linear_refuses_what_torch_refuses(args: Any, kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        nn.Linear(*args, **kwargs)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        QuantSparseLinear(*args, **kwargs)


@pytest.mark.parametrize("bits", [0, 9, -1, True, "8", 5.0, None])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"bits is .*, expected an integer from 1 to 8"):
        QuantSparseLinear(3, 2, bits=bits)
    with pytest.raises(ValueError, match=r"bits is .*, expected an integer from 1 to 8"):
        QuantSparseConv2d(3, 2, 1, bits=bits)


@pytest.mark.parametrize("shape", [(4,), (9, 9), (1, 1, 4, 9, 9)])
def test_conv2d_refuses_other_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x has shape"):
        QuantSparseConv2d(4, 2, 3)(torch.zeros(shape))


def test_conv2d_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="x has 5 channels, expected"):
        QuantSparseConv2d(4, 2, 3)(torch.zeros(5, 9, 9))


def test_negative_padding_is_refused_in_forward_as_in_torch() -> None:
    x = torch.zeros(1, 4, 9, 9)
    with pytest.raises(RuntimeError, match="negative padding"):
        nn.Conv2d(4, 2, 3, padding=-1)(x)
    with pytest.raises(ValueError, match="padding is"):
        QuantSparseConv2d(4, 2, 3, padding=-1)(x)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    layer = QuantSparseLinear(10, 4, bits=5)
    with pytest.raises(ValueError, match=r"weight is \[4, 9\] with 5 bits, expected \[4, 10\]"):
        layer.weight = random_weight(4, 9, 0.5, 5)
    with pytest.raises(ValueError, match="with 4 bits, expected"):
        layer.weight = random_weight(4, 10, 0.5, 4)


# ---- from_float and to_dense ----


def few_values(layer: nn.Module, bits: int = 4) -> nn.Module:
    """The layer with 2^bits distinct weights (exact in bfloat16) and zeros in between."""
    steps = torch.arange(1, 2**bits + 1, dtype=layer.weight.dtype) / 16
    drawn = steps[torch.randint(len(steps), layer.weight.shape)]
    drawn *= torch.where(steps[torch.randint(2, drawn.shape)] == steps[0], 1, 0)
    with torch.no_grad():
        layer.weight.copy_(drawn)
    return layer


@pytest.mark.parametrize("form", CONV_FORMS)
def test_conv2d_round_trip(form: str) -> None:
    args, kwargs = CONV_FORMS[form]
    check_round_trip(few_values(nn.Conv2d(*args, **kwargs).float()), QuantSparseConv2d)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv2d_round_trip_keeps_the_dtype(dtype: torch.dtype) -> None:
    check_round_trip(few_values(nn.Conv2d(4, 6, 3, groups=2, dtype=dtype)), QuantSparseConv2d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_round_trip(bias: bool, dtype: torch.dtype) -> None:
    check_round_trip(few_values(nn.Linear(31, 9, bias, dtype=dtype)), QuantSparseLinear)


def check_round_trip(dense: nn.Module, kind: type) -> None:
    before = copy.deepcopy(dense.state_dict())
    layer = kind.from_float(dense.eval(), CompressConfig(bits=4))
    assert not layer.training
    assert layer.bias is dense.bias
    assert layer.weight.nnz == dense.weight.count_nonzero()
    assert layer.codebook.dtype == dense.weight.dtype

    again = layer.to_dense()
    assert type(again) is type(dense)
    assert not again.training
    assert repr(again) == repr(dense)
    for state in (again.state_dict(), dense.state_dict()):
        assert state.keys() == before.keys()
        for name, tensor in before.items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name
    assert again.bias is None or again.bias is not dense.bias


def test_to_dense_of_a_layer_with_relu_ends_in_one() -> None:
    layer = sparse_linear(relu=True)
    x = torch.randn(3, 64)
    assert isinstance(layer.to_dense()[1], nn.ReLU)
    assert relative_error(layer.to_dense()(x), layer(x)) < 1e-5


# ---- training ----


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_moves_codebook_and_bias_and_lowers_the_loss(optimizer: Any) -> None:
    model = nn.Sequential(
        QuantSparseConv2d(3, 8, 3, bits=4, relu=True),
        nn.Flatten(),
        QuantSparseLinear(8 * 36, 5, bits=5),
    )
    x, labels = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    before = copy.deepcopy(model)
    steps = optimizer(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), labels)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert len(list(model.parameters())) == 4
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old), name
    for (name, new), old in zip(model.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old), name  # positions and codes stay


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_conv2d_gradients_are_those_through_the_dense_weight(relu: bool, padding_mode: str) -> None:
    layer = QuantSparseConv2d(
        4, 6, (3, 2), 2, 1, groups=2, padding_mode=padding_mode, bits=3, relu=relu
    ).double()
    layer.weight = random_weight(6, 2 * 6, 0.6, 3, torch.float64)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    codebook, bias, image = (
        t.detach().clone().requires_grad_() for t in (layer.codebook, layer.bias, x)
    )
    weight = layer.weight
    weight.codebook = codebook
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(image, (1, 1, 1, 1), mode=mode)
    expected = F.conv2d(padded, weight.to_dense().reshape(6, 2, 3, 2), bias, 2, groups=2)
    (expected.relu() if relu else expected).backward(grad_y)
    assert relative_error(layer.codebook.grad, codebook.grad) < 1e-10
    assert relative_error(layer.bias.grad, bias.grad) < 1e-10
    assert relative_error(x.grad, image.grad) < 1e-10


@pytest.mark.parametrize("density", [0.04, 0.6])
@pytest.mark.parametrize("relu", [False, True])
def test_linear_gradients_are_those_through_the_dense_weight(relu: bool, density: float) -> None:
    layer = sparse_linear(300, 12, density, relu=relu).double()
    x = torch.randn(5, 300, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    codebook, bias, inputs = (
        t.detach().clone().requires_grad_() for t in (layer.codebook, layer.bias, x)
    )
    weight = layer.weight
    weight.codebook = codebook
    expected = F.linear(inputs, weight.to_dense(), bias)
    (expected.relu() if relu else expected).backward(grad_y)
    assert relative_error(layer.codebook.grad, codebook.grad) < 1e-10
    assert relative_error(layer.bias.grad, bias.grad) < 1e-10
    assert relative_error(x.grad, inputs.grad) < 1e-10


def test_outputs_may_be_changed_in_place() -> None:
    # nn.ReLU(inplace=True) follows most layers of torchvision's networks.
    for layer, x in (
        (sparse_linear(), torch.randn(3, 64)),
        (sparse_linear(), torch.randn(2, 3, 64)),
        (sparse_linear(), torch.randn(64)),
        (QuantSparseConv2d(3, 8, 3), torch.randn(2, 3, 7, 7)),
        (QuantSparseConv2d(3, 8, 3), torch.randn(3, 7, 7)),
    ):
        twin = copy.deepcopy(layer)
        (layer(x) * 3 + 1).square().sum().backward()
        twin(x).mul_(3).add_(1).square_().sum().backward()
        assert relative_error(twin.codebook.grad, layer.codebook.grad) < 1e-6


@pytest.mark.parametrize("frozen", ["codebook", "bias", "x", "all but x"])
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(frozen: str) -> None:
    layer, x = sparse_linear(), torch.randn(3, 64)
    whole = copy.deepcopy(layer)
    inputs = x.clone().requires_grad_()
    whole(inputs).square().sum().backward()

    layer.codebook.requires_grad_(frozen not in ("codebook", "all but x"))
    layer.bias.requires_grad_(frozen not in ("bias", "all but x"))
    x.requires_grad_(frozen != "x")
    layer(x).square().sum().backward()
    for part, reference in (
        (layer.codebook, whole.codebook),
        (layer.bias, whole.bias),
        (x, inputs),
    ):
        if part.requires_grad:
            assert torch.equal(part.grad, reference.grad)
        else:
            assert part.grad is None


def test_gradients_of_two_passes_add_up() -> None:
    layer, x = sparse_linear(), torch.randn(3, 64)
    layer(x).sum().backward()
    once = layer.codebook.grad.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.codebook.grad, 2 * once)


# ---- state ----


DENSITIES = [(0.5, 0.03), (0.03, 0.5), (0.0, 1.0), (1.0, 0.0)]


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("source", "target"), DENSITIES)
def test_state_dict_loads_into_another_density_and_layout(
    source: float, target: float, assign: bool
) -> None:
    one, other = sparse_linear(600, 8, source), sparse_linear(600, 8, target)
    codebook = other.codebook
    state = through_a_file(one.state_dict())
    assert set(state) == {"codebook", "bias", "row_ptr", "positions", "codes"}
    other.load_state_dict(state, assign=assign)
    x = torch.randn(3, 600)
    assert other.weight.layout == (Layout.MASK if source > 0.1 else Layout.WINDOW)
    prove(other)
    assert torch.equal(other(x), one(x))
    assert other.weight.nnz == one.weight.nnz
    assert (other.codebook is codebook) != assign  # an optimizer keeps hold of what is copied into
    if not assign:
        for tensor in state.values():
            tensor.zero_()
        assert torch.equal(other(x), one(x))


def test_state_dict_of_a_layer_without_bias_and_of_a_conv2d() -> None:
    one = QuantSparseConv2d(3, 4, 3, bias=False, bits=2)
    one.weight = random_weight(4, 27, 0.3, 2)
    other = QuantSparseConv2d(3, 4, 3, bias=False, bits=2)
    state = through_a_file(one.state_dict())
    assert set(state) == {"codebook", "row_ptr", "positions", "codes"}
    other.load_state_dict(state)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(other(x), one(x))


def test_the_target_keeps_its_dtype_when_values_are_copied() -> None:
    one, other = sparse_linear(), sparse_linear().double()
    other.load_state_dict(one.state_dict())
    assert other.codebook.dtype == other.bias.dtype == torch.float64
    assert torch.equal(other.codebook, one.codebook.double())
    other.load_state_dict(one.state_dict(), assign=True)
    assert other.codebook.dtype == torch.float32


@pytest.mark.parametrize("how", ["assign", "to_empty", "device context"])
def test_state_dict_loads_into_a_model_built_on_meta(how: str) -> None:
    def build(device: Any = None) -> nn.Module:
        return nn.Sequential(
            QuantSparseConv2d(3, 8, 3, bits=3, device=device),
            nn.Flatten(),
            QuantSparseLinear(8 * 9, 5, bits=5, device=device),
        )

    one = build()
    one[2].weight = random_weight(5, 72, 0.05, 5)
    if how == "device context":
        with torch.device("meta"):
            other = build()
    else:
        other = build("meta")
    assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
    if how == "to_empty":
        other.to_empty(device="cpu")
    other.load_state_dict(through_a_file(one.state_dict()), assign=how != "to_empty")
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(other(x), one(x))
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_a_meta_layer_that_was_only_given_room_is_refused_not_read() -> None:
    for layer, x in (
        (QuantSparseLinear(5000, 20, device="meta"), torch.zeros(1, 5000)),
        (QuantSparseConv2d(3, 4, 3, device="meta"), torch.zeros(1, 3, 9, 9)),
    ):
        layer.to_empty(device="cpu")
        with pytest.raises((ValueError, RuntimeError)):
            layer(x)


def _truncated(t: Tensor) -> Tensor:
    return t[:-1]


# What is damaged, how, and the arrays that the error may name: some faults show in another array.
MALFORMED = {
    "positions truncated": ("positions", _truncated, "positions"),
    "positions empty": ("positions", lambda t: t[:0], "positions"),
    "positions of another size": ("positions", lambda t: torch.cat([t, t]), "positions"),
    "positions that count otherwise": ("positions", lambda t: t ^ 1, "(positions|col_ind)"),
    "positions past the last column": ("positions", lambda t: t | 0xFF, "positions"),
    "positions of another dtype": ("positions", lambda t: t.int(), "positions"),
    "codes truncated": ("codes", _truncated, "codes"),
    "codes in two dimensions": ("codes", lambda t: t[None], "codes"),
    "codes of another dtype": ("codes", lambda t: t.to(torch.int8), "codes"),
    "codes that are a list": ("codes", lambda t: t.tolist(), "codes"),
    "row_ptr truncated": ("row_ptr", _truncated, "row_ptr"),
    "row_ptr that falls": ("row_ptr", lambda t: t.flip(0), "row_ptr"),
    "row_ptr that starts late": ("row_ptr", lambda t: t + 1, "row_ptr"),
    "row_ptr of another dtype": ("row_ptr", lambda t: t.float(), "row_ptr"),
    "row_ptr far too large": (
        "row_ptr",
        lambda t: t.long() * (1 << 40),
        "(row_ptr|positions|codes)",
    ),
    "codebook with NaN": ("codebook", lambda t: t / 0 * 0, "codebook"),
    "codebook with an infinity": ("codebook", lambda t: t / 0, "codebook"),
    "codebook of other bits": ("codebook", lambda t: t[:16], "codebook"),
    "codebook of integers": ("codebook", lambda t: t.int(), "codebook"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("density", [0.03, 0.5])
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_state_dict_is_refused_by_name(case: str, density: float, strict: bool) -> None:
    name, damage, named = MALFORMED[case]
    model = nn.Sequential(nn.Identity(), sparse_linear(203, 6, density))
    x = torch.randn(2, 203)
    before = model(x)
    state = {f"1.{key}": t for key, t in sparse_linear(203, 6, density).state_dict().items()}
    state[f"1.{name}"] = damage(state[f"1.{name}"])
    with pytest.raises(RuntimeError, match=f"1: .*{named}"):
        model.load_state_dict(state, strict=strict)
    prove(model[1])
    assert torch.equal(model(x), before)


def test_a_state_dict_of_other_bits_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"codebook has shape \(16,\), expected \(32,\)"):
        sparse_linear(bits=5).load_state_dict(sparse_linear(bits=4).state_dict())


def test_a_state_dict_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="row_ptr has shape"):
        sparse_linear(64, 12).load_state_dict(sparse_linear(64, 13).state_dict())
    with pytest.raises(RuntimeError, match="positions"):
        sparse_linear(64, 12).load_state_dict(sparse_linear(640, 12).state_dict())


ARRAYS = ["row_ptr", "positions", "codes", "codebook"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("missing", [[a] for a in ARRAYS] + [[a for a in ARRAYS if a != "codes"]])
def test_an_incomplete_state_dict_never_leaves_an_unsound_layer(
    missing: list[str], strict: bool
) -> None:
    # The masks of two densities have the same size, so torch itself would copy one array and keep
    # the others: the kernels would then read past their end.
    layer = sparse_linear(203, 6, 0.2)
    state = sparse_linear(203, 6, 0.9).state_dict()
    for name in missing:
        del state[name]
    if strict:
        with pytest.raises(RuntimeError, match=missing[0]):
            layer.load_state_dict(state)
    else:
        with suppress(RuntimeError):  # either an error, or the layer as it was
            layer.load_state_dict(state, strict=False)
    prove(layer)


def test_missing_layers_are_reported_and_left_alone_when_not_strict() -> None:
    model = nn.Sequential(sparse_linear(), sparse_linear(12, 3))
    before = model[1](torch.ones(1, 12))
    state = {f"0.{key}": t for key, t in sparse_linear().state_dict().items()}
    result = model.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {f"1.{name}" for name in (*ARRAYS, "bias")}
    assert torch.equal(model[1](torch.ones(1, 12)), before)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*1\.codebook"):
        model.load_state_dict(state)


def test_a_dense_state_dict_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*codebook.*Unexpected key.*weight"):
        sparse_linear().load_state_dict(nn.Linear(64, 12).state_dict())


# ---- copies, dtypes, devices ----


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_deepcopy_is_equal_and_apart(density: float) -> None:
    layer = sparse_linear(300, 12, density)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 300)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.codebook.zero_()
        twin.codes.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_pickle_and_torch_save_of_a_whole_module(density: float) -> None:
    model = nn.Sequential(sparse_linear(300, 12, density, relu=True), QuantSparseLinear(12, 2))
    x = torch.randn(2, 300)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    for layer, x in (
        (sparse_linear(300, 12), torch.randn(3, 300)),
        (QuantSparseConv2d(3, 8, 3, padding=1), torch.randn(2, 3, 7, 7)),
    ):
        layer.to(dtype)
        assert layer.codebook.dtype == layer.bias.dtype == dtype
        assert layer.codes.dtype == layer.positions.dtype == torch.uint8
        assert layer.row_ptr.dtype == torch.int32
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        expected = layer.to_dense().double()(x.to(dtype).double())
        assert relative_error(y, expected) < {torch.float64: 1e-12}.get(dtype, 5e-3)
        y.float().sum().backward()
        assert layer.codebook.grad.dtype == dtype


def test_to_meta_keeps_shapes() -> None:
    layer = sparse_linear().to("meta")
    assert layer(torch.empty(5, 64, device="meta")).shape == (5, 12)
    conv = QuantSparseConv2d(3, 8, 3, stride=2, padding_mode="reflect", padding=1).to(device="meta")
    assert conv(torch.empty(3, 9, 9, device="meta")).shape == (8, 5, 5)


def test_filters_follow_the_memory_format_of_a_model() -> None:
    def last(layer: nn.Module) -> bool:
        return layer.to_dense().weight.is_contiguous(memory_format=torch.channels_last)

    dense = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    layer = QuantSparseConv2d.from_float(dense, CompressConfig(bits=5, threshold=0.01))
    assert last(layer)
    assert last(QuantSparseConv2d.from_weight(layer.weight, layer))
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert last(empty)
    assert not last(layer.to(memory_format=torch.contiguous_format))
    assert last(layer.to(torch.float64, memory_format=torch.channels_last))
    assert last(pickle.loads(pickle.dumps(layer)))
    # What a linear layer has no say in, it does not refuse.
    nn.Sequential(nn.Conv3d(2, 2, 3), QuantSparseLinear(4, 3)).to(
        memory_format=torch.channels_last_3d
    )


def test_channels_last_models_and_images_go_together() -> None:
    layer = QuantSparseConv2d(3, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 7, 7)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, layer(x)) < 1e-6


def test_relu_is_the_one_of_torch() -> None:
    for plain, x in (
        (sparse_linear(), torch.randn(3, 64)),
        (QuantSparseConv2d(3, 8, 3), torch.randn(2, 3, 7, 7)),
    ):
        fused = copy.deepcopy(plain)
        fused.relu = True
        assert (plain(x) < 0).any()
        assert torch.equal(fused(x), plain(x).relu())


def test_repr_names_what_a_person_looks_for() -> None:
    assert repr(sparse_linear(relu=True)).startswith(
        "QuantSparseLinear(in_features=64, out_features=12, bias=True, bits=5, density=0."
    )
    assert repr(sparse_linear(relu=True)).endswith(", relu=True)")
    conv = QuantSparseConv2d(
        4, 8, (3, 1), 2, padding=(1, 0), dilation=3, groups=2, bias=False, padding_mode="reflect"
    )
    text = repr(conv)
    for part in (
        "4, 8, kernel_size=(3, 1), stride=(2, 2), padding=(1, 0)",
        "dilation=(3, 3)",
        "groups=2",
        "padding_mode=reflect",
        "bias=False",
        "bits=8",
        "density=1.000",
    ):
        assert part in text
    assert "density" not in repr(QuantSparseLinear(3, 2, device="meta"))


def test_resident_bytes_are_those_of_the_tensors() -> None:
    for layer in (sparse_linear(bias=False), QuantSparseConv2d(3, 8, 3).double()):
        tensors = (*layer.parameters(), *layer.buffers())
        assert layer.resident_bytes == sum(t.numel() * t.element_size() for t in tensors)


# ---- torch's machinery ----


def small_network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    compress_(model, CompressConfig(bits=5, threshold=0.02))
    return model


def gradients(model: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    y = forward(inputs)
    y.square().sum().backward()
    return [y.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [("aot_eager", None), ("aot_eager", True), ("inductor", None)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("backend", "dynamic"), COMPILED)
def test_compile_without_graph_breaks(
    fresh_dynamo: None, backend: str, dynamic: bool | None
) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("inductor needs a C++ compiler")
    model = small_network()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    x = torch.randn(2, 3, 8, 8)
    expected = gradients(model, model, x)
    for actual, wanted in zip(gradients(model, compiled, x), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5
    if dynamic:
        more = torch.randn(5, 3, 8, 8)
        assert relative_error(compiled(more), model(more)) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_with_a_batch_of_any_size(tmp_path: Path) -> None:
    model = small_network().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"placekern.conv2d.default", "placekern.linear.default"} <= names
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    x = torch.randn(7, 3, 8, 8)
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(again.module()(x), model(x))


def test_autocast_rounds_activations_and_leaves_the_codebook_exact() -> None:
    model, x = small_network(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        inner = model[0](x)
    assert y.dtype == inner.dtype == torch.bfloat16
    assert torch.equal(inner, model[0](x.bfloat16()))
    assert relative_error(y, model(x)) < 2e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = gradients(model, model, x)[2:]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    for p, wanted in zip(model.parameters(), exact, strict=True):
        assert relative_error(p.grad, wanted) < 5e-2


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    model, x = small_network(), torch.randn(2, 3, 8, 8)
    expected = gradients(model, model, x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for actual, wanted in zip(gradients(model, wrapped, x), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_checkpointed_and_inference_mode_passes() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = small_network(), torch.randn(2, 3, 8, 8)
    expected = gradients(model, model, x)
    again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
    for actual, wanted in zip(again, expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.inference_mode():
        assert torch.equal(model(x), expected[0])


def test_the_module_runs_the_op_on_its_own_arrays() -> None:
    layer, x = sparse_linear(), torch.randn(2, 64)
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias))
    assert layer.weight.codebook is layer.codebook
    assert layer.weight.codes is layer.codes
