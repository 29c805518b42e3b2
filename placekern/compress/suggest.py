"""suggest: settings for each layer, from a sensitivity analysis, for a budget of bytes or of drop.

The surprise: drops of single layers are added up, which is an assumption. So with a metric the
whole compressed network is measured, and for a budget of drop the settings are made milder, or
harsher, until the measured drop is within it. Bytes are no prediction: the file is written once.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..io.atomic import written_beside
from ..nn import COMPRESSED_KINDS
from ..tables import as_text
from .config import CompressConfig
from .sensitivity import check_baseline, evaluating, number
from .sensitivity_choices import Choice, choices, resolution
from .sensitivity_knapsack import Options, solve
from .sensitivity_result import Sensitivity
from .sensitivity_rows import drop_of
from .swap import compress_

if TYPE_CHECKING:
    from rich.table import Table

MB = 1_000_000
_TRIES = 6  # to meet a budget of bytes
_ENOUGH = 0.01  # a bisection that is this near, relatively, is at its end


@dataclass(frozen=True)
class SuggestedLayer:
    """One layer of a suggestion.

    Attributes:
        name: in the model.
        settings: fields of its `CompressConfig`; None: it stays dense.
        density: share of its weights that are kept.
        dense_bytes: of its weight in the model.
        bytes: of its weight in the file, with the dense one where that stays there, because a
            module that is not compressed has it too (a tied embedding).
        drop: of the metric that this layer is predicted to cost.
    """

    name: str
    settings: Mapping[str, Any] | None
    density: float
    dense_bytes: int
    bytes: int
    drop: float


@dataclass(frozen=True)
class Suggestion:
    """Settings for each layer; `str()` gives a table.

    Attributes:
        layers: the measured layers, in the model's order.
        config: what `compress_` takes: an exception for each layer by its name. Layers that were
            not measured stay dense.
        predicted_drop: of the metric, the sum over the layers.
        file_bytes: of the file that `save` writes, every byte; it was encoded to be counted.
        baseline: the metric of the dense network.
        measured: the metric of the compressed network; None when no metric was given.
        measured_drop: how much worse that is than the baseline; None when no metric was given.
        evaluations: how many compressed networks were measured.
    """

    layers: tuple[SuggestedLayer, ...]
    config: CompressConfig
    predicted_drop: float
    file_bytes: int
    baseline: float
    measured: float | None = None
    measured_drop: float | None = None
    evaluations: int = 0

    def settings(self) -> dict[str, Any]:
        """The config as plain values, which `CompressConfig.from_dict` takes."""
        return {"layers": {name: own and dict(own) for name, own in self.config.layers.items()}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `settings` as JSON, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        with written_beside(path) as temporary:
            temporary.write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        own = ("predicted_drop", "file_bytes", "baseline", "measured", "measured_drop")
        return {
            "config": self.settings(),
            "layers": [asdict(layer) for layer in self.layers],
            **{name: getattr(self, name) for name in (*own, "evaluations")},
        }

    def table(self) -> Table:
        """The suggestion as a rich table; kB are 1,000 bytes."""
        from rich import box  # here, so that suggesting needs no rich
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.file_bytes / MB:.3f} MB, predicted drop {self.predicted_drop:.3g}"
        if self.measured is not None:
            title += (
                f"\nmeasured: from {self.baseline:.5g} to {self.measured:.5g}, "
                f"drop {self.measured_drop:.3g}"
            )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        for heading in ("bits", "pruned", "density", "dense kB", "kB", "drop"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            how = layer.settings or {}
            pruned = f"{100 * how['sparsity']:g}%" if "sparsity" in how else ""
            if "threshold" in how:
                pruned = f"< {how['threshold']:g}"
            table.add_row(
                escape(layer.name),
                str(how.get("bits", "dense")),
                pruned,
                f"{layer.density:.3f}",
                f"{layer.dense_bytes / 1000:,.1f}",
                f"{layer.bytes / 1000:,.1f}",
                f"{layer.drop:.2g}",
            )
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def suggest(
    found: Sensitivity,
    model: nn.Module,
    *,
    budget_mb: float | None = None,
    max_drop: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    evaluations: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> Suggestion:
    """Settings for each layer: the least drop within a budget of bytes, or the least bytes of drop.

    A layer's choices are to stay dense, and each measured number of bits with each measured pruning
    or none. The predicted drop of a choice is the sum of its two measured drops, made monotone, and
    that of the network the sum over its layers. `docs/sensitivity.md` shows how far that holds.

    Args:
        found: of `sensitivity`, on this model.
        model: the dense model, which is left as it is: a copy is compressed.
        budget_mb: largest file, in MB of 1,000,000 bytes, every byte counted: tensors that are not
            compressed and the header too.
        max_drop: largest drop of the metric; give one of the two.
        metric: as it was given to `sensitivity`. The suggestion is then measured. For `max_drop`
            the predicted drop is halved or doubled, then bisected, and of the measured networks the
            smallest is taken whose drop keeps to it. Without a metric there is a prediction only.
        evaluations: of the metric on compressed networks, at most, for `max_drop`.
        progress: called with (what, done, total).

    Returns:
        A `Suggestion`.

    Raises:
        TypeError: the metric gives no number.
        ValueError: not one of budget_mb and max_drop is given, or one out of range; the budget
            cannot be met (says what the smallest file is); no measured network kept to `max_drop`;
            or the analysis is of another model or metric, or holds no layer.
    """
    if (budget_mb is None) == (max_drop is None):
        raise ValueError(
            f"budget_mb is {budget_mb} and max_drop is {max_drop}, expected one of the two"
        )
    if budget_mb is not None and not 0 < budget_mb < math.inf:
        raise ValueError(f"budget_mb is {budget_mb}, expected a positive number of MB")
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise ValueError(f"max_drop is {max_drop}, expected a number >= 0")
    if evaluations < 1:
        raise ValueError(f"evaluations is {evaluations}, expected 1 at least")
    planner = _Planner(found, model, metric, progress)
    if budget_mb is not None:
        return planner.measured(planner.within_bytes(budget_mb * MB))
    if metric is None:
        return planner.suggestion(planner.solve_drop(max_drop))
    return planner.within_drop(max_drop, evaluations)


_Picks = tuple[int, ...]


class _Planner:
    """The choices of all layers, and what comes out when some of them are taken."""

    def __init__(
        self,
        found: Sensitivity,
        model: nn.Module,
        metric: Callable[[nn.Module], float] | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        if not found.layers:
            raise ValueError("the analysis has no row but the dense network's; measure some layers")
        self._found, self._model, self._metric = found, model, metric
        self._progress = progress or (lambda what, done, total: None)
        modules = {
            name: module
            for name, module in model.named_modules()
            if type(module) in COMPRESSED_KINDS
        }
        self._names = list(modules)
        self._sharing = {
            layer: [n for n, m in modules.items() if m.weight is modules[layer].weight]
            for layer in found.layers
            if layer in modules
        }
        self.step = resolution(found.rows)
        self._choices: list[list[Choice]] = []
        for done, layer in enumerate(found.layers):
            if layer not in modules:
                raise ValueError(
                    f"{layer!r} was measured, but is no Conv2d or Linear layer of this model; give "
                    "the model that was measured"
                )
            self._progress("choices", done, len(found.layers))
            own = choices(found, layer, modules[layer], self.step)
            if _stays(model, weight := modules[layer].weight):
                own = [c if c.settings is None else _beside(c, weight.nbytes) for c in own]
            self._choices.append(own)
        self._progress("choices", len(found.layers), len(found.layers))
        self._dense = [modules[layer].weight.nbytes for layer in found.layers]
        self._written: dict[_Picks, tuple[int, float | None]] = {}
        if metric is not None:
            with evaluating(model):
                check_baseline(number(metric(model)), found.baseline, "the analysis")

    def solve_drop(self, limit: float) -> _Picks:
        """The fewest bytes within a predicted drop; staying dense is always possible."""
        options: list[Options] = [
            (np.array([c.drop for c in own]), np.array([c.bytes for c in own]))
            for own in self._choices
        ]
        return tuple(solve(options, limit) or [0] * len(options))

    def within_bytes(self, budget: float) -> _Picks:
        """The least predicted drop in a file of at most `budget` bytes."""
        options: list[Options] = [
            (np.array([c.bytes for c in own]), np.array([c.drop for c in own]))
            for own in self._choices
        ]
        smallest = tuple(int(size.argmin()) for size, _ in options)
        tensors = {id(t): t for t in self._model.state_dict(keep_vars=True).values()}
        rest = sum(t.nbytes for t in tensors.values()) - sum(self._dense)
        best: _Picks | None = None
        tried: set[_Picks] = set()
        for _ in range(_TRIES):
            # `rest` holds what choices do not: the header among it, whose length depends on them.
            picks = tuple(solve(options, budget - rest) or smallest)
            if picks in tried:
                break
            tried.add(picks)
            size = self._size(picks)
            rest = size - sum(self._bytes(picks))
            if size <= budget and (best is None or self._drop(picks) < self._drop(best)):
                best = picks
        if best is not None:
            return best
        least = self._size(smallest)
        if least > budget:
            raise ValueError(
                f"a file of {budget / MB:g} MB cannot be reached: the smallest, with the harshest "
                f"settings that were measured, has {math.ceil(least / 1000) / 1000:.3f} MB; allow "
                "that, or measure more pruning or fewer bits"
            )
        return smallest

    def within_drop(self, max_drop: float, evaluations: int) -> Suggestion:
        """The smallest of the measured networks that keep to a drop."""
        target = max(max_drop, self.step)
        low, high = 0.0, math.inf  # predicted drops that are known to keep to it, and not to
        harshest = self.solve_drop(sum(max(c.drop for c in own) for own in self._choices))
        best: _Picks | None = None
        least = math.inf
        done = 0
        while math.isinf(high) or high - low > _ENOUGH * high:
            picks = self.solve_drop(target)
            if not self._is_measured(picks):
                if done == evaluations:
                    break
                self._progress("measure", done, evaluations)
                done += 1
            trial = self.measured(picks)
            least = min(least, trial.measured_drop)
            if trial.measured_drop <= max_drop:
                low = target
                if best is None or self._size(picks) < self._size(best):
                    best = picks
                if picks == harshest:
                    break
            elif all(choice.settings is None for choice in self._chosen(picks)):
                break  # nothing is milder
            else:
                high = target
            target = 2 * target if math.isinf(high) else (low + high) / 2
        self._progress("measure", evaluations, evaluations)
        if best is None:
            raise ValueError(
                f"none of {done} measured networks keeps to a drop of {max_drop:g}: the mildest "
                f"drops by {least:.4g}; allow that, or more evaluations"
            )
        return self.suggestion(best)

    def measured(self, picks: _Picks) -> Suggestion:
        """The suggestion of some picks, measured when there is a metric."""
        if self._metric is not None and not self._is_measured(picks):
            compressed, size = self._compressed(picks)
            self._written[picks] = (size, number(self._metric(compressed.eval())))
        return self.suggestion(picks)

    def suggestion(self, picks: _Picks) -> Suggestion:
        """The suggestion of some picks, with what is known of it."""
        size = self._size(picks)
        measured = self._written[picks][1]
        drop = None
        if measured is not None:
            drop = drop_of(measured, self._found.baseline, self._found.larger_is_better)
        chosen = self._chosen(picks)
        layers = tuple(
            SuggestedLayer(name, c.settings, c.density, dense, round(c.bytes), c.drop)
            for name, c, dense in zip(self._found.layers, chosen, self._dense, strict=True)
        )
        measurements = sum(value is not None for _, value in self._written.values())
        return Suggestion(
            layers=layers,
            config=self._config(picks),
            predicted_drop=self._drop(picks),
            file_bytes=size,
            baseline=self._found.baseline,
            measured=measured,
            measured_drop=drop,
            evaluations=measurements,
        )

    def _is_measured(self, picks: _Picks) -> bool:
        return picks in self._written and self._written[picks][1] is not None

    def _chosen(self, picks: Sequence[int]) -> list[Choice]:
        return [own[pick] for own, pick in zip(self._choices, picks, strict=True)]

    def _bytes(self, picks: _Picks) -> list[float]:
        return [choice.bytes for choice in self._chosen(picks)]

    def _drop(self, picks: _Picks) -> float:
        return sum(choice.drop for choice in self._chosen(picks))

    def _config(self, picks: _Picks) -> CompressConfig:
        settings: dict[str, Mapping[str, Any] | None] = dict.fromkeys(self._names)
        for layer, choice in zip(self._found.layers, self._chosen(picks), strict=True):
            settings |= dict.fromkeys(self._sharing[layer], choice.settings)
        return CompressConfig(layers=settings)

    def _compressed(self, picks: _Picks) -> tuple[nn.Module, int]:
        """A compressed copy of the model, and the bytes of its file."""
        compressed = copy.deepcopy(self._model)
        return compressed, compress_(compressed, self._config(picks)).file_bytes

    def _size(self, picks: _Picks) -> int:
        if picks not in self._written:
            self._written[picks] = (self._compressed(picks)[1], None)
        return self._written[picks][0]


def _stays(model: nn.Module, weight: Tensor) -> bool:
    """Whether a module that is not compressed has a weight too: it is then in the file as it is."""
    others = (module for module in model.modules() if type(module) not in COMPRESSED_KINDS)
    return any(own is weight for module in others for own in module.parameters(recurse=False))


def _beside(choice: Choice, size: int) -> Choice:
    return replace(choice, bytes=choice.bytes + size)
