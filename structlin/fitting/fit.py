"""Fit a structure to a dense weight: closed form or projection, then refinement where it helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.equation.structure import Family, Structure
from structlin.fitting.budget import Budget, NoMemberError, within
from structlin.fitting.linear import solve, solves
from structlin.fitting.objective import PART, InputGram, Objective, divided, make_objective, norm
from structlin.fitting.refine import Refinement, low_rank_summand
from structlin.runtime.contract import to_dense
from structlin.runtime.eager import has_values

STEPS = 300  # of refinement, for a closed form that is optimal for G = I only
RACE = 60  # steps after which the best size of a family goes on
PACE = (100, 160)  # steps between which the pace of the families tells which of them goes on

Families = Family | Sequence[Family]


@dataclass(frozen=True)
class Fit:
    """The factors that approximate a weight, with their errors."""

    structure: Structure  # resolved
    spec: Spec
    factors: tuple[Tensor, ...]  # in the order of `spec`, in the dtype of the weight
    error: float  # relative Frobenius error ||W - What|| / ||W||, of the factors rounded to that dtype
    output_error: float | None = None  # the same in the norm of the given Grams; None without

    @property
    def minimised(self) -> float:
        """The error that the fit minimised: `output_error`, or `error` without Grams."""
        return self.error if self.output_error is None else self.output_error


@torch.inference_mode(False)  # refinement needs gradients
def fit(
    weight: Tensor,
    structure: Structure | Families,
    *,
    ratio: float | None = None,
    gram: Tensor | InputGram | None = None,
    output_gram: Tensor | None = None,
    refine: int | None = None,
    budget: Budget = "parameters",
) -> Fit:
    """Find the factors of a structure that approximate a dense weight best.

    The error is ||W - What||^2 without a Gram, the layer's output error tr((W - What) G (W - What)^T) with one, and
    tr(H (W - What) G (W - What)^T) with an output Gram H. Low rank has a closed form for all three. Other structures
    start from their closed form for W, or a projection, and are refined (`fitting.refine`); the result is never worse
    than its start. Among several sizes and families, the start of their refinement decides which one is carried on.
    Deterministic.

    Args:
        weight: (out_features, in_features), any float or complex dtype, finite.
        structure: an instance, whose sizes are given; or a class, a sum of classes (`structlin.structures.sum_of`), or
            several to choose from, whose sizes follow from `ratio`.
        ratio: kept / dense, in (0, 1].
        gram: G = sum x x^T over the layer's inputs x, (in, in), at any scale; it may be singular, and zero counts as
            none. An `InputGram` shares its square root among layers.
        output_gram: H, (out, out), or its diagonal (out,): weights of the rows, for example a diagonal Fisher.
        refine: number of refinement steps; None takes the structure's `refine_steps`, or 300 if that is 0 and the given
            Gram rules the closed form out.
        budget: unit of the ratio: "parameters", "bytes", or "flops" per token.
    Returns:
        The Fit with the least error among the candidates.
    Raises:
        ValueError: if the weight is not a finite matrix, if a Gram or the structure does not fit it, unless either an
            instance or a ratio is given, or if the approximation has entries that the weight's dtype cannot hold.
    Example:
        >>> from structlin.structures import LowRank
        >>> inputs, weight = torch.randn(100, 64), torch.randn(32, 64)
        >>> found = fit(weight, LowRank, ratio=0.5, gram=inputs.T @ inputs)
        >>> found.structure, found.output_error < found.error
        (LowRank(rank=10), True)
    """
    weight = weight.detach()  # of a model made in inference mode: its parameters require gradients all the same
    check_weight(weight)
    if isinstance(structure, Structure) == (ratio is not None):
        raise ValueError("give either hyperparameters or a ratio, and not both")
    problem = _Problem(weight, *make_objective(weight, gram, output_gram))
    if isinstance(structure, Structure):
        out_features, in_features = weight.shape
        return problem.fit_with(structure.resolve(in_features, out_features, weight), refine)
    assert ratio is not None
    options = []
    errors = []
    for family in structure if isinstance(structure, Sequence) else [structure]:
        try:
            options.append(within(family, weight.shape[1], weight.shape[0], ratio, budget))
        except NoMemberError as error:
            errors.append(error)
    if not options:
        raise errors[0]
    return problem.best(options, refine)


def extend(
    found: Fit,
    structure: Structure,
    weight: Tensor,
    *,
    gram: Tensor | InputGram | None = None,
    output_gram: Tensor | None = None,
) -> Fit:
    """Change the rank of the low-rank summand of a fit: solve for it in closed form, keep all other factors.

    `structure` differs from the fit's in that rank only. The error does not exceed that of `found`, for the same weight
    and Grams, unless the rank is smaller.
    """
    return _Problem(weight.detach(), *make_objective(weight, gram, output_gram)).extended(found, structure)


@dataclass(frozen=True)
class _Problem:
    """One weight and its objective in float64, which holds the weight divided by `scale`."""

    weight: Tensor
    objective: Objective
    scale: float

    def steps(self, structure: Structure, refine: int | None) -> int:
        if refine is not None:
            return refine
        spec = structure.spec(self.weight.shape[1], self.weight.shape[0])
        return structure.refine_steps or (0 if self.objective.plain or _is_low_rank(spec) else STEPS)

    def best(self, families: Sequence[Sequence[Structure]], refine: int | None) -> Fit:
        """Race the sizes of each family, then the families, and refine the winner to the end."""
        if len(families) == len(families[0]) == 1:
            return self.fit_with(families[0][0], refine)
        winners = [
            min((self._started(each, refine) for each in sizes), key=lambda run: run.error) for sizes in families
        ]
        done = [run for run in winners if run.finished]
        least = math.inf
        # A family that lost goes on only if the one that went on ends above its error so far: then it was misjudged.
        for run in sorted((run for run in winners if not run.finished), key=Run.expected):
            if run.error < least:
                run.advance()
                least = min(least, run.error)
                done.append(run)
        return min(
            (self.measured(run.structure, run.spec, run.result()) for run in done), key=lambda fit: fit.minimised
        )

    def _started(self, structure: Structure, refine: int | None) -> Run:
        run = self.start(structure, self.steps(structure, refine))
        run.advance(RACE)
        return run

    def fit_with(self, structure: Structure, refine: int | None) -> Fit:
        """Decompose, refine, and measure."""
        run = self.start(structure, self.steps(structure, refine))
        run.advance()
        return self.measured(run.structure, run.spec, run.result())

    def start(self, structure: Structure, steps: int) -> Run:
        """Decompose, and prepare the refinement if there is something to gain."""
        structure = structure.suited(self.objective.weight * self.objective.scales().sqrt())
        spec = structure.spec(self.weight.shape[1], self.weight.shape[0])
        factors = self._start(structure, spec)
        if (not steps and self.objective.plain and len(spec.equations) == 1) or _is_low_rank(spec):
            return Run(structure, spec, factors, self.objective, None)
        # float32 is enough for the steps, unless the weight itself has the digits of float64.
        objective = self._double if not steps or self.weight.dtype == torch.float64 else self._single
        if solves(spec):
            return Run(structure, spec, [solve(spec, factors[0], objective, steps)], self.objective, None)
        refinement = Refinement(spec, [f.to(objective.weight.dtype) for f in factors], objective, steps)
        return Run(structure, spec, factors, self.objective, refinement)

    @cached_property
    def _single(self) -> Objective:
        return self.objective.to(torch.complex64 if self.weight.is_complex() else torch.float32)

    @cached_property
    def _double(self) -> Objective:
        return self.objective.to(self.objective.weight.dtype)

    def extended(self, found: Fit, structure: Structure) -> Fit:
        """Solve for the low-rank summand; take the other factors from a fit."""
        spec = structure.spec(self.weight.shape[1], self.weight.shape[0])
        if _is_low_rank(spec):
            return self.fit_with(structure, 0)
        known = _rescaled(found.spec, found.factors, 1 / self.scale, self.objective.weight.dtype)
        return self.measured(structure, spec, Refinement(spec, known, self._double, 0).result())

    def measured(self, structure: Structure, spec: Spec, factors: Sequence[Tensor]) -> Fit:
        """Round the factors to the dtype of the weight, and compute the error of the result."""
        stored = _rescaled(spec, factors, self.scale, self.weight.dtype)
        dense = to_dense(spec, [factor.to(self.objective.weight.dtype) for factor in stored])
        largest, limit = torch.linalg.vector_norm(dense, math.inf).item(), torch.finfo(self.weight.dtype).max
        if not largest <= limit:
            raise ValueError(
                f"{structure} approximates the weight by entries up to {largest:.4g}, and {self.weight.dtype} ends at "
                f"{limit:.4g}; use a smaller weight or a wider dtype"
            )
        error = relative_error(self.weight, dense)
        dense = divided(dense, self.scale)  # the copy of before is freed
        measured = None if self.objective.plain else self.objective.relative_error(dense)
        return Fit(structure, spec, stored, error, measured)

    def _start(self, structure: Structure, spec: Spec) -> list[Tensor]:
        weight = self.objective.weight
        if _is_low_rank(spec) and not self.objective.plain:
            return list(self.objective.low_rank(weight, self.objective.basis(weight, spec.shapes[0][1])))
        factors = [factor.to(weight.dtype) for factor in structure.decompose(weight)]
        shapes = tuple(tuple(factor.shape) for factor in factors)
        if shapes != spec.shapes:
            raise ValueError(f"{structure} decomposes into factors of shapes {shapes}; its equation says {spec.shapes}")
        return factors


@dataclass
class Run:
    """A candidate, refined as far as the race has come."""

    structure: Structure
    spec: Spec
    factors: Sequence[Tensor]  # the start
    objective: Objective
    refinement: Refinement | None  # None: the start is all there is

    @cached_property
    def _start_error(self) -> float:
        return self.objective.relative_error(to_dense(self.spec, self.factors))

    @property
    def error(self) -> float:
        return self._start_error if self.refinement is None else self.refinement.error

    @property
    def finished(self) -> bool:
        return self.refinement is None or self.refinement.finished

    def advance(self, until: int | None = None) -> None:
        if self.refinement is not None:
            self.refinement.advance(until)

    def expected(self) -> float:
        """Refine through PACE and extrapolate: the log of the error falls on at that pace per learning rate.

        Errors alone would mislead: long chains begin later than short ones, and end below them.
        """
        if self.refinement is None:
            return self.error
        self.advance(PACE[0])
        before, begin = self.error, self.refinement.progress
        self.advance(PACE[1])
        now, end = self.error, self.refinement.progress
        return now if self.finished else now * (now / before) ** ((1 - end) / (end - begin))

    def result(self) -> Sequence[Tensor]:
        return self.factors if self.refinement is None else self.refinement.result(self.objective)


def _is_low_rank(spec: Spec) -> bool:
    return len(spec.equations) == 1 and low_rank_summand(spec) == 0


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Compute ||weight - approximation|| / ||weight|| in the Frobenius norm; 0 for two zero matrices."""
    wide = torch.promote_types(weight.dtype, approximation.dtype)
    pairs = zip(weight.split(PART), approximation.split(PART), strict=True)  # no wide copy of all rows at once
    error, total = math.hypot(*(norm(rows.to(wide) - found) for rows, found in pairs)), norm(weight)
    return error / total if total > 0 else (0.0 if error == 0 else math.inf)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError unless the weight is a finite, non-empty matrix of a float or complex dtype."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; a dense matrix (out_features, in_features) is needed"
        )
    if not (weight.is_floating_point() or weight.is_complex()) or weight.itemsize < 2:  # torch computes with no float8
        raise ValueError(f"weight has dtype {weight.dtype}; a float or complex matrix of 16 bits or more is needed")
    if not has_values(weight):
        raise ValueError("weight is fake or on the meta device and has no values; load the weights first")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values; repair it or leave the layer dense")


def _rescaled(spec: Spec, factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Distribute a scale of the matrix evenly over the learned factors of each equation, and cast."""
    result = []
    for eq, part in spec.split(factors):
        share = scale ** (1 / sum(factor.learned for factor in eq.factors))
        for factor, tensor in zip(eq.factors, part, strict=True):
            result.append((tensor * share if factor.learned else tensor).to(dtype).contiguous())
    return tuple(result)
