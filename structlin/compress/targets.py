"""Find every linear map of a model, and account for all of its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Target:
    """One weight and all modules that use it.

    Args:
        linears: the `nn.Linear` modules with this weight (nearly always one), each with all of its dotted names.
        embeddings: the `nn.Embedding` modules tied to it, likewise.
        reason: why it must stay dense, or None.
    """

    linears: tuple[tuple[nn.Linear, tuple[str, ...]], ...]
    embeddings: tuple[tuple[nn.Embedding, tuple[str, ...]], ...] = ()
    reason: str | None = None

    @property
    def linear(self) -> nn.Linear:
        """The first module that uses the weight."""
        return self.linears[0][0]

    @property
    def names(self) -> tuple[str, ...]:
        """All dotted names of all linear modules, the canonical one first."""
        return tuple(name for _, names in self.linears for name in names)

    @property
    def name(self) -> str:
        """The first dotted name; empty for the root."""
        return self.names[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weight and biases that belong to the target."""
        for linear, _ in self.linears:
            yield from (p for p in linear.parameters(recurse=False))


def module_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module once, in order, with all names under which it is reachable."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {module: tuple(found) for module, found in names.items()}


def find_targets(model: nn.Module, *, tied: str = "skip") -> list[Target]:
    """Find the `nn.Linear` modules of a model, one Target per weight, in module order.

    Args:
        model: any module; a root that is itself linear is found under the name "".
        tied: "skip" keeps weights that an embedding shares; "replace" makes all of their users targets.
    Returns:
        Targets; those that must stay dense carry a reason.
    Raises:
        ValueError: if tied is neither "skip" nor "replace".
    """
    if tied not in ("skip", "replace"):
        raise ValueError(f"tied={tied!r} is unknown; use 'skip' or 'replace'")
    names = module_names(model)
    users: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in names:
        for attribute, parameter in module.named_parameters(recurse=False):
            users[id(parameter)].append((module, attribute))
    attention = {child for module in names if isinstance(module, nn.MultiheadAttention) for child in module.children()}
    targets: list[Target] = []
    seen: set[nn.Module] = set()
    for module in names:
        if not isinstance(module, nn.Linear) or module in seen:
            continue
        weight = module._parameters.get("weight")
        own: list[tuple[nn.Module, str]] = [(module, "weight")]
        sharing = own if weight is None else users[id(weight)]
        linears = tuple((m, names[m]) for m, _ in sharing if isinstance(m, nn.Linear))
        embeddings = tuple((m, names[m]) for m, _ in sharing if isinstance(m, nn.Embedding))
        seen.update(m for m, _ in linears)
        reasons = (_module_reason(m, m in attention) or _weight_reason(m.weight) for m, _ in linears)
        reason = next((r for r in reasons if r), None) or _tie_reason(sharing, names, tied)
        targets.append(Target(linears, embeddings, reason))
    return targets


def _module_reason(linear: nn.Linear, in_attention: bool) -> str | None:
    """Return why a linear module must stay dense, None if nothing in the module itself forbids it."""
    if in_attention or type(linear) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads the weight itself: a structured layer would be made dense at each call"
    if parametrize.is_parametrized(linear):
        return "its weight is parametrised; remove the parametrisation first"
    if linear._parameters.get("weight") is None:
        return "its weight is computed by a hook (weight_norm, pruning); remove the hook first"
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet (a lazy layer)"
    if type(linear) is not nn.Linear:
        return f"{type(linear).__module__}.{type(linear).__name__} is a subclass of nn.Linear with an unknown forward"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance (by an offloading hook, say)"
    return None


def _weight_reason(weight: Tensor) -> str | None:
    """Return why a weight cannot be decomposed, None if it can."""
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, quantised or of an unknown kind"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if 0 in weight.shape:
        return "its weight is empty"
    return None


def _tie_reason(
    sharing: list[tuple[nn.Module, str]], names: dict[nn.Module, tuple[str, ...]], tied: str
) -> str | None:  # fmt: skip
    """Return why the users of a weight that are not linear keep it dense, None if there are no such users."""
    others = [(m, a) for m, a in sharing if not isinstance(m, nn.Linear)]
    replaceable = all(type(m) is nn.Embedding and m.max_norm is None and not m.sparse for m, _ in others)
    if not others or (tied == "replace" and replaceable):
        return None
    module, attribute = others[0]
    way_out = "pass tied='replace'" if replaceable else "untie it first"
    return f"its weight is tied to {'.'.join(filter(None, (names[module][0], attribute)))}; {way_out} to compress it"


def last_target(model: nn.Module, targets: Sequence[Target]) -> Target | None:
    """Return the output layer: that of `get_output_embeddings` in a transformers model, else the last one found."""
    getter = getattr(model, "get_output_embeddings", None)
    declared = getter() if callable(getter) else None
    for target in targets:
        if any(linear is declared for linear, _ in target.linears):
            return target
    return targets[-1] if targets and targets[-1].name != "" else None


def unreached(model: nn.Module, reached: set[int]) -> dict[str, int]:
    """Count the parameters outside `reached` (ids) by the type of the module that owns them."""
    counts: dict[str, int] = defaultdict(int)
    seen = set(reached)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[type(module).__name__] += parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
