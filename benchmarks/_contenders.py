"""Ways to fit low rank + K-matrix to a weight in the norm of its inputs, for `optimisers.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _weights import Layer, output_error
from torch import Tensor

from structlin.fitting.objective import leading_basis, make_objective
from structlin.fitting.refine import WARM_UP, Refinement
from structlin.runtime import planner
from structlin.runtime.contract import apply, to_dense
from structlin.runtime.machines import machine_of
from structlin.structures import Kaleidoscope, LowRank, Sum

Factors = list[Tensor]
Residual = Callable[[Sequence[Tensor]], Tensor]

SIZE = 384
RANK = 20
CHAIN = Kaleidoscope(width=3, in_modes=(24, 16), out_modes=(24, 16)).resolve(SIZE, SIZE)
STRUCTURE = Sum(parts=(LowRank(rank=RANK), CHAIN)).resolve(SIZE, SIZE)
RATES = (0.3, 1.0, 1.4, 2.0)
OUR_STEPS = (300, 500, 1500)
OTHER_STEPS = (300, 1500)


# The problem -----------------------------------------------------------------------------------------------------


class Problem:
    """One weight: the objective in float32, the residual of all factors, and that with the low rank eliminated."""

    def __init__(self, layer: Layer, dtype: torch.dtype = torch.float32) -> None:
        self.layer = layer
        self.exact, self.scale = make_objective(layer.weight, layer.gram)
        self.objective = self.exact.to(dtype)
        self.spec, self.chain = STRUCTURE.spec(SIZE, SIZE), CHAIN.spec(SIZE, SIZE)
        assert self.objective.inputs is not None
        self.rows = self.objective.inputs
        machine = machine_of(self.rows.device)
        self.plans = [
            planner.find_plan(spec, len(self.rows), machine=machine, itemsize=dtype.itemsize)
            for spec in (self.spec, self.chain)
        ]
        self.basis = self.rows.new_zeros(SIZE, RANK)
        self.taken: int | None = None  # steps, where a contender may end early

    def weighted_start(self) -> Factors:
        """Low rank from the whitened SVD, the K-matrix from what it leaves."""
        low = self.exact.low_rank(self.exact.weight, self.exact.basis(self.exact.weight, RANK))
        rest = self.exact.weight - low[0] @ low[1]
        return [factor.to(self.rows.dtype) for factor in (*low, *CHAIN.decompose(rest))]

    def chain_start(self) -> Factors:
        """The K-matrix of the library's start, and the basis of the low rank that is best for it."""
        chain = [factor.to(self.rows.dtype) for factor in STRUCTURE.decompose(self.exact.weight)[2:]]
        self.basis = leading_basis(self._left_by(chain), RANK)
        return chain

    def joint(self, factors: Sequence[Tensor]) -> Tensor:
        """Residual of all factors, of norm 1 at zero factors."""
        return (self.objective.targets - apply(self.spec, factors, self.rows, self.plans[0])) / self.exact.total

    def eliminated(self, chain: Sequence[Tensor]) -> Tensor:
        """Residual of the K-matrix when the low rank takes what it can; its basis follows by a subspace iteration."""
        rest = self._left_by(chain)
        with torch.no_grad():
            self.basis = torch.linalg.qr(rest.mT @ (rest @ self.basis))[0]
        return self.project(rest) / self.exact.total

    def project(self, rows: Tensor) -> Tensor:
        """Take the span of the basis out of rows."""
        return rows - (rows @ self.basis) @ self.basis.mT

    def completed(self, chain: Sequence[Tensor]) -> Factors:
        """Put the best low rank before the K-matrix."""
        rest = self.objective.weight - to_dense(self.chain, chain)
        return [*self.objective.low_rank(rest, self.objective.basis(rest, RANK)), *chain]

    def _left_by(self, chain: Sequence[Tensor]) -> Tensor:
        return self.objective.targets - apply(self.chain, chain, self.rows, self.plans[1])

    def error(self, factors: Sequence[Tensor]) -> float:
        """Output error of the dense matrix that the factors build, against the weight as it is."""
        return output_error(self.layer.weight.double() / self.scale, self.spec, factors, self.layer.gram)


# The contenders: each returns all factors ------------------------------------------------------------------------


def ours(problem: Problem, steps: int, rate: float) -> Factors:
    """The library's refinement."""
    start = [factor.to(problem.rows.dtype) for factor in STRUCTURE.decompose(problem.exact.weight)]
    refinement = Refinement(problem.spec, start, problem.objective, steps, learning_rate=rate)
    claimed = refinement.advance()
    problem.taken = refinement.steps_taken
    factors = refinement.result()
    assert problem.error(factors) < claimed + 1e-5, (problem.error(factors), claimed)
    return factors


def adam(problem: Problem, steps: int, rate: float, relative: bool, low: float = 1.0) -> Factors:
    """Adam over all factors: a rate relative to a factor's entries or absolute, `low` times that for the low rank."""
    variables = _variables(problem.weighted_start())
    groups = [
        {"params": [factor], "base": (_rms(factor) if relative else 1.0) * (low if k < 2 else 1.0)}
        for k, factor in enumerate(variables)
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-30)
    return descend(problem.joint, variables, optimizer, steps, rate)


def lbfgs(problem: Problem, steps: int) -> Factors:
    """L-BFGS over all factors; every evaluation of its line search is a step."""
    variables = _variables(problem.weighted_start())
    best: list[tuple[float, Factors]] = [(math.inf, variables)]
    optimizer = torch.optim.LBFGS(
        variables, max_iter=steps, max_eval=steps, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.joint(variables).square().sum()
        if loss.item() < best[0][0]:
            best[0] = loss.item(), _copies(variables)
        loss.backward()
        return loss

    optimizer.step(closure)
    return best[0][1]


class Muon(torch.optim.Optimizer):
    """Momentum whose every block (the last two axes) is orthogonalised by five Newton-Schulz steps (Jordan 2024)."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for factor in group["params"]:
                state = self.state[factor]
                average = state["average"] = group["momentum"] * state.get("average", 0.0) + factor.grad
                x = factor.grad + group["momentum"] * average
                x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                factor.sub_(group["lr"] * math.sqrt(max(factor.shape[-2:])) * x)  # of root mean square lr


def muon(problem: Problem, steps: int, rate: float) -> Factors:
    """Orthogonalised momentum on the K-matrix, the low rank eliminated."""
    variables = _variables(problem.chain_start())
    optimizer = Muon([{"params": [factor], "base": _rms(factor)} for factor in variables])
    return problem.completed(descend(problem.eliminated, variables, optimizer, steps, rate))


def alternating(problem: Problem, steps: int, inner: int) -> Factors:
    """Solve for one stage of the K-matrix after the other by conjugate gradients, the low rank's basis fixed meanwhile.

    A step is one iteration of conjugate gradients: a forward and a backward pass for one stage.
    """
    chain, taken = problem.chain_start(), 0
    while taken < steps:
        for k in range(len(chain)):
            with torch.no_grad():
                residual = problem.eliminated(chain) * problem.exact.total  # updates the basis
            chain[k] = chain[k] + _solve(problem, chain, k, residual, min(inner, steps - taken))
            taken += inner
            if taken >= steps:
                break
    return problem.completed(chain)


def _solve(problem: Problem, chain: Factors, k: int, residual: Tensor, iterations: int) -> Tensor:
    """Change of one stage that fits the residual best (CGLS)."""

    def linear(stage: Tensor) -> Tensor:
        return problem.project(apply(problem.chain, [*chain[:k], stage, *chain[k + 1 :]], problem.rows, plan))

    plan = problem.plans[1]
    variable = chain[k].detach().requires_grad_()
    image = linear(variable)

    def transposed(rows: Tensor) -> Tensor:
        return torch.autograd.grad(image, variable, rows, retain_graph=True)[0]

    change, gradient = torch.zeros_like(chain[k]), transposed(residual)
    direction, size = gradient, gradient.square().sum()
    with torch.no_grad():
        for _ in range(iterations):
            rows = linear(direction)
            length = size / rows.square().sum().clamp(min=1e-30)
            change, residual = change + length * direction, residual - length * rows
            gradient, before = transposed(residual), size
            size = gradient.square().sum()
            direction = gradient + size / before.clamp(min=1e-30) * direction
    return change


def descend(
    residual: Residual, variables: Factors, optimizer: torch.optim.Optimizer, steps: int, rate: float
) -> Factors:
    """Take steps with the schedule of our refinement; return the best factors on the way."""
    least, best = math.inf, variables
    for k in range(steps):
        loss = residual(variables).square().sum()
        if not math.isfinite(loss.item()):
            break
        if loss.item() < least:
            least, best = loss.item(), _copies(variables)
        optimizer.zero_grad()
        loss.backward()
        fade = 0.5 * (1 + math.cos(math.pi * k / steps)) * min(1.0, (k + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base"] * fade
        optimizer.step()
    return best


def _variables(factors: Factors) -> Factors:
    return [factor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for factor in factors]


def _copies(factors: Factors) -> Factors:
    return [factor.detach().clone() for factor in factors]


def _rms(factor: Tensor) -> float:
    return factor.detach().square().mean().sqrt().item()


@dataclass(frozen=True)
class Contender:
    """A way to fit, the numbers of steps that it gets, and the dtype that it computes in."""

    run: Callable[..., Factors]
    steps: tuple[int, ...] = OTHER_STEPS
    dtype: torch.dtype = torch.float32


CONTENDERS = {
    **{f"ours, rate {rate}": Contender(functools.partial(ours, rate=rate), OUR_STEPS) for rate in RATES},
    "joint Adam, absolute rate 0.02, low rank 0.001": Contender(
        functools.partial(adam, rate=0.02, relative=False, low=0.05)
    ),
    "joint Adam, relative rate 0.3": Contender(functools.partial(adam, rate=0.3, relative=True)),
    "joint Adam, relative rate 0.3, low rank 0.03": Contender(
        functools.partial(adam, rate=0.3, relative=True, low=0.1)
    ),
    "L-BFGS": Contender(lbfgs),
    "L-BFGS, float64": Contender(lbfgs, dtype=torch.float64),
    **{f"Muon-like, rate {rate}": Contender(functools.partial(muon, rate=rate)) for rate in (0.03, 0.1, 0.3)},
    **{f"alternating, {n} iterations": Contender(functools.partial(alternating, inner=n)) for n in (3, 10, 50)},
}
