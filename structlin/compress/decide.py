"""Decide what each layer gets: its rule, its sizes, and the ranks that are left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from structlin.compress.allocate import Distance, Share, allocate
from structlin.compress.config import Choice, Compression, describe, matches
from structlin.compress.data import Data
from structlin.compress.fit_layers import size_layer
from structlin.compress.plan import CompressionPlan, PlanEntry, fingerprint
from structlin.compress.targets import Target
from structlin.compress.workers import each
from structlin.equation.structure import Structure
from structlin.fitting.fit import check_weight, extend
from structlin.structures import LowRank, Sum

Choices = Mapping[str, Choice | str]  # by name: what a layer gets, or why it stays dense
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


def choose(config: Compression, targets: Sequence[Target], last: Target | None) -> Choices:
    """Apply the rules to the layers of a model, or pair a plan with them; check all weights that will be fitted.

    Args:
        config: the settings.
        targets: the layers.
        last: the output layer.
    Raises:
        ValueError: if a rule matches no layer, a plan does not fit the model, or a weight cannot be decomposed.
    """
    if isinstance(config, CompressionPlan):
        choices = _of_plan(config, targets)
    else:
        default, rules = config.choices()
        for pattern, _ in rules:
            if not any(matches(pattern, target.spellings, target.linear) for target in targets):
                raise ValueError(
                    f"rule {describe(pattern)} matches no linear layer; there are {[t.name for t in targets][:20]}"
                )
        last = last if config.skip_last else None
        choices = {target.name: _choice(target, rules, default, target is last) for target in targets}
    for target in targets:
        if isinstance(choices[target.name], Choice):
            try:
                for matrix in target.matrices:
                    check_weight(matrix.detach())
            except ValueError as error:
                raise ValueError(f"layer {target.name!r}: {error}") from error
    return choices


def _choice(
    target: Target, rules: Sequence[tuple[object, Choice | None]], default: Choice | None, is_last: bool
) -> Choice | str:
    if target.reason:
        return target.reason
    for pattern, chosen in rules:
        if matches(pattern, target.spellings, target.linear):  # type: ignore[arg-type]
            return chosen or f"rule {describe(pattern)} keeps it dense"  # type: ignore[arg-type]
    if target.on_request:
        return "it is an embedding; name it in a rule to compress it"
    if is_last and not _tied(target):
        return "it is the output layer; pass skip_last=False or name it in a rule"
    return default or "the default keeps it dense"


def _tied(target: Target) -> bool:
    """Whether embeddings use the weight too: without a reason it is a target by tied="replace", which asks for it."""
    return any(user.adapter is not None and user.adapter.on_request for user in target.users)


def _of_plan(plan: CompressionPlan, targets: Sequence[Target]) -> dict[str, Choice | str]:
    known = {target.name: target for target in targets}
    choices: dict[str, Choice | str] = {target.name: "the plan does not name it" for target in targets}
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
        choices[entry.name] = Choice(entry.structure) if entry.structure else entry.reason or "left dense in the plan"
    return choices


# Sizes ---------------------------------------------------------------------------------------------------------------


def decide(
    config: Compression,
    targets: Sequence[Target],
    choices: Choices,
    data: Data,
    distance: Distance | None,
    progress: bool | None,
) -> CompressionPlan:
    """Give every layer its sizes.

    Args:
        config: the settings; a plan is returned as it is.
        targets: the layers.
        choices: what each of them gets, of `choose`.
        data: with the Grams.
        distance: of the model's outputs from the dense ones when modules answer in place of others; for
            allocation="global".
        progress: show a progress bar.
    """
    if isinstance(config, CompressionPlan):
        return config
    ratios: dict[str, float] = {}
    if config.allocation == "global":
        assert distance is not None
        ratios = allocate(shares_of(targets, choices), data, distance)

    def entry(target: Target) -> PlanEntry:
        choice = choices[target.name]
        if isinstance(choice, Choice):
            choice = replace(choice, ratio=ratios.get(target.name, choice.ratio))
        return size_layer(target, choice, data, config.budget)

    entries = list(each(entry, targets, progress, "plan"))
    if config.budget != "flops":
        entries = round_up_ranks(entries, ratios, targets, data)
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rules"}
    statistics = data.statistics
    return CompressionPlan(
        **settings,
        entries=tuple(entries),
        fitted_with=None if statistics is None else statistics.summary,
        statistics=statistics,
    )


# Ranks from what is left over ----------------------------------------------------------------------------------------


def _grown(structure: Structure) -> Structure | None:
    """Return the structure with one more rank in its first low-rank part, None if it has none."""
    if isinstance(structure, LowRank):
        return replace(structure, rank=structure.rank + 1)
    if isinstance(structure, Sum):
        for k, part in enumerate(structure.parts):
            if isinstance(part, LowRank):
                return Sum(parts=(*structure.parts[:k], replace(part, rank=part.rank + 1), *structure.parts[k + 1 :]))
    return None


def round_up_ranks(
    entries: Sequence[PlanEntry], ratios: Mapping[str, float], targets: Sequence[Target], data: Data
) -> list[PlanEntry]:
    """Round sizes up instead of down where the layers together have parameters to spare.

    Rank after rank goes to the layer that lacks the fewest parameters for it, until the next one would exceed the
    budget. Known fits are extended, their other factors as they are.

    Args:
        entries: one for each target, in the same order.
        ratios: what each layer was to keep, by name; layers without one, and layers that stay dense, do not take part.
        targets: the layers.
        data: the Grams of the fits.
    Returns:
        The entries, some of them larger.
    """
    limits = {e.name: ratios[e.name] * e.parameters_before for e in entries if e.structure and e.name in ratios}
    current = {entry.name: entry for entry in entries if entry.name in limits}
    rest = sum(limits.values()) - sum(entry.parameters_after for entry in current.values())

    def larger(entry: PlanEntry) -> PlanEntry | None:
        assert entry.structure is not None
        if (structure := _grown(entry.structure)) is None:
            return None
        try:
            structure.resolve(entry.in_features, entry.out_features)
        except ValueError:  # the rank is full
            return None
        found = replace(entry, structure=structure)
        return found if found.parameters_after < found.parameters_before else None

    while True:
        steps = {
            name: (after, after.parameters_after - entry.parameters_after)
            for name, entry in current.items()
            if (after := larger(entry)) is not None
        }
        fitting = [name for name, (_, cost) in steps.items() if cost <= rest]
        if not fitting:
            break
        first = min(fitting, key=lambda name: steps[name][0].parameters_after - limits[name])
        current[first] = steps[first][0]
        rest -= steps[first][1]
    return [
        _refitted(entry, current.get(entry.name, entry), target, data)
        for entry, target in zip(entries, targets, strict=True)
    ]


def _refitted(before: PlanEntry, after: PlanEntry, target: Target, data: Data) -> PlanEntry:
    if before.structure == after.structure or before.fitted is None:
        return after
    assert after.structure is not None
    weight = target.linear.weight
    gram, output_gram = data.grams(after.name)
    found = extend(before.fitted[1], after.structure, weight, gram=gram, output_gram=output_gram)
    return replace(after, fitted=(fingerprint(weight), found))
