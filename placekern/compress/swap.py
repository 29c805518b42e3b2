"""compress_: swaps a model's Conv2d and Linear layers for compressed ones, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..io.sizes import LayerSizes, WeightSizes, planned_sizes, weight_sizes
from ..nn import COMPRESSED_KINDS, QuantSparseModule, quant_sparse_layers, replace_module
from ..packing import READ_PADDING
from ..weight import QuantSparseWeight, as_matrix
from .config import CompressConfig
from .cost import predict_layers
from .cost_trace import Example, passes
from .report import CompressReport, LayerReport


def compress_(
    model: nn.Module,
    config: CompressConfig | Mapping[str, Any] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    example: Example | None = None,
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
        example: an input of the model (a tensor, a tuple of arguments or a mapping of keyword
            arguments): the report then predicts each layer's time and warns where it will be slower
            than dense. Measures the machine for one to three seconds, once a process.

    Returns:
        A report, a row a layer; `print` it.

    Raises:
        TypeError: the model is itself a Conv2d or Linear layer.
        ValueError: the config is out of range or names a layer that is not there, or a weight is
            not finite or on the meta device; the model is then unchanged.
        Exception: whatever the model raises when the example does not fit it.
    """
    config = CompressConfig.of(config)
    check_model(model, config)
    work = []
    for name, module in model.named_modules():
        if type(module) not in COMPRESSED_KINDS or (filter_fn and not filter_fn(module, name)):
            continue
        if module.weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no weights; load them first")
        own = config.for_layer(name, module)
        if own is not None:
            work.append((name, module, own))

    earlier = list(quant_sparse_layers(model))
    # Everything is computed before anything is swapped: an error leaves the model as it was.
    seen = None if example is None else passes(model, example)
    before = _tensors(model)
    float32_bytes = _float32_bytes(model, before)
    weights: dict[tuple[int, str], QuantSparseWeight] = {}
    encoded: dict[int, WeightSizes] = {}
    swaps: list[tuple[str, nn.Module, QuantSparseModule]] = []
    for done, (name, module, own) in enumerate(work):
        if progress:
            progress(name, done, len(work))
        # Layers that share a weight share its codebook where all settings agree.
        key = (id(module.weight), repr(replace(own, layers={})))
        if key not in weights:
            try:
                weights[key] = own.compress_tensor(module.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            weights[key].codebook = nn.Parameter(
                weights[key].codebook, requires_grad=module.weight.requires_grad
            )
            encoded[id(weights[key].codes)] = weight_sizes(weights[key])
        swaps.append(
            (name, module, COMPRESSED_KINDS[type(module)].from_weight(weights[key], module))
        )
    made = [(name, layer) for name, _, layer in swaps]
    cost = None if seen is None else predict_layers(made, seen)
    try:
        for _, module, layer in swaps:
            replace_module(model, module, layer)
        if progress:
            progress("done", len(work), len(work))
        file = planned_sizes(model, lambda weight: encoded.get(id(weight.codes)))
    except BaseException:
        for _, module, layer in swaps:
            replace_module(model, layer, module)
        raise
    sizes = {row.name: row for row in file.layers}
    counted: set[int] = set()
    rows = tuple(_row(m, layer, sizes[name], counted) for name, m, layer in swaps)
    return CompressReport(
        layers=rows,
        dense_bytes=sum(t.nbytes for t in before.values()),
        resident_bytes=sum(t.nbytes for t in _tensors(model).values()),
        disk_bytes=file.tensors,
        float32_bytes=float32_bytes,
        header_bytes=file.header,
        padding_bytes=file.padding,
        cost=cost,
        earlier=_sums(_parts(layer, sizes[name], counted) for name, layer in earlier),
    )


def check_model(model: nn.Module, config: CompressConfig) -> None:
    """Proves that a model can be compressed in place by a config, as far as that is quickly seen.

    Raises:
        TypeError: the model is itself a Conv2d or Linear layer.
        ValueError: the config names a layer that is not there, or a layer that is compressed
            already is on the meta device.
    """
    if type(model) in COMPRESSED_KINDS:
        kind = COMPRESSED_KINDS[type(model)].__name__
        raise TypeError(
            f"compress_ cannot swap the model itself in place: it is a {type(model).__name__}; "
            f"use {kind}.from_float(model, config)"
        )
    config.check_names(model)
    for name, layer in quant_sparse_layers(model):
        if layer.codebook.is_meta:
            raise ValueError(f"{name} is on the meta device and has no weights; load them first")


def _row(
    module: nn.Module, layer: QuantSparseModule, file: LayerSizes, counted: set[int]
) -> LayerReport:
    """A layer's row; what an earlier one has `counted` is not its own."""
    weight = layer.weight
    dense = _own(module.weight, counted)
    parts = _parts(layer, file, counted)
    return LayerReport(
        name=file.name,
        kind=type(module).__name__,
        shape=tuple(module.weight.shape),
        bits=layer.bits,
        nnz=weight.nnz,
        relative_error=_relative_error(module.weight, weight),
        dense_bytes=dense + parts["bias_bytes"],
        **parts,
    )


def _parts(layer: QuantSparseModule, file: LayerSizes, counted: set[int]) -> dict[str, Any]:
    """What a layer takes in the file and in memory, by the names of a `LayerReport`."""
    weight = layer.weight
    bias, codebook = _own(layer.bias, counted), _own(weight.codebook, counted)
    arrays = (weight.row_ptr, weight.positions, weight.codes)
    row_ptr, positions, codes = (_own(array, counted) for array in arrays)
    padding = READ_PADDING if codes else 0
    return {
        "resident_bytes": bias + codebook + row_ptr + positions + codes,
        "disk_bytes": file.total,
        "positions_bytes": file.positions,
        "codes_bytes": file.codes,
        "codebook_bytes": file.codebook,
        "bias_bytes": file.bias,
        "positions_bound": file.positions_bound,
        "codes_bound": file.codes_bound,
        "resident_positions_bytes": positions - padding,
        "resident_codes_bytes": codes - padding,
        "row_ptr_bytes": row_ptr,
        "read_padding_bytes": 2 * padding,
    }


def _own(tensor: Tensor | None, counted: set[int]) -> int:
    """Bytes of a tensor that is not `counted` yet; it then is."""
    if tensor is None or id(tensor) in counted:
        return 0
    counted.add(id(tensor))
    return tensor.nbytes


def _sums(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for row in rows:
        sums |= {name: sums.get(name, 0) + size for name, size in row.items()}
    return sums


def _float32_bytes(model: nn.Module, tensors: Mapping[int, Tensor]) -> int:
    """Of a model's tensors in float32; what is compressed already counts as it was before."""
    left = dict(tensors)
    total = 0
    for _, layer in quant_sparse_layers(model):
        weight = layer.weight
        arrays = (weight.row_ptr, weight.positions, weight.codes, weight.codebook)
        if left.pop(id(weight.codes), None) is not None:
            total += 4 * weight.shape[0] * weight.shape[1]
        for tensor in arrays:
            left.pop(id(tensor), None)
    return total + sum(4 * t.numel() if t.is_floating_point() else t.nbytes for t in left.values())


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
