"""The layer table alone, for a format that keeps the tensors itself, such as the folders of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from structlin.checkpoint import _manifest, _skeleton
from structlin.checkpoint._manifest import Checkpoint, Manifest
from structlin.checkpoint.api import _structured
from structlin.checkpoint.tensors import CheckpointError


def table_of(model: nn.Module) -> dict[str, Any]:
    """Write the structured layers of a model as JSON data, with the names that share a layer or one of its tensors."""
    layers, shared_layers = _structured(model)
    names = {*layers, *shared_layers}
    tensors: dict[int, list[str]] = {}
    for slot in _skeleton.slots_of(model.named_modules(remove_duplicate=False)):
        tensors.setdefault(id(slot.tensor), []).append(slot.name)
    aliases = {
        other: found[0]
        for found in tensors.values()
        if any(name.rpartition(".")[0] in names for name in found)
        for other in found[1:]
    }
    return {
        "format_version": _manifest.FORMAT_VERSION,
        "structlin_version": _manifest._version(),
        "layers": {name: _manifest._encoded_layer(name, layer) for name, layer in layers.items()},
        "shared_layers": shared_layers,
        "aliases": aliases,
    }


def read_table(document: Any, limit: int, where: str) -> Manifest:
    """Read what `table_of` wrote, every kind, size and name checked.

    Args:
        document: the JSON data.
        limit: the largest axis of the model to be: no size and no number of a structure exceeds it (or 1024).
        where: names the document in errors.
    Raises:
        CheckpointError: naming the layer, what was found and what was expected.
    """
    found = document.get("format_version") if isinstance(document, dict) else None
    if type(found) is not int or found != _manifest.FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {found!r}; this structlin reads {_manifest.FORMAT_VERSION}, update it"
        )
    kinds = dict.fromkeys(("layers", "shared_layers", "aliases"), dict)
    _manifest._check_fields(document, {"format_version": int, "structlin_version": str, **kinds}, where)
    for key in ("shared_layers", "aliases"):
        _manifest._check_strings(document[key].values(), f"{where}: {key}")
    limit = max(limit, _manifest.SMALL)
    layers = {name: _manifest._decoded_layer(name, entry, limit) for name, entry in document["layers"].items()}
    table = Manifest(layers, document["shared_layers"], document["aliases"], (), {}, {}, document["structlin_version"])
    # The tensors are not known here: what aliases stand for is checked against the model.
    _manifest._check_names(table, set(table.aliases.values()))
    for name, layer in layers.items():
        if max(layer.in_features, layer.out_features) > limit:
            raise CheckpointError(
                f"layer {name!r}: {layer.out_features} x {layer.in_features}; the model's largest axis is {limit}"
            )
        _manifest._shapes(name, layer)
        _manifest._check_resolved(name, layer)
    return table


def replace_layers(skeleton: nn.Module, table: Manifest) -> None:
    """Put the layers of a table, on the meta device and in the skeleton's dtypes, in place of the dense ones.

    Args:
        skeleton: the dense model, on the meta device; unchanged if anything fails.
        table: of `read_table`.
    Raises:
        CheckpointError: if a layer does not fit the skeleton.
    """
    old = dict(skeleton.named_modules(remove_duplicate=False))
    layers = {
        name: replace(layer, dtype=_dtype(old.get(name, old.get(name.rpartition(".")[0])), layer.dtype))
        for name, layer in table.layers.items()
    }
    table = replace(table, layers=layers)
    tree = _skeleton.tree_of(skeleton, Checkpoint(Path(), table, {}))
    _check_aliases(tree, table.aliases)
    _skeleton.assign(_skeleton.swaps(skeleton, tree))
    for name, first in table.aliases.items():
        owner, _, part = name.rpartition(".")
        source, _, key = first.rpartition(".")
        setattr(skeleton.get_submodule(owner), part, getattr(skeleton.get_submodule(source), key))


def _dtype(module: nn.Module | None, default: Any) -> Any:
    return default if module is None else next((p.dtype for p in module.parameters()), default)


def _check_aliases(tree: Mapping[str, nn.Module], aliases: Mapping[str, str]) -> None:
    """Refuse aliases that are no tensors of the same shape and kind in the model to be."""
    shapes = {slot.name: (slot.tensor.shape, type(slot.tensor)) for slot in _skeleton.slots_of(tree.items())}
    for name, first in aliases.items():
        if name not in shapes or shapes[name] != shapes.get(first):
            raise CheckpointError(f"tensor {name!r} is another name of {first!r}; the model has no two such tensors")
