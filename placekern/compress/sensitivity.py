"""Sensitivity analysis: each layer alone is pruned or quantized, and a metric is measured.

The surprise: pruning is tried without quantization and quantization without pruning, so that the
two drops of a layer can be added up (`suggest` does). And no weight is ever written to: a layer has
another Parameter while the metric runs, so what is put back is the very same tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..io.entropy import entropy_bytes
from ..io.streams import entropy_bits
from ..nn import COMPRESSED_KINDS
from ..weight import as_matrix
from .config import CompressConfig
from .sensitivity_result import Sensitivity
from .sensitivity_rows import (
    BITS,
    DENSE,
    KEPT,
    SPARSITY,
    THRESHOLD,
    SensitivityRow,
    drop_of,
    read_rows,
    write_rows,
)

BITS_TRIED = (8, 6, 5, 4, 3, 2)
SPARSITIES_TRIED = (0.3, 0.5, 0.7, 0.8, 0.9)


def sensitivity(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    *,
    bits: Sequence[int] = BITS_TRIED,
    thresholds: Sequence[float] | None = None,
    sparsities: Sequence[float] | None = None,
    config: CompressConfig | Mapping[str, Any] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    larger_is_better: bool = True,
    resume: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sensitivity:
    """Measures a model with one layer at a time quantized or pruned, at each setting.

    Codebooks and masks are those that `compress_` would make; the layer then runs dense on the
    decoded values, so a metric differs from the compressed model's by float rounding alone. The
    model runs in evaluation mode. Afterwards, also when the metric raises, each layer has its own
    Parameter back and each module the mode that it was in.

    Layers that share a weight are measured together, under the name of the first.

    Args:
        model: any module with `nn.Conv2d` and `nn.Linear` layers.
        metric: called with the model; gives a number. It must give the same one each time: fix what
            it draws at random.
        bits: of a code, to be tried without pruning; () for none.
        thresholds: to be tried without quantization, weights with |w| below are pruned.
        sparsities: to be tried in the same way, the share that is pruned, 0 to 1. None is 0.3, 0.5,
            0.7, 0.8 and 0.9, or none where thresholds are given.
        config: how layers are quantized, and which of them stay dense (by `layers`) and are not
            measured. Its bits, threshold and sparsity are not used.
        filter_fn: called with (module, name); False leaves that layer out.
        larger_is_better: False for a loss.
        resume: a CSV file that holds all rows at any time, so that nothing is lost when the process
            ends. Where it is there already, what it holds is not measured again.
        identity: what the results depend on beside the settings, by name, as plain values: a digest
            of the weights, the name of the metric and the like. The dense row's `config` holds it,
            and a file to resume must have the same; one without it is known by its baseline alone,
            which a metric such as the cosine to the dense descriptors has in common with any other.
        progress: called with (layer, done, total) before each evaluation and at the end; the first
            is of the dense network.

    Returns:
        A `Sensitivity`.

    Raises:
        TypeError: the metric gives no number, the model is itself a layer, or identity holds what
            JSON does not.
        ValueError: a setting is out of range, the config names a layer that is not there, there is
            no layer to measure, a weight is not finite, layers that share a weight are not treated
            alike, the dense network's metric is not finite, or the file to resume is of another
            model, metric or config.
    """
    if sparsities is None:
        sparsities = SPARSITIES_TRIED if thresholds is None else ()
    config = CompressConfig.of(config)
    tried = [
        *((BITS, value) for value in bits),
        *((THRESHOLD, value) for value in thresholds or ()),
        *((SPARSITY, value) for value in sparsities),
    ]
    layers = _layers(model, config, filter_fn)
    jobs = [
        (name, modules, setting, value, replace(own, **{setting: value}))
        for name, (modules, own) in layers.items()
        for setting, value in dict.fromkeys(tried)
    ]
    own_identity: dict[str, Any] = json.loads(json.dumps(dict(identity or {})))
    known: dict[tuple[str, str, float], SensitivityRow] = {}
    if resume is not None and Path(resume).exists():
        known = {row.key: row for row in read_rows(resume)}
        own_identity = check_identity(own_identity, _identity_in(known), str(resume))
        _check_known(known, layers, larger_is_better, str(resume))
    left = [job for job in jobs if (job[0], job[2], float(job[3])) not in known]

    def keep(row: SensitivityRow) -> None:
        known[row.key] = row
        if resume is not None:
            write_rows(_in_order(known, layers), resume)

    total = 1 + len(left)
    with evaluating(model):
        if progress:
            progress("dense", 0, total)
        dense = _dense_row(layers, number(metric(model)), larger_is_better, own_identity)
        if resume is not None and dense.key in known:
            before = known[dense.key].metric
            check_baseline(dense.metric, before, str(resume))
            dense = replace(dense, metric=before)
        keep(dense)
        baseline = dense.metric
        for done, (name, modules, setting, value, own) in enumerate(left, 1):
            if progress:
                progress(name, done, total)
            try:
                values, row = _try(name, modules[0], setting, value, own)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            with _weight_of(modules, values):
                result = number(metric(model))
            drop = drop_of(result, baseline, larger_is_better)
            keep(replace(row, metric=result, drop=drop, larger_is_better=larger_is_better))
    if progress:
        progress("done", total, total)
    return Sensitivity(tuple(_in_order(known, layers)))


_Layers = dict[str, tuple[list[nn.Module], CompressConfig]]


def _layers(
    model: nn.Module,
    config: CompressConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> _Layers:
    """Each weight to be measured: the modules that share it, and their config without settings."""
    if type(model) in COMPRESSED_KINDS:
        raise TypeError(
            f"the model is itself a {type(model).__name__}, which compress_ cannot swap; put it "
            "into an nn.Sequential"
        )
    config.check_names(model)
    found: dict[int, list[tuple[str, nn.Module, CompressConfig | None]]] = {}
    for name, module in model.named_modules():
        if type(module) not in COMPRESSED_KINDS:
            continue
        if module.weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no weights; load them first")
        left_out = filter_fn is not None and not filter_fn(module, name)
        own = None if left_out else config.for_layer(name, module)
        if own is not None:
            if not isinstance(module.weight, nn.Parameter):
                raise ValueError(
                    f"{name}.weight is computed by a hook, expected a Parameter; remove the hook "
                    "(remove_weight_norm or the like) first"
                )
            own = replace(own, bits=8, threshold=None, sparsity=None, layers={})
        found.setdefault(id(module.weight), []).append((name, module, own))
    layers: _Layers = {}
    for users in found.values():
        (first, _, own), *others = users
        for name, _, other in others:
            if other != own:
                raise ValueError(
                    f"{first} and {name} share one weight, but config or filter_fn treats them "
                    "differently; treat them alike"
                )
        if own is not None:
            layers[first] = ([module for _, module, _ in users], own)
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer to measure")
    return layers


@torch.no_grad()
def _try(
    name: str, module: nn.Module, setting: str, value: float, own: CompressConfig
) -> tuple[Tensor, SensitivityRow]:
    """What a weight becomes at a setting, in its shape and dtype, and a row without metric."""
    weight = module.weight.detach()
    matrix = as_matrix(weight.float())
    if setting == BITS:
        compressed = own.compress_tensor(weight)
        decoded = compressed.to_dense().detach()
        nnz, bits = compressed.nnz, own.bits
        size = sum(entropy_bytes(compressed)) + compressed.codebook.nbytes
    else:
        if not torch.isfinite(matrix).all():
            raise ValueError("the weight is not finite everywhere")
        mask = own.mask(matrix)
        decoded = torch.where(mask, matrix, 0.0)
        nnz, bits = int(mask.sum()), 8 * weight.element_size()
        size = entropy_bits([nnz, mask.numel() - nnz]) / 8 + nnz * weight.element_size()
    norm = matrix.norm()
    row = SensitivityRow(
        layer=name,
        setting=setting,
        value=float(value),
        weights=matrix.numel(),
        density=nnz / matrix.numel() if matrix.numel() else 0.0,
        bits=bits,
        relative_error=float((matrix - decoded.float()).norm() / norm) if norm > 0 else 0.0,
        entropy_bytes=float(size),
        metric=math.nan,
        drop=math.inf,
        larger_is_better=True,
        config=_config_values(own),
    )
    # In the weight's own memory format: with another one, the library may round otherwise.
    return torch.empty_like(weight).copy_(decoded.reshape(weight.shape)), row


def _config_values(own: CompressConfig) -> dict[str, Any]:
    """Fields that are kept and differ from the defaults, as plain values."""
    default = CompressConfig()
    return {n: getattr(own, n) for n in KEPT if getattr(own, n) != getattr(default, n)}


def _dense_row(
    layers: _Layers, metric: float, larger_is_better: bool, identity: Mapping[str, Any]
) -> SensitivityRow:
    if not math.isfinite(metric):
        raise ValueError(f"the metric of the dense network is {metric}, expected a finite number")
    weights = [modules[0].weight for modules, _ in layers.values()]
    return SensitivityRow(
        layer="",
        setting=DENSE,
        value=0.0,
        weights=sum(weight.numel() for weight in weights),
        density=1.0,
        bits=8 * weights[0].element_size(),
        relative_error=0.0,
        entropy_bytes=float(sum(weight.nbytes for weight in weights)),
        metric=metric,
        drop=0.0,
        larger_is_better=larger_is_better,
        config=identity,
    )


def number(value: Any) -> float:
    """A metric's result as a float.

    Raises:
        TypeError: it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the metric gave {value!r:.80}, expected a number") from None


@contextmanager
def _weight_of(modules: Sequence[nn.Module], values: Tensor) -> Iterator[None]:
    """Gives modules that share a weight another one, until the end of the block."""
    own = modules[0].weight
    other = nn.Parameter(values, requires_grad=own.requires_grad)
    try:
        for module in modules:
            module.weight = other
        yield
    finally:
        for module in modules:
            module.weight = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode until the end of the block; then each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _in_order(
    known: Mapping[tuple[str, str, float], SensitivityRow], layers: _Layers
) -> list[SensitivityRow]:
    place = {name: i for i, name in enumerate(["", *layers])}
    mildest_first = {BITS: -1, DENSE: 0, THRESHOLD: 1, SPARSITY: 1}
    return sorted(
        known.values(),
        key=lambda row: (place[row.layer], row.setting, mildest_first[row.setting] * row.value),
    )


def _check_known(
    known: Mapping[tuple[str, str, float], SensitivityRow],
    layers: _Layers,
    larger_is_better: bool,
    path: str,
) -> None:
    for row in known.values():
        if row.larger_is_better != larger_is_better:
            raise ValueError(
                f"in {path} larger_is_better is {row.larger_is_better}, but here it is "
                f"{larger_is_better}; go on with the same, or remove the file"
            )
        if row.setting == DENSE:
            continue
        if row.layer not in layers or layers[row.layer][0][0].weight.numel() != row.weights:
            raise ValueError(
                f"{path} has the layer {row.layer!r} with {row.weights} weights, which is not "
                "measured here; go on with the same model, config and filter_fn, or remove the file"
            )
        here = _config_values(layers[row.layer][1])
        if row.config != here:
            raise ValueError(
                f"{path} has {row.layer} measured with {dict(row.config)}, but here it is {here}; "
                "go on with the same config, or remove the file"
            )


def _identity_in(known: Mapping[tuple[str, str, float], SensitivityRow]) -> Mapping[str, Any]:
    return next((row.config for row in known.values() if row.setting == DENSE), {})


def check_identity(here: Mapping[str, Any], there: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Compares what results depend on with what those before depended on.

    Args:
        here: the identity given now; {} for none.
        there: the identity of the results that are there already; {} for none.
        where: those stand.

    Returns:
        `there`. Where one of the two is empty there is nothing to compare, and results that are
        there do not become known by what was not given when they were measured.

    Raises:
        ValueError: they differ; names what differs.
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names and here and there:
        told = [", ".join(f"{name} = {of.get(name)!r}" for name in names) for of in (there, here)]
        raise ValueError(
            f"{where} is of {told[0]}, but here it is {told[1]}; go on with the same, or measure "
            "anew into another file"
        )
    return dict(there)


def check_baseline(here: float, there: float, where: str) -> None:
    """Compares the dense network's metric with the one measured before.

    Raises:
        ValueError: they differ; `where` says where the other one stands.
    """
    if not math.isclose(here, there, rel_tol=1e-5, abs_tol=1e-9):
        raise ValueError(
            f"the dense network's metric is {here:.6g}, but {there:.6g} in {where}: "
            "another model, other data, or a metric that is not the same each time; measure anew"
        )
