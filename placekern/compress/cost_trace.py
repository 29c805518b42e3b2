"""How often and with which shapes an example runs through each layer of a model.

Where the model allows it nothing is computed: a copy without data is run on fake tensors. The
surprise: it is a copy because a model may keep what it computed, and would then keep a fake one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from ..nn import COMPRESSED_KINDS, QuantSparseModule
from .cost_work import Call, ConvCall, LinearCall

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Passed:
    """One pass through a layer.

    Attributes:
        call: its shapes.
        dtype: that the layer computes in.
        device: "cpu", "cuda", ...
    """

    call: Call
    dtype: torch.dtype
    device: str


def passes(model: nn.Module, example: Example) -> dict[str, list[Passed]]:
    """Runs an example through the model and notes what reaches its Conv2d and Linear layers.

    Args:
        model: any module, its layers dense or compressed; left as it is, and run in eval mode.
        example: the model's input: a tensor, a tuple or list of arguments, or a mapping of
            keyword arguments.

    Returns:
        By layer (its first name, as in `named_modules`) its passes, in order.

    Raises:
        Exception: whatever the model raises when the example does not fit it.
    """
    try:
        hollow, fake = _without_data(model, example)
    except Exception:  # it cannot be copied
        return _run(model, example)
    # A forward that was put there as a closure calls the layers of the original, not of the copy.
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: called.append(module))
        for _, module in _layers(model)
    ]
    try:
        with fake:
            found = _run(hollow, fake.example)
    except Exception:  # it looks at values; a real error comes again, in words of its own
        found = None
    finally:
        for hook in hooks:
            hook.remove()
    return _run(model, example) if found is None or called else found


class _FakeRun(FakeTensorMode):
    """A fake mode that holds the fake example."""

    example: Example


def _without_data(model: nn.Module, example: Example) -> tuple[nn.Module, _FakeRun]:
    fake = _FakeRun(allow_non_fake_inputs=True)

    def hollow(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)

    tensors = (*model.parameters(), *model.buffers())
    memo = {id(tensor): hollow(tensor) for tensor in tensors if not is_lazy(tensor)}
    fake.example = tree_map_only(Tensor, hollow, example)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # which may keep what passes
    return twin, fake


def _run(model: nn.Module, example: Example) -> dict[str, list[Passed]]:
    found: dict[str, list[Passed]] = {}
    hooks = [
        module.register_forward_hook(_note(found, name), with_kwargs=True)
        for name, module in _layers(model)
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, tuple | list):
                model(*example)
            else:
                model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module) in COMPRESSED_KINDS or isinstance(module, QuantSparseModule):
            yield name, module


def _note(found: dict[str, list[Passed]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
        x = next((value for value in (*args, *named.values()) if isinstance(value, Tensor)), None)
        if x is None or not isinstance(y, Tensor):
            return
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        found.setdefault(name, []).append(Passed(call_of(module, x, y), dtype, kind))

    return hook


def call_of(module: nn.Module, x: Tensor, y: Tensor) -> Call:
    """The shapes of one pass of a Conv2d or Linear layer, dense or compressed."""
    if not hasattr(module, "kernel_size"):
        return LinearCall(x.shape[:-1].numel())
    image, out = (t if t.dim() == 4 else t.unsqueeze(0) for t in (x, y))
    same_size = image.shape[2:] == out.shape[2:]
    return ConvCall(
        batch=image.shape[0],
        channels=image.shape[1],
        height=image.shape[2],
        width=image.shape[3],
        out_height=out.shape[2],
        out_width=out.shape[3],
        stride=module.stride[1],  # along a row: whether pixels lie side by side
        groups=module.groups,
        pointwise=module.kernel_size == (1, 1) and module.stride == (1, 1) and same_size,
    )
