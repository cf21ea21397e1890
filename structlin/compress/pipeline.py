"""The whole process on one page: find, observe, decide, fit, commit, report. Each step reads only what came before.

1. find     every linear map, and for each the rule that applies or the reason why it stays dense. All errors of
            settings, rules, plans and weights are raised here: nothing has run.
2. observe  run the dense model over the calibration batches: a Gram of each map's inputs; and once over the held-back
            batches, whose outputs are the reference of all checks.
3. decide   the share of the budget and the sizes of each map, by real fits where a ratio leaves a choice: a plan.
4. fit      every map of the plan, at once or each behind the compressed ones before it.
5. commit   swap all modules, or none.
6. report   what became of every parameter, and how good the model is before and after.

A plan of another day enters as the settings and leaves step 3 as it came. Here the model is one block: refinement
by blocks, and checkpoints larger than memory, put steps 2 to 5 into a loop over blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from structlin.batches import evaluating, progress_bar
from structlin.compress.calibrate import Collecting, collect
from structlin.compress.commit import assemble, swap_modules
from structlin.compress.config import Compression
from structlin.compress.data import Data
from structlin.compress.decide import Choices, choose, decide, shares_of
from structlin.compress.evaluate import Evaluate, Evaluator
from structlin.compress.fit_layers import Outcome, fit_all, fit_in_turn
from structlin.compress.observe import OutputSearch, replaced
from structlin.compress.output import declared_output, last_target
from structlin.compress.plan import CompressionPlan, PlanEntry
from structlin.compress.report import Coverage, Report
from structlin.compress.sequential import shifted
from structlin.compress.speed import only_faster
from structlin.compress.targets import Target, find_targets, openings
from structlin.compress.workers import seeded


@dataclass(frozen=True)
class Found:
    """The result of step 1: a model, the settings, its calibration data, its targets and their choices."""

    model: nn.Module
    config: Compression
    data: Data
    targets: Sequence[Target]
    choices: Choices


def find(model: nn.Module, config: Compression, data: Data, checks: bool) -> Found:
    """Find the targets and what each gets; `checks` tells whether batches for checks from end to end are known."""
    targets = find_targets(model, tied=config.tied)
    choices = choose(config, targets, last_target(model, targets))
    data = replace(data, shrinkage=config.shrinkage)
    if isinstance(config, CompressionPlan):
        if data.statistics is None and not data.batches:
            data = replace(data, statistics=config.statistics)
        if not data.batches:  # else once they are collected
            config.check_statistics(data.statistics)
    elif config.allocation == "global" and not checks and len(shares_of(targets, choices)) > 1:
        raise ValueError(
            "allocation='global' is checked from end to end: pass calibration as two or more batches, or validation="
        )
    if config.sequential and not data.batches:
        raise ValueError("sequential=True runs the model again for every layer: pass calibration as batches")
    return Found(model, config, data, targets, choices)


def observe(found: Found) -> Found:
    """Collect the statistics of the calibration batches, if there are any; running shows the output layer too."""
    data, config, search = found.data, found.config, OutputSearch()
    if data.batches and data.statistics is None:
        targets = [target for target in found.targets if not target.reason and not target.on_request]
        how = Collecting(mask=config.mask)
        data = replace(data, statistics=collect(found.model, targets, data.batches, data.forward, None, how, search))
    if isinstance(config, CompressionPlan):
        config.check_statistics(data.statistics)
    elif search.key is not None and declared_output(found.model) is None:
        last = next(target for target in found.targets if target.name == search.key)
        found = replace(found, choices=choose(config, found.targets, last))
    return replace(found, data=data)


def plan(found: Found, evaluator: Evaluator | None, progress: bool | None) -> CompressionPlan:
    """Decide the sizes of all layers; the model keeps its modules."""
    opened = openings(found.targets)

    def distance(modules: Mapping[nn.Module, nn.Module]) -> float:
        assert evaluator is not None
        with evaluating(*opened.values()), replaced(opened), replaced(modules):
            return evaluator.distance(found.model)

    with seeded(found.config.seed):
        return decide(found.config, found.targets, found.choices, found.data, distance, progress)


def fit(found: Found, entries: Sequence[PlanEntry], progress: bool | None) -> list[Outcome]:
    """Fit all layers, and take back those that are not faster where that is asked for."""
    config, data, targets = found.config, found.data, found.targets
    with seeded(config.seed):
        if config.sequential:
            aims = partial(shifted, found.model, data=data, mask=config.mask, opened=openings(targets))
            with progress_bar("compress", "group", None, progress) as advance:
                outcomes = fit_in_turn(entries, targets, data, aims, advance)
        else:
            outcomes = fit_all(entries, targets, data, progress)
        return only_faster(outcomes) if config.require_speedup else outcomes


def compress(
    found: Found, evaluate: Evaluate | Evaluator | None, dry_run: bool, progress: bool | None
) -> Report:  # fmt: skip
    """Carry the settings out: steps 2 to 6."""
    model, targets = found.model, found.targets
    found = observe(found)
    evaluator = evaluator_of(found, evaluate)
    planned = plan(found, evaluator, progress)
    outcomes = fit(found, planned.entries_for(targets), progress)
    compressed = {outcome.target.name for outcome in outcomes if outcome.modules}
    covered = Coverage.of(model, targets, compressed)
    swaps = {old: new for outcome in outcomes for old, new in outcome.modules.items()}
    root = model if dry_run else swap_modules(model, assemble(swaps, targets))
    report = Report(root, tuple(outcome.row for outcome in outcomes), covered, planned.settings())
    if report.verdict:
        warnings.warn(report.verdict, stacklevel=3)
    if evaluator is None:
        return report
    report = replace(report, qualities=(evaluator.dense,))
    return report if dry_run else report.measure("compressed", evaluator)


def evaluator_of(found: Found, evaluate: Evaluate | Evaluator | None) -> Evaluator | None:
    """Run the dense model over the held-back batches and by the task, if there is either."""
    data = found.data
    if isinstance(evaluate, Evaluator):
        return evaluate
    if evaluate is None and not data.held_back:
        return None
    return Evaluator(found.model, data.held_back, evaluate=evaluate, forward=data.forward)
