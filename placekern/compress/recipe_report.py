"""RecipeReport: where a recipe stands, a row a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .cost import CostReport
from .report import CompressReport, LayerReport


@dataclass(frozen=True)
class RecipeLayer:
    """One layer.

    Attributes:
        name: in the model.
        weights: positions of the dense weight.
        nnz: of them not zero.
        bits: of a code; None while the layer is dense.
        threshold, sparsity: what it is pruned by while it is dense; None for neither.
    """

    name: str
    weights: int
    nnz: int
    bits: int | None
    threshold: float | None
    sparsity: float | None


@dataclass(frozen=True)
class RecipeReport:
    """All layers of a recipe; `str()` gives a table.

    Attributes:
        steps: of the optimiser so far.
        phase: "dense", "codebook" or "final".
        layers: a row a layer, in the model's order.
        compressed: what compression did when the layers were quantized, with sizes and errors of
            that moment; None before.
    """

    steps: int
    phase: str
    layers: tuple[RecipeLayer, ...]
    compressed: CompressReport | None

    @property
    def pruned(self) -> float:
        """Share of the weights that are zero now, 0 to 1."""
        weights = sum(layer.weights for layer in self.layers)
        return 1 - sum(layer.nnz for layer in self.layers) / weights if weights else 0.0

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"step {self.steps}, phase {self.phase}, {self.pruned:.1%} pruned"]
        lines.append(f"{'layer':{width}}  {'weights':>11}  {'density':>7}  bits  target")
        for layer in self.layers:
            target = ""
            if layer.sparsity is not None:
                target = f"sparsity {layer.sparsity:g}"
            elif layer.threshold is not None:
                target = f"threshold {layer.threshold:g}"
            density = layer.nnz / layer.weights if layer.weights else 0.0
            bits = "" if layer.bits is None else str(layer.bits)
            row = f"{layer.name:{width}}  {layer.weights:>11,}  {density:7.3f}  {bits:>4}  {target}"
            lines.append(row.rstrip())
        text = "\n".join(lines)
        return text if self.compressed is None else f"{text}\n\n{self.compressed}"


def read_report(values: Mapping[str, Any]) -> CompressReport:
    """A report from the plain values of its `to_dict`, also from one that had fewer of them."""
    names = [f.name for f in fields(LayerReport)]
    rows = tuple(
        LayerReport(**{k: tuple(v) if k == "shape" else v for k, v in row.items() if k in names})
        for row in values["layers"]
    )
    own = [f.name for f in fields(CompressReport) if f.name not in ("layers", "cost")]
    totals = {name: values[name] for name in own if name in values}
    cost = values.get("cost")
    return CompressReport(
        layers=rows, cost=None if cost is None else CostReport.from_dict(cost), **totals
    )
