"""The layer table in a folder that transformers writes: in its config.json, beside tensors that it stores itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structlin.adapters import Origin
from structlin.checkpoint import _manifest, _skeleton, bounded
from structlin.checkpoint._directory import CONFIG, INDEX, MANIFEST, CheckpointError, explaining, naming, read_json
from structlin.checkpoint._manifest import FIELDS, Checkpoint, dotted
from structlin.checkpoint.tensors import Stored, read_headers
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.factored import Factored

METHOD = "structlin"  # the quant_method of the config
TABLE_FIELDS = {
    key: FIELDS[key] for key in ("format_version", "structlin_version", "layers", "shared_layers", "aliases")
}

# Called with the skeleton, if there is one, and a folder's config. Each returns a function from the name of a stored
# tensor to that in the model: transformers renames tensors on save, and structlin.hf knows how.
name_readers: list[Callable[[nn.Module | None, dict[str, Any]], Callable[[str], str]]] = []


def table_of(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Return the structured layers of a model as JSON data, with the further names of layers and of their tensors.

    Args:
        model: or a part of one.
        prefix: dotted name of that part.
    """
    modules = [*model.named_modules(prefix=prefix, remove_duplicate=False)]
    layers, shared = _skeleton.by_first_name((n, m) for n, m in modules if isinstance(m, Factored))
    _, further = _skeleton.by_first_name((slot.name, slot.tensor) for slot in _skeleton.slots_of(modules))
    names = {*layers, *shared}
    structured = {
        first for pair in further.items() for first in pair[1:] if any(_owner(name) in names for name in pair)
    }
    return _manifest.document_of(
        layers={name: _skeleton.described(layer) for name, layer in layers.items()},
        shared_layers=shared,
        aliases={name: first for name, first in further.items() if first in structured},
    )


def write_config(model: nn.Module, directory: Path) -> None:
    """Write the config of a model of transformers with the table of its structured layers; other models have none."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    with naming(directory / CONFIG):
        config.save_pretrained(directory)
    record = json.loads((directory / CONFIG).read_text("utf-8"))
    record["architectures"] = record.get("architectures") or [type(model).__name__]
    table = table_of(model)
    if table["layers"]:
        record["quantization_config"] = {**table, "quant_method": METHOD}
    with naming(directory / CONFIG):
        (directory / CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def read_table(document: Any, limit: int, where: str) -> Checkpoint:
    """Read what `table_of` wrote, every kind, size and name checked, as a checkpoint without tensors.

    Args:
        document: the JSON data.
        limit: the largest axis of the model to be: no size and no number of a structure exceeds it (or 1024).
        where: names the document in errors.
    Raises:
        CheckpointError: naming the layer, what was found and what was expected.
    """
    table = _table(document, limit, where)
    # The tensors are not known here: what aliases stand for is checked against the model.
    firsts = dict.fromkeys(table.aliases.values(), Stored("", (), torch.float32))
    _manifest.check_names(table.layers, table.shared_layers, firsts, table.aliases)
    limit = max(limit, _manifest.SMALL)
    for name, layer in table.layers.items():
        if max(layer.in_features, layer.out_features) > limit:
            size = f"{layer.out_features} x {layer.in_features}"
            raise CheckpointError(f"layer {name!r}: {size}; the largest axis of the model is {limit}")
        _manifest.check_equation(name, layer)
        _manifest.check_resolved(name, layer)
    return table


def _table(document: Any, limit: int, where: str) -> Checkpoint:
    with explaining(where):
        bounded.check_depth(document)
    _manifest.check_document(document, TABLE_FIELDS, where)
    same = {key: document[key] for key in ("shared_layers", "aliases", "structlin_version")}
    layers = _manifest.decoded_layers(document, limit)
    return Checkpoint(directory=Path(), tensors={}, layers=layers, shards={}, metadata={}, **same)


def replaced_weights(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the names of the dense weights that layers replaced, each with a shape that no such weight has.

    The shapes are the smallest that transformers can still split into the tensors of single experts.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[int, ...]] = {}
    for name in layers:
        holder, path = name, ""
        while holder and not isinstance(vars(modules[holder]).get("origin"), Origin):
            holder = _owner(holder)
            path = name[len(holder) :].lstrip(".")
        origin = vars(modules[holder]).get("origin")
        if isinstance(origin, Origin) and path in (leaves := origin.adapter.leaves(origin.shell)):
            weight = leaves[path][0]
            stacked = origin.shell.get_parameter(weight).ndim == 3
            found[dotted(holder, weight)] = ((1, 2, 1) if path == "gate_up" else (1, 1, 1)) if stacked else (1,)
        else:
            parent = modules[_owner(name)]
            found[f"{_owner(name) if isinstance(parent, StructuredEmbedding) else name}.weight"] = (1,)
    return found


def replace_layers(skeleton: nn.Module, table: Checkpoint) -> None:
    """Put the layers of a table, on the meta device and in the skeleton's dtypes, in place of the dense ones.

    Args:
        skeleton: the dense model, on the meta device; unchanged if anything fails.
        table: of `read_table`.
    Raises:
        CheckpointError: if a layer does not fit the skeleton.
    """
    old = dict(skeleton.named_modules(remove_duplicate=False))
    layers = {
        name: replace(layer, dtype=_dtype(old[_skeleton.spot(name, old)[0]], layer.dtype))
        for name, layer in table.layers.items()
    }
    tree, _ = _skeleton.tree_of(old, replace(table, layers=layers))
    slots = {slot.name: (slot.tensor.shape, type(slot.tensor)) for slot in _skeleton.slots_of(tree.items())}
    for name, first in table.aliases.items():
        if name not in slots or slots[name] != slots.get(first):
            raise CheckpointError(f"tensor {name!r} is another name of {first!r}; the model has no two such tensors")
    _skeleton.assign(_skeleton.swaps(old, tree))
    for name, first in table.aliases.items():
        source = skeleton.get_submodule(_owner(first))
        setattr(skeleton.get_submodule(_owner(name)), _part(name), getattr(source, _part(first)))


def read_folder(directory: Path, skeleton: nn.Module | None) -> Checkpoint | None:
    """Read a folder of `save_pretrained` as a checkpoint, everything checked; None if it is none with a layer table.

    Args:
        directory: where its config.json and shards lie.
        skeleton: the model to fill: transformers stores dense weights that it ties under one name only.
    Raises:
        CheckpointError: naming the layer or file, what was found and what was expected.
    """
    if (directory / MANIFEST).exists() or not (directory / CONFIG).exists():
        return None
    config = read_json(directory, CONFIG)
    document = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(document, dict) or document.get("quant_method") != METHOD:
        return None
    shards = ["model.safetensors"]
    if (directory / INDEX).exists():
        index = read_json(directory, INDEX)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    tensors = read_headers(directory, shards, set())
    for reader in name_readers:
        named = reader(skeleton, config)
        tensors = {named(name): replace(stored, key=stored.key or name) for name, stored in tensors.items()}
    limit = _manifest.largest_axis(tensors)
    table = {key: value for key, value in document.items() if key != "quant_method"}
    checkpoint = replace(
        _table(table, limit, str(directory / CONFIG)), directory=directory, shards=dict.fromkeys(shards)
    )
    # The weights that layers replaced are there as NaNs of other shapes, under names that transformers may convert.
    dense = {} if skeleton is None else {slot.name: slot.tensor for slot in _skeleton.slots_of(_all_modules(skeleton))}
    stored = {name: tensor for name, tensor in tensors.items() if not _replaces(name, tensor, checkpoint, dense)}
    aliases = {**_dense_ties(skeleton, stored), **checkpoint.aliases}
    checkpoint = replace(checkpoint, tensors=stored, aliases=aliases)
    _manifest.check_names(checkpoint.layers, checkpoint.shared_layers, stored, aliases)
    try:
        _manifest.check_tensors(checkpoint)
    except CheckpointError as error:
        hint = (
            "; if transformers renames tensors of this model (Mixtral, say), import structlin.hf or use from_pretrained"
        )
        raise CheckpointError(f"{error}{hint}") from error
    return checkpoint


def _dense_ties(skeleton: nn.Module | None, stored: Mapping[str, Any]) -> dict[str, str]:
    """Names of tied tensors of a skeleton that are not stored, each with the name that is."""
    if skeleton is None:
        return {}
    names: dict[int, list[str]] = {}
    for slot in _skeleton.slots_of(skeleton.named_modules(remove_duplicate=False)):
        names.setdefault(id(slot.tensor), []).append(slot.name)
    return {
        name: first
        for found in names.values()
        for first in [name for name in found if name in stored][:1]
        for name in found
        if name not in stored
    }


def _replaces(name: str, tensor: Stored, checkpoint: Checkpoint, dense: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor only stands for a weight that a layer replaced."""
    if tensor.shape not in ((), (1,), (1, 1), (1, 1, 1), (1, 2, 1)):
        return False
    owner = _owner(name)
    if name == f"{owner}.weight" and (owner in checkpoint.layers or f"{owner}.linear" in checkpoint.layers):
        return True
    inside = any(layer == owner or owner.startswith(f"{layer}.") for layer in checkpoint.layers)
    return bool(dense) and not inside and (name not in dense or tuple(dense[name].shape) != tensor.shape)


def _all_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), default)
