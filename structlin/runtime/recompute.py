"""Contract by chunks of tokens or blocks of rows, and in training keep the input and the factors only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime import contract
from structlin.runtime.costs import ALIGNED, FEWEST, FRESH, MOST_BLOCKS, MOST_KEPT
from structlin.runtime.planner import Plan, find_plan


def by_chunks(spec: Spec, operands: contract.Operands, x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Compute x W^T + bias for x (..., in_features), at most `plan.chunk` tokens at a time; without a graph."""
    rows = x if x.ndim == 2 else x.reshape(-1, spec.in_features)
    if len(rows) <= plan.chunk and len(rows) * plan.widest * x.element_size() < FRESH:
        y = contract.run(spec, operands, rows, plan)
        return with_bias(y if x.ndim == 2 else y.reshape(*x.shape[:-1], spec.out_features), bias)
    out = x.new_empty((*x.shape[:-1], spec.out_features))
    size = -(-len(rows) // -(-len(rows) // plan.chunk))
    widest = max(plan.widest, *(part.equation.padded_out for part in plan.parts))
    spare = _spare(size * widest, x)
    for part, piece in zip(out.view(-1, spec.out_features).split(size), rows.split(size), strict=True):
        contract.run_into(part, spec, operands, piece, plan, spare)
        if bias is not None:
            part.add_(bias)
    return out


class _Kept(threading.local):
    """Buffers of a thread, for CPUs only: on a GPU several streams may be at work, and memory is quick to come by."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


_KEPT = _Kept()


def _spare(entries: int, like: Tensor) -> contract.Spare:
    """Two buffers of so many entries."""
    entries = -(-entries // ALIGNED) * ALIGNED
    nbytes = 2 * entries * like.element_size()
    if not like.is_cpu or nbytes > MOST_KEPT:
        both = like.new_empty(2 * entries)
    else:
        if len(_KEPT.bytes) < nbytes:
            with torch.inference_mode(False):
                _KEPT.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        both = _KEPT.bytes[:nbytes].view(like.dtype)
    return contract.Spare(both[:entries], both[entries:])


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias; the result is not a view, and in the dtype of y."""
    # Under autocast the product is in low precision and the bias is not: nn.Linear returns the former.
    if bias is None:
        return y.clone()
    return y + bias if bias.dtype is y.dtype else y + bias.to(y.dtype)


def recomputed(spec: Spec, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Compute x W^T + bias for x (..., in_features); the backward pass computes anew what it needs.

    These are the activations, by chunks of tokens, or the dense matrix, by blocks of rows, where that is faster.
    """
    result: Tensor = _Function.apply(spec, plan, _again(spec, plan), x, bias, *factors)
    return result


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, plan: Plan, again: Plan, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.spec, ctx.plan = spec, again
        ctx.save_for_backward(x, *factors)
        return by_chunks(spec, contract.fold(spec, factors, plan), x, bias, plan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        _, _, _, of_input, of_bias, *of_factors = ctx.needs_input_grad
        slopes, rows = gradient.reshape(-1, ctx.spec.out_features), x.reshape(-1, ctx.spec.in_features)
        wanted = [k for k, needed in enumerate(of_factors) if needed]
        # With create_graph=True the gradients must be differentiable themselves.
        differentiate = contract.gradients if torch.is_grad_enabled() else _gradients
        found = iter(differentiate(ctx.spec, rows, factors, slopes, of_input, wanted, ctx.plan))
        of_x = next(found).reshape(x.shape) if of_input else None
        bias = slopes.sum(0) if of_bias else None
        return None, None, None, of_x, bias, *(next(found) if needed else None for needed in of_factors)


def _gradients(
    spec: Spec, x: Tensor, factors: Sequence[Tensor], slopes: Tensor, of_input: bool, wanted: Sequence[int], plan: Plan
) -> tuple[Tensor, ...]:
    """The same as `contract.gradients`, without a graph."""
    if plan.materialises:
        return contract.pulled_back(spec, x, factors, slopes, of_input, wanted, _rows(spec, len(x)))
    pullback = contract.Pullback(spec, factors, wanted, plan)
    size = _tokens(spec, plan, len(x))
    if len(x) <= size:
        of_x = pullback(x, slopes, of_input)
    else:
        of_x = torch.empty_like(x) if of_input else None
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            found = pullback(x[chunk], slopes[chunk], of_input)
            if of_x is not None and found is not None:
                of_x[chunk] = found
    return (*(() if of_x is None else (of_x,)), *pullback.gradients())


def _again(spec: Spec, plan: Plan) -> Plan:
    """The plan to differentiate by: a chain does its products three times then, and the dense matrix is in two."""
    part = plan.parts[0]
    dense = find_plan(spec, part.tokens, itemsize=part.itemsize, machine=part.machine, order="materialise")
    return dense if dense.materialises and 2 * dense.seconds < 3 * plan.seconds else plan


def _room(spec: Spec, tokens: int) -> float:
    """Entries that a backward pass may hold, beside gradients of input and factors, at 1.1 times dense's memory."""
    sizes = spec.in_features, spec.out_features
    return 0.1 * tokens * sum(sizes) + 1.1 * sizes[0] * sizes[1] - spec.num_parameters


def _tokens(spec: Spec, plan: Plan, tokens: int) -> int:
    """How many tokens to differentiate at a time: a chunk, or fewer where that would take more memory than dense."""
    kept = plan.inner + 4 * plan.widest  # for each token: what stands between input and output, and gradients of it
    return int(max(FEWEST, min(plan.chunk, _room(spec, tokens) / max(1, kept))))


def _rows(spec: Spec, tokens: int) -> int:
    """How many rows of the dense matrix to build at a time."""
    kept = 4 * spec.in_features  # for each row: of the matrix, its gradient, and copies of them
    return int(max(spec.out_features / MOST_BLOCKS, _room(spec, tokens) / kept, 1))
