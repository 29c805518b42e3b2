"""The picture of a sensitivity analysis: labels, a baseline, and a legend that can be read."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

import placekern as pk
from placekern.compress.sensitivity import Sensitivity
from placekern.compress.sensitivity_plot import figure_of
from placekern.compress.sensitivity_rows import SensitivityRow


def many_layers(count: int) -> tuple[SensitivityRow, ...]:
    def row(layer: str, setting: str, value: float, drop: float) -> SensitivityRow:
        return SensitivityRow(
            layer, setting, value, 9, 1.0, 8, 0.0, 9.0, 0.9 - drop, drop, True, {}
        )

    rows = [row("", "dense", 0.0, 0.0)]
    for i in range(count):
        name = f"backbone.features.{i}.expand3x3"
        rows += [row(name, "bits", bits, (i + 1) * 4.0**-bits) for bits in (8, 4, 2)]
        rows += [row(name, "sparsity", s, (i - 1) * s * s / 90) for s in (0.3, 0.9)]
        rows += [row(name, "threshold", t, math.inf if i == 1 else t) for t in (0.001, 0.1)]
    return tuple(rows)


@pytest.mark.parametrize("count", [1, 8, 30, 75])
def test_the_picture_has_labels_a_baseline_and_a_legend_that_can_be_read(count: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figure_of(many_layers(count), "A title", "accuracy (share of images)")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    panels = figure.axes
    labels = [panel.get_xlabel() for panel in panels]
    assert labels == ["weights of the layer pruned (%)", "threshold on |weight|", "bits of a code"]
    assert panels[0].get_ylabel() == "drop of accuracy (share of images)"
    for panel in panels:
        assert len(panel.lines) == 1 + count
        assert set(panel.lines[0].get_ydata()) == {0}
        bottom, top = panel.get_ylim()
        assert bottom > 0 > top  # worse is lower
    assert panels[2].get_xlim()[0] > panels[2].get_xlim()[1]
    assert panels[0].lines[1].get_xdata().tolist() == [30, 90]

    legend = figure.legends[0]
    texts = legend.get_texts()
    assert texts[0].get_text() == "dense network: 0.9"
    assert len(texts) == 1 + count
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.y1
    assert all(panel.get_window_extent().x1 < box.x0 for panel in panels)
    assert min(panel.get_window_extent().width for panel in panels) > 250
    extents = [text.get_window_extent() for text in texts]
    for i, one in enumerate(extents):
        assert not any(one.overlaps(other) for other in extents[:i])
    looks = [(h.get_color(), str(h.get_linestyle()), h.get_marker()) for h in legend.legend_handles]
    assert len(set(looks[:41])) == min(count + 1, 41)


def test_plot_writes_a_picture_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "sensitivity.csv", tmp_path / "sensitivity.png"
    Sensitivity(many_layers(3)).to_csv(file)
    code = f"""
import sys
from placekern.compress.sensitivity import Sensitivity
Sensitivity.from_csv({str(file)!r}).plot({str(picture)!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    root = Path(pk.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        Sensitivity(many_layers(0)).plot(picture)
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        Sensitivity(many_layers(1)).plot(tmp_path / "picture.xyz")
    assert sorted(tmp_path.iterdir()) == [file, picture]


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib, which is not installed; pip"):
        Sensitivity(many_layers(1)).plot(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
