"""Carry a plan out: fit every layer first, then swap all of them or none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from structlin.compress.choose import make_plan
from structlin.compress.evidence import Evidence, gather
from structlin.compress.observe import Forward
from structlin.compress.plan import CompressionPlan, PlanEntry, by_name
from structlin.compress.quality import Evaluate, Judge
from structlin.compress.report import Coverage, LayerReport, Report
from structlin.compress.rules import Rules, Value
from structlin.compress.sequential import groups, shifted
from structlin.compress.speed import only_faster
from structlin.compress.statistics import Statistics
from structlin.compress.targets import Target, find_targets, module_names, unreached
from structlin.compress.workers import bar, each
from structlin.equation.structure import show
from structlin.fitting.budget import Budget
from structlin.fitting.fit import Fit, fit, relative_error
from structlin.fitting.objective import GramRoot
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build, from_fit
from structlin.runtime.contract import to_dense

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

Swap = tuple[nn.Module, str, nn.Module]  # parent, attribute, new module


def compress_model(
    model: nn.Module,
    structure: Value | CompressionPlan,
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
    sequential: bool = False,
    require_speedup: bool = False,
    evaluate: Evaluate | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replace the linear layers of a model, in place, by structured ones fitted to their weights.

    All layers are fitted before any is swapped: on an error the model is as it was. Biases, dtype, device,
    `requires_grad`, the training flag and forward and backward hooks are kept; a module reachable under several names
    stays one module; layers that share a weight share its factors. Fits run on as many threads as torch has.

    Args:
        model: any module.
        structure: a plan of `plan_compression`, or its `structure` argument.
        ratio: see `plan_compression`, as for all other arguments up to `budget`.
        rules: pattern -> structure.
        skip_last: leave the output layer dense unless a rule names it.
        tied: "skip" or "replace".
        refine: refinement steps.
        calibration: `Statistics` or batches; with a plan too, for the fits that it does not hold.
        validation: held-back batches.
        forward: calls the model.
        allocation: "uniform" or "global".
        budget: "parameters", "bytes" or "flops".
        sequential: fit each layer to the inputs that the compressed layers before it produce, towards the original
            outputs. Needs calibration as batches, of which each group of layers runs all twice.
        require_speedup: leave layers dense whose replacement, timed here in eval on one sentence's and on a batch's
            number of rows (`compress.speed.TOKENS`), is not faster; the report has the ratios.
        evaluate: a function of the model that measures a task; the report has its value before and after.
        dry_run: fit and report, but leave the model as it is.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
    Returns:
        The report; `report.model` is the model, another object only where the root itself was a linear layer.
    Raises:
        ValueError: if an argument, a rule or a weight is bad, naming the layer; nothing is changed.
    Example:
        >>> import torch
        >>> mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = compress_model(mlp, "lowrank", ratio=0.5, calibration=[torch.randn(200, 64)])
        >>> mlp[0].structure, report.ratio
        (LowRank(rank=16), 0.5)
    """
    planned = structure if isinstance(structure, CompressionPlan) else None
    if planned is not None and (ratio is not None or rules is not None or refine is not None):
        raise ValueError("a plan holds its ratio, rules and refinement; edit the plan instead of passing them again")
    evidence = gather(model, calibration, validation, forward, tied if planned is None else planned.tied)
    if sequential and not evidence.batches:
        raise ValueError("sequential=True runs the model anew for every layer: pass calibration as batches")
    judge = Judge(model, evidence, evaluate) if evaluate is not None or evidence.held_back else None
    if planned is None:
        assert not isinstance(structure, CompressionPlan)
        planned = make_plan(
            model, structure, evidence, ratio=ratio, rules=rules, skip_last=skip_last, tied=tied, refine=refine,
            allocation=allocation, budget=budget, progress=progress,
        )  # fmt: skip
    targets = find_targets(model, tied=planned.tied)
    pairs = list(by_name(planned.entries, targets))
    fit_all = _fit_in_turn if sequential else _fit_at_once
    rows, swaps = fit_all(model, pairs, evidence, progress)
    if require_speedup:
        rows, swaps = only_faster(rows, swaps, targets)
    coverage = _coverage(model, targets, {row.name for row in rows if row.structure})
    root = model if dry_run else swap_modules(model, swaps)
    report = Report(root, tuple(rows), coverage, judge=judge)
    if judge is None:
        return report
    return replace(report, qualities=(judge.dense,) if dry_run else (judge.dense, judge(root, "compressed")))


Pairs = Sequence[tuple[PlanEntry, Target]]
Fitted = tuple[LayerReport, dict[nn.Module, nn.Module]]


def _fit_at_once(
    model: nn.Module, pairs: Pairs, evidence: Evidence, progress: bool | None
) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    """Fit every layer to the inputs that it has in the dense model."""

    def work(pair: tuple[PlanEntry, Target]) -> Fitted:
        entry, target = pair
        weight = target.linear.weight
        return _fitted(entry, target, entry.fit_of(weight), weight, *evidence.grams(entry.name))

    return _collected(each(work, pairs, progress, "compress"))


def _fit_in_turn(
    model: nn.Module, pairs: Pairs, evidence: Evidence, progress: bool | None
) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    """Fit group after group of layers to the inputs that the compressed ones before give them."""
    assert evidence.statistics is not None
    entries = {target.name: entry for entry, target in pairs if entry.structure}
    done: dict[str, LayerReport] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    chosen = [target for _, target in pairs if target.name in entries]
    for group in bar(groups(chosen, evidence.statistics), None, progress, "compress"):
        wanted = shifted(model, group, swaps, evidence)

        def work(target: Target, wanted: dict[str, tuple[Tensor, GramRoot | None]] = wanted) -> Fitted:
            weight, root = wanted[target.name]
            return _fitted(entries[target.name], target, None, weight, root, evidence.grams(target.name)[1])

        rows, found = _collected(each(work, group, False, ""))
        done |= {row.name: row for row in rows}
        swaps |= found
    rows = [done.get(entry.name) or _unfitted(entry) for entry, _ in pairs]
    return rows, swaps


def _collected(fits: Iterable[Fitted]) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    rows: list[LayerReport] = []
    swaps: dict[nn.Module, nn.Module] = {}
    for row, replacements in fits:
        rows.append(row)
        swaps |= replacements
    return rows, swaps


def to_dense_(model: nn.Module) -> nn.Module:
    """Merge every structured layer back into an `nn.Linear`, in place; tied embeddings get the dense table.

    Hooks are kept; layers that shared factors share the dense weight.

    Args:
        model: any module.
    Returns:
        The model, another object only where the root itself was a structured layer.
    """
    weights: dict[int, nn.Parameter] = {}
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


def _coverage(model: nn.Module, targets: Sequence[Target], chosen: set[str]) -> Coverage:
    seen: set[int] = set()
    counts = {True: 0, False: 0}
    for compressed in (True, False):  # a shared bias counts where its layer is compressed
        for target in targets:
            if (target.name in chosen) == compressed:
                for parameter in target.parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        counts[compressed] += _numel(parameter)
    return Coverage(counts[True], counts[False], unreached(model, seen))


def _numel(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()


def _unfitted(entry: PlanEntry) -> LayerReport:
    return LayerReport(
        entry.name, entry.aliases, entry.in_features, entry.out_features, None,
        parameters_before=entry.parameters_before, parameters_after=entry.parameters_before,
        flops_before=2 * entry.parameters_before, flops_after=2 * entry.parameters_before, reason=entry.reason,
    )  # fmt: skip


def _fitted(
    entry: PlanEntry,
    target: Target,
    known: Fit | None,
    wanted: Tensor,
    gram: GramRoot | None,
    output_gram: Tensor | None,
) -> Fitted:
    """Fit one layer (unless the fit is known) and build what takes the place of each module that uses its weight."""
    if entry.structure is None:
        return _unfitted(entry), {}
    start = time.perf_counter()
    weight = target.linear.weight
    try:
        found = known or fit(wanted, entry.structure, gram=gram, output_gram=output_gram, refine=entry.refine)
        if wanted is not weight:  # another matrix was aimed at: store in the dtype of the weight
            factors = tuple(factor.to(weight.dtype) for factor in found.factors)
            error = relative_error(weight, to_dense(found.spec, factors))
            found = replace(found, factors=factors, error=error)
        replacements = _replacements(target, from_fit(found, target.linear))
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"layer {entry.name!r}: {error}; the model is unchanged") from error
    layer = next(iter(replacements.values()))
    assert isinstance(layer, StructuredLinear)
    row = replace(
        _unfitted(entry), structure=show(entry.structure), reason=None,
        parameters_after=layer.num_parameters, flops_after=layer.flops_per_token,
        error=found.error, output_error=found.output_error, seconds=time.perf_counter() - start,
        hooks=sum(len(getattr(m, h)) for m, _ in target.linears for h in _HOOKS if not h.endswith(("kwargs",
        "called"))),
    )  # fmt: skip
    return row, replacements


def _replacements(target: Target, layer: StructuredLinear) -> dict[nn.Module, nn.Module]:
    """Build the new module of each user of the weight: all share the factors, each keeps its bias parameter."""
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


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """Hand the hook dictionaries over, so that the handles that callers hold still remove their hooks."""
    for attribute in (*_HOOKS, "_is_full_backward_hook"):
        setattr(new, attribute, getattr(old, attribute))
    return new


def swap_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones under all of their names, all or none.

    Args:
        model: the root.
        swaps: old module -> new module.
    Returns:
        The root, or its replacement.
    """
    found: list[Swap] = [
        (parent, attribute, swaps[child])
        for parent in module_names(model)
        for attribute, child in parent._modules.items()
        if child in swaps
    ]
    for parent, attribute, new in found:  # dictionary entries only: nothing here can fail halfway
        parent._modules[attribute] = new
    return swaps.get(model, model)
