"""Predicts each compressed layer's time beside the dense one's, and says where it is slower.

The times are those of this machine's CPU, alone and with warm caches, from rates that are measured
once a process (cost_calibrate) and counts of work (cost_work). docs/cost.md says how far off they
are. Nothing is predicted for GPUs: nothing has been measured there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn import QuantSparseLinear, QuantSparseModule, quant_sparse_layers
from ..tables import as_text
from .cost_calibrate import Needs, measured_rates
from .cost_trace import Example, Passed, passes
from .cost_work import Call, LinearCall, Matrix, Rates

if TYPE_CHECKING:
    from rich.table import Table

SLOWER = 1.1
"""Times dense from which a layer is warned of: below, the prediction's own error decides."""

_ROUGH = 0.4  # misfit of rates from which the machine was too busy to be measured
_STEPS = 100  # densities that are tried for the break-even


@dataclass(frozen=True)
class LayerCost:
    """One compressed layer.

    Attributes:
        name: in the model.
        kind: "Conv2d" or "Linear".
        density: non-zeros / positions.
        calls: passes through the layer in one of the model; 0 where none was seen.
        dense_ms: predicted for the dense layer in float32, all calls; None: not predicted.
        compressed_ms: the same for the compressed layer.
        break_even: (low, high), the densities next below the layer's from which to which it would
            be faster than dense; low is 0 where every density below high is. None when it is
            faster as it is, when no lower density makes it faster, or not predicted.
    """

    name: str
    kind: str
    density: float
    calls: int
    dense_ms: float | None = None
    compressed_ms: float | None = None
    break_even: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """Times dense: dense_ms / compressed_ms, above 1 the compressed layer is faster."""
        if self.dense_ms is None or not self.compressed_ms:
            return None
        return self.dense_ms / self.compressed_ms

    @property
    def warning(self) -> str | None:
        """One sentence where a slowdown is expected."""
        if self.ratio is None or self.ratio * SLOWER > 1:
            return None
        times, density = f"{1 / self.ratio:.1f}x", f"{self.density:.2f}"
        text = f"{self.name}: {times} slower than dense expected at density {density}"
        if self.break_even is None:
            return f"{text}; no lower density makes it faster"
        low, high = self.break_even
        if not low:
            return f"{text}; faster below about {high:.2g}"
        if low == high:
            return f"{text}; faster only at about {high:.2g}"
        return f"{text}; faster between about {low:.2g} and {high:.2g}"


@dataclass(frozen=True)
class CostReport:
    """Predicted times of a model's compressed layers; `str()` gives a table.

    Attributes:
        layers: a row a layer, in the model's order.
        isa: level of the kernels.
        threads: of torch.
        notes: a sentence for each reason why layers were not predicted.
    """

    layers: tuple[LayerCost, ...]
    isa: str
    threads: int
    notes: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        """Level and threads, for people."""
        return f"{self.isa}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def dense_ms(self) -> float:
        """Of all layers that are predicted."""
        return sum(layer.dense_ms or 0.0 for layer in self.layers)

    @property
    def compressed_ms(self) -> float:
        """Of all layers that are predicted."""
        return sum(layer.compressed_ms or 0.0 for layer in self.layers)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence a layer where a slowdown is expected."""
        return tuple(layer.warning for layer in self.layers if layer.warning)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layers": [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers],
            "isa": self.isa,
            "threads": self.threads,
            "notes": list(self.notes),
            "dense_ms": self.dense_ms,
            "compressed_ms": self.compressed_ms,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostReport:
        """A report from the plain values of its `to_dict`."""
        names = [f.name for f in fields(LayerCost)]
        rows = [{name: row[name] for name in names} for row in values["layers"]]
        for row in rows:
            if row["break_even"] is not None:
                row["break_even"] = tuple(row["break_even"])
        layers = tuple(LayerCost(**row) for row in rows)
        return cls(layers, values["isa"], values["threads"], tuple(values["notes"]))

    def table(self) -> Table:
        """The times as a rich table."""
        from rich import box  # here, so that predicting needs no rich
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"predicted, CPU at {self.machine}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("layer", overflow="fold")
        for heading in ("density", "calls", "dense ms", "ms", "times dense", "faster at"):
            table.add_column(heading, justify="right")
        for row in self.layers:
            table.add_row(
                escape(row.name),
                f"{row.density:.3f}",
                str(row.calls),
                *(_number(value, ".3f") for value in (row.dense_ms, row.compressed_ms)),
                _number(row.ratio, ".2f"),
                "" if row.break_even is None else _interval(*row.break_even),
            )
        table.add_section()
        ratio = self.dense_ms / self.compressed_ms if self.compressed_ms else None
        times = (f"{self.dense_ms:.3f}", f"{self.compressed_ms:.3f}")
        table.add_row("total", "", "", *times, _number(ratio, ".2f"), "", style="bold")
        return table

    def __str__(self) -> str:
        return as_text(self.table(), *self.notes, *self.warnings)


def predict(
    model: nn.Module, example: Example | None = None, *, rates: Rates | None = None
) -> CostReport:
    """Predicts the time of each compressed layer on this machine's CPU, and of the dense one.

    The first call in a process measures the machine for one to three seconds; rates are kept for
    each level of the kernels and number of threads.

    Args:
        model: with compressed layers; left as it is, and looked at in eval mode.
        example: the model's input (a tensor, a tuple of arguments or a mapping of keyword
            arguments), from which shapes are taken. None: linear layers are predicted for one row,
            and convolutions are left out.
        rates: of a machine; None: those of this one.

    Raises:
        ValueError: `rates` has no rate for something that the model does.
        Exception: whatever the model raises when the example does not fit it.
    """
    layers = list(quant_sparse_layers(model))
    return predict_layers(layers, None if example is None else passes(model, example), rates)


def predict_layers(
    layers: Iterable[tuple[str, QuantSparseModule]],
    seen: Mapping[str, Sequence[Passed]] | None,
    rates: Rates | None = None,
) -> CostReport:
    """Predicts layers from the passes that were `seen`; None: as `predict` without an example."""
    notes: dict[str, None] = {}  # in order, each once
    work: list[tuple[LayerCost, Matrix, list[Call]]] = []
    for name, layer in layers:
        weight = layer.weight
        matrix = Matrix(*weight.shape, weight.nnz, weight.bits)
        kind = "Linear" if isinstance(layer, QuantSparseLinear) else "Conv2d"
        found = _without_example(layer) if seen is None else list(seen.get(name, ()))
        reasons = [reason for each in found if (reason := _unknown(each))]
        if not found:
            reasons = [
                "Convolutions are not predicted without an example input."
                if seen is None
                else "Layers that the example does not reach are not predicted."
            ]
        notes |= dict.fromkeys(reasons)
        calls = [] if reasons else [each.call for each in found]
        work.append((LayerCost(name, kind, matrix.density, len(found)), matrix, calls))
    if rates is None:
        pairs = [(call, matrix) for _, matrix, calls in work for call in calls]
        rates = measured_rates(Needs.of(pairs))
    if rates.misfit > _ROUGH:
        notes["The machine was busy while it was measured: predict again in a new process."] = None
    rows = tuple(
        _predicted(row, matrix, calls, rates) if calls else row for row, matrix, calls in work
    )
    return CostReport(rows, rates.isa, rates.threads, tuple(notes))


def _without_example(layer: QuantSparseModule) -> list[Passed]:
    if not isinstance(layer, QuantSparseLinear):
        return []
    return [Passed(LinearCall(1), layer.codebook.dtype, layer.codebook.device.type)]


def _unknown(passed: Passed) -> str | None:
    """Why a pass cannot be predicted."""
    if passed.device != "cpu":
        return f"Layers on {passed.device} are not predicted: nothing has been measured there."
    if passed.dtype != torch.float32:
        dtype = str(passed.dtype).removeprefix("torch.")
        return f"Layers that compute in {dtype} are not predicted, only those in float32 are."
    return None


def _predicted(row: LayerCost, matrix: Matrix, calls: list[Call], rates: Rates) -> LayerCost:
    dense = sum(rates.dense(call, matrix) for call in calls)
    compressed = _compressed(matrix, calls, rates)
    even = _break_even(matrix, calls, rates, dense) if compressed > dense else None
    return LayerCost(
        row.name, row.kind, row.density, row.calls, 1e3 * dense, 1e3 * compressed, even
    )


def _compressed(matrix: Matrix, calls: list[Call], rates: Rates) -> float:
    return sum(rates.compressed(call, matrix) for call in calls)


def _break_even(
    matrix: Matrix, calls: list[Call], rates: Rates, dense: float
) -> tuple[float, float] | None:
    """The densities next below the matrix's own at which the compressed layer is faster.

    They may end above 0: positions are stored in another way at low densities, which may be slower.
    """
    low = high = 0.0
    for step in range(_STEPS - 1, 0, -1):
        density = step / _STEPS
        if density >= matrix.density:
            continue
        if _compressed(matrix.at_density(density), calls, rates) < dense:
            low, high = density, high or density
        elif high:
            return low, high
    return (0.0, high) if high else None


def _interval(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if low else f"below {high:.2f}"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
