"""Decide what each layer gets: its rule, its share of the budget, and the ranks that are left over."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from structlin.compress.config import Choice, Compression, describe, matches
from structlin.compress.data import Data
from structlin.compress.fit_layers import size_layer
from structlin.compress.plan import CompressionPlan, PlanEntry, fingerprint
from structlin.compress.targets import Target
from structlin.compress.workers import each
from structlin.equation.structure import Structure
from structlin.fitting.fit import check_weight, extend, fit
from structlin.fitting.objective import make_objective
from structlin.layers.linear import from_fit
from structlin.structures import LowRank, Sum

Choices = Mapping[str, Choice | str]  # by name: what a layer gets, or why it stays dense
# How far the model's outputs move when modules answer in place of others (old -> new).
Distance = Callable[[Mapping[nn.Module, nn.Module]], float]

# A layer's ratio stays between these multiples of the given one, and below 1: the model of the errors is local.
LEAST, MOST, CEILING = 0.4, 1.8, 0.95
# The squared output error of the sums in "auto" falls like that of low rank to this power
# (benchmarks/results/structures_tried.md); with low rank itself the exponent hardly changes the allocation.
EXPONENT = 1.5


@dataclass(frozen=True)
class Share:
    """One layer's part of the budget: the ratio that it gets when all get the same."""

    target: Target
    ratio: float


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
    if is_last:
        return "it is the output layer; pass skip_last=False or name it in a rule"
    return default or "the default keeps it dense"


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


# Shares of a global budget -------------------------------------------------------------------------------------------


def allocate(shares: Sequence[Share], data: Data, distance: Distance) -> dict[str, float]:
    """Find a ratio for each layer, with the same number of parameters in all as the given ratios keep.

    Each layer alone is replaced by its whitened low-rank approximation: how much the model's outputs change per unit of
    relative error is the layer's sensitivity s. Where the statistics hold output Grams (of a loss gradient), those
    take its place. Then rank after rank goes to the layer where a parameter lowers sum_layers s (1 - energy kept)^1.5
    most. Both allocations are tried from end to end on held-back batches with low rank everywhere; the given ratios
    win unless the new ones are better. A layer without any effect on the outputs keeps its given ratio: its module may
    never be called, its weight read by other code.

    Time: a forward pass over the held-back batches for each layer, and an eigenproblem of its smaller side.

    Args:
        shares: the layers and their ratios.
        data: with the Grams.
        distance: see `Distance`; the model keeps its modules.
    Returns:
        The ratios by name.
    """
    given = {share.target.name: share.ratio for share in shares}
    if len(given) < 2:
        return given
    curves = {share.target.name: _curve(share.target, data) for share in shares}
    uniform = {share.target.name: _answers(share.target, share.ratio, data) for share in shares}
    weights: dict[str, float] = {}
    for share in shares:
        name = share.target.name
        if data.statistics is not None and name in data.statistics.output_grams:
            weights[name] = _loss_energy(share.target, data)
        else:
            lost = curves[name][min(_rank(share.target, share.ratio), len(curves[name]) - 1)].item()
            weights[name] = distance(uniform[name]) / max(lost, 1e-12)
    felt = [share for share in shares if weights[share.target.name] > 0]
    if len(felt) < 2:
        return given
    found = given | _filled(felt, curves, weights)
    other = [_answers(share.target, found[share.target.name], data) for share in felt]
    before, after = (
        distance({old: new for answers in each for old, new in answers.items()}) for each in (uniform.values(), other)
    )
    return found if after < before else given


def _answers(target: Target, ratio: float, data: Data) -> dict[nn.Module, nn.Module]:
    """Return the whitened low-rank approximation of a layer for each module that uses its weight."""
    gram, output_gram = data.grams(target.name)
    weight = target.linear.weight
    found = fit(weight, LowRank(_rank(target, ratio)), gram=gram, output_gram=output_gram, refine=0)
    proxy = from_fit(found, target.linear)
    return dict.fromkeys(target.leaves, proxy)


def _rank(target: Target, ratio: float) -> int:
    linear = target.linear
    most = min(linear.in_features, linear.out_features)
    return max(1, min(most, int(ratio * linear.weight.numel() / (linear.in_features + linear.out_features))))


def _curve(target: Target, data: Data) -> Tensor:
    """Return the share of the output energy that a low-rank approximation of rank 0, 1, 2, .. loses."""
    objective, _ = make_objective(target.linear.weight, *data.grams(target.name))
    rows = objective.targets
    smaller = rows.mH @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.mH
    energy = torch.linalg.eigvalsh(smaller).clamp_min(0)  # ascending
    tails = torch.cat([energy.cumsum(0).flip(0), energy.new_zeros(1)])
    return (tails / tails[0].clamp_min(1e-300)).cpu()


def _loss_energy(target: Target, data: Data) -> float:
    """Return tr(H W G W^H), the energy of the outputs in the metric of the loss, per token."""
    statistics = data.statistics
    assert statistics is not None
    gram, metric = statistics.grams[target.name], statistics.output_grams[target.name]
    weight = target.linear.weight.detach().to(gram.dtype)
    outputs = weight @ gram @ weight.mH
    total = (torch.diagonal(outputs) * metric).sum() if metric.ndim == 1 else (outputs * metric.mT).sum()
    return total.real.item() / max(statistics.tokens[target.name], 1)


def _filled(shares: Sequence[Share], curves: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Hand out ranks greedily until the budget is spent, which is optimal for convex curves."""
    sizes = {share.target.name: share.target.linear.weight.numel() for share in shares}
    steps = {s.target.name: s.target.linear.in_features + s.target.linear.out_features for s in shares}
    budget = sum(share.ratio * sizes[share.target.name] for share in shares)
    ranks = {share.target.name: _rank(share.target, LEAST * share.ratio) for share in shares}
    most = {s.target.name: min(CEILING, MOST * s.ratio) * sizes[s.target.name] / steps[s.target.name] for s in shares}
    costs = {name: weights[name] * (curves[name] ** EXPONENT) for name in ranks}

    def gain(name: str) -> float:
        rank = ranks[name]
        last = len(costs[name]) - 1
        return (costs[name][min(rank, last)] - costs[name][min(rank + 1, last)]).item() / steps[name]

    spent = sum(ranks[name] * steps[name] for name in ranks)
    queue = [(-gain(name), name) for name in ranks]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if ranks[name] + 1 <= most[name] and spent + steps[name] <= budget:
            ranks[name] += 1
            spent += steps[name]
            heapq.heappush(queue, (-gain(name), name))
    spare = (budget - spent) / len(ranks)
    return {n: min(CEILING, (ranks[n] * steps[n] + spare) / sizes[n]) for n in ranks}


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
