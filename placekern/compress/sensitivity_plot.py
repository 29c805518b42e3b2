"""The picture of a sensitivity analysis: drops of the metric against pruning and against bits.

The surprise: drops grow downwards from the dense network's line, by powers of ten; between it and
the first power the axis is linear, so that noise on either side of the line can be seen. matplotlib
is an optional package, and pyplot is not touched, which would keep state for the whole process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..io.atomic import written_beside
from .sensitivity_rows import BITS, SPARSITY, THRESHOLD, SensitivityRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {
    SPARSITY: "weights of the layer pruned (%)",
    THRESHOLD: "threshold on |weight|",
    BITS: "bits of a code",
}
_MARKERS = "os^DvP*X"
_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), "-.")
_DPI = 160
_DECADES = 2.5  # of drops that the axis shows by powers of ten


def draw(
    rows: Sequence[SensitivityRow], path: str | os.PathLike[str], title: str, metric: str
) -> None:
    """Writes the picture, beside the file's place and then renamed.

    Args:
        rows: the dense one first.
        path: its ending gives the format.
        title: above the picture.
        metric: what it is called, on the vertical axis.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is nothing to draw, or matplotlib does not know the ending.
    """
    if len(rows) < 2:
        raise ValueError("there are no rows but the dense one: nothing to draw")
    figure = figure_of(rows, title, metric)
    kind = os.path.splitext(path)[1].lstrip(".") or "png"
    with written_beside(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=_DPI)


def figure_of(rows: Sequence[SensitivityRow], title: str, metric: str) -> Figure:
    """The picture as a matplotlib figure: a panel a setting, a line a layer, one legend."""
    figure_type = _figure_type()
    dense, measured = rows[0], rows[1:]
    layers = list(dict.fromkeys(row.layer for row in measured))
    settings = [s for s in (SPARSITY, THRESHOLD, BITS) if any(r.setting == s for r in measured)]
    columns = 1 if len(layers) <= 32 else math.ceil(len(layers) / 32)
    legend_width = columns * (0.9 + 0.085 * max(len(layer) for layer in layers))
    height = max(4.2, 1.2 + 0.19 * math.ceil(len(layers) / columns))
    figure = figure_type(
        figsize=(0.8 + 4.2 * len(settings) + legend_width, height), layout="constrained"
    )
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    styles = {layer: _style(i) for i, layer in enumerate(layers)}
    for panel, setting in zip(panels, settings, strict=True):
        panel.axhline(0, color="0.35", linestyle="--", linewidth=1, zorder=1)
        for layer in layers:
            points = sorted(
                (_place(row), row.drop)
                for row in measured
                if row.layer == layer and row.setting == setting and math.isfinite(row.drop)
            )
            panel.plot(*zip(*points, strict=True) if points else ([], []), **styles[layer])
        _label(panel, setting, {_place(row) for row in measured if row.setting == setting})
    _scale_drops(panels[0], [row.drop for row in measured if math.isfinite(row.drop)])
    panels[0].set_ylabel(f"drop of {metric}")
    _legend(figure, layers, styles, columns, dense.metric)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _place(row: SensitivityRow) -> float:
    return 100 * row.value if row.setting == SPARSITY else row.value


def _style(index: int) -> dict[str, Any]:
    """Ten colours, told apart at once; every further ten have their own line and marker."""
    import matplotlib

    again = index // 10
    return {
        "color": matplotlib.colormaps["tab10"](index % 10),
        "linestyle": _LINES[again % len(_LINES)],
        "marker": _MARKERS[again % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.4,
        "alpha": 0.9,
    }


def _label(panel: Axes, setting: str, places: set[float]) -> None:
    panel.set_xlabel(_AXES[setting])
    panel.grid(True, color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if setting == THRESHOLD:
        if min(places) > 0 and max(places) > 20 * min(places):
            panel.set_xscale("log")
    else:
        panel.set_xticks(sorted(places))
    if setting == BITS:
        panel.invert_xaxis()  # harsher to the right, as in the other panels


def _scale_drops(panel: Axes, drops: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    largest = max([abs(drop) for drop in drops], default=0.0)
    if largest == 0:
        panel.invert_yaxis()
        return
    first = 10.0 ** math.floor(math.log10(largest) - _DECADES)
    panel.set_yscale("symlog", linthresh=first, linscale=0.5)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda drop, _: f"{drop:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_ylim(max(1.4 * max(drops), first), min(1.4 * min(drops), -0.3 * first))


def _legend(
    figure: Figure, layers: Sequence[str], styles: dict[str, Any], columns: int, baseline: float
) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="0.35", linestyle="--", label=f"dense network: {baseline:.4g}")]
    lines += [Line2D([], [], label=layer, **styles[layer]) for layer in layers]
    figure.legend(
        handles=lines, loc="outside right center", ncols=columns, fontsize=8, frameon=False
    )


def _figure_type() -> Any:
    """matplotlib's Figure, which draws by itself, without a window or pyplot."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the picture is drawn by the package matplotlib, which is not installed; "
            "pip install matplotlib",
            name=error.name,
        ) from None
    return Figure
