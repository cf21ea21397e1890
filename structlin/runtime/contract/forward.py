"""Run plans on tensors: apply a structured matrix to an input, or build the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Equation, Spec
from structlin.runtime.contract.tied import expanded
from structlin.runtime.eager import constant
from structlin.runtime.planner import CPU, EquationPlan, Merge, Plan, View, merge_plan

Operands = list[list[Tensor]]  # one list per equation, one tensor per step of its plan: (rows, columns) or a stack


def apply(spec: Spec, factors: Sequence[Tensor], x: Tensor, plan: Plan) -> Tensor:
    """Compute y = x W^T, (tokens, in_features) -> (tokens, out_features); y may be a view of a temporary."""
    return run(spec, merge_factors(spec, factors, plan), x, plan)


def merge_factors(spec: Spec, factors: Sequence[Tensor], plan: Plan) -> Operands:
    """Merge factors as a plan says and read the results as the operands of its products (views where possible)."""
    operands = []
    for (_, part), eq_plan in zip(spec.split(expanded(spec, factors)), plan.parts, strict=True):
        slots = merged(eq_plan.merges, part)
        operands.append([read(slots[step.factor], step.factor_view) for step in eq_plan.steps])
    return operands


def lay_out(operands: Operands, plan: Plan) -> Operands:
    """Copy operands into the order in memory that products read fastest; this pays for operands used many times.

    Stacks and left operands by rows, a single matrix on the right by columns: BLAS then reads both along the sum.
    """
    return [
        [
            operand.contiguous() if step.swapped or operand.ndim == 3 else operand.T.contiguous().T
            for step, operand in zip(eq_plan.steps, part, strict=True)
        ]
        for eq_plan, part in zip(plan.parts, operands, strict=True)
    ]


def run(
    spec: Spec, operands: Operands, x: Tensor, plan: Plan, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute what `apply` does, plus a bias, with the operands of `merge_factors`; `out` is filled where given.

    The bias and the sum over equations cost no pass of their own where a last product gives the output in order.
    """
    total = bias
    for eq_plan, operand in zip(plan.parts, operands, strict=True):
        eq = eq_plan.equation
        rows = F.pad(x, (0, eq.padded_in - spec.in_features)) if eq.padded_in > spec.in_features else x
        if total is not None and total.dtype is operand[-1].dtype and in_order(spec, eq_plan):
            total = contracted(eq_plan, operand, rows, total, out)
            continue
        y = contracted(eq_plan, operand, rows)
        y = y[:, : spec.out_features] if eq.padded_out > spec.out_features else y
        if total is not None:
            # Under autocast y is in low precision and the bias is not; nn.Linear returns the dtype of y.
            y = torch.add(y, total if total.dtype is y.dtype else total.to(y.dtype), out=out)
        total = y
    assert total is not None
    return total if out is None or total is out else out.copy_(total)


def in_order(spec: Spec, plan: EquationPlan) -> bool:
    """Return whether the last product of an equation gives (tokens, out_features), and so can add to something."""
    return plan.in_order and plan.equation.padded_out == spec.out_features


def to_dense(spec: Spec, factors: Sequence[Tensor]) -> Tensor:
    """Build the dense matrix W (out_features, in_features), differentiable; the FLOPs are those of all merges."""
    total = None
    for eq, part in spec.split(expanded(spec, factors)):
        merges, view = _merges(eq)
        last = merged(merges, part)[-1]
        last = last if merges else last.clone()  # a single factor: what is written into W goes to a temporary
        dense = read(last, view)
        if (eq.padded_out, eq.padded_in) != (spec.out_features, spec.in_features):  # else backward would copy for it
            dense = dense[: spec.out_features, : spec.in_features]
        total = dense if total is None else total + dense
    assert total is not None
    return total


@constant
def _merges(eq: Equation) -> tuple[tuple[Merge, ...], View]:
    return merge_plan(eq, machine=CPU)  # everywhere: a dense matrix does not depend on records


def merged(merges: Sequence[Merge], factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors followed by the results of the merges, which later merges refer to by position."""
    slots = [*factors]
    for merge in merges:
        left, right = read(slots[merge.left], merge.left_view), read(slots[merge.right], merge.right_view)
        # Where nothing is summed, bmm takes up to 40 times as long as a multiplication of entries.
        slots.append(left * right if left.shape[-1] == 1 else product(left, right, merge.shared))
    return slots


def contracted(
    plan: EquationPlan, operands: Sequence[Tensor], x: Tensor, addend: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Run the steps of a plan: (tokens, padded_in) -> (tokens, padded_out); an addend joins a plan `in_order`."""
    value, last = x, plan.steps[-1]
    for step, operand in zip(plan.steps, operands, strict=True):
        stack = read(value, step.view)  # (rows, columns), or (batch, rows, columns)
        left, right = (operand, stack) if step.swapped else (stack, operand)
        if step is last and plan.turned:
            left, right = right.T, left.T
        if step is last and addend is not None:
            value = torch.addmm(addend, left, right, out=out)
        else:
            value = product(left, right, step.shared)
    return value if plan.turned else read(value, plan.result)


def product(left: Tensor, right: Tensor, shared: bool) -> Tensor:
    """Multiply two matrices or two stacks; if `shared`, the matrix `left` with every item of the stack `right`."""
    if right.ndim == 2:
        return torch.mm(left, right)
    # A stride of 0 over the batch: bmm reads the one matrix again and again, without a copy. The batch may be the
    # tokens: len(right) would make torch.export and torch.jit.trace take their number for a constant.
    return torch.bmm(left.expand(right.shape[0], -1, -1) if shared else left, right)


def read(tensor: Tensor, view: View) -> Tensor:
    """Split, permute, copy and reshape a tensor as a view says."""
    if view.modes is not None:
        tensor = tensor.reshape(view.modes)
    if view.axes is not None:
        tensor = tensor.permute(view.axes)
    if view.copy:  # before the axes are split again: torch transposes matrices faster than stacks
        tensor = tensor.contiguous()
    return tensor if view.shape is None else tensor.reshape(view.shape)
