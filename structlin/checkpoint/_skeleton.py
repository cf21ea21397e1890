"""The places of a model that tensors go to: found, compared with a checkpoint, and filled all or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.adapters import Adapter, Origin, adapter_of
from structlin.adapters.adapter import shell_of
from structlin.checkpoint._files import Stored
from structlin.checkpoint._manifest import Checkpoint, Layer
from structlin.checkpoint.tensors import CheckpointError
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
    """Return the modules of the model to be, by every dotted name; the skeleton is only read."""
    old = dict(skeleton.named_modules(remove_duplicate=False))
    names, layers = _layer_names(checkpoint), checkpoint.manifest.layers
    spots = {name: _spot(name, old) for name in names}
    opened: dict[nn.Module, nn.Module] = {}  # module of the skeleton that holds leaves -> what its adapter opens it to
    new: dict[str, nn.Module] = {}
    placed: dict[str, nn.Module] = {}  # by the name in the skeleton
    for name, first in names.items():
        holder, path, adapter = spots[name]
        module = old[holder]
        if path and module not in opened:
            assert adapter is not None
            opened[module] = adapter.open(module).train(module.training)
            opened[module].origin = Origin(adapter, shell_of(module))  # type: ignore[assignment]
        leaf = opened[module].get_submodule(path) if path else module if adapter is None else adapter.open(module)
        _check_sizes(name, leaf, layers[first])
        if first not in new:
            new[first] = _fitting(name, leaf, layers[first])
            if not path and leaf is not module:
                new[first].origin = Origin(adapter, shell_of(module))  # type: ignore[arg-type, assignment]
        if path:
            owner, _, attribute = path.rpartition(".")
            opened[module].get_submodule(owner)._modules[attribute] = new[first]
        placed[holder] = opened[module] if path else new[first]
    tree: dict[str, nn.Module] = {
        path: module for path, module in old.items() if not any(path[:k] in placed for k in (*_dots(path), 0))
    }
    for holder, placed_module in placed.items():
        for path, module in placed_module.named_modules(remove_duplicate=False):
            tree[".".join(filter(None, (holder, path)))] = module
    seen: dict[tuple[int, str], str] = {}
    for path, module in tree.items():
        parent, _, child = path.rpartition(".")
        if path and parent in old:
            other = seen.setdefault((id(old[parent]), child), path)
            if tree[other] is not module:
                raise CheckpointError(
                    f"the skeleton shares {path!r} with {other!r}, the checkpoint does not; untie them"
                )
    return tree


def _dots(path: str) -> Iterator[int]:
    return (k for k, letter in enumerate(path) if letter == ".")


def _spot(name: str, old: Mapping[str, nn.Module]) -> tuple[str, str, Adapter | None]:
    """Return the module of the skeleton that holds a layer, the layer's path once it is opened, and its adapter."""
    for holder in (name, *(name[:k] for k in reversed([*_dots(name)])), ""):
        module = old.get(holder)
        path = name[len(holder) :].lstrip(".")
        if isinstance(module, StructuredLinear) and not path:
            return holder, "", None
        adapter = None if module is None else adapter_of(module)
        if module is not None and adapter is not None and path in adapter.leaves(module):
            if reason := adapter.reason(module):
                raise CheckpointError(f"layer {name!r}: the skeleton's {type(module).__name__} cannot be one: {reason}")
            return holder, path, adapter
    found = f"has a {type(old[name]).__name__} without this map" if name in old else "has no such module"
    raise CheckpointError(f"layer {name!r}: the skeleton {found}; expected the architecture that was saved")


def _check_sizes(name: str, leaf: Any, layer: Layer) -> None:
    found, expected = [leaf.out_features, leaf.in_features], [layer.out_features, layer.in_features]
    if found != expected:
        raise CheckpointError(f"layer {name!r}: the skeleton's weight is {found}, the checkpoint's {expected}")
    bias = leaf.bias is not None
    if bias != layer.bias:
        raise CheckpointError(f"layer {name!r}: bias is {bias} in the skeleton, {layer.bias} in the checkpoint")


def _fitting(name: str, module: Any, layer: Layer) -> nn.Module:
    """Return the module itself, if it has the structure already, or a new layer on the meta device."""
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
    found_places: dict[str, torch.device] = {}
    for slot in slots:
        found = slot.tensor.device
        if found.type == "meta":  # a new layer: it goes where the parameters of the module it comes from are
            owner = slot.name.rpartition(".")[0]
            while owner not in old:
                owner = owner.rpartition(".")[0]
            found = next(old[owner].parameters(), slot.tensor).device
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
        # Inside an opened module nothing is left to do: it comes as a whole.
        if path in old and path and module is not old[path] and tree[parent] is old[parent]:
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
