"""Decide what each layer becomes, without touching the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from structlin.budget import within
from structlin.compress.report import table
from structlin.compress.rules import Choice, Rules, Value, choice, describe, matches
from structlin.compress.targets import Target, find_targets, last_target
from structlin.fit import check_weight, fit
from structlin.structure import Structure, from_record, hyperparameters, to_record


@dataclass(frozen=True)
class PlanEntry:
    """What one linear map becomes.

    Args:
        name: dotted name.
        aliases: other names of the module, and of layers that share its weight.
        in_features: size of the input.
        out_features: size of the output.
        structure: with all sizes fixed, or None to stay dense.
        reason: why it stays dense.
        refine: refinement steps, None for the structure's default.
    """

    name: str
    aliases: tuple[str, ...]
    in_features: int
    out_features: int
    structure: Structure | None
    reason: str | None = None
    refine: int | None = None

    @property
    def parameters_before(self) -> int:
        """Entries of the dense weight."""
        return self.in_features * self.out_features

    @property
    def parameters_after(self) -> int:
        """Learned entries of the factors, or the dense count."""
        if self.structure is None:
            return self.parameters_before
        return self.structure.spec(self.in_features, self.out_features).num_parameters


@dataclass(frozen=True)
class CompressionPlan:
    """One entry per linear map of a model; prints as a table, goes through JSON unchanged, and may be edited there."""

    entries: tuple[PlanEntry, ...]
    tied: str = "skip"

    def to_json(self) -> str:
        """Write the plan as JSON: set a layer's `structure` to null, or change its fields, and read it back."""
        layers = [
            {
                "name": entry.name,
                "aliases": list(entry.aliases),
                "in_features": entry.in_features,
                "out_features": entry.out_features,
                "structure": to_record(entry.structure) if entry.structure else None,
                "reason": entry.reason,
                "refine": entry.refine,
            }
            for entry in self.entries
        ]
        return json.dumps({"version": 1, "tied": self.tied, "layers": layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan; structures are resolved and checked against their layers' sizes.

        Raises:
            ValueError: if the version, a key or a structure is not understood, naming the layer.
        """
        content = json.loads(text)
        if content.get("version") != 1:
            raise ValueError(f"plan version {content.get('version')} is unknown; this structlin reads version 1")
        return cls(tuple(_read_entry(layer) for layer in content["layers"]), content["tied"])

    def __str__(self) -> str:
        rows = [("layer", "shape", "becomes", "kept")]
        for entry in self.entries:
            becomes = show(entry.structure) if entry.structure else f"dense: {entry.reason}"
            kept = f"{entry.parameters_after / entry.parameters_before:.3f}"
            rows.append((entry.name or "(root)", f"{entry.out_features}x{entry.in_features}", becomes, kept))
        before = sum(entry.parameters_before for entry in self.entries)
        after = sum(entry.parameters_after for entry in self.entries)
        return "\n".join([*table(rows), f"linear weights: {before:,} -> {after:,} parameters"])


def _read_entry(layer: dict[str, Any]) -> PlanEntry:
    try:
        sizes = layer["in_features"], layer["out_features"]
        structure = from_record(layer["structure"]).resolve(*sizes) if layer["structure"] else None
        reason = layer["reason"] or (None if structure else "left dense in the plan")
        return PlanEntry(layer["name"], tuple(layer["aliases"]), *sizes, structure, reason, layer["refine"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"layer {layer.get('name')!r} of the plan: {error}") from error


def show(structure: Structure) -> str:
    """A structure with the fields that are set."""
    fields = ", ".join(f"{name}={value}" for name, value in hyperparameters(structure).items() if value is not None)
    return f"{structure.name}({fields})"


def plan_compression(
    model: nn.Module,
    structure: Value,
    *,
    ratio: float | None = None,
    rules: Rules | None = None,
    skip_last: bool = True,
    tied: str = "skip",
    refine: int | None = None,
) -> CompressionPlan:
    """Decide what each linear layer of a model becomes; the model is not touched.

    Where a ratio leaves a choice of shape (factor shapes of a Kronecker sum, blocks of a Monarch matrix), the one
    that fits the weight best is taken.

    Args:
        model: any module.
        structure: for layers that no rule names: a registered name (with `ratio`), an instance, or None to stay dense.
        ratio: parameters kept / dense parameters of each layer.
        rules: pattern -> structure, name, None, or a mapping with `structure`, `ratio`, `refine`, hyperparameters. A
            pattern is a glob on the dotted name, a regular expression after `re:`, or a predicate(name, module). First
            match wins.
        skip_last: leave the output layer dense unless a rule names it.
        tied: "skip" leaves a weight that an embedding shares dense; "replace" compresses it for all of its users.
        refine: refinement steps, None for the structure's default.
    Returns:
        The plan, for `compress_model(model, plan)`.
    Raises:
        ValueError: if a rule matches no linear layer, a weight is not finite, or an argument is out of range; the
            message names the layer.
    Example:
        >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> print(plan_compression(mlp, "lowrank", ratio=0.5))
        layer  shape  becomes                                                               kept
        0      64x64  lowrank(rank=16)                                                      0.500
        2      10x64  dense: it is the output layer; pass skip_last=False or name it in a rule  1.000
        linear weights: 4,736 -> 2,688 parameters
    """
    targets = find_targets(model, tied=tied)
    default = choice(structure, None, ratio, refine)
    choices = [(pattern, choice(value, default, ratio, refine)) for pattern, value in (rules or {}).items()]
    last = last_target(model, targets) if skip_last else None
    for pattern, _ in choices:
        if not any(matches(pattern, target.names, target.linear) for target in targets):
            raise ValueError(
                f"rule {describe(pattern)} matches no linear layer; there are {[t.name for t in targets][:20]}"
            )
    return CompressionPlan(tuple(_entry(target, choices, default, target is last) for target in targets), tied)


def _entry(
    target: Target, choices: Sequence[tuple[Any, Choice | None]], default: Choice | None, is_last: bool
) -> PlanEntry:
    linear, name = target.linear, target.name
    dense = PlanEntry(name, target.names[1:], linear.in_features, linear.out_features, None)
    if target.reason:
        return replace(dense, reason=target.reason)
    for pattern, chosen in choices:
        if matches(pattern, target.names, linear):
            return _resolved(dense, target, chosen, f"rule {describe(pattern)}")
    if is_last:
        return replace(dense, reason="it is the output layer; pass skip_last=False or name it in a rule")
    return _resolved(dense, target, default, "the default")


def _resolved(dense: PlanEntry, target: Target, chosen: Choice | None, source: str) -> PlanEntry:
    """Fix the sizes of a choice for one layer, or say why it stays dense."""
    if chosen is None:
        return replace(dense, reason=f"{source} keeps it dense")
    weight = target.linear.weight.detach()
    try:
        check_weight(weight)
    except ValueError as error:
        raise ValueError(f"layer {dense.name!r}: {error}") from error
    try:
        structure = _sized(chosen, dense, weight)
    except ValueError as error:
        return replace(dense, reason=str(error))
    entry = replace(dense, structure=structure, refine=chosen.refine)
    if entry.parameters_after >= entry.parameters_before:
        return replace(
            dense,
            reason=f"{show(structure)} would keep {entry.parameters_after:,} of {entry.parameters_before:,} parameters",
        )
    return entry


def _sized(chosen: Choice, dense: PlanEntry, weight: Any) -> Structure:
    sizes = dense.in_features, dense.out_features
    if isinstance(chosen.structure, Structure):
        return chosen.structure.resolve(*sizes, weight)
    assert chosen.ratio is not None
    options = within(chosen.structure, *sizes, chosen.ratio)
    if len(options) == 1:
        return options[0]
    return fit(weight, chosen.structure, ratio=chosen.ratio, refine=0).structure


def by_name(entries: Sequence[PlanEntry], targets: Sequence[Target]) -> Iterator[tuple[PlanEntry, Target]]:
    """Pair the entries of a plan with the targets of a model.

    Raises:
        ValueError: if the model lacks a layer of the plan, or it has another size or must stay dense.
    """
    found = {target.name: target for target in targets}
    for entry in entries:
        target = found.get(entry.name)
        if target is None:
            raise ValueError(
                f"the plan names layer {entry.name!r}, which this model has not; it has {list(found)[:20]}"
            )
        sizes = target.linear.in_features, target.linear.out_features
        if sizes != (entry.in_features, entry.out_features):
            raise ValueError(
                f"layer {entry.name!r} has (in, out) {sizes}, the plan says {entry.in_features, entry.out_features}"
            )
        if entry.structure and target.reason:
            raise ValueError(f"layer {entry.name!r} cannot be compressed: {target.reason}")
        yield entry, target
