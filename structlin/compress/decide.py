"""Decide what each layer gets: its rule, or the entry of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from structlin.compress.allocate import Share
from structlin.compress.config import AUTO, Choice, Compression, Pattern, describe, matches
from structlin.compress.plan import CompressionPlan, Wanted
from structlin.compress.targets import Target
from structlin.equation.structure import Structure
from structlin.fitting.fit import check_weight
from structlin.layers.conv import PatchLinear
from structlin.structures import of_kernel, over_kernel

Choices = Mapping[str, Wanted]  # by name

# Rules ---------------------------------------------------------------------------------------------------------------


def shares_of(targets: Sequence[Target], choices: Choices) -> list[Share]:
    """Return the layers that a ratio sizes: those that a global budget is divided among.

    Stacks of experts and tables keep the ratio that they are given.
    """
    return [
        Share(t, c.ratio)
        for t in targets
        if isinstance(c := choices[t.name], Choice) and c.ratio is not None and not t.stacked and not t.on_request
    ]


def sizes_of(targets: Sequence[Target], choices: Choices) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each matrix that is to be fitted, by its name in statistics, which know no tables."""
    return {
        name: (target.linear.in_features, target.linear.out_features)
        for target in targets
        if not isinstance(choices[target.name], str) and not target.on_request
        for name in target.parts
    }


def choose(config: Compression, targets: Sequence[Target], last: Target | None) -> Choices:
    """Apply the rules to the layers of a model, or pair a plan with them; check all weights that will be fitted.

    Args:
        config: the settings.
        targets: the layers.
        last: the output layer.
    Raises:
        ValueError: if a rule matches no layer, nothing uses the ratio, a plan does not fit the model, or a weight
            cannot be decomposed.
    """
    if isinstance(config, CompressionPlan):
        choices = _of_plan(config, targets)
    else:
        default, rules = config.choices()
        used = {choice.ratio for choice in (default, *(chosen for _, chosen in rules)) if choice}
        if config.ratio is not None and config.ratio not in used:
            raise ValueError(
                f"ratio={config.ratio} sizes nothing: structure={config.structure!r} and the rules have sizes or "
                "ratios of their own; leave ratio out, or name a structure, such as 'lowrank'"
            )
        for pattern, _ in rules:
            if not any(matches(pattern, target.spellings, target.linear) for target in targets):
                raise ValueError(
                    f"rule {describe(pattern)} matches no linear layer; there are {[t.name for t in targets][:20]}"
                )
        last = last if config.skip_last else None
        choices = {target.name: _choice(target, rules, default, target is last) for target in targets}
    for target in targets:
        if not isinstance(choices[target.name], str):
            try:
                for matrix in () if target.linear.weight.is_meta else target.matrices:
                    check_weight(matrix.detach())
            except ValueError as error:
                raise ValueError(f"layer {target.name!r}: {error}") from error
    return choices


def _choice(
    target: Target, rules: Sequence[tuple[Pattern, Choice | None]], default: Choice | None, is_last: bool
) -> Choice | str:
    if target.reason:
        return target.reason
    for pattern, chosen in rules:
        if matches(pattern, target.spellings, target.linear):
            return _over_taps(chosen, target) if chosen else f"rule {describe(pattern)} keeps it dense"
    if target.on_request:
        return "it is an embedding; name it in a rule to compress it"
    if is_last and not _tied(target):
        return "it is the output layer; pass skip_last=False or name it in a rule"
    return _over_taps(default, target) if default else "the default keeps it dense"


def _over_taps(choice: Choice, target: Target) -> Choice:
    """Return a choice for the kernel of a convolution, where it has several taps; see `over_kernel`."""
    if not isinstance(target.linear, PatchLinear) or isinstance(choice.structure, Structure):
        return choice
    kernel, chosen = target.linear.kernel_size, choice.structure
    if chosen is AUTO:
        return replace(choice, structure=of_kernel(kernel))
    if isinstance(chosen, Sequence):
        return replace(choice, structure=tuple(over_kernel(family, kernel) for family in chosen))
    return replace(choice, structure=over_kernel(chosen, kernel))


def _tied(target: Target) -> bool:
    """Whether embeddings use the weight too: without a reason it is a target by tied="replace", which asks for it."""
    return any(user.adapter is not None and user.adapter.on_request for user in target.users)


def _of_plan(plan: CompressionPlan, targets: Sequence[Target]) -> dict[str, Wanted]:
    known = {target.name: target for target in targets}
    choices: dict[str, Wanted] = {t.name: t.reason or "the plan does not name it" for t in targets}
    for entry in plan.entries:
        target = known.get(entry.name)
        if target is None:
            raise ValueError(
                f"the plan names layer {entry.name!r}, which this model has not; it has {list(known)[:20]}"
            )
        sizes = target.linear.in_features, target.linear.out_features
        if sizes != (entry.in_features, entry.out_features):
            raise ValueError(
                f"layer {entry.name!r} has (in, out) {sizes}, the plan says {entry.in_features, entry.out_features}"
            )
        if entry.structure and target.reason:
            raise ValueError(f"layer {entry.name!r} cannot be compressed: {target.reason}")
        choices[entry.name] = entry if entry.structure else entry.reason or "left dense in the plan"
    return choices
