"""Fit layers: the sizes of one, then all layers of a plan, at once or in turn, and the modules that replace them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from structlin.compress.commit import count_hooks, replacements
from structlin.compress.config import Choice
from structlin.compress.data import Data
from structlin.compress.plan import PlanEntry, dense_entry, fingerprint
from structlin.compress.report import LayerReport
from structlin.compress.targets import Target
from structlin.compress.workers import each
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import Budget, NoMemberError, within
from structlin.fitting.fit import Fit, fit, relative_error
from structlin.fitting.objective import GramRoot
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.linear import StructuredLinear, from_fit
from structlin.runtime.contract import to_dense


@dataclass(frozen=True)
class Outcome:
    """The result of one target.

    Args:
        target: the weight and its users.
        row: of the report.
        modules: old module -> new module; empty where the layer stays dense.
    """

    target: Target
    row: LayerReport
    modules: Mapping[nn.Module, nn.Module]

    @property
    def layer(self) -> StructuredLinear | None:
        """The structured layer, None where the layer stays dense."""
        return next((module for module in self.modules.values() if isinstance(module, StructuredLinear)), None)


# Sizes ---------------------------------------------------------------------------------------------------------------


def size_layer(target: Target, choice: Choice | str, data: Data, budget: Budget) -> PlanEntry:
    """Fix the sizes of a layer's structure, by real fits where a ratio leaves several, or say why it stays dense.

    Args:
        target: the layer.
        choice: what it gets, or the reason why it stays dense.
        data: with the Grams.
        budget: what the choice's ratio counts.
    Raises:
        ValueError: naming the layer, if a fit fails.
    """
    dense = dense_entry(target, choice if isinstance(choice, str) else None)
    if isinstance(choice, str):
        return dense
    try:
        entry = _sized(dense, target.linear.weight, choice, data, budget)
    except Exception as error:
        raise _named(target.name, error) from error
    if entry.structure is not None and entry.parameters_after >= entry.parameters_before:
        text = (
            f"{show(entry.structure)} would keep {entry.parameters_after:,} of {entry.parameters_before:,} parameters"
        )
        return replace(dense, reason=text)
    return replace(entry, refine=choice.refine) if entry.structure else entry


def _sized(dense: PlanEntry, weight: Tensor, choice: Choice, data: Data, budget: Budget) -> PlanEntry:
    sizes = dense.in_features, dense.out_features
    stacked = weight.ndim == 3
    sample = weight[0] if stacked else weight  # sizes are found on one matrix of a stack
    if isinstance(choice.structure, Structure):
        try:
            return replace(dense, structure=choice.structure.resolve(*sizes, sample.detach()))
        except ValueError as error:  # the layer is too small for these sizes
            return replace(dense, reason=str(error))
    assert choice.ratio is not None
    try:
        if not isinstance(choice.structure, Sequence):
            options = within(choice.structure, *sizes, choice.ratio, budget)
            if len(options) == 1:
                return replace(dense, structure=options[0])
        names = [f"{dense.name}[{k}]" for k in range(dense.count)]
        gram, output_gram = data.expert_grams(names)[0] if stacked else data.grams(dense.name)
        found = fit(
            sample, choice.structure, ratio=choice.ratio, gram=gram, output_gram=output_gram, refine=choice.refine,
            budget=budget,
        )  # fmt: skip
    except NoMemberError as error:
        return replace(dense, reason=str(error))
    return replace(dense, structure=found.structure, fitted=None if stacked else (fingerprint(weight), found))


# Fits ----------------------------------------------------------------------------------------------------------------

Aim = tuple[Tensor, GramRoot | None]  # what a fit approximates, and the square root of the Gram of its inputs


def fit_all(
    entries: Sequence[PlanEntry], targets: Sequence[Target], data: Data, progress: bool | None
) -> list[Outcome]:
    """Fit every layer to the inputs that it has in the dense model; fits that the plan holds are taken as they are."""

    def work(pair: tuple[PlanEntry, Target]) -> Outcome:
        entry, target = pair
        return fit_layer(entry, target, data, None)

    return list(each(work, list(zip(entries, targets, strict=True)), progress, "compress"))


def fit_in_turn(
    entries: Sequence[PlanEntry],
    targets: Sequence[Target],
    data: Data,
    aims_of: Callable[[Sequence[Target], Mapping[nn.Module, nn.Module]], Mapping[str, Aim]],
    advance: Callable[[], None],
) -> list[Outcome]:
    """Fit group after group of layers with the same inputs, each behind the compressed ones before it.

    Args:
        entries: of the plan.
        targets: the layers, in the same order.
        data: with statistics, which tell the groups.
        aims_of: a function of (group, replacements so far) that returns the weights to approximate and their Grams.
        advance: called after each group.
    """
    assert data.statistics is not None
    by_name = {entry.name: entry for entry in entries}
    groups: dict[int, list[Target]] = {}
    for target in targets:
        if by_name[target.name].structure:
            # Layers with the same inputs share one Gram, which the statistics keep alive. A stack of experts and a
            # table stand alone: behind compressed layers other experts are chosen, and a table has no inputs.
            gram = data.statistics.grams.get(target.name)
            groups.setdefault(id(target if gram is None else gram), []).append(target)
    outcomes: dict[str, Outcome] = {}
    modules: dict[nn.Module, nn.Module] = {}
    for group in groups.values():
        aims = aims_of(group, modules) if group[0].name in data.statistics.grams else {}

        def work(target: Target, aims: Mapping[str, Aim] = aims) -> Outcome:
            return fit_layer(by_name[target.name], target, data, aims.get(target.name))

        for outcome in each(work, group, False, ""):
            outcomes[outcome.target.name] = outcome
            modules |= outcome.modules
        advance()
    return [outcomes.get(t.name) or Outcome(t, stays_dense(by_name[t.name]), {}) for t in targets]


def fit_layer(entry: PlanEntry, target: Target, data: Data, aim: Aim | None) -> Outcome:
    """Fit one layer, unless the plan holds its fit, and build what replaces each module that uses the weight.

    Args:
        entry: of the plan.
        target: the layer.
        data: with the Grams.
        aim: what to approximate instead of the weight.
    Raises:
        ValueError: naming the layer, or RuntimeError where the error is of another kind.
    """
    if entry.structure is None:
        return Outcome(target, stays_dense(entry), {})
    start = time.perf_counter()
    try:
        fits = _fit_stack(entry, target, data) if target.stacked else [_fit(entry, target, data, aim)]
        layer: Any = (
            StructuredExpertLinear.from_fits(fits, target.linear)
            if target.stacked
            else from_fit(fits[0], target.linear)
        )
        modules = replacements(target, layer)
    except Exception as error:
        raise _named(entry.name, error) from error
    called = None if data.statistics is None else sum(data.statistics.tokens.get(name, 0) for name in target.parts) > 0
    row = replace(
        stays_dense(entry), structure=show(entry.structure), reason=None,
        parameters_after=entry.parameters_after, flops_after=layer.flops_per_token,
        error=_mean(found.error for found in fits), output_error=_mean(found.output_error for found in fits),
        seconds=time.perf_counter() - start, hooks=count_hooks(target), called=None if target.on_request else called,
        itemsize=target.linear.weight.element_size(),
    )  # fmt: skip
    return Outcome(target, row, modules)


def _fit(entry: PlanEntry, target: Target, data: Data, aim: Aim | None) -> Fit:
    assert entry.structure is not None
    weight = target.linear.weight
    if aim is None and (known := entry.fit_of(weight)):
        return known
    gram, output_gram = data.grams(entry.name)
    wanted, gram = (weight, gram) if aim is None else aim
    found = fit(wanted, entry.structure, gram=gram, output_gram=output_gram, refine=entry.refine)
    return found if aim is None else _of_weight(found, weight)


def _fit_stack(entry: PlanEntry, target: Target, data: Data) -> list[Fit]:
    """Fit each matrix of a stack to the inputs that it got."""
    assert entry.structure is not None
    return [
        fit(weight, entry.structure, gram=gram, output_gram=output_gram, refine=entry.refine)
        for weight, (gram, output_gram) in zip(target.linear.weight, data.expert_grams(target.parts), strict=True)
    ]


def _mean(errors: Iterable[float | None]) -> float | None:
    """Return the root mean square of the errors of a stack, None if one is unknown."""
    found = list(errors)
    if len(found) == 1:
        return found[0]
    known = [error for error in found if error is not None]
    return math.sqrt(sum(error**2 for error in known) / len(known)) if len(known) == len(found) else None


def stays_dense(entry: PlanEntry) -> LayerReport:
    """Return the row of a layer that stays dense."""
    return LayerReport(
        entry.name, entry.aliases, entry.in_features, entry.out_features, None,
        parameters_before=entry.parameters_before, parameters_after=entry.parameters_before,
        flops_before=2 * entry.in_features * entry.out_features,
        flops_after=2 * entry.in_features * entry.out_features, reason=entry.reason, count=entry.count,
    )  # fmt: skip


def _of_weight(found: Fit, weight: Tensor) -> Fit:
    """Store a fit of another matrix in the dtype of the weight, and measure its error against the weight."""
    factors = tuple(factor.to(weight.dtype) for factor in found.factors)
    return replace(found, factors=factors, error=relative_error(weight, to_dense(found.spec, factors)))


def _named(name: str, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"layer {name!r}: {error}; the model is unchanged")
