"""Decide what each layer becomes, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from structlin.compress.allocate import Share, allocate
from structlin.compress.evidence import Evidence, gather
from structlin.compress.observe import Forward
from structlin.compress.plan import CompressionPlan, PlanEntry, fingerprint
from structlin.compress.rules import Choice, Rules, Value, choice, describe, matches
from structlin.compress.spend import spend
from structlin.compress.statistics import Statistics
from structlin.compress.targets import Target, find_targets, last_target
from structlin.compress.workers import each
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import Budget, within
from structlin.fitting.fit import check_weight, fit


def plan_compression(
    model: nn.Module,
    structure: Value,
    *,
    ratio: float | None = None,
    rules: Rules | None = None,
    skip_last: bool = True,
    tied: str = "skip",
    refine: int | None = None,
    calibration: Statistics | Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    forward: Forward | None = None,
    allocation: str = "uniform",
    budget: Budget = "parameters",
    progress: bool | None = None,
) -> CompressionPlan:
    """Decide what each linear layer of a model becomes; the model is not touched.

    Where a ratio leaves a choice (of factor shapes, of blocks, of the structure for "auto"), real fits decide; the plan
    keeps them, so that `compress_model(model, plan)` need not repeat them.

    Args:
        model: any module.
        structure: for layers that no rule names: a registered name (with `ratio`); "auto" (with `ratio`) for the best
            of low rank, low rank + K-matrix and low rank + BLAST; an instance; or None to stay dense.
        ratio: kept / dense parameters of each layer, or with allocation="global" of all of them together.
        rules: pattern -> structure, name, None, or a mapping with `structure`, `ratio`, `refine`, hyperparameters. A
            pattern is a glob on the dotted name, a regular expression after `re:`, or a predicate(name, module). First
            match wins.
        skip_last: leave the output layer dense unless a rule names it.
        tied: "skip" leaves a weight that an embedding shares dense; "replace" compresses it for all of its users.
        refine: refinement steps, None for the structure's default.
        calibration: `Statistics`, or batches to collect them from: fits then minimise the layers' output errors.
        validation: batches for checks from end to end; None holds back a tenth of the calibration batches.
        forward: `forward(model, batch)` calls the model, where a batch is not what it takes.
        allocation: "uniform" gives each layer the ratio; "global" gives more to layers where a parameter saves more of
            the error of the model's outputs, if that is better from end to end, else the ratio to each (`allocate`).
        budget: what the ratio counts: "parameters", "bytes", or "flops" per token.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
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
    evidence = gather(model, calibration, validation, forward, tied)
    return make_plan(
        model, structure, evidence, ratio=ratio, rules=rules, skip_last=skip_last, tied=tied, refine=refine,
        allocation=allocation, budget=budget, progress=progress,
    )  # fmt: skip


def make_plan(
    model: nn.Module,
    structure: Value,
    evidence: Evidence,
    *,
    ratio: float | None,
    rules: Rules | None,
    skip_last: bool,
    tied: str,
    refine: int | None,
    allocation: str,
    budget: Budget,
    progress: bool | None,
) -> CompressionPlan:
    """Do what `plan_compression` does, with the evidence at hand."""
    if allocation not in ("uniform", "global"):
        raise ValueError(f"allocation={allocation!r} is unknown; use 'uniform' or 'global'")
    targets = find_targets(model, tied=tied)
    default = choice(structure, None, ratio, refine)
    choices = [(pattern, choice(value, default, ratio, refine)) for pattern, value in (rules or {}).items()]
    last = last_target(model, targets) if skip_last else None
    for pattern, _ in choices:
        if not any(matches(pattern, target.names, target.linear) for target in targets):
            raise ValueError(
                f"rule {describe(pattern)} matches no linear layer; there are {[t.name for t in targets][:20]}"
            )
    chosen = {target.name: _choice(target, choices, default, target is last) for target in targets}
    for target in targets:
        if isinstance(chosen[target.name], Choice):
            try:
                check_weight(target.linear.weight.detach())
            except ValueError as error:
                raise ValueError(f"layer {target.name!r}: {error}") from error
    ratios: dict[str, float] = {}
    if allocation == "global":
        ratios = _shared_out(model, targets, chosen, evidence)

    def entry(target: Target) -> PlanEntry:
        found = chosen[target.name]
        dense = PlanEntry(target.name, target.names[1:], target.linear.in_features, target.linear.out_features, None)
        if isinstance(found, str):
            return replace(dense, reason=found)
        found = replace(found, ratio=ratios.get(target.name, found.ratio))
        return _resolved(dense, target.linear.weight, found, evidence, budget)

    entries = list(each(entry, targets, progress, "plan"))
    if budget != "flops":
        entries = spend(entries, ratios, targets, evidence)
    return CompressionPlan(tuple(entries), tied)


def _choice(
    target: Target, choices: Sequence[tuple[Any, Choice | None]], default: Choice | None, is_last: bool
) -> Choice | str:
    """What a layer gets, or why it stays dense."""
    if target.reason:
        return target.reason
    for pattern, chosen in choices:
        if matches(pattern, target.names, target.linear):
            return chosen or f"rule {describe(pattern)} keeps it dense"
    if is_last:
        return "it is the output layer; pass skip_last=False or name it in a rule"
    return default or "the default keeps it dense"


def _resolved(dense: PlanEntry, weight: Tensor, chosen: Choice, evidence: Evidence, budget: Budget) -> PlanEntry:
    """Fix the sizes of a choice for one layer, or say why it stays dense."""
    try:
        entry = replace(_sized(chosen, dense, weight, evidence, budget), refine=chosen.refine)
    except ValueError as error:
        return replace(dense, reason=str(error))
    if entry.parameters_after >= entry.parameters_before:
        assert entry.structure is not None
        what = (
            f"{show(entry.structure)} would keep {entry.parameters_after:,} of {entry.parameters_before:,} parameters"
        )
        return replace(dense, reason=what)
    return entry


def _sized(chosen: Choice, dense: PlanEntry, weight: Tensor, evidence: Evidence, budget: Budget) -> PlanEntry:
    sizes = dense.in_features, dense.out_features
    if isinstance(chosen.structure, Structure):
        return replace(dense, structure=chosen.structure.resolve(*sizes, weight.detach()))
    assert chosen.ratio is not None
    if not isinstance(chosen.structure, Sequence):
        options = within(chosen.structure, *sizes, chosen.ratio, budget)
        if len(options) == 1:
            return replace(dense, structure=options[0])
    gram, output_gram = evidence.grams(dense.name)
    found = fit(
        weight, chosen.structure, ratio=chosen.ratio, gram=gram, output_gram=output_gram, refine=chosen.refine,
        budget=budget,
    )  # fmt: skip
    return replace(dense, structure=found.structure, fitted=(fingerprint(weight), found))


def _shared_out(
    model: nn.Module, targets: Sequence[Target], chosen: Mapping[str, Choice | str], evidence: Evidence
) -> dict[str, float]:
    """Ratios that differ by layer but keep the same share in all."""
    shares = [
        Share(target, found.ratio)
        for target in targets
        if isinstance(found := chosen[target.name], Choice) and found.ratio is not None
    ]
    return allocate(model, shares, evidence)
