"""The places of a model that tensors go to: found, compared with a checkpoint, and filled all or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.checkpoint._files import Stored
from structlin.checkpoint._manifest import Checkpoint, Layer
from structlin.checkpoint.tensors import CheckpointError
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build


@dataclass(frozen=True)
class Slot:
    """A place of a module that holds a parameter or a persistent buffer."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor


def slots_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Slot]:
    for path, module in modules:
        transient = module._non_persistent_buffers_set
        buffers = {key: value for key, value in module._buffers.items() if key not in transient}
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield Slot(f"{path}.{key}" if path else key, module, key, tensor)


# Fitting a checkpoint to a skeleton ----------------------------------------------------------------------------------


def _layer_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Every name of a structured layer, with its first name."""
    return {name: name for name in checkpoint.manifest.layers} | dict(checkpoint.manifest.shared_layers)


def tree_of(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The modules of the model to be, by every dotted name; the skeleton is only read."""
    old = dict(skeleton.named_modules(remove_duplicate=False))
    names = _layer_names(checkpoint)
    layers = checkpoint.manifest.layers
    replaced = {name: _replaced(name, old, layers[first]) for name, first in names.items()}
    new = {name: _fitting(name, replaced[name], layer) for name, layer in layers.items()}
    inside = {path for path in old if any(path[:k] in names for k in _dots(path))}
    tree = {path: new[names[path]] if path in names else module for path, module in old.items() if path not in inside}
    tables: dict[nn.Module, nn.Module] = {}
    for name, embedding in replaced.items():
        if isinstance(embedding, nn.Embedding):
            layer = new[names[name]]
            assert isinstance(layer, StructuredLinear)
            table = tables.setdefault(embedding, StructuredEmbedding(layer, embedding.padding_idx))
            tree |= {name: layer, name.rpartition(".")[0]: table.train(embedding.training)}
    seen: dict[tuple[int, str], str] = {}
    for path, module in tree.items():
        parent, _, child = path.rpartition(".")
        other = seen.setdefault((id(old[parent]), child), path)
        if path and tree[other] is not module:
            raise CheckpointError(f"the skeleton shares {path!r} with {other!r}, the checkpoint does not; untie them")
    return tree


def _dots(path: str) -> Iterator[int]:
    return (k for k, letter in enumerate(path) if letter == ".")


def _replaced(name: str, old: Mapping[str, nn.Module], layer: Layer) -> nn.Module:
    """The module of the skeleton that a layer replaces: that of its name, or the embedding whose table it becomes."""
    parent, _, child = name.rpartition(".")
    module = old.get(name, old.get(parent) if child == "linear" else None)
    where = f"layer {name!r}"
    if module is None or (name not in old and not isinstance(module, nn.Embedding)):
        raise CheckpointError(f"{where}: the skeleton has no such module; expected the architecture that was saved")
    expected = [layer.out_features, layer.in_features]
    if isinstance(module, (nn.Linear, StructuredLinear)):
        found = [module.out_features, module.in_features]
    elif isinstance(module, nn.Embedding) and name not in old:
        found = [module.num_embeddings, module.embedding_dim]
    elif type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):  # of transformers: transposed
        found = [*module.weight.shape[::-1]]
    else:
        raise CheckpointError(f"{where}: the skeleton has a {type(module).__name__}; expected a linear layer")
    if found != expected:
        raise CheckpointError(f"{where}: the skeleton's weight is {found}, the checkpoint's {expected}")
    bias = getattr(module, "bias", None) is not None
    if bias != layer.bias and not isinstance(module, nn.Embedding):  # there the bias is that of the tied output layer
        raise CheckpointError(f"{where}: bias is {bias} in the skeleton, {layer.bias} in the checkpoint")
    return module


def _fitting(name: str, module: nn.Module, layer: Layer) -> nn.Module:
    """The module itself, if it has the structure already, or a new layer on the meta device."""
    if isinstance(module, StructuredLinear) and module.structure == layer.structure:
        return module
    try:
        built = build(
            layer.structure, layer.in_features, layer.out_features, layer.bias, device="meta", dtype=layer.dtype
        )
    except Exception as error:  # a layer of a third party may raise anything
        raise CheckpointError(f"layer {name!r}: {layer.structure} cannot be built: {error!r}") from error
    built.requires_grad_(next((p.requires_grad for p in module.parameters()), True))
    return built.train(module.training)


def check_fit(slots: list[Slot], checkpoint: Checkpoint) -> None:
    aliases, tensors = checkpoint.manifest.aliases, checkpoint.tensors
    names = {slot.name for slot in slots}
    if missing := sorted(names - {*tensors, *aliases}):
        raise CheckpointError(
            f"tensors {missing[:5]} ({len(missing)} in all) of the skeleton are not in the checkpoint"
        )
    if unexpected := sorted({*tensors, *aliases} - names):
        raise CheckpointError(f"tensors {unexpected[:5]} ({len(unexpected)} in all) are not in the skeleton")
    filled: dict[tuple[int, str], str] = {}
    for slot in slots:
        key = aliases.get(slot.name, slot.name)
        stored = tensors[key]
        if is_lazy(slot.tensor) or stored.shape != tuple(slot.tensor.shape) or _kind(stored) != _kind(slot.tensor):
            found = "uninitialised" if is_lazy(slot.tensor) else f"{slot.tensor.dtype} {tuple(slot.tensor.shape)}"
            raise CheckpointError(
                f"tensor {slot.name!r} in {stored.shard} is {stored.dtype} {stored.shape}, the skeleton's is {found}"
            )
        if (other := filled.setdefault((id(slot.module), slot.attribute), key)) != key:
            raise CheckpointError(
                f"the skeleton shares {slot.name!r} with {other!r}, the checkpoint does not; untie them"
            )


def _kind(tensor: Tensor | Stored) -> str:
    """Dtypes of the same kind replace one another: floats of any size, complex numbers, else only the same."""
    if tensor.dtype.is_complex:
        return "complex"
    return "float" if tensor.dtype.is_floating_point else str(tensor.dtype)


def places(
    skeleton: nn.Module, slots: list[Slot], checkpoint: Checkpoint, device: torch.device | str | None
) -> dict[str, torch.device]:
    """The device of every stored tensor: of the first name's tensor in the skeleton."""
    if device is not None:
        return dict.fromkeys(checkpoint.tensors, torch.device(device))
    old = dict(skeleton.named_modules(remove_duplicate=False))
    names = _layer_names(checkpoint)
    found_places: dict[str, torch.device] = {}
    for slot in slots:
        owner = slot.name.rpartition(".")[0]
        module = old.get(owner, old.get(owner.rpartition(".")[0])) if owner in names else None
        found = next(module.parameters(), slot.tensor).device if module else slot.tensor.device
        key = checkpoint.manifest.aliases.get(slot.name, slot.name)
        found_places.setdefault(key, torch.device("cpu") if found.type == "meta" else found)
    return found_places


# Changing the skeleton -----------------------------------------------------------------------------------------------

Assignment = tuple[nn.Module, str, Tensor | nn.Module]


def fillings(slots: list[Slot], values: Mapping[str, Tensor], checkpoint: Checkpoint) -> Iterator[Assignment]:
    parameters: dict[str, nn.Parameter] = {}
    for slot in slots:
        key = checkpoint.manifest.aliases.get(slot.name, slot.name)
        if isinstance(slot.tensor, nn.Parameter):
            if key not in parameters:
                parameters[key] = nn.Parameter(values[key], requires_grad=slot.tensor.requires_grad)
            yield slot.module, slot.attribute, parameters[key]
        else:
            yield slot.module, slot.attribute, values[key]


def moves(tree: Mapping[str, nn.Module], device: torch.device | str | None) -> Iterator[Assignment]:
    """Buffers that are not stored go to the asked device, too."""
    for module in tree.values():
        for key in module._non_persistent_buffers_set if device is not None else ():
            buffer = module._buffers[key]
            if buffer is not None and not buffer.is_meta:
                yield module, key, buffer.to(device)


def swaps(skeleton: nn.Module, tree: Mapping[str, nn.Module]) -> Iterator[Assignment]:
    old = dict(skeleton.named_modules(remove_duplicate=False))
    for path, module in tree.items():
        parent, _, child = path.rpartition(".")
        if path in old and path and module is not old[path]:
            yield old[parent], child, module


def assign(assignments: Iterable[Assignment]) -> None:
    """Make all assignments, or none."""
    done: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, key, value in assignments:
            done.append((module, key, _held(module, key)))
            setattr(module, key, value)
    except BaseException as error:
        for owner, name, old in reversed(done):
            if _held(owner, name) is not old:
                setattr(owner, name, old)
        if isinstance(error, Exception):
            raise CheckpointError(f"{key!r} of {type(module).__name__} cannot be assigned: {error!r}") from error
        raise


def _held(module: nn.Module, key: str) -> Any:
    return next(held[key] for held in (module._parameters, module._buffers, module._modules) if key in held)


def report_left_on_meta(tree: Mapping[str, nn.Module]) -> None:
    left = [
        f"{path}.{key}" if path else key
        for path, module in tree.items()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set and buffer is not None and buffer.is_meta
    ]
    if left:
        warnings.warn(
            f"buffers {left[:5]} ({len(left)} in all) are not persistent, hence not in the checkpoint, and still on "
            "the meta device; compute them again",
            stacklevel=3,
        )
