"""The rows of a sensitivity analysis, and the CSV file that holds them.

The surprise: the first row is the dense network's, with setting "dense" and no layer, and every
row says which way the metric goes and how its layer is quantized. So a file is complete by itself:
it can be gone on with, plotted and turned into a suggestion, without the program that made it.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..io.atomic import written_beside
from .config import CompressConfig

BITS, THRESHOLD, SPARSITY, DENSE = "bits", "threshold", "sparsity", "dense"
SETTINGS = (BITS, THRESHOLD, SPARSITY)
"""What a row varies; a row of the setting "dense" is the network as it was."""
KEPT = tuple(f.name for f in fields(CompressConfig) if f.name not in (*SETTINGS, "layers"))
"""Fields of a `CompressConfig` that a row's config may have: how a layer is quantized."""

_BETTER = {True: "larger", False: "smaller"}


@dataclass(frozen=True)
class SensitivityRow:
    """One layer at one setting, all other layers as they were.

    Attributes:
        layer: its name; "" in the dense row.
        setting: "bits", "threshold" or "sparsity"; "dense" in the dense row.
        value: of the setting: bits of a code, the threshold, or the share to prune; 0 when dense.
        weights: positions of the layer's dense weight; of all measured layers in the dense row.
        density: share of the positions that were kept.
        bits: of a kept weight: the code's, or the dense dtype's where only pruning is tried.
        relative_error: |weight - tried| / |weight|, Frobenius norms.
        entropy_bytes: least bytes of this weight in a file by order-0 entropy: of the positions,
            and of the codes with the codebook as it is, or of the kept weights as they are. A
            written file comes out about 1 % above it.
        metric: what the user's metric gave.
        drop: how much worse that is than the dense network, positive for worse; infinite where the
            metric is not finite.
        larger_is_better: which way the metric goes.
        config: further fields of the layer's `CompressConfig` that differ from the defaults; in the
            dense row the identity that `sensitivity` was given.
    """

    layer: str
    setting: str
    value: float
    weights: int
    density: float
    bits: int
    relative_error: float
    entropy_bytes: float
    metric: float
    drop: float
    larger_is_better: bool
    config: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, float]:
        """(layer, setting, value), which no two rows share."""
        return self.layer, self.setting, self.value


COLUMNS = tuple(f.name for f in fields(SensitivityRow))


def drop_of(metric: float, baseline: float, larger_is_better: bool) -> float:
    """How much worse a metric is than the baseline; infinite where it is not finite."""
    if not math.isfinite(metric):
        return math.inf
    return baseline - metric if larger_is_better else metric - baseline


def write_rows(rows: Iterable[SensitivityRow], path: str | os.PathLike[str]) -> None:
    """Writes rows as CSV, beside the file's place and then renamed; numbers keep all digits.

    Raises:
        OSError: the file cannot be written.
    """
    with (
        written_beside(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            cells = {name: getattr(row, name) for name in COLUMNS}
            cells["larger_is_better"] = _BETTER[row.larger_is_better]
            cells["config"] = json.dumps(dict(row.config), sort_keys=True)
            writer.writerow([cells[name] for name in COLUMNS])


def read_rows(path: str | os.PathLike[str]) -> list[SensitivityRow]:
    """The rows of a file of `write_rows`, the dense one first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or a line of it is damaged; names the line.
    """
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        try:
            heading = next(reader, [])
            if tuple(heading) != COLUMNS:
                raise ValueError(
                    f"{path} has the columns {', '.join(heading)[:80] or 'none'}, expected "
                    f"{', '.join(COLUMNS)}; it is no file of a sensitivity analysis"
                )
            for cells in reader:
                try:
                    rows.append(_row(cells))
                except ValueError as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file: {error}") from None
    if not rows or rows[0].setting != DENSE or any(row.setting == DENSE for row in rows[1:]):
        raise ValueError(f"{path} does not begin with the one row of the dense network")
    if any(row.larger_is_better != rows[0].larger_is_better for row in rows):
        raise ValueError(f"{path} has rows in which a larger metric is better, and others")
    if len({row.key for row in rows}) != len(rows):
        raise ValueError(f"{path} has two rows for one setting of a layer")
    return rows


def _row(cells: list[str]) -> SensitivityRow:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells, expected {len(COLUMNS)}")
    texts = dict(zip(COLUMNS, cells, strict=True))
    if texts["setting"] not in (*SETTINGS, DENSE):
        raise ValueError(f"setting is {texts['setting']!r}, expected one of {', '.join(SETTINGS)}")
    if texts["larger_is_better"] not in _BETTER.values():
        raise ValueError(f"larger_is_better is {texts['larger_is_better']!r}")
    return SensitivityRow(
        layer=texts["layer"],
        setting=texts["setting"],
        value=float(texts["value"]),
        weights=int(texts["weights"]),
        density=float(texts["density"]),
        bits=int(texts["bits"]),
        relative_error=float(texts["relative_error"]),
        entropy_bytes=float(texts["entropy_bytes"]),
        metric=float(texts["metric"]),
        drop=float(texts["drop"]),
        larger_is_better=texts["larger_is_better"] == _BETTER[True],
        config=_config(texts["config"], dense=texts["setting"] == DENSE),
    )


def _config(text: str, dense: bool) -> dict[str, Any]:
    """A row's config, which a `CompressConfig` takes; of the `dense` row any JSON object."""
    try:
        config = json.loads(text)
    except RecursionError:
        raise ValueError("config is nested too deeply, expected fields and their values") from None
    if not isinstance(config, dict):
        raise ValueError(f"config is {text:.80}, expected a JSON object")
    if dense:
        return config
    unknown = [key for key in config if key not in KEPT]
    if unknown:
        raise ValueError(
            f"config has the unknown key {unknown[0]!r:.80}, expected some of {', '.join(KEPT)}"
        )
    try:
        CompressConfig(**config)
    except (TypeError, RecursionError):  # a value of a kind that no field is compared with
        raise ValueError(f"config is {text:.80}, expected plain values") from None
    return config
