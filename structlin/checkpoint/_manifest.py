"""structlin.json: the structured layers of a checkpoint and the names that share a tensor, checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from structlin.checkpoint._directory import MANIFEST, CheckpointError, explaining, read_json
from structlin.checkpoint.tensors import LARGEST_AXIS, MOST_AXES, Stored, read_headers
from structlin.equation.structure import Structure, hyperparameters, registered

FORMAT_VERSION = 1
FIELDS = {
    "format_version": int, "structlin_version": str, "layers": dict, "shared_layers": dict, "aliases": dict,
    "complex": list, "shards": dict, "metadata": dict,
}  # fmt: skip
STRUCTURE_FIELDS = {"kind": str, "hyperparameters": dict}
LAYER_FIELDS = STRUCTURE_FIELDS | {"in_features": int, "out_features": int, "bias": bool, "dtype": str}
DTYPE_NAMES = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
LAYER_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}

# A small file must not ask for much work. Hyperparameters are at most SMALL or the largest stored axis. Planning takes
# seconds for a chain of MOST_FACTORS, and grows with a high power of the length.
SMALL = 1024
MOST_FACTORS = 128


@dataclass(frozen=True)
class Layer:
    """The arguments that build a structured layer."""

    structure: Structure
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors by name."""
        spec = self.structure.spec(self.in_features, self.out_features)
        shapes = {factor.name: shape for factor, shape in zip(spec.factors, spec.shapes, strict=True)}
        return shapes | {"bias": (self.out_features,)} if self.bias else shapes


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: the contents of structlin.json, and the headers of the shards."""

    directory: Path
    tensors: Mapping[str, Stored]
    layers: Mapping[str, Layer]  # by dotted name
    shared_layers: Mapping[str, str]  # further names of layers, each with the first
    aliases: Mapping[str, str]  # further names of tensors, each with the stored one
    shards: Mapping[str, str]  # sha256 by file name
    metadata: Mapping[str, Any]
    structlin_version: str  # of the writer

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        return self.aliases.get(name, name)


def dotted(path: str, name: str) -> str:
    """Join the name of a module, "" for the root, and that of its tensor."""
    return f"{path}.{name}" if path else name


def write(directory: Path, **fields: Any) -> None:
    """Write structlin.json from its fields; the versions are added."""
    try:
        by = version("structlin")
    except PackageNotFoundError:  # a source tree that is not installed
        by = "unknown"
    document = {"format_version": FORMAT_VERSION, "structlin_version": by, **fields, "layers": {}}
    for name, layer in fields["layers"].items():
        sizes = {key: getattr(layer, key) for key in ("in_features", "out_features", "bias")}
        dtype = {"dtype": str(layer.dtype).removeprefix("torch.")}
        document["layers"][name] = _encoded(name, layer.structure) | sizes | dtype
    with explaining("metadata or a hyperparameter cannot be written as JSON; use numbers, strings, None, lists, dicts"):
        text = json.dumps(document, indent=2, allow_nan=False)
    (directory / MANIFEST).write_text(text, "utf-8")


def read(directory: Path) -> Checkpoint:
    """Read structlin.json and the headers of the shards, and check each against the other."""
    document = read_json(directory, MANIFEST)
    where = str(directory / MANIFEST)
    found = document.get("format_version") if isinstance(document, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format_version {found!r}; this structlin reads {FORMAT_VERSION}, update it")
    _check_fields(document, FIELDS, where)
    for key in ("shared_layers", "aliases", "shards", "complex"):
        values = document[key].values() if FIELDS[key] is dict else document[key]
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise CheckpointError(f"{where}: {key}: found {type(wrong[0]).__name__}, expected a string")
    tensors = read_headers(directory, list(document["shards"]), set(document["complex"]))
    limit = max([SMALL, *(size for stored in tensors.values() for size in stored.shape)])
    layers = {name: _decoded_layer(f"layer {name!r}", entry, limit) for name, entry in document["layers"].items()}
    same = {key: document[key] for key in ("shared_layers", "aliases", "shards", "metadata", "structlin_version")}
    checkpoint = Checkpoint(directory, tensors, layers, **same)
    _check_names(checkpoint)
    for name, layer in layers.items():
        _check_layer(name, layer, checkpoint)
    for key in (*tensors, *checkpoint.aliases):
        owner, _, part = key.rpartition(".")
        if owner in layers and part not in (has := layers[owner].shapes):
            problem = f"tensor {key!r} is unexpected; {layers[owner].structure} has {sorted(has)}"
            raise CheckpointError(f"layer {owner!r}: {problem}")
    for name, first in checkpoint.shared_layers.items():
        for part in layers[first].shapes:
            key, expected = dotted(name, part), dotted(first, part)
            if checkpoint.aliases.get(key) != checkpoint.stored_name(expected):
                raise CheckpointError(f"layer {name!r} is {first!r}, but tensor {key!r} is not {expected!r}")
    return checkpoint


def _encoded(name: str, value: Any) -> Any:
    """Convert a hyperparameter to JSON; one that is itself a structure (a summand, say) becomes an object."""
    if isinstance(value, Structure):
        if registered().get(value.name) is not type(value):
            raise CheckpointError(f"layer {name!r}: {type(value).__name__} is not registered; decorate with @register")
        fields = {key: _encoded(name, field) for key, field in hyperparameters(value).items()}
        return {"kind": value.name, "hyperparameters": fields}
    return [_encoded(name, item) for item in value] if isinstance(value, tuple) else value


def _decoded_layer(where: str, entry: Any, limit: int) -> Layer:
    _check_fields(entry, LAYER_FIELDS, where)
    for side in ("in_features", "out_features"):
        if not 1 <= entry[side] <= LARGEST_AXIS:
            raise CheckpointError(f"{where}: {side}={entry[side]}; expected 1 to {LARGEST_AXIS}")
    if entry["dtype"] not in LAYER_DTYPES:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r}; expected one of {sorted(LAYER_DTYPES)}")
    structure = _decoded({key: entry[key] for key in STRUCTURE_FIELDS}, limit, where)
    return Layer(structure, entry["in_features"], entry["out_features"], entry["bias"], LAYER_DTYPES[entry["dtype"]])


def _decoded(value: Any, limit: int, where: str) -> Any:
    if isinstance(value, dict):
        _check_fields(value, STRUCTURE_FIELDS, where)
        kind = registered().get(value["kind"])
        if kind is None:
            problem = f"{where}: kind {value['kind']!r} is not registered; import the module that defines it"
            raise CheckpointError(f"{problem}, or use one of {sorted(registered())}")
        fields = {key: _decoded(field, limit, f"{where}: {key}") for key, field in value["hyperparameters"].items()}
        with explaining(f"{where}: {value['kind']} does not take {fields}"):  # third-party code may raise anything
            return kind(**fields)
    if isinstance(value, list):
        if len(value) > MOST_AXES:
            raise CheckpointError(f"{where}: {len(value)} items; expected at most {MOST_AXES}")
        return tuple(_decoded(item, limit, where) for item in value)
    if isinstance(value, int) and abs(value) > limit:
        raise CheckpointError(f"{where}: {value} exceeds {limit}, the largest size that the tensors warrant")
    return value


def _check_fields(value: Any, kinds: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {type(value).__name__}, expected an object with {sorted(kinds)}")
    if set(value) != set(kinds):
        raise CheckpointError(f"{where}: found the fields {sorted(value)[:20]}, expected {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:  # not isinstance: True is no size
            raise CheckpointError(f"{where}: {key} is {type(value[key]).__name__}, expected {kind.__name__}")


def _check_names(checkpoint: Checkpoint) -> None:
    layers, shared = checkpoint.layers, checkpoint.shared_layers
    tensors, aliases = checkpoint.tensors, checkpoint.aliases
    for name in (*layers, *shared, *tensors, *aliases):
        # Names are passed to setattr. A root that is a layer itself is "".
        if any(not part or part.startswith("__") for part in name.split(".")) and not (name == "" and name in layers):
            raise CheckpointError(f"name {name!r}; expected parts that are not empty and do not begin with '__'")
    for kind, names, firsts in (("layer", shared, layers), ("tensor", aliases, tensors)):
        for name, first in names.items():
            if first not in firsts or name in firsts:
                raise CheckpointError(f"{kind} {name!r} is another name of {first!r}; expected {kind}s stored once")


def _check_layer(name: str, layer: Layer, checkpoint: Checkpoint) -> None:
    where, structure = f"layer {name!r}", layer.structure
    with explaining(f"{where}: {structure} has no equation"):  # third-party code, or sizes that overflow
        shapes = layer.shapes
    if len(shapes) > MOST_FACTORS:
        raise CheckpointError(f"{where}: {structure} has {len(shapes)} tensors; expected up to {MOST_FACTORS}")
    for part, shape in shapes.items():
        key = dotted(name, part)
        stored = checkpoint.tensors.get(checkpoint.stored_name(key))
        if stored is None:
            raise CheckpointError(f"{where}: tensor {key!r} is missing; {structure} needs {sorted(shapes)}")
        if stored.shape != shape or stored.dtype != layer.dtype:
            found = f"tensor {key!r} in {stored.shard} is {stored.dtype} {stored.shape}"
            raise CheckpointError(f"{where}: {found}, expected {layer.dtype} {shape}")
    with explaining(f"{where}: {structure} does not fit"):
        resolved = structure.resolve(layer.in_features, layer.out_features)
    if resolved != structure:
        raise CheckpointError(f"{where}: found {structure}, expected the resolved {resolved}")
