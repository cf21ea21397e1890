"""Hidden units of an MLP: find the maps around them, and choose those that stay before anything else is fitted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structlin.batches import pick
from structlin.compress.config import AUTO, Choice
from structlin.compress.data import Aim, Data
from structlin.compress.observe import hooked, replaced
from structlin.compress.patched import Pass
from structlin.compress.plan import Fitted, PlanEntry, Wanted, dense_entry
from structlin.compress.processes import shared, spread
from structlin.compress.targets import Target
from structlin.fitting.budget import Budget, NoMemberError
from structlin.fitting.fit import Fit, fit, relative_error
from structlin.fitting.objective import InputGram
from structlin.runtime.contract import to_dense
from structlin.structures import Dense

# Share of an MLP's parameters up to which it loses units. Above it structures of the whole maps are better.
MOST = 0.7
# Units and entries of their maps make up for a budget: of a share s of the parameters, s^SPLIT of the units stay, and
# structures keep the rest, s^(1 - SPLIT), of their maps.
SPLIT = 0.5
STEPS = 128  # in which units are removed: of many, several go at once
MULTIPLE = 8  # of units that stay, where there are many: kernels of matrix products like it
RIDGE = 1e-6  # of the Gram, whose mean eigenvalue is about 1: it may be singular
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the probe; others 2e-2


@dataclass(frozen=True)
class Mlp:
    """The maps around the hidden units of an MLP: h = f(U x, ..) acts on each unit alone, and y = D h.

    Args:
        ups: U and, where f has gates, the maps of these; all (units, in).
        down: D, (out, units).
    """

    ups: tuple[Target, ...]
    down: Target

    @property
    def targets(self) -> tuple[Target, ...]:
        """All of its maps."""
        return (*self.ups, self.down)

    @property
    def units(self) -> int:
        """Hidden units of the dense model."""
        return int(self.down.linear.in_features)

    def pays(self, wanted: Mapping[str, Wanted]) -> bool:
        """Whether units are to go: a plan says so, or the maps get at most MOST of their parameters."""
        return isinstance(wanted[self.down.name], PlanEntry) or self.share(wanted) <= MOST

    def count(self, wanted: Mapping[str, Wanted], split: float = SPLIT) -> int:
        """Return how many units stay: as many as a plan says, or a power of the share that its maps may keep."""
        choice = wanted[self.down.name]
        if isinstance(choice, PlanEntry):
            assert choice.sizes is not None
            units = {c.sizes[1] for t in self.ups if isinstance(c := wanted[t.name], PlanEntry) and c.sizes}
            if units != {choice.sizes[0]}:
                raise ValueError(
                    f"layer {self.down.name!r}: the plan leaves it {choice.sizes[0]} units, others {units}"
                )
            return choice.sizes[0]
        found = int(self.units * self.share(wanted) ** split + 1e-6)
        return max(found - found % MULTIPLE if found >= 8 * MULTIPLE else found, 1)

    def share(self, wanted: Mapping[str, Wanted]) -> float:
        """Return the share of their parameters that the maps may keep together."""
        sizes = {target.name: target.linear.weight.numel() for target in self.targets}
        ratios = {name: c.ratio if isinstance(c := wanted[name], Choice) else 1.0 for name in sizes}
        return sum(min(ratios[name] or 1.0, 1.0) * size for name, size in sizes.items()) / sum(sizes.values())


# Finding -------------------------------------------------------------------------------------------------------------


def find_mlps(
    targets: Sequence[Target], passes: Sequence[Pass], choices: Mapping[str, Wanted], grams: Mapping[str, Tensor],
    asked: bool,
) -> list[Mlp]:  # fmt: skip
    """Find the MLPs of a part whose maps "auto" may choose a structure for, or whose units a plan counts.

    Candidates are maps with as many inputs as earlier ones, of one input, have outputs. The first batch tells whether
    they are an MLP: it runs with half of the units, and with the other half unread, and both must agree.

    Args:
        targets: of the part of the model, in the order in which they run.
        passes: of that part; without, nothing is found.
        choices: what each layer gets, by name.
        grams: of the inputs; layers with the same inputs share one.
        asked: whether "auto" may; a plan may in any case.
    Raises:
        ValueError: if a plan counts units of maps that are no MLP.
    """
    planned = [t.name for t in targets if isinstance(c := choices[t.name], PlanEntry) and c.sizes]
    able = [t for t in targets if _is_able(t) and asks(choices[t.name], asked) and t.name in grams]
    found: list[Mlp] = []
    taken: set[str] = set()
    for position, down in enumerate(able if passes else ()):
        before = [t for t in able[:position] if t.linear.out_features == down.linear.in_features]
        if not before or down.name in taken:
            continue
        ups = tuple(t for t in before if grams[t.name] is grams[before[-1].name])
        mlp = Mlp(ups, down)
        if not taken.intersection(t.name for t in mlp.targets) and _is_mlp(mlp, passes[0]):
            found.append(mlp)
            taken.update(target.name for target in mlp.targets)
    if left := [name for name in planned if name not in taken]:
        raise ValueError(
            f"the plan removes hidden units around {left[:5]}, which are found by running the model: pass calibration= "
            "as the batches that the plan was made with"
        )
    return found


def _is_able(target: Target) -> bool:
    (user, *others) = target.users
    if target.reason or target.linear.weight.is_complex():
        return False
    return not others and not user.path and user.adapter is not None and user.adapter.narrows


def asks(choice: Wanted, asked: bool) -> bool:
    """Whether a map may get or give fewer hidden units; `asked`: whether "auto" may choose so."""
    if isinstance(choice, PlanEntry):
        return choice.sizes is not None
    return asked and isinstance(choice, Choice) and choice.structure is AUTO and choice.ratio is not None


def _is_mlp(mlp: Mlp, one: Pass) -> bool:
    """Run the part with half of the units and see whether it does what it does when the other half is not read.

    An output that does not show which units are read tells nothing.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(mlp.units, generator=generator).to(mlp.down.linear.weight.device)
    stay = order[: max(1, mlp.units // 2)]  # in another order, too
    down = mlp.down.linear
    unread = torch.zeros_like(down.weight)
    unread[:, stay] = down.weight[:, stay]
    fewer = {t.linear: _narrowed(t.linear, t.linear.weight[stay], stay) for t in mlp.ups}
    try:
        wanted, inputs = _run(one, {down: _narrowed(down, unread, None)}, down)
        found, fewer_inputs = _run(one, {**fewer, down: _narrowed(down, down.weight[:, stay], None)}, down)
    except Exception:  # whatever it is, the model does not run with fewer units
        return False
    if len(inputs) != 1 or len(fewer_inputs) != 1:
        return False
    if not (_agree(fewer_inputs[0], inputs[0][..., stay]) and _agree(found, wanted)):
        return False
    return not torch.equal(wanted, _run(one, {}, down)[0])


def _run(one: Pass, modules: Mapping[nn.Module, nn.Module], watched: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Run the dense part with other modules; return its output and the inputs of one of them."""
    inputs: list[Tensor] = []
    with torch.no_grad(), replaced(modules), hooked([(watched, None)], lambda _, x: inputs.append(x)):
        return pick(one.dense())[1], inputs


def _agree(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    difference, size = torch.linalg.vector_norm((found - wanted).double()), torch.linalg.vector_norm(wanted.double())
    return bool(difference <= TOLERANCE.get(wanted.dtype, 2e-2) * size) and bool(size > 0)


def _narrowed(linear: Any, weight: Tensor, rows: Tensor | None) -> nn.Linear:
    """Return a map with another weight, and those rows of the bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach()
        made.bias = nn.Parameter(bias if rows is None else bias[rows], linear.bias.requires_grad)
    return made.train(linear.training)


# Choosing ------------------------------------------------------------------------------------------------------------


def narrow(
    mlp: Mlp, wanted: Mapping[str, Wanted], data: Data, aim: Aim | None, budget: Budget = "parameters"
) -> list[list[Fitted]]:
    """Choose the units of an MLP that stay, make up for the others in its last map, and fit structures to its maps.

    With the Gram G of the units and the metric H of the outputs, the unit goes that costs least,
    (D^T H D)_kk / (G^-1)_kk, the others making up for it, and so on (optimal brain surgeon); D' = D G_:s G_ss^-1 of the
    units s that stay then has the least error.

    Time: 3 n^3 for n units, and the fits, which are dealt to the ranks. Memory: 24 n^2 B. Source: Hassibi & Stork 1993;
    MoDeGPT, for the choice by calibration.

    Args:
        mlp: its maps.
        wanted: what they get together, by name.
        data: with the Grams.
        aim: what D is to be instead, and the Gram instead, behind compressed layers (see `shifted`). The maps before it
            keep to the dense model's inputs.
        budget: what ratios count.
    Returns:
        What was found for each map, with structures and with fewer units whose maps stay dense, if no plan says which;
        the latter alone where maps are too small for structures.
    """
    if isinstance(wanted[mlp.down.name], PlanEntry):
        return [_narrowing(mlp, wanted, mlp.count(wanted), data, aim, budget)]
    found = [_narrowing(mlp, dict.fromkeys(wanted, "dense"), mlp.count(wanted, 1.0), data, aim, budget)]
    # A map that the allocation leaves dense shares the budget of all: it gets a structure as the others do.
    some = next(choice for choice in wanted.values() if isinstance(choice, Choice))
    wanted = {name: c if isinstance(c, Choice) else replace(some, ratio=1.0) for name, c in wanted.items()}
    try:
        return [_narrowing(mlp, wanted, mlp.count(wanted), data, aim, budget), *found]
    except NoMemberError:
        return found


def _narrowing(
    mlp: Mlp, wanted: Mapping[str, Wanted], count: int, data: Data, aim: Aim | None, budget: Budget
) -> list[Fitted]:
    down = mlp.down.linear
    own, metric = data.grams(mlp.down.name, aim is None)
    exact, known = aim or (down.weight.detach(), own)
    assert known is not None
    gram, exact = known.matrix.to(torch.float64, copy=True), exact.double()
    gram.diagonal().add_(RIDGE)
    stay = shared(partial(_staying, exact, gram, metric, count)).to(gram.device)
    solved = torch.linalg.solve(gram[stay][:, stay], gram[stay] @ exact.mT).mT.to(down.weight.dtype)
    ratio = mlp.share(wanted) * mlp.units / count

    def fitted(target: Target) -> Fitted:
        start = time.perf_counter()
        linear, full = target.linear, torch.zeros_like(target.linear.weight)
        if target is mlp.down:
            smaller = _narrowed(linear, solved, None)
            found = _fit(wanted[target.name], solved, ratio, InputGram(known.matrix[stay][:, stay]), metric, budget)
            full[:, stay] = to_dense(found.spec, found.factors)
            found = replace(found, output_error=_output_error(exact, full.double(), gram))
        else:
            rows, outputs = data.grams(target.name)
            smaller = _narrowed(linear, linear.weight[stay], stay)
            if outputs is not None:
                outputs = outputs[stay] if outputs.ndim == 1 else outputs[stay][:, stay]
            found = _fit(wanted[target.name], smaller.weight.detach(), ratio, rows, outputs, budget)
            full[stay] = to_dense(found.spec, found.factors)
        found = replace(found, error=relative_error(linear.weight.detach(), full))
        sizes = smaller.in_features, smaller.out_features
        entry = replace(dense_entry(target, None), structure=found.structure, sizes=sizes)
        return Fitted(entry, [found], time.perf_counter() - start, smaller)

    return spread(lambda mine: [fitted(t) for t in mine], mlp.targets, [t.linear.weight.numel() for t in mlp.targets])


def _fit(
    choice: Wanted, weight: Tensor, ratio: float, gram: InputGram | None, metric: Tensor | None, budget: Budget
) -> Fit:
    if isinstance(choice, str):
        return Fit(Dense(), Dense().spec(weight.shape[1], weight.shape[0]), (weight,), 0.0)
    assert choice.structure is not None
    norms: dict[str, Any] = {"gram": gram, "output_gram": metric, "refine": choice.refine}
    if isinstance(choice, PlanEntry):
        return fit(weight, choice.structure, **norms)
    return fit(weight, choice.structure, ratio=ratio, budget=budget, **norms)


def _staying(weight: Tensor, gram: Tensor, metric: Tensor | None, count: int) -> Tensor:
    if metric is not None and metric.any():  # zero: no gradient reaches the map
        outputs = metric.double()
        root = outputs.sqrt().unsqueeze(1) if outputs.ndim == 1 else torch.linalg.cholesky(outputs).mH
        weight = root * weight if outputs.ndim == 1 else root @ weight
    gone = removed(weight, gram, len(gram) - count)
    return torch.tensor(sorted({*range(len(gram))}.difference(gone)))


def removed(weight: Tensor, gram: Tensor, count: int) -> Sequence[int]:
    """Return the columns to remove from a weight, the first first; see `narrow`."""
    weight, inverse = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(gram))
    gone = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    found: list[int] = []
    while len(found) < count:
        costs = (weight.square().sum(0) / inverse.diagonal()).masked_fill(gone, torch.inf)
        units = costs.topk(min(max(1, len(gram) // STEPS), count - len(found)), largest=False).indices
        rows = torch.linalg.solve(inverse[units][:, units], inverse[units])
        weight.addmm_(weight[:, units], rows, alpha=-1)
        inverse.addmm_(inverse[:, units], rows, alpha=-1)
        gone[units] = True
        found += units.tolist()
    return found


def _output_error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    def energy(matrix: Tensor) -> float:
        return ((matrix @ gram) * matrix).sum().clamp_min(0).sqrt().item()

    return energy(weight - found) / (energy(weight) or 1.0)
