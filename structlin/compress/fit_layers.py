"""Fit layers: the sizes of one, then all layers of a plan, at once or in turn, and the modules that replace them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from structlin.compress.blocks import Part
from structlin.compress.commit import count_hooks, replacements
from structlin.compress.config import Choice, Compression
from structlin.compress.data import Aim, Data
from structlin.compress.patched import Patched, moves
from structlin.compress.plan import Fitted, PlanEntry, Wanted, dense_entry, fingerprint
from structlin.compress.processes import shared, spread
from structlin.compress.report import LayerReport, Outcome
from structlin.compress.sequential import shifted
from structlin.compress.targets import Target
from structlin.compress.units import Mlp, find_mlps, narrow
from structlin.compress.workers import each
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import Budget, NoMemberError, within
from structlin.fitting.fit import Fit, fit, relative_error
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.linear import from_fit
from structlin.runtime.contract import to_dense
from structlin.structures import Sum

JUDGES = 8  # passes that tell which way of narrowing an MLP moves its block less
NOT_FASTER = "its MLP with fewer hidden units is not faster, and require_speedup was asked for"
SMALL = 2**16  # entries of a weight whose race costs little, as often as it is run


@dataclass
class Purse:
    """What layers leave to those after them: of a budget, what they could not use; of a race of structures, its winner.

    Args:
        ratios: what each layer is to keep, by name; layers without one do not take part.
        spare: parameters left over so far.
        winners: name of the structure that the first layer of each large size (entries, out, in) chose; None forgets.
    """

    ratios: Mapping[str, float]
    spare: float = 0.0
    winners: dict[tuple[int, ...], str] | None = None

    def choice(self, target: Target, choice: Wanted, count: int) -> Wanted:
        """Return a choice with its ratio from the budget; `count` layers share what is left over.

        Of several structures those remain that cost no refinement, and the winner of an earlier layer of this shape:
        what close structures differ in is less than what the race costs.
        """
        if isinstance(choice, Choice) and isinstance(choice.structure, Sequence) and self.winners is not None:
            linear = target.linear
            winner = self.winners.get((linear.weight.numel(), linear.out_features, linear.in_features))
            left = tuple(f for f in choice.structure if f.name == winner or (winner and not f.refine_steps))
            choice = replace(choice, structure=left or choice.structure)
        ratio = self.ratios.get(target.name)
        if ratio is None or not isinstance(choice, Choice):
            return choice
        if ratio >= 1:
            return "the allocation leaves it dense"
        size = target.linear.weight.numel()
        return replace(choice, ratio=min(max(ratio + self.spare / count / size, 1e-9), 1.0))

    def settle(self, entries: Sequence[PlanEntry]) -> None:
        """Take the parameters of compressed layers from the budget, and remember their structures."""
        compressed = [entry for entry in entries if entry.structure]
        if self.winners is not None:
            for entry in compressed:
                kind = _kind(entry.structure)
                if kind and entry.parameters_before > SMALL:
                    self.winners.setdefault((entry.parameters_before, entry.out_features, entry.in_features), kind)
        self.spare += sum(
            self.ratios[entry.name] * entry.parameters_before - entry.parameters_after
            for entry in compressed
            if entry.name in self.ratios
        )


def _kind(structure: Structure | None) -> str | None:
    """Return the name of a structure's family if its members are refined."""
    if structure is None or not structure.refine_steps:
        return None
    return "+".join(part.name for part in structure.parts) if isinstance(structure, Sum) else structure.name


# Sizes ---------------------------------------------------------------------------------------------------------------


def size_layer(target: Target, choice: Choice | str, data: Data, budget: Budget, aim: Aim | None = None) -> PlanEntry:
    """Fix the sizes of a layer's structure, by real fits where a ratio leaves several, or say why it stays dense.

    Args:
        target: the layer.
        choice: what it gets, or the reason why it stays dense.
        data: with the Grams.
        budget: what the choice's ratio counts.
        aim: what to approximate instead of the weight.
    Raises:
        ValueError: naming the layer, if a fit fails.
    """
    dense = dense_entry(target, choice if isinstance(choice, str) else None)
    if isinstance(choice, str):
        return dense
    try:
        entry = _sized(dense, target.linear.weight, choice, data, budget, aim)
    except Exception as error:
        raise _named(target.name, error) from error
    if entry.structure is not None and entry.parameters_after >= entry.parameters_before:
        text = (
            f"{show(entry.structure)} would keep {entry.parameters_after:,} of {entry.parameters_before:,} parameters"
        )
        return replace(dense, reason=text)
    return replace(entry, refine=choice.refine) if entry.structure else entry


def _sized(
    dense: PlanEntry, weight: Tensor, choice: Choice, data: Data, budget: Budget, aim: Aim | None
) -> PlanEntry:  # fmt: skip
    sizes = dense.in_features, dense.out_features
    stacked = weight.ndim == 3
    sample = weight[0] if stacked else weight  # sizes are found on one matrix of a stack
    if isinstance(choice.structure, Structure):
        try:
            return replace(
                dense, structure=choice.structure.resolve(*sizes, None if weight.is_meta else sample.detach())
            )
        except ValueError as error:  # the layer is too small for these sizes
            return replace(dense, reason=str(error))
    assert choice.ratio is not None
    try:
        if not isinstance(choice.structure, Sequence):
            options = within(choice.structure, *sizes, choice.ratio, budget)
            if len(options) == 1:
                return replace(dense, structure=options[0])
        if weight.is_meta:
            return replace(dense, reason="its sizes follow from its values, and it is on the meta device")
        names = [f"{dense.name}[{k}]" for k in range(dense.count)]
        gram, output_gram = data.expert_grams(names)[0] if stacked else data.grams(dense.name, aim is None)
        wanted, gram = aim or (sample, gram)
        found = fit(
            wanted, choice.structure, ratio=choice.ratio, gram=gram, output_gram=output_gram, refine=choice.refine,
            budget=budget,
        )  # fmt: skip
    except NoMemberError as error:
        return replace(dense, reason=str(error))
    return replace(dense, structure=found.structure, fitted=None if stacked else (fingerprint(weight), found))


# Fits ----------------------------------------------------------------------------------------------------------------


def fit_part(
    part: Part, choices: Mapping[str, Wanted], purse: Purse, data: Data, config: Compression,
    patched: Patched, advance: Callable[..., None], screen: Callable[[list[Outcome]], list[Outcome]],
) -> list[Outcome]:  # fmt: skip
    """Fit the layers of a part; with passes group after group of the same inputs, each behind those before it.

    The layers of a group are dealt to the ranks.

    Args:
        part: see `Part`.
        choices: what each layer gets, by name: to be sized, or the entry of a plan.
        purse: the budget.
        data: with the Grams.
        config: the settings.
        patched: the model; the new layers go into it.
        advance: called after each layer, with a text.
        screen: leaves some of the layers dense.
    """
    shift = bool(part.passes) and config.sequential is not False
    grams = {} if data.statistics is None else data.statistics.grams
    mlps = {
        t.name: mlp
        for mlp in find_mlps(part.targets, part.passes, choices, grams, config.hidden_units)
        if mlp.pays({t.name: purse.choice(t, choices[t.name], len(mlp.targets)) for t in mlp.targets})
        for t in mlp.targets
    }
    result: list[Outcome] = []
    for group in _groups(part.targets, grams, mlps) if shift or mlps or purse.ratios else [part.targets]:
        wanted = {t.name: purse.choice(t, choices[t.name], len(group)) for t in group}
        mlp = mlps.get(group[0].name)
        if mlp is not None:
            aims = shifted([mlp.down], part.passes, data.shrinkage) if shift else {}
            options = narrow(mlp, wanted, data, aims.get(mlp.down.name), config.budget)
            screened = [screen(_built(group, fits, data)) for fits in options]
            ways = [way for way in screened if all(outcome.modules for outcome in way)]
            built = _best(ways, part, patched) if ways else [outcome.kept(NOT_FASTER) for outcome in screened[-1]]
            advance(len(group), mlp.down.name)
        else:
            behind = [t for t in group if shift and _is_fitted(wanted[t.name]) and t.name in grams]
            costs = [t.linear.weight.numel() if _is_fitted(wanted[t.name]) else 0 for t in group]
            work = partial(
                _fit_some, wanted=wanted, behind=behind, part=part, data=data, config=config, advance=advance
            )
            built = _built(group, spread(work, group, costs), data)
        purse.settle([outcome.entry for outcome in built])
        for outcome in built if mlp else screen(built):
            patched.swaps.update(outcome.modules)
            result.append(outcome)
    return result


def _built(group: Sequence[Target], fits: Sequence[Fitted], data: Data) -> list[Outcome]:
    pairs = zip(group, fits, strict=True)
    return [build_layer(target, found.to(target.linear.weight.device), data) for target, found in pairs]


def _best(options: Sequence[list[Outcome]], part: Part, patched: Patched) -> list[Outcome]:
    """Return the option with which the part's outputs move least, on some of its batches."""

    def moved(number: int) -> float:
        for outcome in options[number]:
            patched.swaps.update(outcome.modules)
        return sum(moves(each).item() for each in part.passes[:JUDGES])

    return options[shared(lambda: min(range(len(options)), key=moved))] if len(options) > 1 else options[0]


def _fit_some(
    mine: Sequence[Target], *, wanted: Mapping[str, Wanted], behind: Sequence[Target], part: Part, data: Data,
    config: Compression, advance: Callable[..., None],
) -> Iterator[Fitted]:  # fmt: skip
    """Fit those layers of a group that are dealt to this rank."""
    names = {target.name for target in mine}
    aims = shifted(behind, part.passes, data.shrinkage, names=names) if behind else {}

    def work(target: Target) -> Fitted:
        aim, choice = aims.get(target.name), wanted[target.name]
        entry = choice if isinstance(choice, PlanEntry) else size_layer(target, choice, data, config.budget, aim)
        if entry.structure is not None and target.linear.weight.is_meta:
            return Fitted(entry)  # a plan of sizes
        # A plan's fits are to the inputs of the dense model.
        known = None if choice is entry and aim is not None else entry.fit_of(target.linear.weight)
        return fit_layer(entry, target, data, aim, known)

    for found in each(work, mine):
        error = found.error if found.output_error is None else found.output_error
        advance(1, found.entry.name + ("" if error is None else f" {error:.3f}"))
        yield found
    advance(len(wanted) - len(mine))  # of other ranks


def _groups(targets: Sequence[Target], grams: Mapping[str, Tensor], mlps: Mapping[str, Mlp]) -> list[list[Target]]:
    """Put layers with the same inputs together: they share one Gram, which the statistics keep alive; and an MLP's.

    A stack of experts and a table stand alone: behind compressed layers other experts are chosen, and a table has no
    inputs.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(mlps.get(target.name, grams.get(target.name, target))), []).append(target)
    return list(groups.values())


def _is_fitted(choice: Wanted) -> bool:
    return choice.structure is not None if isinstance(choice, PlanEntry) else isinstance(choice, Choice)


def fit_layer(entry: PlanEntry, target: Target, data: Data, aim: Aim | None, known: Fit | None) -> Fitted:
    """Fit one layer, unless its fit is known.

    Args:
        entry: of the plan.
        target: the layer.
        data: with the Grams.
        aim: what to approximate instead of the weight.
        known: the fit.
    Raises:
        ValueError: naming the layer, or RuntimeError where the error is of another kind.
    """
    if entry.structure is None:
        return Fitted(entry)
    start = time.perf_counter()
    try:
        fits = _fit_stack(entry, target, data) if target.stacked else [_fit(entry, target, data, aim, known)]
    except Exception as error:
        raise _named(entry.name, error) from error
    return Fitted(entry, fits, time.perf_counter() - start)


def build_layer(target: Target, found: Fitted, data: Data) -> Outcome:
    """Build what replaces each module that uses a weight.

    Raises:
        ValueError: naming the layer, or RuntimeError where the error is of another kind.
    """
    entry = found.entry
    if not found.fits or entry.structure is None:
        return Outcome(target, entry, LayerReport.dense(entry), {})
    try:
        layer: Any = (
            StructuredExpertLinear.from_fits(found.fits, target.linear)
            if target.stacked
            else from_fit(found.fits[0], found.smaller or target.linear)
        )
        modules = replacements(target, layer)
    except Exception as error:
        raise _named(entry.name, error) from error
    called = None if data.statistics is None else sum(data.statistics.tokens.get(name, 0) for name in target.parts) > 0
    row = replace(
        LayerReport.dense(entry), structure=entry.becomes, reason=None,
        parameters_after=entry.parameters_after, flops_after=layer.flops_per_token,
        error=found.error, output_error=found.output_error,
        seconds=found.seconds, hooks=count_hooks(target), called=None if target.on_request else called,
        itemsize=target.linear.weight.element_size(),
        bias_lost=0 if layer.bias is None else target.linear.bias.numel() - layer.bias.numel(),
    )  # fmt: skip
    return Outcome(target, entry, row, modules)


def _fit(entry: PlanEntry, target: Target, data: Data, aim: Aim | None, known: Fit | None) -> Fit:
    assert entry.structure is not None
    weight = target.linear.weight
    if known is None:
        gram, output_gram = data.grams(entry.name, aim is None)
        wanted, gram = (weight, gram) if aim is None else aim
        known = fit(wanted, entry.structure, gram=gram, output_gram=output_gram, refine=entry.refine)
    return known if aim is None else _of_weight(known, weight)


def _fit_stack(entry: PlanEntry, target: Target, data: Data) -> list[Fit]:
    """Fit each matrix of a stack to the inputs that it got."""
    assert entry.structure is not None
    weights = target.linear.weight.detach()
    structure = entry.structure.suited(torch.linalg.vector_norm(weights, dim=0))  # one for all
    return [
        fit(weight, structure, gram=gram, output_gram=output_gram, refine=entry.refine)
        for weight, (gram, output_gram) in zip(weights, data.expert_grams(target.parts), strict=True)
    ]


def _of_weight(found: Fit, weight: Tensor) -> Fit:
    """Store a fit of another matrix in the dtype of the weight, and measure its error against the weight."""
    factors = tuple(factor.to(weight.dtype) for factor in found.factors)
    return replace(found, factors=factors, error=relative_error(weight, to_dense(found.spec, factors)))


def _named(name: str, error: Exception) -> Exception:
    """Return the error of a layer with the layer's name in its message: a ValueError, or a RuntimeError."""
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"layer {name!r}: {error}; the model is unchanged")
