"""The tensors of a model: found, compared with a checkpoint, and filled all or none."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.checkpoint._directory import CheckpointError, explaining
from structlin.checkpoint._manifest import Checkpoint, Layer, dotted
from structlin.checkpoint.tensors import Stored
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build

Modules = Mapping[str, nn.Module]  # by every dotted name, shared ones under each of theirs
Assignment = tuple[nn.Module, str, Tensor | nn.Module]


@dataclass(frozen=True)
class Slot:
    """An attribute of a module that holds a parameter or a buffer."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor


def slots_of(modules: Modules, *, stored: bool = True) -> list[Slot]:
    """List the slots that a checkpoint stores, or the others: those of non-persistent buffers."""
    return [
        Slot(dotted(path, key), module, key, tensor)
        for path, module in modules.items()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and stored == (key not in module._non_persistent_buffers_set)
    ]


def tree_of(old: Modules, checkpoint: Checkpoint) -> tuple[dict[str, nn.Module], dict[nn.Module, torch.device]]:
    """Return the modules of the loaded model and the device of each structured layer; `old` are the skeleton's."""
    names = {**{name: name for name in checkpoint.layers}, **checkpoint.shared_layers}
    replaced = {name: _replaced(name, old, checkpoint.layers[first]) for name, first in names.items()}
    new = {name: _fitting(name, replaced[name], layer) for name, layer in checkpoint.layers.items()}
    inside = {path for path in old if any(path[:k] in names for k, letter in enumerate(path) if letter == ".")}
    tree = {path: new[names[path]] if path in names else module for path, module in old.items() if path not in inside}
    tables: dict[nn.Module, nn.Module] = {}
    for name, embedding in replaced.items():
        if isinstance(embedding, nn.Embedding):
            layer = new[names[name]]
            assert isinstance(layer, StructuredLinear)
            table = tables.setdefault(embedding, StructuredEmbedding(layer, embedding.padding_idx))
            tree |= {name: layer, name.rpartition(".")[0]: table.train(embedding.training)}
    # One attribute of a shared module is one place, and cannot hold two modules.
    parents = ((path, *path.rpartition(".")[::2]) for path in tree if path)
    _check_untied((path, (id(old[parent]), child), id(tree[path])) for path, parent, child in parents)
    devices = {layer: p.device for name, layer in new.items() for p in [*replaced[name].parameters()][:1]}
    return tree, devices


def _replaced(name: str, old: Modules, layer: Layer) -> nn.Module:
    """Find the module that a layer replaces: the one of its name, or the embedding whose table it becomes."""
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
    if bias != layer.bias:
        raise CheckpointError(f"{where}: bias is {bias} in the skeleton, {layer.bias} in the checkpoint")
    return module


def _fitting(name: str, module: nn.Module, layer: Layer) -> nn.Module:
    """Return the module if it has the structure already, else a new layer, on the meta device until it is filled."""
    if isinstance(module, StructuredLinear) and module.structure == layer.structure:
        return module
    sizes = layer.in_features, layer.out_features
    with explaining(f"layer {name!r}: {layer.structure} cannot be built"):  # third-party code may raise anything
        built = build(layer.structure, *sizes, layer.bias, device="meta", dtype=layer.dtype)
    built.requires_grad_(next((p.requires_grad for p in module.parameters()), True))
    return built.train(module.training)


def check_fit(slots: list[Slot], checkpoint: Checkpoint) -> None:
    needed, given = {slot.name for slot in slots}, {*checkpoint.tensors, *checkpoint.aliases}
    for names, problem in (
        (needed - given, "of the skeleton are not in the checkpoint"),
        (given - needed, "are not in the skeleton"),
    ):
        if names:
            raise CheckpointError(f"tensors {sorted(names)[:5]} ({len(names)} in all) {problem}")
    for slot in slots:
        stored = checkpoint.tensors[checkpoint.stored_name(slot.name)]
        lazy = is_lazy(slot.tensor)
        if lazy or stored.shape != tuple(slot.tensor.shape) or _kind(stored) != _kind(slot.tensor):
            held = "uninitialised" if lazy else f"{slot.tensor.dtype} {tuple(slot.tensor.shape)}"
            found = f"tensor {slot.name!r} in {stored.shard} is {stored.dtype} {stored.shape}"
            raise CheckpointError(f"{found}, the skeleton's is {held}")
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
    dtype = tensor.dtype
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else str(dtype)


def check_no_meta_left(transient: list[Slot]) -> None:
    if left := [slot.name for slot in transient if slot.tensor.is_meta]:
        raise CheckpointError(
            f"buffers {left[:5]} ({len(left)} in all) are on the meta device, and not in the checkpoint since they are "
            "not persistent; compute them, or build the skeleton on a real device"
        )


def fillings(slots: list[Slot], values: Mapping[str, Tensor], checkpoint: Checkpoint) -> Iterator[Assignment]:
    parameters: dict[str, nn.Parameter] = {}  # one object for all names of a tied parameter
    for slot in slots:
        key = checkpoint.stored_name(slot.name)
        value = values[key]
        if isinstance(slot.tensor, nn.Parameter):
            value = parameters.setdefault(key, nn.Parameter(value, requires_grad=slot.tensor.requires_grad))
        yield slot.module, slot.attribute, value


def swaps(old: Modules, tree: Modules) -> Iterator[Assignment]:
    for path, module in tree.items():
        parent, _, child = path.rpartition(".")
        if path in old and path and module is not old[path]:
            yield old[parent], child, module


def assign(assignments: list[Assignment]) -> None:
    """Make all assignments, or none."""
    before = [(module, key, getattr(module, key)) for module, key, _ in assignments]
    try:
        for module, key, value in assignments:
            setattr(module, key, value)
    except BaseException as error:
        for owner, name, old in reversed(before):
            if getattr(owner, name) is not old:
                setattr(owner, name, old)
        if isinstance(error, Exception):
            raise CheckpointError(f"{key!r} of {type(module).__name__} cannot be assigned: {error!r}") from error
        raise
