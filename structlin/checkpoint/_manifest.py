"""structlin.json: which layers a checkpoint holds and which names share a tensor; read with every check made."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from structlin.checkpoint import _files
from structlin.checkpoint._files import Stored
from structlin.checkpoint.tensors import CheckpointError
from structlin.equation.structure import Structure, hyperparameters, registered

MANIFEST = "structlin.json"
FORMAT_VERSION = 1
# No number of a structure is larger than this or the largest axis stored: a file must not ask for more work than its
# size warrants.
SMALL = 1024
MOST_FACTORS = 128  # planning takes seconds for chains of this length, and grows with a high power of it

LAYER_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What is needed to build a structured layer."""

    structure: Structure
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors by name."""
        spec = self.structure.spec(self.in_features, self.out_features)
        shapes = {factor.name: shape for factor, shape in zip(spec.factors, spec.shapes, strict=True)}
        return shapes | {"bias": (self.out_features,)} if self.bias else shapes


@dataclass(frozen=True)
class Manifest:
    """The contents of structlin.json.

    Args:
        layers: the structured layers by dotted name.
        shared_layers: further names of layers, each with the first.
        aliases: further names of tensors, each with the stored one.
        complex: names of the tensors that are stored as pairs of floats.
        shards: sha256 by file name.
        metadata: the user's.
        structlin_version: of the writer.
    """

    layers: Mapping[str, Layer]
    shared_layers: Mapping[str, str]
    aliases: Mapping[str, str]
    complex: tuple[str, ...]
    shards: Mapping[str, str]
    metadata: Mapping[str, Any]
    structlin_version: str


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: the manifest and what the headers say."""

    directory: Path
    manifest: Manifest
    tensors: Mapping[str, Stored]


def write(directory: Path, **fields: Any) -> None:
    """Write structlin.json from the fields of a `Manifest` (all but the version)."""
    document = {"format_version": FORMAT_VERSION, "structlin_version": _version(), **fields}
    document["layers"] = {name: _encoded_layer(name, layer) for name, layer in fields["layers"].items()}
    try:
        text = json.dumps(document, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"metadata or a hyperparameter cannot be written as JSON: {error}; use numbers, strings, None, lists, dicts"
        ) from error
    (directory / MANIFEST).write_text(text, "utf-8")


def read(directory: Path) -> Checkpoint:
    """Read structlin.json and the headers of the shards, and check one against the other.

    Raises:
        CheckpointError: naming the layer or file, what was found and what was expected.
    """
    document = _files.read_json(directory, MANIFEST)
    where = str(directory / MANIFEST)
    found = document.get("format_version") if isinstance(document, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format_version {found!r}; this structlin reads {FORMAT_VERSION}, update it")
    names = [field.name for field in dataclasses.fields(Manifest)]
    kinds: dict[str, type] = dict.fromkeys(names, dict) | {"complex": list, "structlin_version": str}
    _check_fields(document, {"format_version": int, **kinds}, where)
    for key in ("shared_layers", "aliases", "shards"):
        _check_strings(document[key].values(), f"{where}: {key}")
    _check_strings(document["complex"], f"{where}: complex")
    tensors = _files.read_headers(directory, list(document["shards"]), set(document["complex"]))
    limit = max([SMALL, *(size for stored in tensors.values() for size in stored.shape)])
    layers = {name: _decoded_layer(name, entry, limit) for name, entry in document["layers"].items()}
    fields = {name: document[name] for name in names}
    manifest = Manifest(**fields | {"layers": layers, "complex": tuple(document["complex"])})
    _check_names(manifest, tensors)
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for key in (*tensors, *manifest.aliases):
        owner, _, part = key.rpartition(".")
        parts[owner].add(part)
    for name, layer in layers.items():
        _check_tensors(name, layer, manifest, tensors)
        _check_extras(name, parts[name] - set(layer.shapes()), layer)
        _check_resolved(name, layer)
    for name, first in manifest.shared_layers.items():
        _check_shared(name, first, layers[first], manifest)
    return Checkpoint(directory, manifest, tensors)


def _version() -> str:
    try:
        return version("structlin")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


# Layers --------------------------------------------------------------------------------------------------------------


def _encoded_layer(name: str, layer: Layer) -> dict[str, Any]:
    return {
        **_encoded(name, layer.structure),
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def _encoded(name: str, value: Any) -> Any:
    """Write a hyperparameter as JSON; a structure within a structure (a summand, say) like the structure itself."""
    if isinstance(value, Structure):
        if registered().get(value.name) is not type(value):
            raise CheckpointError(
                f"layer {name!r}: {type(value).__name__} is not registered; decorate it with @register"
            )
        fields = {key: _encoded(name, field) for key, field in hyperparameters(value).items()}
        return {"kind": value.name, "hyperparameters": fields}
    return [_encoded(name, item) for item in value] if isinstance(value, tuple) else value


def _decoded_layer(name: str, entry: Any, limit: int) -> Layer:
    where = f"layer {name!r}"
    kinds = {"kind": str, "hyperparameters": dict, "in_features": int, "out_features": int, "bias": bool, "dtype": str}
    _check_fields(entry, kinds, where)
    for side in ("in_features", "out_features"):
        if not 1 <= entry[side] <= _files.LARGEST_AXIS:
            raise CheckpointError(f"{where}: {side}={entry[side]}; expected 1 to {_files.LARGEST_AXIS}")
    if entry["dtype"] not in LAYER_DTYPES:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r}; expected one of {sorted(LAYER_DTYPES)}")
    structure = _decoded({key: entry[key] for key in ("kind", "hyperparameters")}, limit, where)
    return Layer(structure, entry["in_features"], entry["out_features"], entry["bias"], LAYER_DTYPES[entry["dtype"]])


def _decoded(value: Any, limit: int, where: str) -> Any:
    if isinstance(value, dict):
        _check_fields(value, {"kind": str, "hyperparameters": dict}, where)
        if value["kind"] not in registered():
            raise CheckpointError(
                f"{where}: kind {value['kind']!r} is not registered; import the module that defines it, "
                f"or use one of {sorted(registered())}"
            )
        fields = {key: _decoded(field, limit, f"{where}: {key}") for key, field in value["hyperparameters"].items()}
        try:
            return registered()[value["kind"]](**fields)
        except Exception as error:  # a structure of a third party may raise anything
            raise CheckpointError(f"{where}: {value['kind']} does not take {fields}: {error}") from error
    if isinstance(value, list):
        if len(value) > _files.MOST_AXES:
            raise CheckpointError(f"{where}: {len(value)} items; expected at most {_files.MOST_AXES}")
        return tuple(_decoded(item, limit, where) for item in value)
    if isinstance(value, int) and abs(value) > limit:
        raise CheckpointError(f"{where}: {value} exceeds {limit}, the largest size that the tensors warrant")
    return value


# Checks --------------------------------------------------------------------------------------------------------------


def _check_fields(value: Any, kinds: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {type(value).__name__}, expected an object with {sorted(kinds)}")
    if set(value) != set(kinds):
        raise CheckpointError(f"{where}: found the fields {sorted(value)[:20]}, expected {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:
            raise CheckpointError(f"{where}: {key} is {type(value[key]).__name__}, expected {kind.__name__}")


def _check_strings(values: Iterable[Any], where: str) -> None:
    for value in values:
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: found {type(value).__name__}, expected a string")


def _check_names(manifest: Manifest, tensors: Collection[str]) -> None:
    layers, shared, aliases = manifest.layers, manifest.shared_layers, manifest.aliases
    for name in (*layers, *shared, *tensors, *aliases):
        # The root is "", if it is a layer itself.
        if any(not part or part.startswith("__") for part in name.split(".")) and not (name == "" and name in layers):
            raise CheckpointError(f"name {name!r}; expected parts that are not empty and do not begin with '__'")
    for kind, names, firsts in (("layer", shared, layers), ("tensor", aliases, tensors)):
        for name, first in names.items():
            if first not in firsts or name in firsts:
                raise CheckpointError(f"{kind} {name!r} is another name of {first!r}; expected {kind}s stored once")


def _prefixed(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _shapes(name: str, layer: Layer) -> dict[str, tuple[int, ...]]:
    try:
        shapes = layer.shapes()
    except Exception as error:  # a structure of a third party may raise anything, an overflow included
        raise CheckpointError(f"layer {name!r}: {layer.structure} has no equation: {error!r}") from error
    if len(shapes) > MOST_FACTORS:
        raise CheckpointError(
            f"layer {name!r}: {layer.structure} has {len(shapes)} tensors, expected up to {MOST_FACTORS}"
        )
    return shapes


def _check_tensors(name: str, layer: Layer, manifest: Manifest, tensors: Mapping[str, Stored]) -> None:
    shapes = _shapes(name, layer)
    for part, shape in shapes.items():
        key = _prefixed(name, part)
        stored = tensors.get(manifest.aliases.get(key, key))
        if stored is None:
            raise CheckpointError(
                f"layer {name!r}: tensor {key!r} is missing; {layer.structure} needs {sorted(shapes)}"
            )
        if stored.shape != shape or stored.dtype != layer.dtype:
            raise CheckpointError(
                f"layer {name!r}: tensor {key!r} in {stored.shard} is {stored.dtype} {stored.shape}, "
                f"expected {layer.dtype} {shape}"
            )


def _check_extras(name: str, extras: set[str], layer: Layer) -> None:
    if extras:
        has = sorted(layer.shapes())
        raise CheckpointError(
            f"layer {name!r}: tensors {sorted(extras)[:5]} are unexpected; {layer.structure} has {has}"
        )


def _check_resolved(name: str, layer: Layer) -> None:
    try:
        resolved = layer.structure.resolve(layer.in_features, layer.out_features)
    except Exception as error:  # a structure of a third party may raise anything
        raise CheckpointError(f"layer {name!r}: {layer.structure} does not fit: {error!r}") from error
    if resolved != layer.structure:
        raise CheckpointError(f"layer {name!r}: found {layer.structure}, expected the resolved {resolved}")


def _check_shared(name: str, first: str, layer: Layer, manifest: Manifest) -> None:
    for part in layer.shapes():
        key, expected = _prefixed(name, part), _prefixed(first, part)
        if manifest.aliases.get(key) != manifest.aliases.get(expected, expected):
            raise CheckpointError(f"layer {name!r} is {first!r}, but tensor {key!r} is not {expected!r}")
