"""The tensors of a model: found, compared with a checkpoint, and filled all or none."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.adapters import Adapter, Origin, adapter_of
from structlin.adapters.adapter import shell_of
from structlin.checkpoint._directory import CheckpointError, explaining
from structlin.checkpoint._manifest import Checkpoint, Layer, dotted
from structlin.checkpoint.tensors import Stored, cast
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.factored import Factored
from structlin.layers.linear import build

Modules = Mapping[str, nn.Module]  # by every dotted name, shared ones under each of theirs
T = TypeVar("T")
Assignment = tuple[nn.Module, str, Tensor | nn.Module]


@dataclass(frozen=True)
class Slot:
    """An attribute of a module that holds a parameter or a persistent buffer."""

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
                yield Slot(dotted(path, key), module, key, tensor)


# What a model holds --------------------------------------------------------------------------------------------------


def by_first_name(named: Iterable[tuple[str, T]]) -> tuple[dict[str, T], dict[str, str]]:
    """Return each object under its first name, and every further name with the first."""
    firsts: dict[int, str] = {}
    objects: dict[str, T] = {}
    further: dict[str, str] = {}
    for name, item in named:
        first = firsts.setdefault(id(item), name)
        if first == name:
            objects[name] = item
        else:
            further[name] = first
    return objects, further


def described(layer: Factored) -> Layer:
    """Return the arguments that build a layer."""
    tensors = (*layer.parameters(), *layer.buffers())
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex())
    experts = layer.stack[0] if layer.stack else None
    sizes = layer.in_features, layer.out_features
    return Layer(layer.structure, *sizes, layer.bias is not None, dtype, experts, layer.formats)


# Fitting a checkpoint to a skeleton ----------------------------------------------------------------------------------


def tree_of(old: Modules, checkpoint: Checkpoint) -> tuple[dict[str, nn.Module], dict[nn.Module, torch.device]]:
    """Return the modules of the loaded model, and the device of each new one; `old`, the skeleton's, only get read."""
    layers = checkpoint.layers
    names = {**{name: name for name in layers}, **checkpoint.shared_layers}
    stored = {*checkpoint.tensors, *checkpoint.aliases}
    spots = {name: spot(name, old, stored) for name in names}
    opened: dict[nn.Module, nn.Module] = {}  # module of the skeleton that holds leaves -> what its adapter opens it to
    new: dict[str, nn.Module] = {}
    devices: dict[nn.Module, torch.device] = {}
    placed: dict[str, nn.Module] = {}  # by the name in the skeleton
    lost: list[tuple[str, list[int], list[int]]] = []  # name and sizes of layers that hidden units went from
    for name, first in names.items():
        holder, path, adapter = spots[name]
        module = old[holder]
        if path and module not in opened:
            assert adapter is not None
            opened[module] = adapter.open(module).train(module.training)
            opened[module].origin = Origin(adapter, shell_of(module))  # type: ignore[assignment]
        leaf = opened[module].get_submodule(path) if path else module if adapter is None else adapter.open(module)
        _check_leaf(name, leaf, layers[first], adapter)
        if (found := _sizes(leaf)) != (expected := _sizes(layers[first])):
            _check_fewer(name, found, expected, adapter)
            lost.append((name, found, expected))
        if first not in new:
            new[first] = _fitting(name, leaf, layers[first])
            devices[new[first]] = next(tensor.device for tensor in (*leaf.parameters(), *leaf.buffers()))
            if not path and (leaf is not module or _sizes(leaf) != _sizes(new[first])):
                new[first].origin = Origin(adapter, shell_of(module))  # type: ignore[arg-type, assignment]
        if path:
            owner, _, attribute = path.rpartition(".")
            opened[module].get_submodule(owner)._modules[attribute] = new[first]
        placed[holder] = opened[module] if path else new[first]
    _check_units(lost)
    tree: dict[str, nn.Module] = {
        path: module for path, module in old.items() if not any(path[:k] in placed for k in (*_dots(path), 0))
    }
    for holder, placed_module in placed.items():
        for path, module in placed_module.named_modules(remove_duplicate=False):
            tree[".".join(filter(None, (holder, path)))] = module
    # One attribute of a shared module is one place, and cannot hold two modules.
    parents = ((path, *path.rpartition(".")[::2]) for path in tree if path)
    _check_untied((p, (id(old[parent]), child), id(tree[p])) for p, parent, child in parents if parent in old)
    return tree, devices


def _dots(path: str) -> Iterator[int]:
    return (k for k, letter in enumerate(path) if letter == ".")


def spot(name: str, old: Modules, stored: Container[str] = ()) -> tuple[str, str, Adapter | None]:
    """Return the module of the skeleton that holds a layer, the layer's path once it is opened, and its adapter.

    Args:
        name: of the layer.
        old: the modules of the skeleton.
        stored: names of the tensors of the checkpoint.
    Raises:
        CheckpointError: if the skeleton has no place for the layer.
    """
    if isinstance(old.get(name), Factored):
        return name, "", None
    # From the root: an opened module holds all leaves below it, also those that the skeleton has a module for. A module
    # whose own weight is stored was not opened.
    for holder in ("", *(name[:k] for k in _dots(name)), name):
        module = old.get(holder)
        path = name[len(holder) :].lstrip(".")
        adapter = None if module is None else adapter_of(module)
        leaves = {} if module is None or adapter is None else adapter.leaves(module)
        closed = path and any("." not in weight and dotted(holder, weight) in stored for weight, _ in leaves.values())
        if module is not None and adapter is not None and path in leaves and not closed:
            if reason := adapter.reason(module):
                raise CheckpointError(f"layer {name!r}: the skeleton's {type(module).__name__} cannot be one: {reason}")
            return holder, path, adapter
    found = f"has a {type(old[name]).__name__} without this map" if name in old else "has no such module"
    raise CheckpointError(f"layer {name!r}: the skeleton {found}; expected the architecture that was saved")


def _sizes(leaf: Any) -> list[int]:
    return [leaf.out_features, leaf.in_features]


def _check_fewer(name: str, found: list[int], expected: list[int], adapter: Adapter | None) -> None:
    """Refuse a leaf of another size than its layer, unless that has lost outputs or inputs with hidden units."""
    narrows = adapter is not None and adapter.narrows and any(map(int.__eq__, found, expected))
    if not (narrows and all(map(int.__ge__, found, expected))):
        raise CheckpointError(f"layer {name!r}: the skeleton's weight is {found}, the checkpoint's {expected}")


def _check_units(lost: list[tuple[str, list[int], list[int]]]) -> None:
    """Refuse layers that have lost outputs that no other has lost as inputs, or inputs that none has as outputs."""
    sides = [{e[axis] for _, f, e in lost if f[axis] != e[axis]} for axis in (0, 1)]
    if sides[0] != sides[1]:
        name, found, expected = lost[0]
        raise CheckpointError(f"layer {name!r}: the skeleton's weight is {found}, the checkpoint's {expected}")


def _check_leaf(name: str, leaf: Any, layer: Layer, adapter: Adapter | None) -> None:
    """Compare a leaf of the skeleton with its layer; the bias of a table is that of the tied output layer."""
    if getattr(leaf, "num_experts", None) != layer.experts:
        count = getattr(leaf, "num_experts", None)
        raise CheckpointError(f"layer {name!r}: {count} experts in the skeleton, {layer.experts} in the checkpoint")
    bias = leaf.bias is not None
    if bias != layer.bias and not (adapter is not None and adapter.on_request):
        raise CheckpointError(f"layer {name!r}: bias is {bias} in the skeleton, {layer.bias} in the checkpoint")


def _fitting(name: str, module: Any, layer: Layer) -> nn.Module:
    """Return the module if it has the structure already, else a new layer, on the meta device until it is filled."""
    if isinstance(module, Factored) and (module.structure, module.formats) == (layer.structure, layer.formats):
        return module
    sizes = layer.in_features, layer.out_features
    with explaining(f"layer {name!r}: {layer.structure} cannot be built"):  # third-party code may raise anything
        options: Any = {"device": "meta", "dtype": layer.dtype}
        built: Factored = (
            build(layer.structure, *sizes, layer.bias, **options)
            if layer.experts is None
            else StructuredExpertLinear(layer.experts, *sizes, layer.bias, structure=layer.structure, **options)
        ).hold_unfilled(layer.formats)
    built.requires_grad_(next((p.requires_grad for p in module.parameters()), True))
    return built.train(module.training)


def check_fit(slots: list[Slot], checkpoint: Checkpoint) -> None:
    held, stored_names = {slot.name for slot in slots}, {*checkpoint.tensors, *checkpoint.aliases}
    for names, problem in (
        (held - stored_names, "of the skeleton are not in the checkpoint"),
        (stored_names - held, "are not in the skeleton"),
    ):
        if names:
            raise CheckpointError(f"tensors {sorted(names)[:5]} ({len(names)} in all) {problem}")
    for slot in slots:
        stored = checkpoint.tensors[checkpoint.stored_name(slot.name)]
        lazy = is_lazy(slot.tensor)
        if lazy or stored.shape != tuple(slot.tensor.shape) or _kind(stored) != _kind(slot.tensor):
            found = "uninitialised" if lazy else f"{slot.tensor.dtype} {tuple(slot.tensor.shape)}"
            raise CheckpointError(
                f"tensor {slot.name!r} in {stored.shard} is {stored.dtype} {stored.shape}, the skeleton's is {found}"
            )
    _check_untied((s.name, (id(s.module), s.attribute), checkpoint.stored_name(s.name)) for s in slots)


def _check_untied(places: Iterable[tuple[str, Hashable, object]]) -> None:
    """Raise if one place would have to hold two things; takes the name, place and content of each."""
    seen: dict[Hashable, tuple[str, object]] = {}
    for name, place, content in places:
        other, held = seen.setdefault(place, (name, content))
        if held != content:
            raise CheckpointError(f"the skeleton shares {name!r} with {other!r}, the checkpoint does not; untie them")


def _kind(tensor: Tensor | Stored) -> str:
    # A skeleton of another precision is welcome: the dtype of the checkpoint wins.
    if tensor.dtype.is_complex:
        return "complex"
    return "float" if tensor.dtype.is_floating_point else str(tensor.dtype)


def check_no_meta_left(tree: Modules) -> None:
    left = [
        dotted(path, key)
        for path, module in tree.items()
        for key in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers[key]) is not None and buffer.is_meta
    ]
    if left:
        raise CheckpointError(
            f"buffers {left[:5]} ({len(left)} in all) are on the meta device, and not in the checkpoint since they are "
            "not persistent; compute them, or build the skeleton on a real device"
        )


# Changing the skeleton -----------------------------------------------------------------------------------------------


def fillings(slots: list[Slot], values: Mapping[str, Tensor], checkpoint: Checkpoint) -> Iterator[Assignment]:
    parameters: dict[str, nn.Parameter] = {}  # one object for all names of a tied parameter
    for slot in slots:
        key = checkpoint.stored_name(slot.name)
        value = values[key]
        if isinstance(slot.tensor, nn.Parameter):
            value = parameters.setdefault(key, nn.Parameter(value, requires_grad=slot.tensor.requires_grad))
        yield slot.module, slot.attribute, value


def moves(tree: Modules, device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[Assignment]:
    """Move and cast the buffers that are not stored, as `Module.to` does."""
    for module in tree.values():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers[key]
            if buffer is not None and not buffer.is_meta:
                yield module, key, cast(buffer.to(device=device), dtype)


def swaps(old: Modules, tree: Modules) -> Iterator[Assignment]:
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
