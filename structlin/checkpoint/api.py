"""Save and load models with structured layers: safetensors for the tensors, versioned JSON for the structures.

A checkpoint is a directory: `model.safetensors`, or shards with `model.safetensors.index.json` as Hugging Face writes
them, and `structlin.json`. No code is stored and none that a file names is run; everything in a file is checked
against the headers, the registry and the skeleton before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from structlin.checkpoint import _directory, _files, _manifest, _skeleton
from structlin.checkpoint._manifest import Layer
from structlin.checkpoint.tensors import CheckpointError, obstacle
from structlin.layers.linear import StructuredLinear

__all__ = ["CheckpointError", "Summary", "load", "save", "verify"]


class Recorded(Protocol):
    """Something that writes itself as plain JSON data, such as a `Compression`."""

    def to_record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds.

    Args:
        layers: the kind of each structured layer by dotted name.
        parameters: entries of all stored tensors, persistent buffers included, tied ones once.
        bytes: size of the shards in B.
        shards: their file names.
        structlin_version: of the writer.
        metadata: as given to `save`.
    """

    layers: Mapping[str, str]
    parameters: int
    bytes: int
    shards: tuple[str, ...]
    structlin_version: str
    metadata: Mapping[str, Any]


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    compression: Recorded | None = None,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the parameters and persistent buffers of a model and the structure of its structured layers.

    The directory is written beside its place and renamed: a crash leaves the old one or the new one, complete. Should
    it fall between the two renames, the old one is `.<name>.structlin-previous` beside it, which `load` reads and the
    next `save` puts back. Other files in the directory (`config.json`, a tokenizer) are kept; an
    older checkpoint's are replaced. One writer at a time.

    Tied parameters (one object under several names) and shared modules are stored once and stay tied. Parameters that
    are distinct but share memory are stored separately. Non-persistent buffers are not stored.

    Args:
        model: any module on any device but meta.
        directory: where to; its parents are made.
        compression: settings or plan to keep with the model, such as `report.compression`; `verify` returns its record
            as `metadata["compression"]`, which `CompressionPlan.from_record` reads.
        max_shard_bytes: size from which the tensors are split into several files.
        metadata: JSON values to keep in the checkpoint, such as what the model was trained on.
    Returns:
        The directory.
    Raises:
        ValueError: if max_shard_bytes is below 1.
        CheckpointError: if the model holds something that could not be loaded again, or writing fails; the directory
            is as it was.
    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from structlin import LowRankLinear
        >>> with TemporaryDirectory() as folder:
        ...     path = save(nn.Sequential(LowRankLinear(8, 8, rank=2)), folder + "/small")
        ...     model = load(nn.Sequential(nn.Linear(8, 8)), path)
        >>> model[0].structure
        LowRank(rank=2)
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is below 1; it is a number of bytes")
    layers, shared_layers = _structured(model)
    tensors, aliases = _tensors(model)
    with _directory.replacing(Path(directory)) as fresh:
        shards = _files.write_tensors(fresh, tensors, max_shard_bytes)
        _manifest.write(
            fresh,
            layers=layers,
            shared_layers=shared_layers,
            aliases=aliases,
            complex=[name for name, tensor in tensors.items() if tensor.is_complex()],
            shards=shards,
            metadata={**(metadata or {}), **({"compression": compression.to_record()} if compression else {})},
        )
        _manifest.read(fresh)  # what could not be loaded again is not saved
    return Path(directory)


def load(
    skeleton: nn.Module,
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    check_hashes: bool = True,
) -> nn.Module:
    """Fill a model from a checkpoint, its linear layers replaced by the structured layers that the checkpoint holds.

    Parameters and buffers become new tensors in the dtype of the checkpoint (make the optimizer afterwards);
    `requires_grad` and the training flag stay those of the skeleton; hooks of replaced layers are not carried over.

    Args:
        skeleton: the dense model of the same architecture, with values or on the meta device; it may hold structured
            layers already. It is changed in place, and unchanged if anything fails.
        directory: as written by `save`.
        device: where all tensors go; None keeps each on its device, and puts those on meta on the CPU.
        check_hashes: compare the sha256 of every file, which finds flipped bits.
    Returns:
        The model; it differs from the skeleton only when the root itself is a structured layer.
    Raises:
        CheckpointError: if a file is missing, damaged or unsafe, or does not fit the skeleton.
    """
    checkpoint = _manifest.read(_directory.readable(Path(directory)))
    tree = _skeleton.tree_of(skeleton, checkpoint)
    slots = list(_skeleton.slots_of(tree.items()))
    _skeleton.check_fit(slots, checkpoint)
    place = _skeleton.places(skeleton, slots, checkpoint, device)
    if check_hashes:
        _files.check_hashes(checkpoint.directory, checkpoint.manifest.shards)
    values = _files.read_tensors(checkpoint.directory, checkpoint.tensors, place.__getitem__)
    if device is None or torch.device(device).type != "meta":
        _skeleton.report_left_on_meta(tree)
    _skeleton.assign(
        [
            *_skeleton.fillings(slots, values, checkpoint),
            *_skeleton.moves(tree, device),
            *_skeleton.swaps(skeleton, tree),
        ]
    )
    return tree[""]


def verify(directory: str | Path, *, check_hashes: bool = False) -> Summary:
    """Check a checkpoint as `load` does, short of a skeleton, reading only its JSON and headers.

    Args:
        directory: as written by `save`.
        check_hashes: read all data and compare the sha256 of every file too.
    Returns:
        What the checkpoint holds.
    Raises:
        CheckpointError: naming the layer or file, what was found and what was expected.
    """
    checkpoint = _manifest.read(_directory.readable(Path(directory)))
    manifest = checkpoint.manifest
    if check_hashes:
        _files.check_hashes(checkpoint.directory, manifest.shards)
    return Summary(
        layers={name: layer.structure.name for name, layer in manifest.layers.items()},
        parameters=sum(math.prod(stored.shape) for stored in checkpoint.tensors.values()),
        bytes=sum((checkpoint.directory / shard).stat().st_size for shard in manifest.shards),
        shards=tuple(manifest.shards),
        structlin_version=manifest.structlin_version,
        metadata=manifest.metadata,
    )


# What a model holds --------------------------------------------------------------------------------------------------


def _structured(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The structured layers by their first name, and the first name of every other name."""
    first: dict[int, str] = {}
    layers: dict[str, Layer] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, StructuredLinear):
            continue
        if id(module) in first:
            shared[name] = first[id(module)]
        else:
            first[id(module)] = name
            dtype = next(tensor.dtype for tensor in (*module.parameters(), *module.buffers()))
            bias = module.bias is not None
            layers[name] = Layer(module.structure, module.in_features, module.out_features, bias, dtype)
    return layers, shared


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by their first name, and the first name of every other name."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for slot in _skeleton.slots_of(model.named_modules(remove_duplicate=False)):
        _check_storable(slot)
        if id(slot.tensor) in first:
            aliases[slot.name] = first[id(slot.tensor)]
        else:
            first[id(slot.tensor)] = slot.name
            tensors[slot.name] = slot.tensor
    state = set(model.state_dict(keep_vars=True))
    if different := sorted(state ^ {*tensors, *aliases}):
        raise CheckpointError(f"state_dict and parameters differ in {different[:5]}; only plain tensors can be stored")
    return tensors, aliases


def _check_storable(slot: _skeleton.Slot) -> None:
    if reason := obstacle(slot.tensor):
        raise CheckpointError(f"tensor {slot.name!r} {reason}")
