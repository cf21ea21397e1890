"""The whole process on one page: find, observe, divide, then fit and refine part by part; commit, report.

1. find     every linear map and the rule that applies to it. All errors of settings, rules, plans and weights are
            raised here: nothing has run.
2. observe  run the dense model over the calibration batches: a Gram of each map's inputs, and one of the gradients at
            its outputs; and over the held-back batches, for all checks.
3. divide   the budget among the maps: divisions are tried from end to end.
4. for each block of the model, in the order in which they run:
   fit      each map to the inputs that the compressed maps before it give, or take hidden units out of an MLP;
   refine   all parameters of the block together, towards the dense block's outputs; and then those of all blocks.
   The model keeps its modules: what is compressed answers in their place. Without batches, all maps are one part.
5. commit   swap all modules, or none.
6. report   what became of every parameter, and how good the model is before and after.
Ranks of torch.distributed share steps 2 to 4 (see `processes`), and come to the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from structlin.batches import evaluating, progress_bar
from structlin.compress.allocate import allocate
from structlin.compress.blocks import find_chains, parts
from structlin.compress.calibrate import both_sides, masks_of
from structlin.compress.commit import committed
from structlin.compress.config import Compression
from structlin.compress.data import Data
from structlin.compress.decide import Choices, choose, shares_of, sizes_of
from structlin.compress.evaluate import Evaluate, Evaluator, measured
from structlin.compress.fit_layers import Purse, fit_part
from structlin.compress.observe import OutputSearch, replaced
from structlin.compress.output import declared_output, last_target, vocabulary_of
from structlin.compress.patched import Patched, model_passes, model_runs
from structlin.compress.plan import CompressionPlan
from structlin.compress.processes import ranks, shared, together
from structlin.compress.refine import check_refinable, refine, refine_model
from structlin.compress.report import BlockReport, Coverage, Outcome, Report
from structlin.compress.scramble import scarce, widened
from structlin.compress.speed import only_faster
from structlin.compress.targets import Target, find_targets, openings
from structlin.compress.workers import seeded


@dataclass(frozen=True)
class Found:
    """The result of step 1: a model, the settings, its calibration data, its targets and their choices."""

    model: nn.Module
    config: Compression
    data: Data
    targets: list[Target]
    choices: Choices


def find(model: nn.Module, config: Compression, data: Data, checks: bool, meta: bool = False) -> Found:
    """Find the targets (for plans also on `meta`) and what each gets; `checks`: whether held-back batches are known."""
    targets = find_targets(model, tied=config.tied, meta=meta)
    choices = choose(config, targets, last_target(model, targets))
    data = data.checked(sizes_of(targets, choices), config.shrinkage)
    if isinstance(config, CompressionPlan):
        if data.statistics is None and not data.batches:
            data = replace(data, statistics=config.statistics)
        if not data.batches:  # else once they are collected
            config.check_statistics(data.statistics)
    elif config.allocation == "global" and not checks and len(shares_of(targets, choices)) > 1:
        raise ValueError(
            "allocation='global' is checked from end to end: pass calibration as two or more batches, or validation="
        )
    config.check_batches(data.batches)
    return Found(model, config, data, targets, choices)


def observe(found: Found) -> Found:
    """Collect the statistics of the calibration batches, if there are any; running shows the output layer too."""
    data, config, search = found.data, found.config, OutputSearch()
    made = config.fitted_with if isinstance(config, CompressionPlan) else None
    if data.batches and data.statistics is None:
        targets = [target for target in found.targets if not target.reason and not target.on_request]
        # A plan is carried out with the kind of statistics that it was made with.
        metric = config.output_metric if made is None else made.output_energy > 0
        data = replace(data, statistics=both_sides(found.model, targets, data, config, metric, search))
    if isinstance(config, CompressionPlan):
        config.check_statistics(data.statistics)
    elif search.key is not None and declared_output(found.model) is None:
        last = next(target for target in found.targets if search.key in target.parts)
        found = replace(found, choices=choose(config, found.targets, last))
    return replace(found, data=data)


def divide(found: Found, evaluator: Evaluator | None) -> dict[str, float]:
    """Decide the ratio of each layer; empty where each keeps that of its rule."""
    given = isinstance(found.config, CompressionPlan) or found.config.allocation == "uniform"
    if given or evaluator is None or not evaluator.batches:
        return {}
    opened = openings(found.targets)

    def distance(modules: Mapping[nn.Module, nn.Module]) -> float:
        with evaluating(*opened.values()), replaced(opened), replaced(modules):
            return evaluator.distance(found.model)

    return allocate(shares_of(found.targets, found.choices), found.data, distance)


def work(
    found: Found, ratios: Mapping[str, float], patched: Patched, behind: bool, progress: bool | None
) -> tuple[list[Outcome], list[BlockReport]]:
    """Fit and refine part by part; with `behind`, each behind the compressed ones before it."""
    model, config, data, purse = found.model, found.config, found.data, Purse(ratios, winners={})
    again = behind and (config.sequential is not False or config.block_epochs != 0 or config.model_epochs)
    few = scarce(data.batches, found.targets)
    batches = widened(data.batches, config.seed, vocabulary_of(model), few) if again else ()
    runs, masks = model_runs(model, batches, data.forward), masks_of(config.mask, batches)
    chains = find_chains(model, config.blocks) if batches else []
    screen = only_faster if config.require_speedup else list
    outcomes, blocks = dict[str, Outcome](), list[BlockReport]()
    bar = progress_bar("compress", "layer", len(found.targets), False if ranks()[0] else progress)
    pieces = closing(parts(patched, found.targets, chains, runs, masks))  # an error, too, restores what it changed
    with torch.inference_mode(False), torch.no_grad(), seeded(config.seed), bar as advance, pieces as left:
        for part in left:
            done = fit_part(part, found.choices, purse, data, config, patched, advance, screen)
            outcomes |= {outcome.target.name: outcome for outcome in done}
            if config.block_epochs != 0 and part.passes and part.own:
                swaps = {old: new for outcome in done for old, new in outcome.modules.items()}
                blocks += refine(part, swaps, patched, config.block_epochs, len(data.batches))
        blocks += refine_model(patched, model_passes(patched, runs, masks), config, len(data.batches), len(blocks))
    return [outcomes[target.name] for target in found.targets], blocks


def compress(found: Found, evaluate: Evaluate | Evaluator | None, dry_run: bool, progress: bool | None) -> Report:
    """Carry the settings out: steps 2 to 6."""
    check_refinable(found.model, found.config, found.data.batches)
    found, model, targets = observe(found), found.model, found.targets
    evaluator = together(lambda: Evaluator.of(model, found.data, evaluate))
    patched = Patched(model, openings(targets))
    outcomes, blocks = work(found, divide(found, evaluator), patched, True, progress)
    covered = Coverage.of(model, targets, {outcome.target.name for outcome in outcomes if outcome.modules})
    planned = CompressionPlan.of(found.config, [outcome.entry for outcome in outcomes], found.data.statistics)
    qualities = () if evaluator is None else (evaluator.dense,)
    with nullcontext(model) if dry_run else committed(patched, targets) as root:
        report = Report(root, tuple(o.row for o in outcomes), covered, planned.settings(), qualities, tuple(blocks))
        report = report if dry_run else together(lambda: measured(report, outcomes, evaluator, found.data))
    if report.verdict:
        warnings.warn(report.verdict, stacklevel=3)
    return replace(report, qualities=shared(lambda: report.qualities))
