"""structlin.json: the structured layers of a checkpoint and the names that share a tensor, checked when read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from structlin.checkpoint import bounded
from structlin.checkpoint._directory import MANIFEST, CheckpointError, explaining, naming, read_json
from structlin.checkpoint.tensors import MOST_TENSORS, Stored, read_headers
from structlin.equation.structure import Structure, hyperparameters, least_factors, registered
from structlin.equation.unfolding import unfoldings
from structlin.runtime.quantized import BITS, Format, check_format

FORMAT_VERSION = 1
FIELDS = {
    "format_version": int, "structlin_version": str, "layers": dict, "shared_layers": dict, "aliases": dict,
    "complex": list, "sentinels": list, "shards": dict, "metadata": dict,
}  # fmt: skip
STRUCTURE_FIELDS = {"kind": str, "hyperparameters": dict}
LAYER_FIELDS = STRUCTURE_FIELDS | {"in_features": int, "out_features": int, "bias": bool, "dtype": str}
FORMAT_FIELDS = {"bits": int, "columns": int, "rows": int}
OPTIONAL_FIELDS = {"experts": int, "formats": dict}  # of a layer
LAYER_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    )
}  # fmt: skip

# A small file must not ask for much work: hyperparameters are at most SMALL or the largest stored axis.
SMALL = 1024
MOST_SQUARES = 5_000_000  # of the numbers of factors, over all layers: 300 chains of 128, or a million layers of 2
# A tensor that stands for a weight that a layer replaced: transformers finds it to be of the wrong shape.
MOST_IN_SENTINEL = 2


@dataclass(frozen=True)
class Layer:
    """The arguments that build a structured layer.

    `experts` is the number of matrices of a stack, `formats` the integer formats of factors that are quantised.
    """

    structure: Structure
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    experts: int | None = None
    formats: Mapping[str, Format] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of its tensors by name.

        Raises:
            ValueError: if a format does not fit its factor.
        """
        spec = self.structure.spec(self.in_features, self.out_features)
        stack = () if self.experts is None else (self.experts,)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for factor, shape, unfolding in zip(spec.factors, spec.shapes, unfoldings(spec), strict=True):
            if form := self.formats.get(factor.name):
                check_format(form, unfolding)
                found[f"{factor.name}.codes"] = (*stack, *form.codes_shape(unfolding)), form.dtype
                found[f"{factor.name}.scale"] = (*stack, *form.scale_shape(unfolding)), self.dtype
            else:
                found[factor.name] = (*(stack if factor.learned else ()), *shape), self.dtype
        if unknown := self.formats.keys() - {factor.name for factor in spec.factors if factor.learned}:
            raise ValueError(f"formats of {sorted(unknown)}, which are no learned factors of {self.structure}")
        return found | {"bias": ((*stack, self.out_features), self.dtype)} if self.bias else found


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: the contents of structlin.json, and the headers of the shards.

    Args:
        directory: of its files.
        tensors: the stored tensors by name.
        layers: the structured layers by dotted name.
        shared_layers: further names of layers, each with the first.
        aliases: further names of tensors, each with the stored one.
        shards: sha256 by file name, None where it is not known.
        metadata: the user's.
        structlin_version: of the writer.
    """

    directory: Path
    tensors: Mapping[str, Stored]
    layers: Mapping[str, Layer]
    shared_layers: Mapping[str, str]
    aliases: Mapping[str, str]
    shards: Mapping[str, str | None]
    metadata: Mapping[str, Any]
    structlin_version: str

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        return self.aliases.get(name, name)


def dotted(path: str, name: str) -> str:
    """Join the name of a module, "" for the root, and that of its tensor."""
    return f"{path}.{name}" if path else name


def document_of(*, layers: Mapping[str, Layer], **fields: Any) -> dict[str, Any]:
    """Return the fields as JSON data, with the versions."""
    try:
        by = version("structlin")
    except PackageNotFoundError:  # a source tree that is not installed
        by = "unknown"
    entries = {
        name: {
            **_encoded(name, layer.structure),
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias,
            "dtype": str(layer.dtype).removeprefix("torch."),
            **({} if layer.experts is None else {"experts": layer.experts}),
            **({"formats": {key: asdict(form) for key, form in layer.formats.items()}} if layer.formats else {}),
        }
        for name, layer in layers.items()
    }
    return {"format_version": FORMAT_VERSION, "structlin_version": by, "layers": entries, **fields}


def write(directory: Path, **fields: Any) -> None:
    """Write structlin.json from its fields, all but the versions."""
    with explaining("metadata or a hyperparameter cannot be written as JSON; use numbers, strings, None, lists, dicts"):
        text = json.dumps(document_of(**fields), indent=2, allow_nan=False)
    with naming(directory / MANIFEST):
        (directory / MANIFEST).write_text(text, "utf-8")


def read(directory: Path) -> Checkpoint:
    """Read structlin.json and the headers of the shards, and check each against the other.

    Raises:
        CheckpointError: naming the layer or file, what was found and what was expected.
    """
    document = read_json(directory, MANIFEST)
    where = str(directory / MANIFEST)
    if isinstance(document, dict):
        document.setdefault("sentinels", [])  # files written before have none
    check_document(document, FIELDS, where)
    tensors = read_headers(directory, list(document["shards"]), set(document["complex"]))
    for name in document["sentinels"]:
        if (sentinel := tensors.pop(name, None)) is None or math.prod(sentinel.shape) > MOST_IN_SENTINEL:
            raise CheckpointError(f"{where}: sentinel {name!r}: expected a stored tensor of a number or two")
    check_names(document["layers"], document["shared_layers"], tensors, document["aliases"])
    same = {key: document[key] for key in ("shared_layers", "aliases", "shards", "metadata", "structlin_version")}
    checkpoint = Checkpoint(directory, tensors, decoded_layers(document, largest_axis(tensors)), **same)
    check_tensors(checkpoint)
    return checkpoint


def largest_axis(tensors: Mapping[str, Stored]) -> int:
    """Return the largest axis of the tensors that are not empty: a file has to hold what its numbers ask for."""
    return max((size for stored in tensors.values() if 0 not in stored.shape for size in stored.shape), default=1)


def check_document(document: Any, fields: Mapping[str, type], where: str) -> None:
    """Check the version and the fields of a document, and that names are strings."""
    found = document.get("format_version") if isinstance(document, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format_version {found!r}; this structlin reads {FORMAT_VERSION}, update it")
    _check_fields(document, fields, where)
    for key in {"shared_layers", "aliases", "shards", "complex", "sentinels"} & set(fields):
        values = document[key].values() if fields[key] is dict else document[key]
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise CheckpointError(f"{where}: {key}: found {type(wrong[0]).__name__}, expected a string")


def decoded_layers(document: Mapping[str, Any], limit: int) -> dict[str, Layer]:
    """Read the layers of a document; their hyperparameters are at most `limit`, or SMALL."""
    limit = max(limit, SMALL)
    for name in filter(None, document["layers"]):
        _check_name(name)  # first of all, as it stands in all that is said of the layer
    layers = {name: _decoded_layer(f"layer {name!r}", entry, limit) for name, entry in document["layers"].items()}
    # Equations are written in time that grows with the square of their length.
    if sum(least_factors(layer.structure) ** 2 for layer in layers.values()) > MOST_SQUARES:
        raise CheckpointError(
            f"{len(layers)} layers: too many of them are long chains of factors; split the checkpoint"
        )
    return layers


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the layers with the stored tensors."""
    layers = checkpoint.layers
    shapes = {name: _checked_layer(name, layer, checkpoint) for name, layer in layers.items()}
    for key in (*checkpoint.tensors, *checkpoint.aliases):
        direct = key.rpartition(".")[0]
        for owner in (direct, direct.rpartition(".")[0]):  # quantised factors are modules of their own
            part = key[len(owner) :].lstrip(".")
            if owner in layers and (owner or direct == owner) and part not in shapes[owner]:
                problem = f"tensor {key!r} is unexpected; {layers[owner].structure} has {sorted(shapes[owner])}"
                raise CheckpointError(f"layer {owner!r}: {problem}")
    for name, first in checkpoint.shared_layers.items():
        for part in shapes[first]:
            key, expected = dotted(name, part), dotted(first, part)
            if checkpoint.aliases.get(key) != checkpoint.stored_name(expected):
                raise CheckpointError(f"layer {name!r} is {first!r}, but tensor {key!r} is not {expected!r}")


# Layers --------------------------------------------------------------------------------------------------------------


def _encoded(name: str, value: Any) -> Any:
    """Convert a hyperparameter to JSON; one that is itself a structure (a summand, say) becomes an object."""
    if isinstance(value, Structure):
        if registered().get(value.name) is not type(value):
            raise CheckpointError(f"layer {name!r}: {type(value).__name__} is not registered; decorate with @register")
        fields = {key: _encoded(name, field) for key, field in hyperparameters(value).items()}
        return {"kind": value.name, "hyperparameters": fields}
    return [_encoded(name, item) for item in value] if isinstance(value, tuple) else value


def _decoded_layer(where: str, entry: Any, limit: int) -> Layer:
    optional = {key: kind for key, kind in OPTIONAL_FIELDS.items() if isinstance(entry, dict) and key in entry}
    _check_fields(entry, LAYER_FIELDS | optional, where)
    for side in ("in_features", "out_features", *(["experts"] if "experts" in optional else [])):
        if not 1 <= entry[side] <= bounded.LARGEST_AXIS:
            raise CheckpointError(f"{where}: {side}={entry[side]}; expected 1 to {bounded.LARGEST_AXIS}")
    if entry["dtype"] not in LAYER_DTYPES:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r}; expected one of {sorted(LAYER_DTYPES)}")
    try:
        bounded.check_record(entry["hyperparameters"], limit, where)
        structure = _decoded({key: entry[key] for key in STRUCTURE_FIELDS}, where)
        bounded.check_factors(structure, where)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    sizes = entry["in_features"], entry["out_features"]
    formats = _decoded_formats(entry.get("formats", {}), where)
    return Layer(structure, *sizes, entry["bias"], LAYER_DTYPES[entry["dtype"]], entry.get("experts"), formats)


def _decoded_formats(record: Mapping[str, Any], where: str) -> dict[str, Format]:
    if len(record) > bounded.FACTORS:
        raise CheckpointError(f"{where}: formats of {len(record)} factors; expected up to {bounded.FACTORS}")
    for name, fields in record.items():
        _check_fields(fields, FORMAT_FIELDS, f"{where}: format of {name[: bounded.LETTERS]!r}")
        if fields["bits"] not in BITS:
            raise CheckpointError(f"{where}: bits={fields['bits']} of {name[: bounded.LETTERS]!r}; expected {BITS}")
    return {name: Format(**fields) for name, fields in record.items()}


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        _check_fields(value, STRUCTURE_FIELDS, where)
        kind = registered().get(value["kind"])
        if kind is None:
            raise CheckpointError(
                f"{where}: kind {value['kind']!r} is not registered; import the module that defines it, "
                f"or use one of {sorted(registered())}"
            )
        given, known = value["hyperparameters"], [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        if unknown := {key: given[key] for key in given if key not in known}:
            raise CheckpointError(f"{where}: {value['kind']} does not take {unknown}; expected {known}")
        if missing := [key for key in known if key not in given]:  # a default would be a guess at what was meant
            raise CheckpointError(f"{where}: hyperparameters {missing} of {value['kind']} are missing; save again")
        fields = {key: _decoded(field, f"{where}: {key}") for key, field in given.items()}
        try:
            return kind(**fields)
        except Exception as error:  # third-party code may raise anything
            problem = f"{where}: {value['kind']} does not take {fields}"
            raise CheckpointError(f"{problem}: {type(error).__name__}: {error}") from error
    return tuple(_decoded(item, where) for item in value) if isinstance(value, list) else value


# Checks --------------------------------------------------------------------------------------------------------------


def _check_fields(value: Any, kinds: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {type(value).__name__}, expected an object with {sorted(kinds)}")
    if set(value) != set(kinds):
        raise CheckpointError(f"{where}: found the fields {sorted(value)[:20]}, expected {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:  # not isinstance: True is no size
            raise CheckpointError(f"{where}: {key} is {type(value[key]).__name__}, expected {kind.__name__}")


def check_names(
    layers: Collection[str], shared: Mapping[str, str], tensors: Collection[str], aliases: Mapping[str, str]
) -> None:  # fmt: skip
    """Check the names of layers and tensors, and that further names are those of first ones."""
    if (count := len(tensors) + len(aliases)) > MOST_TENSORS:
        raise CheckpointError(f"{count} names of tensors; expected at most {MOST_TENSORS}")
    for name in (*layers, *shared, *tensors, *aliases):
        if name or name not in layers:  # the root is "", if it is a layer itself
            _check_name(name)
    for kind, names, firsts in (("layer", shared, layers), ("tensor", aliases, tensors)):
        for name, first in names.items():
            if first not in firsts or name in firsts:
                raise CheckpointError(f"{kind} {name!r} is another name of {first!r}; expected {kind}s stored once")


def _check_name(name: str) -> None:
    if len(name) > bounded.LETTERS:
        raise CheckpointError(f"name {name[:50]!r}.. has {len(name)} letters; expected at most {bounded.LETTERS}")
    # Names reach setattr. A file may have 10^5 of them.
    if ".." in f".{name}." or ".__" in f".{name}":
        raise CheckpointError(f"name {name!r}; expected parts that are not empty and do not begin with '__'")


def check_equation(name: str, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Check that a structure has an equation that is small enough to plan; return what its tensors are."""
    where, structure = f"layer {name!r}", layer.structure
    with explaining(f"{where}: {structure} has no equation"):  # third-party code, or sizes that overflow
        found = layer.tensors()
    if (count := len(found) - len(layer.formats)) > bounded.FACTORS:  # a quantised factor is two tensors
        raise CheckpointError(f"{where}: {structure} has {count} tensors; expected up to {bounded.FACTORS}")
    return found


def check_resolved(name: str, layer: Layer) -> None:
    """Check that the hyperparameters of a layer are all there, and those that its sizes give."""
    with explaining(f"layer {name!r}: {layer.structure} does not fit"):
        resolved = layer.structure.resolve(layer.in_features, layer.out_features)
    if resolved != layer.structure:
        raise CheckpointError(f"layer {name!r}: found {layer.structure}, expected the resolved {resolved}")


def _checked_layer(name: str, layer: Layer, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Compare a layer with its stored tensors; return their names."""
    where, structure = f"layer {name!r}", layer.structure
    parts = check_equation(name, layer)
    for part, (shape, dtype) in parts.items():
        key = dotted(name, part)
        stored = checkpoint.tensors.get(checkpoint.stored_name(key))
        if stored is None:
            raise CheckpointError(f"{where}: tensor {key!r} is missing; {structure} needs {sorted(parts)}")
        if stored.shape != shape or stored.dtype != dtype:
            raise CheckpointError(
                f"{where}: tensor {key!r} in {stored.shard} is {stored.dtype} {stored.shape}, expected {dtype} {shape}"
            )
    check_resolved(name, layer)
    return tuple(parts)
