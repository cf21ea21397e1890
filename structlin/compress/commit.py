"""Put new modules in place of old ones, all or none, and back: hooks, shared weights and tied tables stay right."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structlin.adapters import Origin
from structlin.adapters.adapter import shell_of
from structlin.compress.patched import Patched
from structlin.compress.targets import Target, User, module_names
from structlin.layers.factored import Factored
from structlin.layers.linear import StructuredLinear, build

# Called with the root whenever modules were swapped; integrations keep what they store beside a model up to date.
after_swap: list[Callable[[nn.Module], object]] = []
# Dense weights by what their structured layers share, and by shape.
Weights = dict[tuple[tuple[int, ...], tuple[int, ...]], nn.Parameter]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Flags of the hooks above, by the same handles.
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def replacements(target: Target, layer: Any) -> dict[nn.Module, nn.Module]:
    """Build the new leaf of each user of a weight: all share the factors, each keeps its own bias parameter.

    Args:
        target: the weight and its users.
        layer: the structured layer of the first of them.
    Returns:
        Old leaf -> new leaf.
    """
    result: dict[nn.Module, nn.Module] = {}
    for user in target.users:
        twin = layer
        if user.adapter is not None and user.adapter.on_request:
            result[user.leaf] = layer  # a table has no bias: it uses the very layer
            continue
        if result:
            twin = build(
                layer.structure, layer.in_features, layer.out_features, user.leaf.bias is not None, device="meta"
            )
            for factor in layer.spec.factors:
                twin.hold(factor.name, getattr(layer, factor.name))
        if twin.out_features == user.leaf.out_features:  # else some of it went with hidden units
            twin.bias = user.leaf.bias
        result[user.leaf] = twin.train(user.leaf.training)
        if user.opened is user.module:
            _with_hooks(twin, user.module)
    return result


def assemble(swaps: Mapping[nn.Module, nn.Module], targets: Sequence[Target]) -> dict[nn.Module, nn.Module]:
    """Put new leaves into the opened modules that hold them.

    Args:
        swaps: old leaf -> new leaf.
        targets: of the model.
    Returns:
        Old module of the model -> new module.
    """
    result: dict[nn.Module, nn.Module] = {}
    users = [user for target in targets for user in target.users]
    for user in users:
        if user.leaf not in swaps:
            continue
        new: Any = swaps[user.leaf]
        whole = (new.in_features, new.out_features) == (user.leaf.in_features, user.leaf.out_features)
        if user.opened is user.module and whole:
            result[user.module] = new
            continue
        if user.path:
            owner, _, attribute = user.path.rpartition(".")
            user.opened.get_submodule(owner)._modules[attribute] = new
            new = user.opened
        if user.module not in result:
            assert user.adapter is not None
            new.origin = Origin(user.adapter, shell_of(user.module))
            result[user.module] = _with_hooks(new.train(user.module.training), user.module)
    for user in users:
        if user.module in result and user.path and user.leaf not in swaps:
            _own(user)
    return result


@contextmanager
def committed(patched: Patched, targets: Sequence[Target]) -> Iterator[nn.Module]:
    """Swap all modules, and give the norms and biases of refined blocks their values; an error inside undoes both.

    Args:
        patched: the model with its compressed layers and refined parameters.
        targets: of the model.
    Returns:
        The root, or its replacement.
    """
    swaps = assemble(patched.swaps, targets)
    before = {parameter: parameter.detach().clone() for parameter in patched.values}
    root = swap_modules(patched.model, swaps)
    try:
        _set(patched.values)
        yield root
    except BaseException:
        swap_modules(root, {new: old for old, new in swaps.items()})
        _set(before)
        raise


@torch.no_grad()
def _set(values: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)


def _own(user: User) -> None:
    """Give a leaf that stays dense in an opened module storage of its own, so that the packed parameter is freed."""
    for name, value in user.leaf._parameters.items():
        if value is not None:
            setattr(user.leaf, name, nn.Parameter(value.detach().clone(), value.requires_grad))


def count_hooks(target: Target) -> int:
    """Count the forward and backward hooks on the modules that use a target."""
    return sum(len(getattr(user.module, hooks)) for user in target.users for hooks in _HOOKS)


def swap_modules(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones under all of their names, all or none.

    Args:
        model: the root.
        swaps: old module -> new module.
    Returns:
        The root, or its replacement.
    """
    found = [
        (parent, attribute, swaps[child])
        for parent in module_names(model)
        if parent not in swaps  # an old module keeps its children, so that it can be put back
        for attribute, child in parent._modules.items()
        if child is not None and child in swaps
    ]
    for parent, attribute, new in found:  # dictionary entries only: nothing here can fail halfway
        parent._modules[attribute] = new
    root = swaps.get(model, model)
    for call in after_swap:
        call(root)
    return root


def to_dense_(model: nn.Module) -> nn.Module:
    """Merge every structured layer back into a module of its original form, in place.

    Hooks are kept; layers that shared factors share the dense weight, and tied embeddings get the dense table.

    Args:
        model: any module.
    Returns:
        The model, another object only where the root itself was a structured layer.
    """
    return swap_modules(model, merged(model))


def merged(model: nn.Module, only: Container[nn.Module] | None = None) -> dict[nn.Module, nn.Module]:
    """Build the dense module of each structured one; the model keeps its modules.

    Args:
        model: any module.
        only: structured modules; None merges all.
    Returns:
        Structured module -> dense module.
    """
    weights: Weights = {}
    swaps: dict[nn.Module, nn.Module] = {}
    origins = {module: found for module in module_names(model) if (found := vars(module).get("origin"))}
    # Leaves that only opened modules hold are merged with these.
    held = {child for parent in module_names(model) if parent not in origins for child in parent.children()} | {model}
    for module in module_names(model):
        if only is not None and module not in only:
            continue
        if module in origins:
            dense = origins[module].close(module)
            for path, (name, _) in origins[module].adapter.leaves(dense).items():
                _share(dense, name, module.get_submodule(path), weights)
        elif isinstance(module, StructuredLinear) and module in held:
            dense = module.to_linear()
            dense.bias = module.bias
            _share(dense, "weight", module, weights)
        else:
            continue
        swaps[module] = _with_hooks(dense, module)
    return swaps


def _share(dense: nn.Module, name: str, leaf: Any, weights: Weights) -> None:
    """Give a dense module the weight of one that is merged already, if their structured layers share factors."""
    if isinstance(leaf, Factored):
        owner, _, attribute = name.rpartition(".")
        holder = dense.get_submodule(owner)
        weight = holder.get_parameter(attribute)
        if weight.numel() == leaf.in_features * leaf.out_features:  # not packed with others
            setattr(holder, attribute, weights.setdefault((leaf.weight_id, tuple(weight.shape)), weight))


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """Hand the hook dictionaries over, so that the handles that callers hold still remove their hooks."""
    for attribute in (*_HOOKS, *_FLAGS, "_is_full_backward_hook"):
        setattr(new, attribute, getattr(old, attribute))
    return new
