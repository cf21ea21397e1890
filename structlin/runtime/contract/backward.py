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
    spec: Spec, x: Tensor, factors: Sequence[Tensor], grad_output: Tensor, needs_input_grad: bool,
    needs_factor_grad: Sequence[int], plan: Plan,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Differentiate `apply` with a graph, so that the gradients can be differentiated again.

    Returns:
        The gradient of x if needed, then those of the factors at the positions `needs_factor_grad`.
    """
    leaves = [x] * needs_input_grad + [factors[k] for k in needs_factor_grad]
    return torch.autograd.grad(apply(spec, factors, x, plan), leaves, grad_output, create_graph=True)


class Pullback:
    """Differentiate `run` without a graph, by the products of the plan in reverse, for one chunk of rows after another.

    Where every operand is a view of a factor, its gradient is added up in a view of that factor's gradient. Otherwise
    gradients of operands are added up and go back through merges and copies once, at the end.
    """

    def __init__(self, spec: Spec, factors: Sequence[Tensor], needs_factor_grad: Sequence[int], plan: Plan) -> None:
        self.spec = spec
        leaves = [factor.detach().requires_grad_(k in needs_factor_grad) for k, factor in enumerate(factors)]
        self._parts = [_Part(eq_plan, part) for (_, part), eq_plan in zip(spec.split(leaves), plan.parts, strict=True)]

    def __call__(self, x: Tensor, grad_output: Tensor, needs_input_grad: bool) -> Tensor | None:
        """Add the factors' gradients for rows x and grad_output (tokens, ..); return the gradient of x if needed."""
        total = None
        for part in self._parts:
            eq = part.plan.equation
            rows = F.pad(x, (0, eq.padded_in - x.shape[1])) if eq.padded_in > x.shape[1] else x
            extra = eq.padded_out - grad_output.shape[1]
            padded = F.pad(grad_output, (0, extra)) if extra > 0 else grad_output
            found = _pull(part.plan, part.operands, rows, padded, part.sums, needs_input_grad)
            if found is not None:
                found = found[:, : self.spec.in_features]
                total = found if total is None else total + found
        return total

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the factors that need them, in their order."""
        return [gradient for part in self._parts for gradient in part.gradients()]


class _Part:
    """Operands of one equation, with the tensors that their gradients are added to (None: not needed).

    There are two cases. Operands are views of the factors: `sums` are the same views of `_totals`, the gradients of the
    factors. Or some operand is merged or copied: `sums` have the shapes of the operands, `_totals` is empty, and
    `_merged` keeps the graph from factors to operands for `gradients`.
    """

    def __init__(self, plan: EquationPlan, leaves: Sequence[Tensor]) -> None:
        self.plan = plan
        self._leaves = [leaf for leaf in leaves if leaf.requires_grad]
        self._totals = [_zeros(leaf) if leaf.requires_grad else None for leaf in leaves]
        self._merged: list[Tensor] = []
        views = self._views()
        with torch.enable_grad():
            slots = merged(plan.merges, leaves)
            operands = [read(slots[step.factor], step.factor_view) for step in plan.steps]
        self.operands = [operand.detach() for operand in operands]
        if views is None:
            self._totals, self._merged = [], operands
            self.sums = [_zeros(operand) if operand.requires_grad else None for operand in operands]
        else:
            self.sums = views

    def _views(self) -> list[Tensor | None] | None:
        """Return the views of `_totals` that match the operands, or None if an operand is not a view of a factor."""
        if self.plan.merges:
            return None
        views: list[Tensor | None] = []
        for step in self.plan.steps:
            total = self._totals[step.factor]
            view = None if total is None else read(total, step.factor_view)
            if view is not None and total is not None and view.data_ptr() != total.data_ptr():  # `read` made a copy
                return None
            views.append(view)
        return views

    def gradients(self) -> Sequence[Tensor]:
        """Return the gradients of the factors that need them."""
        dtype = self.operands[0].dtype
        sums = [total.to(dtype) for total in self._totals or self.sums if total is not None]
        if self._totals or not sums:
            return sums
        return torch.autograd.grad([operand for operand in self._merged if operand.requires_grad], self._leaves, sums)


def _pull(
    plan: EquationPlan, operands: Sequence[Tensor], x: Tensor, grad_output: Tensor, sums: Sequence[Tensor | None],
    needs_input_grad: bool,
) -> Tensor | None:  # fmt: skip
    """Add to the sums of one equation and return the gradient of x, if needed: run the plan again, then go back."""
    value, shapes, stacks = x, [], []  # of the activations that each product reads
    for step, operand in zip(plan.steps, operands, strict=True):
        shapes.append(value.shape)
        stacks.append(_straight(read(value, step.view)))
        left, right = (operand, stacks[-1]) if step.swapped else (stacks[-1], operand)
        if step is plan.steps[-1]:  # its value is the output, of which only the shape is needed
            result_shape = (*right.shape[:-2], left.shape[-2], right.shape[-1])
        else:
            value = product(left, right, step.shared)
    del value, left, right  # memory is counted here: backward_rows chooses the rows by it
    gradient = _unread(grad_output, plan.result, result_shape)
    for step, operand, total in zip(reversed(plan.steps), reversed(operands), reversed(sums), strict=True):
        stack, gradient = stacks.pop(), _straight(gradient)
        if total is not None:
            if step.shared:  # one product for the whole stack: (batch, rows, columns) -> (rows, batch * columns)
                gradient_rows, stack_rows = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (gradient, stack))
                _add(total, gradient_rows, stack_rows.mH)
            else:
                _add(total, *((gradient, stack.mH) if step.swapped else (stack.mH, gradient)))
        if not stacks and not needs_input_grad:
            return None
        del stack
        left, right = (operand.mH, gradient) if step.swapped else (gradient, operand.mH)
        gradient = _unread(product(left, right, step.shared), step.view, shapes.pop())
    return gradient


def _zeros(like: Tensor) -> Tensor:
    """Return zeros to add many gradients to: at least float32, since in half precision sums stop growing."""
    return torch.zeros_like(like, dtype=max(like.dtype, torch.float32, key=lambda dtype: dtype.itemsize))


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices or stacks, which may have a lower precision."""
    if total.dtype is not left.dtype:
        total += left @ right
    elif total.ndim == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def _unread(tensor: Tensor, view: View, shape: Sequence[int]) -> Tensor:
    """Undo `read`: return the tensor in the shape that it had before."""
    if view.axes is not None:
        modes = view.modes or shape
        inverse = sorted(range(len(view.axes)), key=view.axes.__getitem__)
        tensor = tensor.reshape([modes[axis] for axis in view.axes]).permute(inverse)
    return tensor.reshape(shape)


def _straight(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous rows or columns: bmm falls back to a slow loop for any other layout."""
    return tensor if 1 in tensor.stride()[-2:] else tensor.contiguous()
