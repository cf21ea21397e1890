"""Find every linear map of a model through the adapters, and account for all of its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from structlin.adapters import Adapter, adapter_of
from structlin.layers.factored import Factored

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

STRUCTURED = " (already structured)"  # what the type of such a module is followed by

# A parameter, or the part of a packed one that a leaf is read from.
Piece = tuple[int, str]


@dataclass(frozen=True)
class User:
    """A leaf that uses a weight, in the module of the model that holds it.

    Args:
        leaf: the dense map: an `nn.Linear`, or another leaf with `weight`, `bias`, `in_features` and `out_features`.
        names: all dotted names: of the leaf in the opened model, or of a module with no other leaf.
        module: of the model.
        opened: what its adapter opened it to; the module itself for an `nn.Linear`.
        path: of the leaf in `opened`, empty for `opened` itself.
        adapter: None where no adapter knows the module.
        pieces: the parameters that the leaf is read from, with their sizes.
        parameters: the dotted names of the weight.
    """

    leaf: Any
    names: tuple[str, ...]
    module: nn.Module
    opened: nn.Module
    path: str = ""
    adapter: Adapter | None = None
    pieces: tuple[tuple[Piece, int], ...] = ()
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One weight and all leaves that use it.

    Args:
        users: nearly always one.
        reason: why it must stay dense, or None.
        on_request: it is compressed only where a rule names it, and calibration does not watch it.
    """

    users: tuple[User, ...]
    reason: str | None = None
    on_request: bool = False

    @property
    def linear(self) -> Any:
        """The first leaf that uses the weight."""
        return self.users[0].leaf

    @property
    def leaves(self) -> tuple[nn.Module, ...]:
        """All leaves that use the weight."""
        return tuple(user.leaf for user in self.users)

    @property
    def names(self) -> tuple[str, ...]:
        """All dotted names of all leaves, the canonical one first."""
        return tuple(name for user in self.users for name in user.names)

    @property
    def spellings(self) -> tuple[str, ...]:
        """What a rule may call it: its names, and those of the parameters that hold the weight."""
        return (*self.names, *(name for user in self.users for name in user.parameters))

    @property
    def name(self) -> str:
        """The first dotted name; empty for the root."""
        return self.names[0]

    @property
    def stacked(self) -> bool:
        """Whether its weight is a stack of matrices (experts, out, in), each called by its number."""
        return hasattr(self.linear, "num_experts")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its matrices in statistics: its own name, or one for each matrix of a stack."""
        return tuple(f"{self.name}[{k}]" for k in range(self.linear.num_experts)) if self.stacked else (self.name,)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Its weight, or each matrix of a stack."""
        return tuple(self.linear.weight) if self.stacked else (self.linear.weight,)

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        """Weight and biases of the target, each with its size."""
        for user in self.users:
            yield from user.pieces


def module_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module once, in order, with all names under which it is reachable."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {module: tuple(found) for module, found in names.items()}


def openings(targets: Sequence[Target]) -> dict[nn.Module, nn.Module]:
    """Return the modules that have to be opened before leaves are called -> what they open to."""
    return {u.module: u.opened for target in targets for u in target.users if u.opened is not u.module}


# Finding -------------------------------------------------------------------------------------------------------------


def find_targets(model: nn.Module, *, tied: str = "skip", meta: bool = False) -> list[Target]:
    """Find the linear maps of a model, one Target per weight, in module order.

    Args:
        model: any module; a root that is itself linear is found under the name "".
        tied: "skip" keeps weights that an embedding shares; "replace" makes all of their users targets.
        meta: take weights on the meta device too: sizes are known, values are not.
    Returns:
        Targets; those that must stay dense carry a reason.
    Raises:
        ValueError: if tied is neither "skip" nor "replace".
    """
    if tied not in ("skip", "replace"):
        raise ValueError(f"tied={tied!r} is unknown; use 'skip' or 'replace'")
    names = module_names(model)
    owners: dict[int, list[str]] = defaultdict(list)  # of each parameter: its names, by every module that holds it
    for module, (name, *_) in names.items():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{name}.{attribute}" if name else attribute)
    groups: dict[int, list[tuple[User, str | None]]] = defaultdict(list)
    order: dict[nn.Module, int] = {}
    for user, weight, reason in _users(names, meta):
        # Leaves of packed parameters share nothing: each has its own part.
        packed = any(part for (_, part), _ in user.pieces)
        groups[id(user.leaf) if weight is None or packed else id(weight)].append((user, reason))
        order.setdefault(user.leaf, len(order))
    targets = [_target(found, owners, tied) for found in groups.values()]
    mixtures = {(names[t.users[0].module][0], t.linear.num_experts) for t in targets if t.stacked}
    targets = [replace(t, reason=_router_reason(t, mixtures)) if t.reason is None else t for t in targets]
    return sorted(targets, key=lambda target: order[target.linear])


def _users(names: dict[nn.Module, tuple[str, ...]], meta: bool) -> Iterator[tuple[User, Tensor | None, str | None]]:
    """Yield every leaf with the parameter that holds its weight and the reason why it stays dense."""
    inside: set[nn.Module] = set()  # of a module that was opened or refused
    internal = _internal(names)
    for module, found in names.items():
        if module in inside:
            continue
        adapter = adapter_of(module)
        if adapter is None and not isinstance(module, nn.Linear):
            continue
        reason = internal.get(module) or _module_reason(module, adapter)
        weights = {} if adapter is None else adapter.leaves(module)
        sources = {path: _source(module, weight) for path, (weight, _) in weights.items()}
        inside.update(child for child in module.modules() if child is not module)
        unusual = next((r for source in sources.values() if source is not None and (r := _kind_reason(source))), None)
        if reason or unusual:
            if isinstance(module, nn.Linear):
                weight = module._parameters.get("weight")
                yield User(module, found, module, module, pieces=_pieces(module, "weight", "bias")), weight, (
                    reason or unusual
                )  # fmt: skip
            continue
        assert adapter is not None
        opened = adapter.open(module)
        for path, (weight_name, bias_name) in weights.items():
            leaf = opened.get_submodule(path)
            packed = "" if leaf.weight.numel() == sources[path].numel() else path  # type: ignore[union-attr, operator]
            pieces = _pieces(module, weight_name, bias_name, packed, leaf)
            # The only leaf of a module goes by the module's name; rules may also name the parameter.
            paths = tuple(".".join(filter(None, (name, path if len(weights) > 1 else ""))) for name in found)
            parameters = tuple(".".join(filter(None, (name, weight_name))) for name in found)
            user = User(leaf, paths, module, opened, path, adapter, pieces, parameters)
            yield user, sources[path], _value_reason(sources[path], meta)  # type: ignore[arg-type]


def _source(module: nn.Module, name: str) -> Tensor | None:
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(attribute)


def _pieces(
    module: nn.Module, weight: str, bias: str | None, packed: str = "", leaf: Any = None
) -> tuple[tuple[Piece, int], ...]:
    found = []
    for name, part in ((weight, "weight"), (bias, "bias")):
        source = None if name is None else _source(module, name)
        if source is not None and not is_lazy(source):
            size = getattr(leaf, part).numel() if packed else source.numel()
            found.append(((id(source), packed), size))
    return tuple(found)


def _target(found: list[tuple[User, str | None]], owners: dict[int, list[str]], tied: str) -> Target:
    """Make one target of the users of one weight."""
    tables = [user for user, _ in found if user.adapter is not None and user.adapter.on_request]
    maps = [user for user, _ in found if user not in tables]
    reason = next((reason for _, reason in found if reason), None)
    users = (*maps, *tables)
    if not reason and users[0].pieces:
        reason = _tie_reason(users, tables if maps else [], owners, tied)
    return Target(users, reason, on_request=not maps)


def _tie_reason(
    users: Sequence[User], tables: Sequence[User], owners: dict[int, list[str]], tied: str
) -> str | None:  # fmt: skip
    """Return why a weight that others use too must stay dense, None if nobody else does or all can be replaced."""
    (identity, _), _ = users[0].pieces[0]
    known = {(user.module, user.adapter) for user in users}
    if len(owners[identity]) == len(known) and (not tables or tied == "replace"):
        return None
    mine = {f"{name}." for user in users if user not in tables for name in user.names}
    other = next((o for o in owners[identity] if not any(o.startswith(prefix) for prefix in mine)), None)
    if other is None:
        return None
    replaceable = len(owners[identity]) == len(known)
    way_out = "pass tied='replace'" if replaceable else "untie it first"
    return f"its weight is tied to {other}; {way_out} to compress it"


# Reasons -------------------------------------------------------------------------------------------------------------


def _internal(names: dict[nn.Module, tuple[str, ...]]) -> dict[nn.Module, str]:
    """Return the modules that adapters of peft are made of (all but the base layer), with the reason to leave them."""
    found: dict[nn.Module, str] = {}
    for module in names:
        if "base_layer" in module._modules:
            for name, child in module._modules.items():
                for part in child.modules() if child is not None and name != "base_layer" else ():
                    found[part] = "it is part of an adapter (LoRA, say) of the base layer; merge it first"
    return found


def _module_reason(module: nn.Module, adapter: Adapter | None) -> str | None:
    """Return why a module must stay dense, None if nothing in the module itself forbids it."""
    if type(module) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads the weight itself: a structured layer would be made dense at each call"
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        return "its weight is parametrised; remove the parametrisation first"
    if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
        return "its weight is computed by a hook (weight_norm, pruning); remove the hook first"
    if isinstance(module, nn.Linear) and is_lazy(module.weight):
        return "its weight is not initialised yet (a lazy layer)"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (by an offloading hook, say)"
    if adapter is None:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        return f"{kind} is a subclass of nn.Linear, and its forward is not x W^T + b"
    return adapter.reason(module)


def _kind_reason(weight: Tensor) -> str | None:
    """Return why a weight cannot be read as a plain matrix, None if it can."""
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, quantised or of an unknown kind"
    return None


def _router_reason(target: Target, mixtures: set[tuple[str, int]]) -> str | None:
    """Return why a map beside fused experts with an output for each of them stays dense, None for any other."""
    for experts, count in mixtures:
        parent = experts.rpartition(".")[0]
        beside = f"{parent}." if parent else ""
        if not target.stacked and target.linear.out_features == count and target.name.startswith(beside):
            return f"it routes tokens to {experts}: small, and every error of it sends tokens elsewhere"
    return None


def _value_reason(weight: Tensor, meta: bool) -> str | None:
    """Return why the values of a weight cannot be decomposed, None if they can."""
    if weight.is_meta and not meta:
        return "its weight is on the meta device and has no values"
    if 0 in weight.shape:
        return "its weight is empty"
    return None


# The whole model -----------------------------------------------------------------------------------------------------


def unreached(model: nn.Module, reached: dict[int, int]) -> dict[str, int]:
    """Count the parameters that no target holds, by the type of the module that owns them.

    Args:
        model: the model.
        reached: id of a parameter -> how many of its entries targets hold.
    """
    counts: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and not is_lazy(parameter):
                seen.add(id(parameter))
                if rest := parameter.numel() - reached.get(id(parameter), 0):
                    adapter = adapter_of(module)
                    reason = adapter.reason(module) if adapter else None
                    if isinstance(module, Factored):
                        reason = STRUCTURED[2:-1]
                    counts[type(module).__name__ + (f" ({reason})" if reason else "")] += rest
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
