"""save and load: one .safetensors file, readable by any safetensors reader; no pickle.

Compressed layers are stored as two zstd streams and a codebook (docs/format.md), everything else
as plain tensors. A layer's sizes in the file are compared with the model's before anything is
unpacked, so that a damaged header cannot ask for memory. Layers are unpacked one after the other,
in pieces: loading takes little more memory than the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import packing
from ..nn import COMPRESSED_KINDS, QuantSparseModule, replace_module
from ..nn import quant_sparse_layers as _layers
from ..weight import QuantSparseWeight
from . import stored, streams
from .architectures import build_architecture
from .atomic import written_beside
from .stored import StoredFile

FORMAT_VERSION = 2
"""Of the files that `save` writes; `load` reads those before it too."""

_KINDS = {dense.__name__: (dense, compressed) for dense, compressed in COMPRESSED_KINDS.items()}
_ARRAYS = ("row_ptr", "positions", "codes", "codebook")
_EXTRA = ("rare",)  # in a file, but no array of a layer


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes a model to one .safetensors file, beside and then renamed.

    Args:
        model: any module; compressed layers are entropy-coded. `model.architecture`, when there,
            lets `load` rebuild the model by name.
        path: of the file; an existing one is replaced in one step.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    found = contents(model)
    plain = {k: t.detach().cpu().contiguous().clone() for k, t in found.plain.items()}
    with written_beside(path) as temporary:
        save_file(found.streams | plain, temporary, metadata={stored.METADATA: found.text})
        stored.write_checksum(temporary)
    return path.stat().st_size


class Contents(NamedTuple):
    """What the file of a model holds: `save` writes it, `planned_sizes` weighs it.

    Attributes:
        streams: uint8 tensors, by name.
        plain: all other tensors, the model's own: codebooks, biases and what is not compressed.
        layers: an entry a compressed layer, as in the header.
        text: our entry of the file's header.
    """

    streams: dict[str, Tensor]
    plain: dict[str, Tensor]
    layers: list[dict[str, Any]]
    text: str


def contents(
    model: nn.Module, encode: Callable[[QuantSparseWeight], streams.Encoded] = streams.encode
) -> Contents:
    """What `save` writes for a model; `encode` makes the streams of a weight."""
    made: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    entries = []
    owners_of: dict[str, QuantSparseModule] = {}
    skip = set()
    for name, layer in _layers(model):
        weight = layer.weight
        kind = next(name for name, (_, kind) in _KINDS.items() if isinstance(layer, kind))
        entry: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "shape": list(weight.shape),
            "bits": weight.bits,
            "nnz": weight.nnz,
            "relu": layer.relu,
        }
        owners = [key for key, other in owners_of.items() if _same_weight(layer, other)]
        if owners:
            entry["shares"] = owners[0]
        else:
            owners_of[name] = layer
            encoded = encode(weight)
            entry["positions"] = encoded.coding
            made[_key(name, "positions")] = encoded.positions
            made[_key(name, "codes")] = encoded.codes
            if encoded.rare is not None:
                entry["common"] = encoded.common
                made[_key(name, "rare")] = encoded.rare
            plain[_key(name, "codebook")] = weight.codebook
        entries.append(entry)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantSparseModule):
            skip.update(_key(name, array) for array in _ARRAYS)

    aliases = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in skip:
            continue
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
        else:
            names[id(tensor)] = name
            plain[name] = tensor
    architecture = getattr(model, "architecture", None)
    header = {
        "format": FORMAT_VERSION,
        # A network may have an attribute of this name that means something else.
        "architecture": architecture if _sound_architecture(architecture) else None,
        "layers": entries,
        "aliases": aliases,
    }
    # The checksum comes first, where it is found without understanding the rest, and covers it all.
    rest = json.loads(json.dumps(header, sort_keys=True))
    return Contents(made, plain, entries, json.dumps({"crc32": stored.NO_CHECKSUM, **rest}))


def _same_weight(one: QuantSparseModule, other: QuantSparseModule) -> bool:
    """Whether they train one codebook on the same codes; copies of the arrays count as the same."""
    if one.codebook is not other.codebook:
        return False
    # On a GPU the same codes may lie in different orders.
    packed = [layer.weight.to_layout(layer.weight.best_layout("cpu")) for layer in (one, other)]
    return all(torch.equal(*(getattr(w, array) for w in packed)) for array in _ARRAYS[:3])


def _key(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor  # the model itself may be the layer


def tensor_names(layer: str) -> dict[str, str]:
    """Names in a file of a compressed layer's tensors, by what they hold."""
    roles = ("positions", "codes", "rare", "codebook", "bias")
    return {role: _key(layer, role) for role in roles}


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a file: format, architecture, and a table of the compressed layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a placekern file, or of a format that this version cannot read.
    """
    with StoredFile(path) as file:
        return _header(file)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Reads a file written by `save`.

    Args:
        path: of the file.
        model: a fresh model of the same architecture, dense or compressed, on any device (also
            "meta"); its layers are swapped in place. None: it is rebuilt from the architecture's
            name in the file.

    Returns:
        The model, in eval mode when it was rebuilt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a placekern file, is damaged, or does not fit the model.
    """
    with StoredFile(path) as file:
        file.check()
        header = _header(file)
        if model is None:
            architecture = header["architecture"]
            if not architecture:
                raise ValueError(
                    f"{path} does not name its architecture; pass a fresh model: load(path, model)"
                )
            model = _build(architecture).eval()
        _fill(model, file, header)
    return model


def read_weights(file: StoredFile) -> Iterator[tuple[str, QuantSparseWeight]]:
    """Name and weight of each compressed layer that stores one, decoded one after the other.

    Raises:
        ValueError: the file is damaged, or not one of placekern's.
    """
    header = _header(file)
    for entry in header["layers"]:
        if "shares" not in entry:
            yield entry["name"], _decode(file, entry, header["format"])


def _build(architecture: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):  # no memory for dense weights that are about to be replaced
        model = build_architecture(architecture["name"], architecture["kwargs"])
    # A buffer that no file holds has its value from the constructor, which meta threw away.
    kept = model.state_dict().keys()
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in kept):
        model = build_architecture(architecture["name"], architecture["kwargs"])
    return model


def _header(file: StoredFile) -> dict[str, Any]:
    path, text = file.path, file.metadata
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not one written by placekern.save")
    try:
        header = json.loads(text)
        version = header["format"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} has a damaged placekern header") from None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, this version of placekern reads 1 to {FORMAT_VERSION}; "
            "install a newer placekern"
        )
    sound = (
        isinstance(header.get("layers"), list)
        and isinstance(header.get("aliases"), dict)
        and all(isinstance(source, str) for source in header["aliases"].values())
        and all(_sound_entry(entry) for entry in header["layers"])
        and _sound_architecture(header.get("architecture"))
    )
    if not sound:
        raise ValueError(f"{path} has a damaged placekern header")
    return header


def _sound_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("kind"), str)
        and entry["kind"] in _KINDS
        and isinstance(entry.get("shape"), list)
        and len(entry["shape"]) == 2
        and all(type(value) is int for value in (*entry["shape"], entry.get("nnz")))
        and type(entry.get("bits")) is int
        and 1 <= entry["bits"] <= 8
        and isinstance(entry.get("shares", ""), str)
        and isinstance(entry.get("common", []), list)
        and all(type(code) is int for code in entry.get("common", []))
    )


def _sound_architecture(architecture: Any) -> bool:
    return architecture is None or (
        isinstance(architecture, dict)
        and isinstance(architecture.get("name"), str)
        and isinstance(architecture.get("kwargs"), dict)
    )


def _fill(model: nn.Module, file: StoredFile, header: dict[str, Any]) -> None:
    path, names = file.path, file.names
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, QuantSparseModule] = {}
    for entry in header["layers"]:
        name = entry["name"]
        module = modules.get(name)
        _check_fits(entry, module, file)
        if "shares" in entry:
            if entry["shares"] not in layers:
                raise ValueError(f"{path}: {name} shares the weight of an unknown layer")
            weight = layers[entry["shares"]].weight
        else:
            weight = _decode(file, entry, header["format"])
            like = module.codebook if isinstance(module, QuantSparseModule) else module.weight
            book = weight.codebook if like.is_meta else weight.codebook.to(like.dtype)
            weight.codebook = nn.Parameter(book, requires_grad=like.requires_grad)
        layer = _KINDS[entry["kind"]][1].from_weight(weight, module)
        layer.relu = bool(entry.get("relu", False))
        device = next(module.parameters()).device
        if device.type != "meta":
            layer.to(device)
        if module is model:
            _load_into(model, layer, path)
            layer = model
        replace_module(model, module, layer)
        modules = {key: layer if value is module else value for key, value in modules.items()}
        layers[name] = layer

    compressed = {
        _key(name, array)
        for name, module in modules.items()
        if any(module is layer for layer in layers.values())
        for array in (*_ARRAYS, *_EXTRA)
    }
    plain = {name: file.tensor(name) for name in names - compressed}
    aliases = {alias: name for alias, name in header["aliases"].items() if name in plain}
    plain |= {alias: plain[name] for alias, name in aliases.items()}
    assign = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    try:
        result = model.load_state_dict(plain, strict=False, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the model: {reason}") from None
    missing = [key for key in result.missing_keys if key not in compressed]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} does not fit the model: missing in the file {missing or 'nothing'}, "
            f"missing in the model {result.unexpected_keys or 'nothing'}"
        )
    if assign:  # which makes a parameter of its own for each name
        for alias, name in aliases.items():
            owner, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(owner), attribute, _attribute(model, name))


def _decode(file: StoredFile, entry: dict[str, Any], version: int) -> QuantSparseWeight:
    name, shape = entry["name"], tuple(entry["shape"])
    arguments: dict[str, Any] = {}
    if version == 1:  # positions as they lie in memory, and one code a byte
        nnz = min(max(entry["nnz"], 0), shape[0] * shape[1])
        arguments = {
            "coding": packing.choose_layout(*shape, nnz).name.lower(),
            "codes_per_byte": 1,
        }
    elif entry.get("positions") in streams.CODINGS:
        arguments = {"coding": entry["positions"]}
        if entry.get("common"):
            arguments["common"] = entry["common"]
            arguments["rare"] = file.section(_key(name, "rare"))
    else:
        raise ValueError(
            f"{file.path}: the header writes positions of {name} as {entry.get('positions')!r}, "
            f"expected one of {', '.join(streams.CODINGS)}"
        )
    return streams.decode(
        name,
        shape,
        entry["bits"],
        entry["nnz"],
        file.section(_key(name, "positions")),
        file.section(_key(name, "codes")),
        file.tensor(_key(name, "codebook")).clone(),  # which must not keep the file mapped
        **arguments,
    )


def _attribute(model: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _load_into(model: nn.Module, layer: QuantSparseModule, path: str | os.PathLike[str]) -> None:
    """For a model that is itself a layer: it cannot be replaced, but takes the weight."""
    if not isinstance(model, QuantSparseModule) or model.bits != layer.bits:
        raise ValueError(
            f"{path} holds a single {layer.bits}-bit layer, which cannot take the place of a "
            f"{type(model).__name__} in place; load into a compressed layer of the same bits"
        )
    if model.group_size != layer.group_size:
        raise ValueError(
            f"{path} holds a single layer with a codebook for each {layer.group_size} output "
            f"channels, but the model's is for {model.group_size}; load into a layer made with "
            f"group_size={layer.group_size}"
        )
    model.weight = layer.weight
    model.relu = layer.relu


def _check_fits(entry: dict[str, Any], module: nn.Module | None, file: StoredFile) -> None:
    name, path = entry["name"], file.path
    dense, compressed = _KINDS[entry["kind"]]
    if not isinstance(module, (dense, compressed)):
        found = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{path}: {name} is a compressed {entry['kind']}, but the model has {found} there"
        )
    weight = module.weight
    shape = [weight.shape[0], weight.shape[1:].numel()] if isinstance(weight, Tensor) else None
    expected = shape or list(weight.shape)
    if entry["shape"] != expected:
        raise ValueError(f"{path}: {name} is {entry['shape']}, but the model's is {expected}")
    bias = _key(name, "bias")
    if module.bias is not None and bias in file.names and file.shape(bias) != (expected[0],):
        # A matrix without columns has no streams that would prove its number of rows.
        raise ValueError(
            f"{path}: size mismatch for {bias}, {list(file.shape(bias))} for {expected[0]} rows"
        )
