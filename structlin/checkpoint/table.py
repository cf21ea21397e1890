"""The layer table in a folder that transformers writes: in its config.json, beside tensors that it stores itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structlin.checkpoint import _manifest, _skeleton
from structlin.checkpoint._directory import INDEX, MANIFEST, CheckpointError, read_json
from structlin.checkpoint._manifest import FIELDS, Checkpoint
from structlin.checkpoint.tensors import Stored, read_headers
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.factored import Factored

CONFIG = "config.json"
METHOD = "structlin"  # the quant_method of the config
TABLE_FIELDS = {
    key: FIELDS[key] for key in ("format_version", "structlin_version", "layers", "shared_layers", "aliases")
}


def table_of(model: nn.Module) -> dict[str, Any]:
    """Return the structured layers of a model as JSON data, with the further names of layers and of their tensors."""
    modules = [*model.named_modules(remove_duplicate=False)]
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
    _manifest.check_names(replace(table, tensors=firsts))
    limit = max(limit, _manifest.SMALL)
    for name, layer in table.layers.items():
        if max(layer.in_features, layer.out_features) > limit:
            size = f"{layer.out_features} x {layer.in_features}"
            raise CheckpointError(f"layer {name!r}: {size}; the largest axis of the model is {limit}")
        _manifest.check_equation(name, layer)
        _manifest.check_resolved(name, layer)
    return table


def _table(document: Any, limit: int, where: str) -> Checkpoint:
    _manifest.check_document(document, TABLE_FIELDS, where)
    same = {key: document[key] for key in ("shared_layers", "aliases", "structlin_version")}
    layers = _manifest.decoded_layers(document, limit)
    return Checkpoint(directory=Path(), tensors={}, layers=layers, shards={}, metadata={}, **same)


def replaced_weights(model: nn.Module, layers: Iterable[str]) -> Iterator[str]:
    """Names of the dense weights that layers replaced: their own, or that of the embedding that they stand in."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        parent = _owner(name)
        yield f"{parent if isinstance(modules[parent], StructuredEmbedding) else name}.weight"


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
        name: replace(layer, dtype=_dtype(old.get(name, old.get(_owner(name))), layer.dtype))
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
    limit = max((size for stored in tensors.values() for size in stored.shape), default=1)
    table = {key: value for key, value in document.items() if key != "quant_method"}
    checkpoint = replace(
        _table(table, limit, str(directory / CONFIG)), directory=directory, shards=dict.fromkeys(shards)
    )
    # The weights that layers replaced are there as single NaNs; "linear" is the layer of an embedding.
    names = {*checkpoint.layers, *(_owner(name) for name in checkpoint.layers if _part(name) == "linear")}
    replaced = {f"{name}.weight" for name in names}
    stored = {name: tensor for name, tensor in tensors.items() if name not in replaced or tensor.shape != (1,)}
    aliases = {**_dense_ties(skeleton, stored), **checkpoint.aliases}
    checkpoint = replace(checkpoint, tensors=stored, aliases=aliases)
    _manifest.check_names(checkpoint)
    _manifest.check_tensors(checkpoint)
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


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _dtype(module: nn.Module | None, default: torch.dtype) -> torch.dtype:
    return default if module is None else next((p.dtype for p in module.parameters()), default)
