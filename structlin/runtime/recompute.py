"""Apply a matrix to all rows at once or by chunks, and save only the input and the factors for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime import contract
from structlin.runtime.costs import DENSE_CHUNK, FEWEST, MOST_BLOCKS
from structlin.runtime.planner import Plan, find_plan


def at_once(spec: Spec, operands: contract.Operands, x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Compute x W^T + bias for x (..., in_features), all rows at once, contiguous as nn.Linear's; differentiable."""
    if x.ndim == 2 and bias is not None:
        return contract.run(spec, operands, x, plan, bias).contiguous()
    y = contract.run(spec, operands, x.reshape(-1, spec.in_features), plan)
    return with_bias(y if x.ndim == 2 else y.reshape(*x.shape[:-1], spec.out_features), bias).contiguous()


def by_chunks(spec: Spec, operands: contract.Operands, x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Compute the same, at most `plan.chunk` rows at a time, without a graph: activations stay in a core's cache."""
    tokens = x.numel() // spec.in_features
    most = _most(spec, plan, tokens)
    if tokens <= most and (x.ndim == 2 or bias is None):
        return at_once(spec, operands, x, bias, plan)
    out = x.new_empty((*x.shape[:-1], spec.out_features))
    rows, result = x.reshape(-1, spec.in_features), out.view(-1, spec.out_features)
    if tokens <= most:
        contract.run(spec, operands, rows, plan, bias, result)
        return out
    size = -(-tokens // -(-tokens // most))  # the fewest chunks, as equal as possible
    for piece, part in zip(rows.split(size), result.split(size), strict=True):
        contract.run(spec, operands, piece, plan, bias, part)
    return out


def _most(spec: Spec, plan: Plan, tokens: int) -> int:
    """Return the rows of a chunk, at most."""
    if not plan.materialises:
        return plan.chunk
    if all(contract.in_order(spec, part) for part in plan.parts):
        return max(1, tokens)  # the products write to the result itself
    return min(plan.chunk, DENSE_CHUNK)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias; the result is not a view and has the dtype of y."""
    # Under autocast y is in low precision and the bias is not; nn.Linear returns the dtype of y.
    if bias is None:
        return y.clone()
    return y + bias if bias.dtype is y.dtype else y + bias.to(y.dtype)


def recomputed(
    spec: Spec, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, plan: Plan, backward: Plan
) -> Tensor:
    """Compute x W^T + bias for x (..., in_features); the backward pass recomputes what it needs.

    It follows the plan `backward`: one that materialises goes by blocks of rows of the dense matrix, any other by
    chunks of tokens.
    """
    result: Tensor = _Function.apply(spec.untied, plan, backward, x, bias, *contract.expanded(spec, factors))
    return result


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, plan: Plan, backward: Plan, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.spec, ctx.plan = spec, backward
        ctx.save_for_backward(x, *factors)
        return by_chunks(spec, contract.merge_factors(spec, factors, plan), x, bias, plan)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        _, _, _, needs_input_grad, needs_bias_grad, *needed = ctx.needs_input_grad
        flat, rows = grad_output.reshape(-1, ctx.spec.out_features), x.reshape(-1, ctx.spec.in_features)
        needs_factor_grad = [k for k, need in enumerate(needed) if need]
        # With create_graph=True the gradients must be differentiable themselves.
        differentiate = contract.gradients if torch.is_grad_enabled() else _gradients
        found = iter(differentiate(ctx.spec, rows, factors, flat, needs_input_grad, needs_factor_grad, ctx.plan))
        grad_input = next(found).reshape(x.shape) if needs_input_grad else None
        grad_bias = flat.sum(0) if needs_bias_grad else None
        return None, None, None, grad_input, grad_bias, *(next(found) if need else None for need in needed)


def _gradients(
    spec: Spec, x: Tensor, factors: Sequence[Tensor], grad_output: Tensor, needs_input_grad: bool,
    needs_factor_grad: Sequence[int], plan: Plan,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute what `contract.gradients` does, without a graph."""
    if plan.materialises:
        return contract.gradients_by_rows(
            spec, x, factors, grad_output, needs_input_grad, needs_factor_grad, _rows(spec, len(x))
        )
    pullback = contract.Pullback(spec, factors, needs_factor_grad, plan)
    size = backward_rows(spec, plan, len(x))
    if len(x) <= size:
        grad_input = pullback(x, grad_output, needs_input_grad)
    else:
        grad_input = torch.empty_like(x) if needs_input_grad else None
        size = -(-len(x) // -(-len(x) // size))  # the fewest chunks, as equal as possible
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            found = pullback(x[chunk], grad_output[chunk], needs_input_grad)
            if grad_input is not None and found is not None:
                grad_input[chunk] = found
    return (*(() if grad_input is None else (grad_input,)), *pullback.gradients())


def backward_plan(spec: Spec, plan: Plan) -> Plan:
    """Choose the backward plan: recomputing a chain takes three passes over its products, the dense matrix two."""
    part = plan.parts[0]
    dense = find_plan(spec, part.tokens, itemsize=part.itemsize, machine=part.machine, order="materialise")
    return dense if dense.materialises and 2 * dense.seconds < 3 * plan.seconds else plan


def allowance(spec: Spec, tokens: int) -> float:
    """Entries that a backward pass may hold beside the gradients, so that a step takes 1.1 times dense's memory."""
    sizes = spec.in_features, spec.out_features
    return 0.1 * tokens * sum(sizes) + 1.1 * sizes[0] * sizes[1] - spec.num_parameters


def backward_rows(spec: Spec, plan: Plan, tokens: int) -> int:
    """Return the tokens to differentiate at a time: a chunk, or fewer where a chunk would exceed the allowance."""
    shared = any(step.shared for part in plan.parts for step in part.steps)  # their gradients are products of copies
    held = max(entries for part in plan.parts for entries, _ in part.held)
    entries = held + len(plan.parts) * spec.in_features + 2 * plan.widest * shared  # each part has a gradient of x
    return int(max(FEWEST, min(plan.chunk, allowance(spec, tokens) / max(1, entries))))


def _rows(spec: Spec, tokens: int) -> int:
    """Rows of the dense matrix to build at a time."""
    entries = 3 * spec.in_features  # per row: the matrix or its gradient, and a copy and a product in another order
    return int(max(spec.out_features / MOST_BLOCKS, allowance(spec, tokens) / entries, 1))
