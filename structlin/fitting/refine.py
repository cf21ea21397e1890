"""Refine factors through their equation: Adam over all of them, the low-rank summand eliminated exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.fitting.objective import Objective, inner
from structlin.runtime import kernels, planner
from structlin.runtime.contract import apply, to_dense
from structlin.runtime.eager import plain, suits, unobserved
from structlin.runtime.kernels.chain import Chain, chain_of
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Plan

# Chosen by benchmarks/optimisers.py.
LEARNING_RATE = 2.0  # relative to the root mean square entry of a factor ...
FACTORS = 5  # ... times FACTORS / number for more factors than this: their relative changes add up in the product
BETAS = (0.9, 0.95)
WARM_UP = 20  # steps
HALVINGS = 12  # of the learning rate, before a diverging refinement ends
DIVERGED = 1.1  # a relative error of this, or this multiple of the start's, counts as divergence
# Largest norm of what is outside the low-rank summand, relative to the weight's: beyond, the two cancel more and more,
# which rounding and training pay for. A bound of 2 costs accuracy (MiniLM). It is looked at every so many steps.
LARGEST, EVERY = 8.0, 10
FLOOR = 1e-7  # relative error that float32 does not improve on
WINDOW, PLATEAU = 50, 2e-4  # a relative gain below PLATEAU over WINDOW steps ...
HURRY = 4.0  # ... shortens the rest of the schedule by this factor


def low_rank_summand(spec: Spec) -> int | None:
    """Return the index of the first equation `o r, r i -> o i` (any names) that has the size of the layer, or None."""
    for k, eq in enumerate(spec.equations):
        if (
            len(eq.factors) == 2
            and len(eq.outputs) == len(eq.inputs) == 1
            and len(eq.sizes) == 3
            and (eq.padded_out, eq.padded_in) == (spec.out_features, spec.in_features)
            and all(factor.learned and len(factor.modes) == 2 for factor in eq.factors)
            and eq.factors[0].modes[0] == eq.outputs[0]
            and eq.factors[1].modes[1] == eq.inputs[0]
        ):
            return k
    return None


@dataclass
class Schedule:
    """Learning rate over the steps: warm-up, cosine decay to zero, halved on divergence, hurried on a plateau."""

    steps: int  # the length of the cosine
    rate: float  # its peak, relative to each factor's root mean square entry
    position: float = 0.0  # the place on the cosine, 0 to `steps`
    taken: int = 0  # optimiser steps so far; a step that diverged does not count
    warm_from: int = 0  # `taken` when the current warm-up began
    halvings: int = 0
    stride: float = 1.0  # by which a step moves the position; HURRY on a plateau
    mark: float = math.inf  # error one WINDOW ago

    @property
    def ended(self) -> bool:
        """Whether the cosine has reached zero."""
        return self.position >= self.steps

    @property
    def progress(self) -> float:
        """Share of the cosine's area that is behind; warm-up aside, the share of all learning rates."""
        done = self.position / self.steps
        return done + math.sin(math.pi * done) / math.pi

    def fade(self) -> float:
        """Return the present share of the peak rate."""
        warm = min(1.0, (self.taken - self.warm_from + 1) / WARM_UP)
        return 0.5 * (1 + math.cos(math.pi * self.position / self.steps)) * warm

    def step(self, error: float) -> None:
        """Move on after an optimiser step that began at this error."""
        self.taken += 1
        self.position += self.stride
        if self.taken % WINDOW == 0:
            if error > (1 - PLATEAU) * self.mark:
                self.stride = HURRY
            self.mark = error

    def halve(self) -> None:
        """Halve the rate and warm up again after a divergence; end after HALVINGS of them."""
        self.halvings += 1
        self.rate /= 2
        self.warm_from = self.taken
        if self.halvings >= HALVINGS:
            self.position = self.steps


@dataclass(frozen=True)
class _State:
    """Values of the variables: the factors outside the low-rank summand, and the basis (out, rank) of that summand."""

    factors: list[Tensor]
    basis: Tensor | None
    error: float


class Refinement:
    """Minimise an objective over the factors of an equation, in as many calls of `advance` as wanted.

    A low-rank summand is not a variable. For any value of the other factors its best value is known: the leading
    singular vectors of their residual. So it is eliminated, and the loss is the norm that remains after it (variable
    projection, Golub & Pereyra 1973). One subspace iteration per step keeps its basis up to date.

    The factors are the start, in the order of `spec`; the dtype of the objective is the one to compute in; `steps` and
    `learning_rate` (None: chosen) are the length and the peak of the `Schedule`.
    """

    def __init__(
        self, spec: Spec, factors: Sequence[Tensor], objective: Objective, steps: int,
        *, learning_rate: float | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.objective = spec, objective
        self._low = low_rank_summand(spec)
        others = tuple(eq for k, eq in enumerate(spec.equations) if k != self._low)
        self._rest = Spec(spec.in_features, spec.out_features, others)
        longest = max((len(eq.factors) for eq in others), default=1)
        self._schedule = Schedule(steps, learning_rate or LEARNING_RATE * min(1.0, FACTORS / longest))
        parts = [part for _, part in spec.split(factors)]
        self._work = [factor.detach().clone() for k, part in enumerate(parts) if k != self._low for factor in part]
        self._plan: Plan | None = None
        self._chain: Chain | None = None
        self._gram = objective.gram  # the dense matrix is cheaper than its many rows times the factors
        self._whole = objective.targets if self._gram is None else objective.weighted(objective.weight.mT)
        rows = objective.inputs
        if rows is not None and others:
            machine = machine_of(rows.device)
            self._plan = planner.find_plan(self._rest, rows.shape[0], machine=machine, itemsize=rows.element_size())
            if kernels.available() and unobserved() and plain(self._work) and suits((rows, *self._work)):
                chain = chain_of(self._rest)
                faster = chain.step_seconds(rows.shape[0], machine=machine) < self._plan.training
                self._chain = chain if faster else None
        self._basis: Tensor | None = None
        if self._low is not None:
            with torch.no_grad():
                self._basis = self.objective.basis(self._difference(self._work), self._rank)
        self._best = self._state(self._measure())
        self._limit = DIVERGED * max(1.0, self.error)
        self._adam = self._restart()

    @property
    def _rank(self) -> int:
        assert self._low is not None
        eq = self.spec.equations[self._low]
        return eq.shape(eq.factors[0].modes)[1]

    @property
    def error(self) -> float:
        """The least relative error so far, at first that of the start."""
        return self._best.error

    @property
    def progress(self) -> float:
        """Share of all learning rates that has been used, 0 to 1."""
        return self._schedule.progress

    @property
    def steps_taken(self) -> int:
        """Optimiser steps so far; fewer than the schedule's if it was hurried or ended early."""
        return self._schedule.taken

    @property
    def finished(self) -> bool:
        """Whether the schedule has ended, the error has reached the floor, or no factor is learned."""
        return self._schedule.ended or self.error < FLOOR or self._adam is None

    def advance(self, until: int | None = None) -> float:
        """Move along the schedule to a step of it, by default its end, and return the least relative error so far."""
        schedule = self._schedule
        target = schedule.steps if until is None else min(schedule.steps, until)
        with torch.enable_grad():
            while schedule.position < target and not self.finished:
                self._step()
        self._keep(self._measure())  # a step measures the factors before it only
        return self.error

    def result(self, objective: Objective | None = None) -> list[Tensor]:
        """Return the best factors, with the best low-rank summand for them in an objective that may be more exact."""
        best, objective = self._best.factors, objective or self.objective
        if self._low is None:
            return list(best)
        with torch.no_grad():
            difference = objective.weight - to_dense(self._rest, [f.to(objective.weight.dtype) for f in best])
            basis = objective.basis(difference, self._rank)
            parts = [part for _, part in self._rest.split(best)]
            parts.insert(self._low, objective.low_rank(difference, basis))
        return [factor for part in parts for factor in part]

    # One step ------------------------------------------------------------------------------------------------------

    def _difference(self, factors: Sequence[Tensor]) -> Tensor:
        """Subtract the factors outside the low-rank summand from the weight: (out_features, in_features)."""
        weight = self.objective.weight
        return weight - to_dense(self._rest, factors) if factors else weight

    def _remainder(self) -> Tensor:
        """Residual of the factors being optimised: (rows, out_features), with `_gram` (in_features, out_features)."""
        objective = self.objective
        if self._plan is None:
            return objective.weighted(self._difference(self._work).mT)
        assert objective.inputs is not None
        if self._chain is not None:
            rows = self._chain(objective.inputs, self._work, None)
        else:
            rows = apply(self._rest, self._work, objective.inputs, self._plan)
        return objective.targets - objective.weighted(rows)

    def _loss(self, remainder: Tensor, move: bool) -> tuple[float, Tensor]:
        """Return the squared norm outside the low-rank summand, and half its gradient for the remainder.

        If `move`, a subspace iteration of the basis comes first. With a Gram G the norm of R is tr(R^H G^T R): nothing
        has as many rows as G's root, and the gradient costs no further product.
        """
        weighted = remainder if self._gram is None else self._gram @ remainder
        if self._basis is None:
            return inner(remainder, weighted), weighted
        if move:
            self._basis = torch.linalg.qr(weighted.mH @ (remainder @ self._basis))[0]
        outside = remainder - (remainder @ self._basis) @ self._basis.mH
        if self._gram is None:
            return inner(outside, outside), outside
        weighted = weighted - (weighted @ self._basis) @ self._basis.mH
        return inner(outside, weighted), weighted

    def _measure(self) -> float:
        with torch.no_grad():
            return self._relative(self._loss(self._remainder(), move=False)[0])

    def _relative(self, loss: float) -> float:
        return math.sqrt(max(loss, 0.0)) / self.objective.total if math.isfinite(loss) else math.inf

    def _state(self, error: float) -> _State:
        return _State([factor.detach().clone() for factor in self._work], self._basis, error)

    def _keep(self, error: float) -> None:
        if error < self.error:  # remember the present factors as the best so far
            self._best = self._state(error)

    def _restart(self) -> torch.optim.Adam | None:
        """Return to the best factors, and make an optimiser with fresh moments; None if no factor is learned."""
        learned = [factor.learned for factor in self._rest.factors]
        self._work = [f.clone().requires_grad_(flag) for f, flag in zip(self._best.factors, learned, strict=True)]
        self._basis = self._best.basis
        variables = [factor for factor in self._work if factor.requires_grad]
        rms = [torch.linalg.vector_norm(f.detach()).item() / math.sqrt(f.numel()) for f in variables]
        groups: list[dict[str, Any]] = [
            {"params": [f], "base": max(size, 1e-8)} for f, size in zip(variables, rms, strict=True)
        ]
        return torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=1e-30) if groups else None

    def _step(self) -> None:
        assert self._adam is not None
        remainder = self._remainder()
        with torch.no_grad():
            loss, gradient = self._loss(remainder.detach(), move=True)
        error = self._relative(loss)
        self._keep(error)
        if not error < self._limit:
            self._schedule.halve()
            self._adam = self._restart()
            return
        self._adam.zero_grad()
        remainder.backward(gradient)
        fade = self._schedule.fade()
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.rate * group["base"] * fade
        self._adam.step()
        self._schedule.step(error)
        if self._basis is not None and self._schedule.taken % EVERY == 0:
            self._shrink(remainder.detach())

    @torch.no_grad()
    def _shrink(self, remainder: Tensor) -> None:
        """Scale the learned factors down where their rows, those of this remainder, are too large."""
        rows = self._whole - remainder
        square = inner(rows, rows if self._gram is None else self._gram @ rows)
        excess = math.sqrt(max(square, 0.0)) / (LARGEST * self.objective.total)
        learned = [factor for factor in self._work if factor.requires_grad]
        if excess > 1:
            for factor in learned:
                factor.mul_(excess ** (-1 / len(learned)))
