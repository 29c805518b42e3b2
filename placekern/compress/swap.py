"""compress_: swaps a model's Conv2d and Linear layers for compressed ones, in place."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..io.streams import encoded_bytes
from ..nn import (
    COMPRESSED_KINDS,
    QuantSparseModule,
    replace_module,
)
from ..weight import QuantSparseWeight, as_matrix
from .config import CompressConfig
from .report import CompressReport, LayerReport


def compress_(
    model: nn.Module,
    config: CompressConfig | Mapping[str, Any] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompressReport:
    """Prunes and quantizes a model's layers in place, one shot.

    A module under several names is compressed once and stays shared; modules that share one weight
    keep sharing it, as one codebook. Layers that are not touched stay bit-identical. Hooks stay
    with the dense layers; the codebook of a frozen weight is frozen.

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
        ValueError: the config is out of range or names a layer that is not there, or a weight is
            not finite or on the meta device; the model is then unchanged.
    """
    if config is None:
        config = CompressConfig()
    elif not isinstance(config, CompressConfig):
        config = CompressConfig.from_dict(config)
    if type(model) in COMPRESSED_KINDS:
        kind = COMPRESSED_KINDS[type(model)].__name__
        raise TypeError(
            f"compress_ cannot swap the model itself in place: it is a {type(model).__name__}; "
            f"use {kind}.from_float(model, config)"
        )
    work = []
    for name, module in model.named_modules():
        if type(module) not in COMPRESSED_KINDS or (filter_fn and not filter_fn(module, name)):
            continue
        if module.weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no weights; load them first")
        own = config.for_layer(name, module)
        if own is not None:
            work.append((name, module, own))

    unused = [key for key in config.layers if not _matches(model, key)]
    if unused:
        raise ValueError(f"layers[{unused[0]!r}] fits no layer of the model; check its spelling")

    # Everything is computed before anything is swapped: an error leaves the model as it was.
    before = _tensors(model)
    weights: dict[tuple[Any, ...], QuantSparseWeight] = {}
    swaps: list[tuple[nn.Module, QuantSparseModule]] = []
    rows = []
    for done, (name, module, own) in enumerate(work):
        if progress:
            progress(name, done, len(work))
        how = (own.bits, own.threshold, own.sparsity, own.method, own.entropy_lambda)
        key = (id(module.weight), *how)
        if key not in weights:
            try:
                weights[key] = own.compress_tensor(module.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            weights[key].codebook = nn.Parameter(
                weights[key].codebook, requires_grad=module.weight.requires_grad
            )
        layer = COMPRESSED_KINDS[type(module)].from_weight(weights[key], module)
        first = all(layer.codes is not other.codes for _, other in swaps)
        swaps.append((module, layer))
        rows.append(_row(name, module, layer, first))
    for module, layer in swaps:
        replace_module(model, module, layer)
    if progress:
        progress("done", len(work), len(work))
    after = _tensors(model)
    layers = [layer for _, layer in swaps]
    arrays = {id(t) for layer in layers for t in (*layer.buffers(), layer.codebook)}
    return CompressReport(
        layers=tuple(rows),
        dense_bytes=sum(t.nbytes for t in before.values()),
        resident_bytes=sum(t.nbytes for t in after.values()),
        disk_bytes=sum(
            row.disk_bytes - _bias_bytes(layer) for row, layer in zip(rows, layers, strict=True)
        )
        + sum(t.nbytes for key, t in after.items() if key not in arrays),
    )


def _row(name: str, module: nn.Module, layer: QuantSparseModule, first: bool) -> LayerReport:
    bias = _bias_bytes(layer)
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


def _bias_bytes(layer: QuantSparseModule) -> int:
    return 0 if layer.bias is None else layer.bias.nbytes


@torch.no_grad()
def _relative_error(dense: Tensor, weight: QuantSparseWeight) -> float:
    matrix = as_matrix(dense.detach().float())
    norm = matrix.norm()
    error = (matrix - weight.to_dense(torch.float32)).norm()
    return float(error / norm) if norm > 0 else 0.0


def _tensors(model: nn.Module) -> dict[int, Tensor]:
    """All tensors of the model that exist, each once."""
    tensors = (*model.parameters(), *model.buffers())
    return {id(tensor): tensor for tensor in tensors if not is_lazy(tensor)}


def _matches(model: nn.Module, key: str) -> bool:
    # A type may be absent, so that one config serves many models; a name that is, is misspelt.
    return key in [kind.__name__ for kind in COMPRESSED_KINDS] or any(
        fnmatch.fnmatchcase(name, key)
        for name, module in model.named_modules()
        if type(module) in COMPRESSED_KINDS
    )
