"""Save and load models with structured layers: safetensors for the tensors, versioned JSON for the structures.

A checkpoint is a directory: `structlin.json`, and `model.safetensors` or shards with an index as Hugging Face writes
them. It contains no code and cannot make a reader run any. All of it is checked against the headers, the registry and
the skeleton before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from structlin.checkpoint import _directory, _manifest, _replace, _skeleton, table, tensors
from structlin.checkpoint._directory import CheckpointError
from structlin.checkpoint._manifest import Checkpoint
from structlin.layers.factored import Factored


class Recorded(Protocol):
    """An object that converts itself to plain JSON data, such as a `Compression`."""

    def to_record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Summary:
    """Contents of a checkpoint.

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
    """Write the parameters and persistent buffers of a model, and the structures of its structured layers.

    A new directory is written beside the old one and takes its name, so that a crash leaves a complete checkpoint: the
    old or the new. The working directory, a mount point, or a directory whose parent may not be written stays where it
    is: its files are replaced. Other files in the directory (a tokenizer, say) stay, and new files have the permissions
    of the old. A second saver of the directory is refused while the first one writes.

    The `config.json` of a model of transformers is written too: `from_pretrained` loads the folder where `structlin.hf`
    is imported, and fails where it is not.

    Tied parameters (one object under several names) and shared modules are stored once and stay tied. Distinct
    parameters that share memory are stored separately. Non-persistent buffers are not stored.

    A `DTensor` is gathered: every process calls `save`, process 0 writes, and the others may return before it is done.

    Args:
        model: any module on any device but meta.
        directory: created with its parents if missing.
        compression: settings or plan to keep with the model, such as `report.compression`; `verify` returns its record
            as `metadata["compression"]`, which `CompressionPlan.from_record` reads.
        max_shard_bytes: size from which the tensors are split into several files.
        metadata: JSON values to keep in the checkpoint, such as the name of the training data.
    Returns:
        The directory.
    Raises:
        ValueError: if max_shard_bytes is below 1.
        CheckpointError: if the model holds something that `load` could not restore (a quantised tensor, say), or
            writing fails, or another process or thread saves there; the directory is as it was.
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
    modules = [*model.named_modules(remove_duplicate=False)]
    layers, shared_layers = _skeleton.by_first_name((n, m) for n, m in modules if isinstance(m, Factored))
    stored, aliases = _skeleton.by_first_name((slot.name, slot.tensor) for slot in _skeleton.slots_of(modules))
    if different := sorted(set(model.state_dict(keep_vars=True)) ^ {*stored, *aliases}):
        raise CheckpointError(f"state_dict and parameters differ in {different[:5]}; only plain tensors are stored")
    if _gather(stored):
        return Path(directory)
    sentinels: dict[str, Tensor] = {}
    if callable(getattr(getattr(model, "config", None), "save_pretrained", None)):
        # transformers, which could load the folder by its config, is to fail where structlin.hf is not imported.
        shapes = table.replaced_weights(model, layers)
        sentinels = {name: torch.full(shape, torch.nan) for name, shape in shapes.items() if name not in stored}
    with _replace.replacing(Path(directory)) as fresh:
        shards = tensors.write_shards(fresh, {**stored, **sentinels}, max_shard_bytes)
        table.write_config(model, fresh)
        _manifest.write(
            fresh,
            layers={name: _skeleton.described(layer) for name, layer in layers.items()},
            shared_layers=shared_layers,
            aliases=aliases,
            complex=[name for name, tensor in stored.items() if tensor.is_complex()],
            sentinels=list(sentinels),
            shards=shards,
            metadata={**(metadata or {}), **({"compression": compression.to_record()} if compression else {})},
        )
        _manifest.read(fresh)  # refuse now what `load` would refuse
    return Path(directory)


def load(
    skeleton: nn.Module,
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    check_hashes: bool = True,
) -> nn.Module:
    """Fill a model from a checkpoint, replacing its linear layers by the structured layers of the checkpoint.

    Parameters and buffers become new tensors, so make the optimizer afterwards. `requires_grad` and the training flag
    stay those of the skeleton; hooks of replaced layers are not carried over.

    Args:
        skeleton: the dense model of the same architecture, with values or built under `torch.device("meta")`; it may
            hold structured layers already. It is changed in place, or not at all if anything fails.
        directory: as written by `save`, or by `save_pretrained` with `structlin.hf` (such a folder has no hashes); its
            files may be links. An id such as "owner/name" is looked up in the cache of the Hugging Face hub.
        device: of all tensors; None keeps the device of each, and the CPU replaces meta.
        dtype: of all floating tensors; None takes stored ones as they are. Complex and integer tensors keep theirs.
        check_hashes: compare the sha256 of every file, which finds flipped bits.
    Returns:
        The model; it differs from the skeleton only when the root itself is a structured layer.
    Raises:
        ValueError: if dtype is not a floating one.
        CheckpointError: if a file is missing, damaged or unsafe, or does not fit the skeleton, or if a buffer that is
            not in the checkpoint would stay on meta.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating dtype; use one such as torch.bfloat16, or None")

    def prepare(folder: Path) -> tuple[nn.Module, list[_skeleton.Assignment]]:
        return _prepared(_read(folder, skeleton), skeleton, device, dtype, check_hashes)

    root, assignments = _directory.undisturbed(Path(directory), prepare)
    # Everything that can fail for a reason of its own is behind us: only now the skeleton changes.
    _skeleton.assign(assignments)
    return root


def _prepared(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    check_hashes: bool,
) -> tuple[nn.Module, list[_skeleton.Assignment]]:
    """Return the root of the loaded model, and what is to be assigned for it; all values are read."""
    old = dict(skeleton.named_modules(remove_duplicate=False))
    tree, devices = _skeleton.tree_of(old, checkpoint)
    slots = list(_skeleton.slots_of(tree.items()))
    _skeleton.check_fit(slots, checkpoint)
    if device is None or torch.device(device).type != "meta":
        _skeleton.check_no_meta_left(tree)
    if check_hashes:
        tensors.check_hashes(checkpoint.directory, checkpoint.shards)
    places: dict[str, torch.device] = {}
    for slot in slots:  # a tied tensor goes where its first name is
        place = devices.get(slot.module, slot.tensor.device)
        found = torch.device("cpu") if place.type == "meta" else place
        places.setdefault(checkpoint.stored_name(slot.name), torch.device(device) if device is not None else found)
    values = tensors.read_tensors(checkpoint.directory, checkpoint.tensors, places, dtype)
    return tree[""], [
        *_skeleton.fillings(slots, values, checkpoint),
        *_skeleton.moves(tree, device, dtype),
        *_skeleton.swaps(old, tree),
    ]


def verify(directory: str | Path, *, check_hashes: bool = False) -> Summary:
    """Check a checkpoint as `load` does, without a skeleton, reading only its JSON and headers.

    Args:
        directory: as for `load`.
        check_hashes: read all data and compare the sha256 of every file too.
    Returns:
        A summary of its contents.
    Raises:
        CheckpointError: naming the layer or file, what was found and what was expected.
    """
    return _directory.undisturbed(Path(directory), lambda folder: _summary(_read(folder, None), check_hashes))


def _summary(checkpoint: Checkpoint, check_hashes: bool) -> Summary:
    if check_hashes:
        tensors.check_hashes(checkpoint.directory, checkpoint.shards)
    return Summary(
        layers={name: layer.structure.name for name, layer in checkpoint.layers.items()},
        parameters=sum(math.prod(stored.shape) for stored in checkpoint.tensors.values()),
        bytes=sum((checkpoint.directory / shard).stat().st_size for shard in checkpoint.shards),
        shards=tuple(checkpoint.shards),
        structlin_version=checkpoint.structlin_version,
        metadata=checkpoint.metadata,
    )


def _read(folder: Path, skeleton: nn.Module | None) -> Checkpoint:
    return table.read_folder(folder, skeleton) or _manifest.read(folder)


@torch.no_grad()
def _gather(stored: dict[str, Tensor]) -> bool:
    """Replace each DTensor by its full value, in place; return whether this process leaves the writing to another."""
    leaves = False
    for name, tensor in stored.items():
        full = tensor
        # Only a DTensor has this method. Its class is not imported: torch.distributed is missing in some builds.
        gather = None if tensor.is_meta else getattr(tensor, "full_tensor", None)
        if gather is not None:
            full = gather()  # collective: every process calls it, in the same order
            leaves = torch.distributed.get_rank() > 0
        if reason := tensors.obstacle(full):
            raise CheckpointError(f"tensor {name!r} {reason}")
        if full is not tensor:
            stored[name] = torch.empty(0) if leaves else full.cpu()  # free the accelerator: only one fits, perhaps
    return leaves
