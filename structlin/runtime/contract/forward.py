"""Run plans on tensors: apply a structured matrix to an input, or build the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime.planner import CPU, EquationPlan, Merge, Plan, View, merge_plan

Operands = list[list[Tensor]]  # of each equation, one for each step of its plan
Room = Callable[[Sequence[int]], Tensor]  # memory for a tensor of a shape


class Spare:
    """Gives two buffers in turn: what is computed goes into the one that it is not computed from.

    Args:
        first: flat, with room for the widest activations and for the output of any equation.
        second: likewise.
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._buffers = first, second
        self._turn = 0
        self._views: dict[tuple[int, Sequence[int]], Tensor] = {}

    def restart(self) -> None:
        """Begin with another input."""
        self._turn = 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Return memory of a shape."""
        self._turn += 1
        view = self._views.get((self._turn, shape))
        if view is None:
            view = self._views[self._turn, shape] = self._buffers[self._turn % 2][: math.prod(shape)].view(shape)
        return view


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
    return run(spec, fold(spec, factors, plan), x, plan)


def fold(spec: Spec, factors: Sequence[Tensor], plan: Plan) -> Operands:
    """Merge factors as a plan says, and bring them into the layouts that its products read."""
    operands = []
    for (_, part), eq_plan in zip(spec.split(factors), plan.parts, strict=True):
        slots = merged(eq_plan.merges, part)
        operands.append([read(slots[step.factor], step.factor_view) for step in eq_plan.steps])
    return operands


def keep(operands: Operands, plan: Plan) -> Operands:
    """Bring operands into the order in memory that products read fastest: a matrix on the right by its columns."""
    return [
        [
            operand.contiguous() if step.swapped or operand.ndim == 3 else operand.T.contiguous().T
            for step, operand in zip(eq_plan.steps, part, strict=True)
        ]
        for eq_plan, part in zip(plan.parts, operands, strict=True)
    ]


def run(spec: Spec, operands: Operands, x: Tensor, plan: Plan) -> Tensor:
    """As `apply`, with the operands of `fold`."""
    total = None
    for eq_plan, operand in zip(plan.parts, operands, strict=True):
        eq = eq_plan.equation
        y = contracted(
            eq_plan, operand, F.pad(x, (0, eq.padded_in - spec.in_features)) if eq.padded_in > spec.in_features else x
        )
        y = y[:, : spec.out_features] if eq.padded_out > spec.out_features else y
        total = y if total is None else total + y
    assert total is not None
    return total


def run_into(out: Tensor, spec: Spec, operands: Operands, x: Tensor, plan: Plan, spare: Spare) -> None:
    """As `run`, without memory of its own and without a graph.

    Args:
        out: where the output goes, shape (tokens, out_features), contiguous.
        spec: the structured matrix.
        operands: of `fold`.
        x: input, shape (tokens, in_features).
        plan: the plan of the operands.
        spare: for all that comes in between.
    """
    spare.restart()
    for k, (eq_plan, operand) in enumerate(zip(plan.parts, operands, strict=True)):
        eq = eq_plan.equation
        padded = F.pad(x, (0, eq.padded_in - spec.in_features)) if eq.padded_in > spec.in_features else x
        whole = k == 0 and eq.padded_out == spec.out_features
        y = contracted(eq_plan, operand, padded, spare, out.view if whole else spare)
        if k > 0:
            out += y[:, : spec.out_features]
        elif not whole:
            out.copy_(y[:, : spec.out_features])


def to_dense(spec: Spec, factors: Sequence[Tensor]) -> Tensor:
    """Build the dense matrix (differentiable).

    Cost: memory of the dense matrix, and the FLOPs of merging all factors.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
    Returns:
        W, shape (out_features, in_features).
    """
    total = None
    for eq, part in spec.split(factors):
        merges, view = merge_plan(eq, machine=CPU)  # everywhere: a dense matrix does not depend on records
        dense = read(merged(merges, part)[-1], view)[: spec.out_features, : spec.in_features]
        total = dense if total is None else total + dense
    assert total is not None
    return total


def merged(merges: Sequence[Merge], factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors and what comes of merging them."""
    slots = [*factors]
    for merge in merges:
        left, right = read(slots[merge.left], merge.left_view), read(slots[merge.right], merge.right_view)
        slots.append(product(left, right, merge.shared))
    return slots


def contracted(
    plan: EquationPlan, operands: Sequence[Tensor], x: Tensor, room: Room | None = None, final: Room | None = None
) -> Tensor:  # fmt: skip
    """Do all steps of a plan; where `room` is given, in the memory that it gives, at last in that of `final`."""
    value = x
    for step, operand in zip(plan.steps, operands, strict=True):
        stack = read(value, step.view, room)
        left, right = (operand, stack) if step.swapped else (stack, operand)
        value = product(left, right, step.shared, final if step is plan.steps[-1] and not plan.result.copy else room)
    return read(value, plan.result, final)


def product(left: Tensor, right: Tensor, shared: bool, room: Room | None = None) -> Tensor:
    """Multiply two matrices or stacks; where `shared`, one matrix with a stack."""
    if right.ndim == 2:
        return torch.mm(left, right, out=room and room((len(left), right.shape[1])))
    left = left.expand(len(right), -1, -1) if shared else left
    return torch.bmm(left, right, out=room and room((*left.shape[:2], right.shape[2])))


def read(tensor: Tensor, view: View, room: Room | None = None) -> Tensor:
    """Read a tensor as a view says."""
    if view.modes is not None:
        tensor = tensor.reshape(view.modes)
    if view.axes is not None:
        tensor = tensor.permute(view.axes)
    if view.copy:  # before it is split again: torch turns matrices faster than stacks
        tensor = room(tensor.shape).copy_(tensor) if room else tensor.contiguous()
    return tensor if view.shape is None else tensor.reshape(view.shape)
