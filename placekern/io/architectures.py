"""Names of networks that a file can ask for, and the functions that build them.

A model built by name carries `model.architecture = {"name": ..., "kwargs": ...}`, which `save`
stores and `load` reads; no code is ever taken from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_architecture(name: str, build: Callable[..., nn.Module]) -> None:
    """Makes `name` loadable without a model at hand.

    Args:
        name: as `model.architecture["name"]` has it.
        build: makes the dense network; its keyword arguments are JSON values.
    """
    _BUILDERS[name] = build


def build_architecture(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The dense network of that name, with `architecture` set.

    Raises:
        ValueError: the name is not registered, or the builder refuses the arguments.
    """
    if name not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS)) or "none"
        raise ValueError(
            f"architecture {name!r} is not registered (known: {known}); pass the model to load, or "
            "call placekern.io.register_architecture first"
        )
    try:
        model = _BUILDERS[name](**kwargs)
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"architecture {name!r} refuses {dict(kwargs)}: {error}") from None
    model.architecture = {"name": name, "kwargs": dict(kwargs)}
    return model
