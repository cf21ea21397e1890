"""Refinement of factors through their equation: Adam over all of them, low-rank summands eliminated exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.fitting.objective import Objective, leading_basis
from structlin.runtime import kernels, planner
from structlin.runtime.contract import apply, to_dense
from structlin.runtime.eager import plain, suits, unobserved
from structlin.runtime.kernels.chain import Chain, chain_of
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Plan

# Chosen by benchmarks/optimisers.py.
LEARNING_RATE = 2.0  # relative to the root mean square entry of a factor ...
FACTORS = 5  # ... and less by FACTORS / number where there are more, whose relative changes add up in their product
BETAS = (0.9, 0.95)
WARM_UP = 20  # steps
HALVINGS = 12  # of the learning rate, before a diverging refinement ends
DIVERGED = 1.1  # relative error, or multiple of the start's
FLOOR = 1e-7  # relative error in float32 below which nothing is left to gain
WINDOW, PLATEAU = 50, 2e-4  # a relative gain below PLATEAU over WINDOW steps ...
HURRY = 4.0  # ... makes the rest of the schedule this much shorter


def low_rank_summand(spec: Spec) -> int | None:
    """Return the index of the first equation of the form `o r, r i -> o i` (any names) of the size of the layer."""
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


class Refinement:
    """A refinement of factors that can be advanced, and asked for its error and its result.

    A low-rank summand is not a variable: for every value of the others its best value is known (the leading singular
    vectors of what they leave), so it is eliminated, and the others are fitted to what is left when it is at its best
    (variable projection, Golub & Pereyra 1973). Its basis follows by one step of subspace iteration per step.

    Args:
        spec: the equation.
        factors: the start, in the order of `spec`.
        objective: what is minimised, in the dtype to compute in.
        steps: the length of the schedule: a warm-up, then a cosine decay of the learning rate to zero.
        learning_rate: at its peak, relative to each factor's root mean square entry; None chooses it.

    Attributes:
        error: the least relative error so far, at first that of the start.
        steps_taken: steps so far.
    """

    def __init__(
        self, spec: Spec, factors: Sequence[Tensor], objective: Objective, steps: int,
        *, learning_rate: float | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.objective, self.steps = spec, objective, steps
        self.steps_taken = 0
        self._progress, self._speed, self._halvings = 0.0, 1.0, 0
        self._marks: list[float] = []
        self._low = low_rank_summand(spec)
        others = tuple(eq for k, eq in enumerate(spec.equations) if k != self._low)
        self._rest = Spec(spec.in_features, spec.out_features, others)
        longest = max((len(eq.factors) for eq in others), default=1)
        self.learning_rate = learning_rate or LEARNING_RATE * min(1.0, FACTORS / longest)
        parts = [part for _, part in spec.split(factors)]
        self._work = [factor.detach().clone() for k, part in enumerate(parts) if k != self._low for factor in part]
        self._plan: Plan | None = None
        self._chain: Chain | None = None
        if objective.inputs is not None and others:
            rows = objective.inputs
            machine = machine_of(rows.device)
            self._plan = planner.find_plan(self._rest, rows.shape[0], machine=machine, itemsize=rows.element_size())
            if kernels.available() and unobserved() and plain(self._work) and suits((rows, *self._work)):
                chain = chain_of(self._rest)
                self._chain = chain if chain.seconds(rows.shape[0], machine=machine) < self._plan.seconds else None
        self._basis: Tensor | None = None
        if self._low is not None:
            with torch.no_grad():
                self._basis = leading_basis(self._remainder(), self._rank)
        self._best, self._best_basis = [factor.clone() for factor in self._work], self._basis
        self.error = self._measure()
        self._limit = DIVERGED * max(1.0, self.error)
        self._restart()

    @property
    def _rank(self) -> int:
        assert self._low is not None
        eq = self.spec.equations[self._low]
        return eq.shape(eq.factors[0].modes)[1]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the schedule has ended, the error is at the floor, or nothing can move."""
        return self._progress >= self.steps or self.error < FLOOR or not self._groups

    def advance(self, steps: int | None = None) -> float:
        """Take steps of the schedule (all that are left by default) and return the best relative error so far."""
        target = self.steps if steps is None else min(self.steps, self._progress + steps)
        with torch.enable_grad():
            while self._progress < target and not self.finished:
                self._step()
        self._keep(self._measure())  # what the last step made
        return self.error

    def result(self) -> list[Tensor]:
        """Return the best factors, the low-rank summand put in at its best."""
        if self._low is None:
            return list(self._best)
        with torch.no_grad():
            difference = self.objective.weight
            if self._rest.equations:
                difference = difference - to_dense(self._rest, self._best)
            basis = leading_basis(self.objective.error(difference), self._rank)
            parts = [part for _, part in self._rest.split(self._best)]
            parts.insert(self._low, self.objective.low_rank(difference, basis))
        return [factor for part in parts for factor in part]

    # One step ------------------------------------------------------------------------------------------------------

    def _remainder(self) -> Tensor:
        """What the factors that are variables leave of the targets."""
        if not self._rest.equations:
            return self.objective.targets
        if self._plan is None:
            return self.objective.error(self.objective.weight - to_dense(self._rest, self._work))
        assert self.objective.inputs is not None
        if self._chain is not None:
            rows = self._chain(self.objective.inputs, self._work, None)
        else:
            rows = apply(self._rest, self._work, self.objective.inputs, self._plan)
        return self.objective.targets - (rows if self.objective.outputs is None else rows @ self.objective.outputs)

    def _residual(self) -> Tensor:
        remainder = self._remainder()
        if self._basis is None:
            return remainder
        with torch.no_grad():
            known = remainder.detach()
            self._basis = torch.linalg.qr(known.mH @ (known @ self._basis))[0]
        return remainder - (remainder @ self._basis) @ self._basis.mH

    def _measure(self) -> float:
        with torch.no_grad():
            remainder = self._remainder()
            if self._basis is not None:
                remainder = remainder - (remainder @ self._basis) @ self._basis.mH
            return torch.linalg.vector_norm(remainder).item() / self.objective.total

    def _restart(self) -> None:
        """Begin from the best factors with fresh moments."""
        learned = [factor.learned for factor in self._rest.factors]
        self._work = [f.clone().requires_grad_(flag) for f, flag in zip(self._best, learned, strict=True)]
        self._basis = self._best_basis
        self._groups = [{"params": [f], "base": max(_rms(f), 1e-8)} for f in self._work if f.requires_grad]
        self._since = 0
        if self._groups:
            self._adam = torch.optim.Adam(self._groups, lr=0.0, betas=BETAS, eps=1e-30)

    def _step(self) -> None:
        residual = self._residual()
        loss = torch.linalg.vector_norm(residual).square()
        error = math.sqrt(loss.item()) / self.objective.total if math.isfinite(loss.item()) else math.inf
        self._keep(error)
        if not error < self._limit:
            self._halvings += 1
            self.learning_rate /= 2
            self._progress = self._progress if self._halvings < HALVINGS else self.steps
            self._restart()
            return
        self._adam.zero_grad()
        loss.backward()
        fade = 0.5 * (1 + math.cos(math.pi * self._progress / self.steps)) * min(1.0, (self._since + 1) / WARM_UP)
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate * group["base"] * fade
        self._adam.step()
        self._since += 1
        self.steps_taken += 1
        self._progress += self._speed
        self._watch(error)

    def _keep(self, error: float) -> None:
        """Remember the factors if they are the best so far."""
        if error < self.error:
            self.error, self._best_basis = error, self._basis
            self._best = [factor.detach().clone() for factor in self._work]

    def _watch(self, error: float) -> None:
        """Shorten what is left of the schedule when the error has stopped falling."""
        if self.steps_taken % WINDOW == 0:
            if self._marks and error > (1 - PLATEAU) * self._marks[-1]:
                self._speed = HURRY
            self._marks.append(error)


def _rms(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach()).item() / math.sqrt(tensor.numel())
