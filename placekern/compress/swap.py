"""compress_: swaps a model's Conv2d and Linear layers for compressed ones, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..io.streams import encoded_bytes
from ..nn import (
    QuantSparseConv2d,
    QuantSparseLinear,
    QuantSparseModule,
    replace_module,
)
from ..weight import QuantSparseWeight, as_matrix
from .config import CompressConfig
from .report import CompressReport, LayerReport

_KINDS: dict[type[nn.Module], Any] = {nn.Conv2d: QuantSparseConv2d, nn.Linear: QuantSparseLinear}


def compress_(
    model: nn.Module,
    config: CompressConfig | Mapping[str, Any] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompressReport:
    """Prunes and quantizes a model's layers in place, one shot.

    A module under several names is compressed once and stays shared; modules that share one weight
    keep sharing it, as one codebook. Layers that are not touched stay bit-identical.

    Args:
        model: any module. `nn.Conv2d` and `nn.Linear` layers are swapped (exactly these types:
            subclasses may compute something else). A model that is itself such a layer cannot be
            swapped in place; use `QuantSparseConv2d.from_float`.
        config: a `CompressConfig` or a dict of its fields; None is 8-bit k-means, no pruning.
        filter_fn: called with (module, name); False leaves that layer dense.
        progress: called with (layer, done, total) before each layer and at the end.

    Returns:
        A report, a row a layer; `print` it.

    Raises:
        TypeError: the model is itself a Conv2d or Linear layer.
        ValueError: the config is out of range, or a weight is not finite; the model is then
            unchanged.
    """
    if config is None:
        config = CompressConfig()
    elif not isinstance(config, CompressConfig):
        config = CompressConfig.from_dict(config)
    if type(model) in _KINDS:
        kind = _KINDS[type(model)].__name__
        raise TypeError(
            f"compress_ cannot swap the model itself in place: it is a {type(model).__name__}; "
            f"use {kind}.from_float(model, config)"
        )
    work = []
    for name, module in model.named_modules():
        if type(module) not in _KINDS or (filter_fn and not filter_fn(module, name)):
            continue
        own = config.for_layer(name, module)
        if own is not None:
            work.append((name, module, own))

    # Everything is computed before anything is swapped: an error leaves the model as it was.
    weights: dict[tuple[int, CompressConfig], QuantSparseWeight] = {}
    swaps: list[tuple[nn.Module, QuantSparseModule]] = []
    rows = []
    for done, (name, module, own) in enumerate(work):
        if progress:
            progress(name, done, len(work))
        key = (id(module.weight), own.bits, own.threshold, own.sparsity, own.method)
        if key not in weights:
            try:
                weights[key] = own.compress_tensor(module.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            weights[key].codebook = nn.Parameter(weights[key].codebook)
        layer = _KINDS[type(module)].from_weight(weights[key], module)
        first = all(layer.codes is not other.codes for _, other in swaps)
        swaps.append((module, layer))
        rows.append(_row(name, module, layer, first))
    for module, layer in swaps:
        replace_module(model, module, layer)
    if progress:
        progress("done", len(work), len(work))
    return CompressReport(tuple(rows), _other_bytes(model, [layer for _, layer in swaps]))


def _row(name: str, module: nn.Module, layer: QuantSparseModule, first: bool) -> LayerReport:
    bias = 0 if module.bias is None else module.bias.nbytes
    weight = layer.weight
    return LayerReport(
        name=name,
        kind=type(module).__name__,
        shape=tuple(module.weight.shape),
        bits=layer.bits,
        nnz=weight.nnz,
        relative_error=_relative_error(module.weight, weight),
        dense_bytes=bias + (module.weight.nbytes if first else 0),
        resident_bytes=bias + (weight.nbytes if first else 0),
        disk_bytes=bias + (encoded_bytes(weight) if first else 0),
    )


@torch.no_grad()
def _relative_error(dense: Tensor, weight: QuantSparseWeight) -> float:
    matrix = as_matrix(dense.detach().float())
    norm = matrix.norm()
    error = (matrix - weight.to_dense(torch.float32)).norm()
    return float(error / norm) if norm > 0 else 0.0


def _other_bytes(model: nn.Module, layers: list[QuantSparseModule]) -> int:
    counted = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        tensor.nbytes
        for key, tensor in tensors.items()
        if key not in counted and not is_lazy(tensor)
    )
