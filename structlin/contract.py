"""Run plans on tensors: apply a structured matrix to an input, or build the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.planner import EquationPlan, Plan, Step, View, dense_plan
from structlin.spec import Equation, Spec


def apply(spec: Spec, factors: Sequence[Tensor], x: Tensor, plan: Plan) -> Tensor:
    """Multiply an input by the structured matrix: y = x W^T.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
        x: input, shape (tokens, in_features).
        plan: a plan of `spec`, made for any number of tokens.
    Returns:
        Output, shape (tokens, out_features); it may be a view of a temporary.
    """
    results = []
    for (eq, part), eq_plan in zip(_parts(spec, factors), plan.parts, strict=True):
        padded = F.pad(x, (0, eq.padded_in - spec.in_features)) if eq.padded_in > spec.in_features else x
        y = _run(eq_plan, part, padded)
        results.append(y[:, : spec.out_features] if eq.padded_out > spec.out_features else y)
    return _total(results)


def to_dense(spec: Spec, factors: Sequence[Tensor]) -> Tensor:
    """Build the dense matrix (differentiable).

    Cost: memory of the dense matrix, and the FLOPs of merging all factors.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
    Returns:
        W, shape (out_features, in_features).
    """
    results = []
    for eq, part in _parts(spec, factors):
        steps, axes = dense_plan(eq)
        operands = [*part, part[0]]  # the slot of the input is not read
        for step in steps:
            operands.append(_product(step, operands, 1))
        dense = operands[-1].permute(axes).reshape(eq.padded_out, eq.padded_in)
        results.append(dense[: spec.out_features, : spec.in_features])
    return _total(results)


def _parts(spec: Spec, factors: Sequence[Tensor]) -> list[tuple[Equation, Sequence[Tensor]]]:
    parts, start = [], 0
    for eq in spec.equations:
        parts.append((eq, factors[start : start + len(eq.factors)]))
        start += len(eq.factors)
    return parts


def _total(results: list[Tensor]) -> Tensor:
    total = results[0]
    for result in results[1:]:
        total = total + result
    return total


def _run(plan: EquationPlan, factors: Sequence[Tensor], x: Tensor) -> Tensor:
    tokens = x.shape[0]
    operands = [*factors, x.reshape(tokens, *plan.equation.shape(plan.equation.inputs))]
    for step in plan.steps:
        operands.append(_product(step, operands, tokens))
    return operands[-1].permute(plan.axes).reshape(tokens, plan.equation.padded_out)


def _product(step: Step, operands: list[Tensor], tokens: int) -> Tensor:
    left = _stack(operands[step.left], step.left_view, tokens)
    right = _stack(operands[step.right], step.right_view, tokens)
    if step.left_view.broadcast:
        left = left.expand(right.shape[0], -1, -1)
    out = torch.mm(left[0], right[0]) if step.right_view.shape[0] == 1 else torch.bmm(left, right)
    return out.reshape([size if size > 0 else -size * tokens for size in step.out_shape])


def _stack(operand: Tensor, view: View, tokens: int) -> Tensor:
    stack = operand.permute(view.axes).reshape([size if size > 0 else -size * tokens for size in view.shape])
    return stack.contiguous() if view.copy else stack
