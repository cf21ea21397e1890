"""Fit layers: the sizes of one, then all layers of a plan, at once or in turn, and the modules that replace them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from structlin.compress.commit import count_hooks, replacements
from structlin.compress.config import Choice
from structlin.compress.data import Data
from structlin.compress.plan import PlanEntry, fingerprint
from structlin.compress.report import LayerReport
from structlin.compress.targets import Target
from structlin.compress.workers import each
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import Budget, NoMemberError, within
from structlin.fitting.fit import Fit, fit, relative_error
from structlin.fitting.objective import GramRoot
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
    linear = target.linear
    dense = PlanEntry(target.name, target.names[1:], linear.in_features, linear.out_features, None)
    if isinstance(choice, str):
        return replace(dense, reason=choice)
    try:
        entry = _sized(dense, linear.weight, choice, data, budget)
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
    if isinstance(choice.structure, Structure):
        try:
            return replace(dense, structure=choice.structure.resolve(*sizes, weight.detach()))
        except ValueError as error:  # the layer is too small for these sizes
            return replace(dense, reason=str(error))
    assert choice.ratio is not None
    try:
        if not isinstance(choice.structure, Sequence):
            options = within(choice.structure, *sizes, choice.ratio, budget)
            if len(options) == 1:
                return replace(dense, structure=options[0])
        gram, output_gram = data.grams(dense.name)
        found = fit(
            weight, choice.structure, ratio=choice.ratio, gram=gram, output_gram=output_gram, refine=choice.refine,
            budget=budget,
        )  # fmt: skip
    except NoMemberError as error:
        return replace(dense, reason=str(error))
    return replace(dense, structure=found.structure, fitted=(fingerprint(weight), found))


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
            # Layers with the same inputs share one Gram, which the statistics keep alive.
            groups.setdefault(id(data.statistics.grams[target.name]), []).append(target)
    outcomes: dict[str, Outcome] = {}
    modules: dict[nn.Module, nn.Module] = {}
    for group in groups.values():
        aims = aims_of(group, modules)

        def work(target: Target, aims: Mapping[str, Aim] = aims) -> Outcome:
            return fit_layer(by_name[target.name], target, data, aims[target.name])

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
    weight = target.linear.weight
    known = entry.fit_of(weight) if aim is None else None
    gram, output_gram = data.grams(entry.name)
    wanted, gram = (weight, gram) if aim is None else aim
    try:
        found = known or fit(wanted, entry.structure, gram=gram, output_gram=output_gram, refine=entry.refine)
        if aim is not None:
            found = _of_weight(found, weight)
        modules = replacements(target, from_fit(found, target.linear))
    except Exception as error:
        raise _named(entry.name, error) from error
    layer = modules[target.linear]
    assert isinstance(layer, StructuredLinear)
    row = replace(
        stays_dense(entry), structure=show(entry.structure), reason=None,
        parameters_after=layer.num_parameters, flops_after=layer.flops_per_token,
        error=found.error, output_error=found.output_error, seconds=time.perf_counter() - start,
        hooks=count_hooks(target),
    )  # fmt: skip
    return Outcome(target, row, modules)


def stays_dense(entry: PlanEntry) -> LayerReport:
    """Return the row of a layer that stays dense."""
    return LayerReport(
        entry.name, entry.aliases, entry.in_features, entry.out_features, None,
        parameters_before=entry.parameters_before, parameters_after=entry.parameters_before,
        flops_before=2 * entry.parameters_before, flops_after=2 * entry.parameters_before, reason=entry.reason,
    )  # fmt: skip


def _of_weight(found: Fit, weight: Tensor) -> Fit:
    """Store a fit of another matrix in the dtype of the weight, and measure its error against the weight."""
    factors = tuple(factor.to(weight.dtype) for factor in found.factors)
    return replace(found, factors=factors, error=relative_error(weight, to_dense(found.spec, factors)))


def _named(name: str, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"layer {name!r}: {error}; the model is unchanged")
