"""What an example shows: the shapes that reach each layer, and a model that is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cost_models import compressed, network
from torch import Tensor, nn

from placekern.compress import cost_trace
from placekern.compress.cost_trace import passes
from placekern.compress.cost_work import ConvCall, LinearCall


def conv_of(seen: dict[str, list[cost_trace.Passed]]) -> ConvCall:
    return seen["0"][0].call


@pytest.mark.parametrize("make", [network, compressed])
def test_shapes_of_an_example(make: Any) -> None:
    seen = passes(make(), torch.zeros(2, 3, 9, 11))
    assert conv_of(seen) == ConvCall(2, 3, 9, 11, 5, 6, stride=2)
    assert [passed.call for passed in (*seen["5"], *seen["7"])] == [LinearCall(2), LinearCall(2)]
    assert seen["0"][0].dtype == torch.float32
    assert seen["0"][0].device == "cpu"


def test_nothing_is_computed_and_nothing_kept() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros(()))
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert type(x).__name__ == "FakeTensor"
            self.kept = self.layer(x)
            self.steps += 1
            return self.kept

    model = Keeps()
    hooked: list[Tensor] = []
    model.layer.register_forward_hook(lambda module, args, y: hooked.append(y))
    before = copy.deepcopy(model.state_dict())
    x = torch.zeros(3, 4)
    assert passes(model, x)["layer"][0].call == LinearCall(3)
    assert model.kept is None
    assert hooked == []
    assert model.training
    assert model.layer.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert len(model.layer._forward_hooks) == 1
    assert type(x) is Tensor


def test_a_model_that_looks_at_values_is_really_run() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.rand(4)) if float(x.sum()) > 0 else x

    model = Looks().train()
    state = torch.get_rng_state()
    assert passes(model, torch.ones(3, 4))["layer"][0].call == LinearCall(3)
    assert passes(model, -torch.ones(3, 4)) == {}
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_copied_is_run_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.kept = (i for i in range(3))  # generators cannot be copied
    assert passes(model, torch.ones(2, 4))["0"][0].call == LinearCall(2)


def test_a_forward_that_holds_the_model_itself_is_run_as_it_is() -> None:
    """A copy of it would call the layers of the original, where nobody looks."""
    model = nn.ModuleList([nn.Linear(4, 4)])
    model.forward = lambda x: model[0](x)
    assert passes(model, torch.ones(2, 4))["0"][0].call == LinearCall(2)
    assert not model[0]._forward_pre_hooks


def test_a_layer_that_is_not_reached_is_no_reason_to_compute() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            assert type(x).__name__ == "FakeTensor"
            return self.layers[1](x)

    model = Second()
    assert list(passes(model, torch.ones(2, 4))) == ["layers.1"]
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize(
    "example", [(torch.ones(2, 4), 3), [torch.ones(2, 4), 3], {"x": torch.ones(2, 4), "times": 3}]
)
def test_forms_of_an_example(example: Any) -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = self.layer(input=x)
            return x

    assert [p.call for p in passes(Repeats(), example)["layer"]] == [LinearCall(2)] * 3


def test_odd_shapes() -> None:
    one = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert conv_of(passes(one, torch.zeros(3, 5, 6))) == ConvCall(1, 3, 5, 6, 5, 6, pointwise=True)
    padded = nn.Sequential(nn.Conv2d(4, 4, 1, padding=1, groups=2))
    assert conv_of(passes(padded, torch.zeros(1, 4, 5, 6))) == ConvCall(1, 4, 5, 6, 7, 8, groups=2)
    rows = passes(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 3, 4))
    assert rows["0"][0].call == LinearCall(6)
    assert passes(nn.Sequential(nn.Linear(4, 4)), torch.zeros(4))["0"][0].call == LinearCall(1)


def test_an_example_that_does_not_fit_says_what_the_model_says() -> None:
    model = network().train()
    with pytest.raises(RuntimeError, match="channels"):
        passes(model, torch.zeros(1, 7, 8, 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
