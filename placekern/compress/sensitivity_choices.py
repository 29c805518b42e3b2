"""What can be done to a layer after a sensitivity analysis: its choices, with bytes and drops.

The surprise: a drop that is not measurable is not zero. Where many settings leave the metric as it
is (recall moves in steps of one query), the squared error of the weight orders them: it is added,
scaled so that an error of 100 % counts as the smallest step of the metric that was seen. Otherwise
every layer would be pushed to the last setting without a visible drop, and all of them together
would drop visibly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..io.streams import encoded_bytes
from ..weight import as_matrix
from .config import CompressConfig
from .sensitivity_result import Sensitivity
from .sensitivity_rows import BITS, SPARSITY, THRESHOLD, SensitivityRow

_LARGE = 1 << 22  # weights of a layer from which bytes are taken from a part of its rows


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Attributes:
        settings: of a `CompressConfig`, as plain values; None leaves the layer dense.
        density: share of the positions that are kept.
        bytes: of the weight in a file, without the file's header.
        drop: of the metric, as predicted.
    """

    settings: Mapping[str, Any] | None
    density: float
    bytes: float
    drop: float


def resolution(rows: Sequence[SensitivityRow]) -> float:
    """The smallest change of the metric that was seen; a very small number without any."""
    changes = [abs(row.drop) for row in rows if row.drop != 0 and math.isfinite(row.drop)]
    return min(changes, default=1e-9)


def monotone(drops: Sequence[float]) -> list[float]:
    """Drops of ever harsher settings without noise: none is below 0 or below the one before.

    The nearest such curve in squares (isotonic regression by pooling adjacent violators), then cut
    at 0: what falls is averaged, so that one lucky measurement does not look like a free lunch.
    """
    pools: list[tuple[float, int]] = []
    for drop in drops:
        pools.append((drop, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (high, before), (low, after) = pools[-2:]
            mean = (
                math.inf if math.isinf(high) else (high * before + low * after) / (before + after)
            )
            pools[-2:] = [(mean, before + after)]
    return [max(mean, 0.0) for mean, count in pools for _ in range(count)]


def predicted_drops(rows: Sequence[SensitivityRow], step: float) -> list[float]:
    """Of rows from mild to harsh: the monotone drop, and `step` x relative error squared."""
    smooth = monotone([row.drop for row in rows])
    errors = np.maximum.accumulate([row.relative_error for row in rows]) if rows else []
    return [drop + step * float(e) ** 2 for drop, e in zip(smooth, errors, strict=True)]


def choices(found: Sensitivity, layer: str, module: nn.Module, step: float) -> list[Choice]:
    """A layer's choices: dense, and all pairs of measured bits with measured pruning or none.

    Args:
        found: the analysis.
        layer: its name.
        module: of the model that was analysed; each pair is really compressed. Of a layer of more
            than 4 million weights a part of the rows is, and the bytes are scaled up.
        step: `resolution` of the analysis.

    Raises:
        ValueError: no bits were measured, or the module has other weights than were measured.
    """
    widths = found.of(layer, BITS)
    prunings = sorted(found.of(layer, THRESHOLD, SPARSITY), key=lambda row: -row.density)
    if not widths:
        raise ValueError(f"{layer} was not measured at any bits; measure some to choose from")
    weight = module.weight.detach()
    matrix = as_matrix(weight)
    if matrix.numel() != widths[0].weights:
        raise ValueError(
            f"{layer} has {matrix.numel()} weights, but {widths[0].weights} when it was measured; "
            "give the model that was measured"
        )
    quantized = list(zip(widths, predicted_drops(widths, step), strict=True))
    result = [Choice(None, 1.0, weight.nbytes, 0.0)]
    pruned: list[tuple[SensitivityRow | None, float]] = [
        (None, 0.0),
        *zip(prunings, predicted_drops(prunings, step), strict=True),
    ]
    for pruning, pruning_drop in pruned:
        kept, how = matrix, {}
        if pruning is not None:
            how = {pruning.setting: pruning.value}
            mask = CompressConfig(**how).mask(matrix.float())
            _check_density(layer, mask, pruning)
            kept = torch.where(mask, matrix, 0.0)
        for width, drop in quantized:
            settings = {"bits": width.bits, **how, **width.config}
            size = _bytes(kept, CompressConfig(bits=width.bits, **width.config))
            density = width.density if pruning is None else pruning.density
            result.append(Choice(settings, density, size, pruning_drop + drop))
    return [choice for choice in result if math.isfinite(choice.drop)]


def _bytes(matrix: Tensor, config: CompressConfig) -> float:
    """Of a weight [M, K] in a file, exactly, or nearly where it is large."""
    M, K = matrix.shape
    if matrix.numel() <= _LARGE or config.group_size is not None:
        return encoded_bytes(config.compress_tensor(matrix))
    count = max(1, _LARGE // K)
    rows = torch.linspace(0, M - 1, count, device=matrix.device).round().long()
    part = config.compress_tensor(matrix[rows])
    book = part.codebook.nbytes
    return (encoded_bytes(part) - book) * M / count + book


def _check_density(layer: str, mask: Tensor, row: SensitivityRow) -> None:
    density = int(mask.sum()) / mask.numel() if mask.numel() else 0.0
    if not math.isclose(density, row.density, abs_tol=1e-6):
        raise ValueError(
            f"{layer} keeps {density:.4f} of its weights at {row.setting} {row.value:g}, but kept "
            f"{row.density:.4f} when it was measured; give the model that was measured"
        )
