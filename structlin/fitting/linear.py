"""Solve for the one factor of an equation: the matrix is linear in it, so the best is a least-squares solution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.fitting.objective import Objective
from structlin.runtime.contract import to_dense

CLOSE = 1e-12  # squared relative residual at which the steps end; float32 ends before


def solves(spec: Spec) -> bool:
    """Return whether `solve` applies: one equation of one factor, which is tied (an untied one is the weight)."""
    return len(spec.factors) == 1 and spec.tied


def solve(spec: Spec, values: Tensor, objective: Objective, steps: int) -> Tensor:
    """Minimise the objective over the values of a tied factor, by conjugate gradients from a start.

    The error falls with every step. The diagonal of the normal equations conditions them: with diagonal Grams one step
    ends it.  Cost per step: the matrix of the values, its products with the Grams, and the gradient.

    Args:
        spec: see `solves`.
        values: the start.
        objective: in the dtype to compute in.
        steps: at most.
    Returns:
        The values, in the dtype of the objective.
    Source: Hestenes & Stiefel 1952.
    """
    values = values.to(objective.weight.dtype)
    collected = _collector(spec, values)
    counts = collected(objective.scales()).real
    scale = counts.clamp_min(torch.finfo(counts.dtype).tiny).rsqrt()
    rest = scale * collected(objective.gradient(objective.weight - to_dense(spec, [values])))
    direction, size = rest, _square(rest)
    first = size
    for _ in range(steps):
        if size <= CLOSE * first:
            break
        move = scale * direction
        image = scale * collected(objective.gradient(to_dense(spec, [move])))
        step = size / torch.linalg.vecdot(direction.flatten(), image.flatten()).real
        values, rest = values + step * move, rest - step * image
        new = _square(rest)
        direction, size = rest + new / size * direction, new
    return values


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).square()


def _collector(spec: Spec, like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the adjoint of `to_dense`: the sum of the entries that read each value."""
    with torch.enable_grad():
        values = torch.zeros_like(like, requires_grad=True)
        dense = to_dense(spec, [values])
    return lambda matrix: torch.autograd.grad(dense, values, matrix, retain_graph=True)[0]
