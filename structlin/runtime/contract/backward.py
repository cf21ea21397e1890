"""Differentiate plans: with a graph, or by the products of the plan in reverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime.contract.forward import apply, merged, product, read
from structlin.runtime.planner import EquationPlan, Plan, View


def gradients(
    spec: Spec, x: Tensor, factors: Sequence[Tensor], slopes: Tensor, of_input: bool, wanted: Sequence[int], plan: Plan
) -> tuple[Tensor, ...]:
    """Differentiate `apply` with a graph, so that the gradients can be differentiated again.

    Args:
        spec: the structured matrix.
        x: input, shape (tokens, in_features).
        factors: one tensor per factor of `spec`, in its order.
        slopes: gradient of the output, shape (tokens, out_features).
        of_input: whether the gradient of x is wanted.
        wanted: numbers of the factors whose gradients are.
        plan: a plan of `spec`.
    Returns:
        The gradient of x where it is wanted, then those of the wanted factors.
    """
    operands = [x] * of_input + [factors[k] for k in wanted]
    return torch.autograd.grad(apply(spec, factors, x, plan), operands, slopes, create_graph=True)


class Pullback:
    """Differentiates `run` without a graph, by the products of the plan in reverse, for one input after another.

    The gradients of the factors add up in place where the operands are views of them. Others are those of the operands
    first, and go through merges and copies at the end.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
        wanted: numbers of the factors whose gradients are wanted.
        plan: a plan of `spec`.
    """

    def __init__(self, spec: Spec, factors: Sequence[Tensor], wanted: Sequence[int], plan: Plan) -> None:
        self.spec = spec
        leaves = [factor.detach().requires_grad_(k in wanted) for k, factor in enumerate(factors)]
        self._parts = [_Part(eq_plan, part) for (_, part), eq_plan in zip(spec.split(leaves), plan.parts, strict=True)]

    def __call__(self, x: Tensor, slopes: Tensor, of_input: bool) -> Tensor | None:
        """Add the gradients for some rows.

        Args:
            x: input, shape (tokens, in_features).
            slopes: gradient of the output, shape (tokens, out_features).
            of_input: whether the gradient of x is wanted.
        Returns:
            The gradient of x, if it is wanted.
        """
        total = None
        for part in self._parts:
            eq = part.plan.equation
            rows = F.pad(x, (0, eq.padded_in - x.shape[1])) if eq.padded_in > x.shape[1] else x
            slope = F.pad(slopes, (0, eq.padded_out - slopes.shape[1])) if eq.padded_out > slopes.shape[1] else slopes
            found = _pull(part.plan, part.operands, rows, slope, part.sums, of_input)
            if found is not None:
                found = found[:, : self.spec.in_features]
                total = found if total is None else total + found
        return total

    def gradients(self) -> list[Tensor]:
        """The gradients of the wanted factors, in their order."""
        return [gradient for part in self._parts for gradient in part.gradients()]


class _Part:
    """Operands of one equation, and what their gradients are added to: None where one is not wanted."""

    def __init__(self, plan: EquationPlan, leaves: Sequence[Tensor]) -> None:
        self.plan = plan
        self._leaves = [leaf for leaf in leaves if leaf.requires_grad]
        self._totals = [_zeros(leaf) if leaf.requires_grad else None for leaf in leaves]
        self._folded: list[Tensor] = []
        views = self._views()
        if views is None:
            self._totals = []
            with torch.enable_grad():
                slots = merged(plan.merges, leaves)
                self._folded = [read(slots[step.factor], step.factor_view) for step in plan.steps]
            self.operands = [operand.detach() for operand in self._folded]
            self.sums = [_zeros(operand) if operand.requires_grad else None for operand in self._folded]
        else:
            self.sums = views
            self.operands = [read(leaves[step.factor].detach(), step.factor_view) for step in plan.steps]

    def _views(self) -> list[Tensor | None] | None:
        """The sums as views of the factors' gradients, none where there are no such views."""
        if self.plan.merges:
            return None
        views: list[Tensor | None] = []
        for step in self.plan.steps:
            total = self._totals[step.factor]
            view = None if total is None else read(total, step.factor_view)
            if view is not None and total is not None and view.data_ptr() != total.data_ptr():
                return None
            views.append(view)
        return views

    def gradients(self) -> Sequence[Tensor]:
        dtype = self.operands[0].dtype
        sums = [total.to(dtype) for total in self._totals or self.sums if total is not None]
        if self._totals or not sums:
            return sums
        return torch.autograd.grad([operand for operand in self._folded if operand.requires_grad], self._leaves, sums)


def _pull(
    plan: EquationPlan, operands: Sequence[Tensor], x: Tensor, slopes: Tensor, sums: Sequence[Tensor | None],
    of_input: bool,
) -> Tensor | None:  # fmt: skip
    """Add to the sums for one equation; the gradient of x, if it is wanted."""
    value, shapes, stacks = x, [], []
    for step, operand in zip(plan.steps, operands, strict=True):
        shapes.append(value.shape)
        stacks.append(_straight(read(value, step.view)))
        left, right = (operand, stacks[-1]) if step.swapped else (stacks[-1], operand)
        if step is plan.steps[-1]:
            shape = (*right.shape[:-2], left.shape[-2], right.shape[-1])
        else:
            value = product(left, right, step.shared)
    slope = _unread(slopes, plan.result, shape)
    for step, operand, total in zip(reversed(plan.steps), reversed(operands), reversed(sums), strict=True):
        stack, slope = stacks.pop(), _straight(slope)
        if total is not None:
            if step.shared:  # one product for the whole stack
                slope_rows, stack_rows = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (slope, stack))
                _add(total, slope_rows, stack_rows.mH)
            else:
                _add(total, *((slope, stack.mH) if step.swapped else (stack.mH, slope)))
        if not stacks and not of_input:
            return None
        left, right = (operand.mH, slope) if step.swapped else (slope, operand.mH)
        slope = _unread(product(left, right, step.shared), step.view, shapes.pop())
    return slope


def _zeros(like: Tensor) -> Tensor:
    """To add many gradients to: in half precision sums would stop growing."""
    return torch.zeros_like(like, dtype=max(like.dtype, torch.float32, key=lambda dtype: dtype.itemsize))


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices or stacks, which may be in a lower precision."""
    if total.dtype is not left.dtype:
        total += left @ right
    elif total.ndim == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def _unread(tensor: Tensor, view: View, shape: Sequence[int]) -> Tensor:
    """Undo `read` of a tensor of a shape."""
    if view.axes is not None:
        modes = view.modes or shape
        inverse = sorted(range(len(view.axes)), key=view.axes.__getitem__)
        tensor = tensor.reshape([modes[axis] for axis in view.axes]).permute(inverse)
    return tensor.reshape(shape)


def _straight(tensor: Tensor) -> Tensor:
    """The tensor, in a layout in which products with it are fast: rows or columns stay together."""
    return tensor if 1 in tensor.stride()[-2:] else tensor.contiguous()
