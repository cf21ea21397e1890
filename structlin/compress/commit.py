"""Put new modules in place of old ones, all or none, and back: hooks, shared weights and tied tables stay right."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from structlin.compress.targets import Target, module_names
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build

# Called with the root whenever modules were swapped; integrations keep what they store beside a model up to date.
after_swap: list[Callable[[nn.Module], object]] = []

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Flags of the hooks above, by the same handles.
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def replacements(target: Target, layer: StructuredLinear) -> dict[nn.Module, nn.Module]:
    """Build the new module of each user of a weight: all share the factors, each keeps its own bias parameter.

    Args:
        target: the weight and its users.
        layer: the structured layer of the first of them.
    Returns:
        Old module -> new module.
    """
    result: dict[nn.Module, nn.Module] = {}
    for linear, _ in target.linears:
        twin = layer
        if result:
            twin = build(layer.structure, layer.in_features, layer.out_features, linear.bias is not None, device="meta")
            for factor in layer.spec.factors:
                setattr(twin, factor.name, getattr(layer, factor.name))
        twin.bias = linear.bias
        result[linear] = _with_hooks(twin.train(linear.training), linear)
    for embedding, _ in target.embeddings:
        tied = StructuredEmbedding(layer, embedding.padding_idx)
        result[embedding] = _with_hooks(tied.train(embedding.training), embedding)
    return result


def count_hooks(target: Target) -> int:
    """Count the forward and backward hooks on the linear modules of a target."""
    return sum(len(getattr(linear, hooks)) for linear, _ in target.linears for hooks in _HOOKS)


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
    """Merge every structured layer back into an `nn.Linear`, in place; tied embeddings get the dense table.

    Hooks are kept; layers that shared factors share the dense weight.

    Args:
        model: any module.
    Returns:
        The model, another object only where the root itself was a structured layer.
    """
    weights: dict[int, nn.Parameter] = {}  # by the identity of a layer's first factor, which layers may share
    swaps: dict[nn.Module, nn.Module] = {}
    for module in module_names(model):
        if isinstance(module, StructuredLinear):
            linear = module.to_linear()
            linear.bias = module.bias
            assert isinstance(linear.weight, nn.Parameter)
            linear.weight = weights.setdefault(id(module.factors[0]), linear.weight)
            swaps[module] = _with_hooks(linear, module)
    for module in module_names(model):
        if isinstance(module, StructuredEmbedding):
            rows, columns = module.num_embeddings, module.embedding_dim
            embedding = nn.Embedding(rows, columns, padding_idx=module.padding_idx, device="meta")
            embedding.weight = weights[id(module.linear.factors[0])]
            swaps[module] = _with_hooks(embedding.train(module.training), module)
    return swap_modules(model, swaps)


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """Hand the hook dictionaries over, so that the handles that callers hold still remove their hooks."""
    for attribute in (*_HOOKS, *_FLAGS, "_is_full_backward_hook"):
        setattr(new, attribute, getattr(old, attribute))
    return new
