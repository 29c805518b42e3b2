"""PyTorch's own inputs for Conv2d and Linear, and small networks, through the swapped layers.

The inputs come from torch's test suite, which moves from release to release; it needs the package
expecttest, and these tests are skipped without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn

from placekern import CompressConfig, QuantSparseConv2d, QuantSparseLinear, compress_
from placekern.nn import quant_sparse_layers, replace_module

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_exact(dense: nn.Module, zeros: float = 0.3) -> nn.Module:
    """Draws the weights from few values and zero, so that compression loses nothing."""
    values = torch.linspace(-1, 1, 16)
    with torch.no_grad():
        drawn = values[torch.randint(len(values), dense.weight.shape)]
        drawn[torch.rand(drawn.shape) < zeros] = 0
        dense.weight.copy_(drawn)
    return dense


def swapped(dense: nn.Module) -> nn.Module:
    """The compressed layer that compress_ puts in the place of `dense`, apart from it."""
    model = nn.Sequential(copy.deepcopy(dense))
    compress_(model, CompressConfig(bits=4))
    assert isinstance(model[0], (QuantSparseConv2d, QuantSparseLinear))
    return model[0]


def check_against_dense(dense: nn.Module, x: Tensor) -> nn.Module:
    """Output and every gradient of the swapped layer are those of the dense one; returns it."""
    make_exact(dense)
    layer = swapped(dense)
    assert torch.equal(layer.weight.to_dense(), dense.weight.reshape(layer.weight.shape))
    one, other = (x.detach().clone().requires_grad_() for _ in range(2))
    y, expected = layer(one), dense(other)
    tolerance = TOLERANCE[x.dtype]
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert y.stride() == expected.stride()
    assert relative_error(y, expected) < tolerance

    grad_y = torch.randn_like(expected)
    y.backward(grad_y)
    expected.backward(grad_y)
    assert relative_error(one.grad, other.grad) < tolerance
    if dense.bias is not None:
        assert relative_error(layer.bias.grad, dense.bias.grad) < tolerance
    # The gradient of an entry is the sum over the weights of that value.
    scale = dense.weight.grad.norm().clamp_min(1e-3)
    for value in layer.codebook.detach().unique():
        actual = layer.codebook.grad[layer.codebook == value].sum()
        wanted = dense.weight.grad[(dense.weight == value) & (dense.weight != 0)].sum()
        assert abs(actual - wanted) < 10 * tolerance * scale
    return layer


def torch_internal(name: str) -> ModuleType:
    """A module of torch's test suite, which freezes the global flags of torch when imported."""
    pytest.importorskip("expecttest", reason="torch's own test inputs need expecttest")
    module = pytest.importorskip(f"torch.testing._internal.{name}")
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nn.Conv2d", "nn.Linear"])
def test_module_inputs_of_torch(name: str, dtype: torch.dtype) -> None:
    database = torch_internal("common_modules").module_db
    (info,) = (info for info in database if info.name == name)
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert len(inputs) >= 3
    for case in inputs:
        arguments = case.constructor_input
        dense = info.module_cls(*arguments.args, **arguments.kwargs).to(dtype)
        forward = case.forward_input
        (x,) = (*forward.args, *forward.kwargs.values())
        layer = check_against_dense(dense, x)
        if case.reference_fn is not None:  # torch's own idea of the right answer
            assert relative_error(layer(x), case.reference_fn(dense, x)) < TOLERANCE[dtype]


def older_cases() -> list[tuple[str, nn.Module, Tensor]]:
    """Of the older suite, which knows more convolutions: (name, dense layer, x)."""
    suite = torch_internal("common_nn")
    cases = []
    newer = getattr(suite, "get_new_module_tests", lambda: suite.new_module_tests)
    for test in (*suite.module_tests, *newer()):
        name = test.get("fullname") or test["module_name"]
        if not (name.startswith("Conv2d") or name == "Linear"):
            continue
        if "constructor" in test:
            dense = test["constructor"]()
        else:
            dense = getattr(nn, name)(*test["constructor_args"])
        x = torch.randn(test["input_size"]) if "input_size" in test else test["input_fn"]()
        cases.append((f"{name} {test.get('desc')}", dense, x))
    return cases


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_older_module_inputs_of_torch(dtype: torch.dtype) -> None:
    cases = older_cases()
    assert len(cases) >= 20
    for name, dense, x in cases:
        try:
            check_against_dense(dense.to(dtype), x.to(dtype))
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


# ---- networks ----


class BasicBlock(nn.Module):
    """He et al. 2016, with the projection that changes size."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class Fire(nn.Module):
    """Iandola et al. 2016."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, depthwise, project, and the shortcut."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TiedPerceptron(nn.Module):
    """Three hidden layers, of which two share one weight and one is run twice."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, size)
        self.second = nn.Linear(size, size)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x).tanh()).tanh())


def alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(16, 24, 5, padding=2, groups=2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5),
        nn.Conv2d(24, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(144, 50),
        nn.ReLU(inplace=True),
        nn.Linear(50, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "alexnet": (alexnet, (2, 3, 67, 67), 5),
    "resnet block": (lambda: BasicBlock(8, 16, 2), (2, 8, 13, 13), 3),
    "fire": (lambda: Fire(12, 4, 8), (2, 12, 9, 9), 3),
    "mobilenet block": (lambda: InvertedResidual(6, 4), (2, 6, 10, 10), 3),
    "tied perceptron": (lambda: TiedPerceptron(20), (5, 20), 2),
}


def dense_copy(model: nn.Module) -> nn.Module:
    """The model with every compressed layer decoded."""
    twin = copy.deepcopy(model)
    for _, layer in list(quant_sparse_layers(twin)):
        replace_module(twin, layer, layer.to_dense())
    assert not list(quant_sparse_layers(twin))
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_their_decoded_copies(
    name: str, channels_last: bool, training: bool, dtype: torch.dtype
) -> None:
    build, size, layers = NETWORKS[name]
    model = build().to(dtype)
    report = compress_(model, CompressConfig(bits=5, sparsity=0.4))
    assert len(report.layers) == len(list(quant_sparse_layers(model))) == layers
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    twin = dense_copy(model)
    x = torch.randn(size, dtype=dtype)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
        model, twin = (m.to(memory_format=torch.channels_last) for m in (model, twin))
    model.train(training)
    twin.train(training)
    results = []
    for network in (model, twin):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(1)  # of the dropout
        y = network(inputs)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape))
        results.append((y, inputs.grad))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < 10 * TOLERANCE[dtype]
    # Biases and norms, which both have; as one, for those before a norm are all but zero.
    names = [name for name, p in twin.named_parameters() if p.dim() == 1]
    actual, expected = (
        torch.cat([network.get_parameter(name).grad for name in names]) for network in (model, twin)
    )
    assert relative_error(actual, expected) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_encoder_layer(grad: bool, training: bool) -> None:
    # In eval mode without gradients torch takes a fused path that reads linear1.weight itself.
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    compress_(model, CompressConfig(bits=5))
    assert isinstance(model.linear1, QuantSparseLinear)
    assert type(model.self_attn.out_proj) is not QuantSparseLinear  # a subclass: left alone
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(grad):
        assert relative_error(model(x), dense_copy(model)(x)) < 1e-5


def test_recurrent_use_of_one_layer_sums_its_gradients() -> None:
    layer = nn.Linear(12, 12)
    model = nn.ModuleDict({"cell": layer})
    compress_(model, CompressConfig(bits=3))
    twin = dense_copy(model)
    x = torch.randn(4, 12)
    for network in (model, twin):
        state = x
        for _ in range(5):
            state = network["cell"](state).tanh()
        state.sum().backward()
    weight = model["cell"].weight
    codes = weight.to_csr()[2].long()
    dense_grad = twin["cell"].weight.grad.flatten()  # full density: codes in row order
    expected = torch.zeros(8).index_add(0, codes, dense_grad)
    assert relative_error(model["cell"].codebook.grad, expected) < 1e-4


def test_functional_parts_of_a_model_are_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.table = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("scale", torch.randn(8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            x = self.linear(x) @ self.table * self.scale
            return self.attention(x, x, x)[0]

    model = Mixed().eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("linear")}
    compress_(model)
    x = torch.randn(2, 5, 8)
    assert relative_error(model(x), dense_copy(model)(x)) < 1e-5
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
