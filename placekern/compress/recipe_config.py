"""RecipeConfig: what a training run does to a model, and when; plain values, from JSON or YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .config import CompressConfig
from .prune import PruneSchedule
from .settings_file import read_settings
from .trained import GRADIENTS, GRIDS

_L1_MODES = ("penalty", "proximal")
_SCOPES = ("layer", "global")


@dataclass(frozen=True)
class RecipeConfig:
    """What a `Recipe` does, and when. Step n is the state after n steps of the optimiser.

    Args:
        compress: which layers, how far they are pruned (threshold or sparsity) and how they are
            quantized (bits, method), with exceptions by name, pattern or type: a
            `CompressConfig` or a dict of its fields.
        schedule: when weights are pruned: "one-shot", "iterative", "layers" or "polynomial", see
            `PruneSchedule`.
        prune_begin, prune_end, prune_every: its `begin`, `end` and `every`.
        scope: "layer": a sparsity is that of each layer; "global": layers with the default
            sparsity share one threshold, found so that together they have it. A layer with an
            exception of its own keeps to that.
        l1: strength of the L1 term, 0 for none.
        l1_mode: "penalty": `Recipe.penalty()` for the loss; measured better with Adam. "proximal":
            soft thresholding by learning rate x l1 after the optimiser's step; as good with SGD,
            and better above 90 % pruned. With momentum m it needs an l1 1 / (1 - m) times as large.
        l1_end: last step with L1. None: until the last pruning, or where nothing is pruned, until
            layers are quantized; so that what stays is then trained without shrinking.
        quantize_at: step at which layers become compressed ones and their codebooks are trained;
            None: not before `Recipe.finalize`, so that no codebook is trained.
        codebook_lr: factor on the learning rate of a codebook, over that of the weight that it
            replaces. A codebook's gradient is a sum over many weights: with SGD take a small one.
        codebook_gradient: "sum" over the weights of a code, as in the paper, or their "mean".
        grid: hold entries to values that "bfloat16" has, or to an "int8" grid of a scale a
            codebook; None leaves them free.
        reassign_every: assign codes anew every so many steps after `quantize_at`, see
            `placekern.compress.trained`; None never does, and needs no memory for it.

    Raises:
        ValueError: a field is out of range or unknown, or two do not fit together.
    """

    compress: CompressConfig | Mapping[str, Any] = field(default_factory=CompressConfig)
    schedule: str = "one-shot"
    prune_begin: int = 0
    prune_end: int | None = None
    prune_every: int = 1
    scope: str = "layer"
    l1: float = 0.0
    l1_mode: str = "penalty"
    l1_end: int | None = None
    quantize_at: int | None = None
    codebook_lr: float = 1.0
    codebook_gradient: str = "sum"
    grid: str | None = None
    reassign_every: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compress, CompressConfig):
            object.__setattr__(self, "compress", CompressConfig.from_dict(self.compress))
        for name, least in (
            ("prune_begin", 0),
            ("prune_end", 0),
            ("prune_every", 1),
            ("l1_end", 0),
            ("quantize_at", 0),
            ("reassign_every", 1),
        ):
            value = getattr(self, name)
            optional = name not in ("prune_begin", "prune_every")
            if (value is None and optional) or (type(value) is int and value >= least):
                continue
            raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
        for name in ("l1", "codebook_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, expected a number")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a finite number >= 0")
        for name, known in (
            ("scope", _SCOPES),
            ("l1_mode", _L1_MODES),
            ("codebook_gradient", GRADIENTS),
            ("grid", GRIDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(map(repr, known))}"
                )
        if self.scope == "global" and self.compress.sparsity is None:
            raise ValueError(
                'scope "global" needs a sparsity in compress, to be that of all layers together'
            )
        if self.scope == "global" and self.schedule == "layers":
            raise ValueError('scope "global" prunes all layers at once, schedule "layers" does not')
        if self.quantize_at is None and self.reassign_every is not None:
            raise ValueError("reassign_every assigns codes in training, which needs quantize_at")
        last = self.pruning.last(1)  # a schedule that makes no sense is refused here
        if self.quantize_at is not None and self.quantize_at < last:
            raise ValueError(
                f"layers are quantized at step {self.quantize_at}, but pruned until step "
                f"{last}; quantize after pruning"
            )

    @property
    def pruning(self) -> PruneSchedule:
        """The schedule as an object."""
        return PruneSchedule(self.schedule, self.prune_begin, self.prune_end, self.prune_every)

    @classmethod
    def over_steps(
        cls, steps: int, compress: CompressConfig | Mapping[str, Any] | None = None
    ) -> RecipeConfig:
        """A recipe that suits a run of so many steps; what `placekern train` does by default.

        Weights are pruned by the cubic schedule over the first half of the steps, layers are
        quantized at three fifths, and codebooks are trained from there to the end.
        """
        return cls(
            compress=CompressConfig() if compress is None else compress,
            schedule="polynomial",
            prune_end=steps // 2,
            prune_every=max(1, steps // 100),
            quantize_at=steps * 3 // 5,
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RecipeConfig:
        """A config from plain values; `compress` is a mapping of the fields of `CompressConfig`.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise ValueError(
                f"the recipe has the unknown key {unknown[0]!r}, expected one of {', '.join(known)}"
            )
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> RecipeConfig:
        """A config from a .json, .yaml or .yml file.

        Raises:
            ModuleNotFoundError: a YAML file, and PyYAML is not installed.
            ValueError: another ending, a file that does not parse, or values that do not fit.
        """
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` takes them back."""
        return asdict(self)


def without_pruning(config: CompressConfig) -> CompressConfig:
    """The same for weights that are pruned already: their zeros say where."""
    layers: dict[str, Any] = {}
    for name, setting in config.layers.items():
        if isinstance(setting, CompressConfig):
            layers[name] = replace(setting, threshold=None, sparsity=None)
        elif setting is not None:
            ways = ("threshold", "sparsity")
            layers[name] = {key: value for key, value in setting.items() if key not in ways}
        else:
            layers[name] = None
    return replace(config, threshold=None, sparsity=None, layers=layers)
