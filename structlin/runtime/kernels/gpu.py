"""Run a structured layer on a GPU by Triton: one launch for each factor, which reads and writes in place.

Torch's batched product wants its operands in three axes, so that plans copy activations into other orders between the
factors. Here tables of offsets, as those of the native kernel, tell each launch where its entries lie.

The kernels were run by Triton's interpreter only, never timed on a GPU: `STRUCTLIN_TRITON=on` chooses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from structlin.equation.spec import Spec
from structlin.runtime.kernels.launches import Stage, chains

TILE = 64  # most rows, columns and summed entries of a tile; least is 16, below which tl.dot has no tiles


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _stage(
    a, w, b, bias,
    a_block, b_block, w_block, a_free, b_free, b_row, w_row, a_column, w_column,
    tokens, a_size, b_size, free, rows, columns,
    adds: tl.constexpr, biased: tl.constexpr, precision: tl.constexpr,
    m_tile: tl.constexpr, n_tile: tl.constexpr, k_tile: tl.constexpr,
):  # fmt: skip
    """Compute a tile of b: pairs of (token, free entry) by rows, summed in float32."""
    block = tl.program_id(2)
    m = tl.program_id(0) * m_tile + tl.arange(0, m_tile)
    n = tl.program_id(1) * n_tile + tl.arange(0, n_tile)
    live, inside = m < tokens * free, n < rows
    token = (m // free).to(tl.int64)
    a_place = tl.load(a_block + block) + tl.load(a_free + m % free, mask=live, other=0)
    w_place = tl.load(w_block + block) + tl.load(w_row + n, mask=inside, other=0)
    total = tl.zeros((m_tile, n_tile), tl.float32)
    for start in range(0, columns, k_tile):
        k = start + tl.arange(0, k_tile)
        summed = k < columns
        place = a_place[:, None] + tl.load(a_column + k, mask=summed, other=0)[None, :]
        left = tl.load(
            a + token[:, None] * a_size + place, mask=live[:, None] & summed[None, :] & (place < a_size), other=0
        )
        right = tl.load(
            w + w_place[None, :] + tl.load(w_column + k, mask=summed, other=0)[:, None],
            mask=summed[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(left, right, total, input_precision=precision)
    place = tl.load(b_block + block) + tl.load(b_free + m % free, mask=live, other=0)
    place = place[:, None] + tl.load(b_row + n, mask=inside, other=0)[None, :]
    known = live[:, None] & inside[None, :] & (place < b_size)
    if biased:
        total += tl.load(bias + place, mask=known, other=0).to(tl.float32)
    target = b + token[:, None] * b_size + place
    if adds:
        total += tl.load(target, mask=known, other=0).to(tl.float32)
    tl.store(target, total.to(b.dtype.element_ty), mask=known)


@triton.jit
def _factor(
    a, slope, dw,
    a_block, b_block, w_block, a_free, b_free, b_row, w_row, a_column, w_column,
    tokens, a_size, b_size, free, rows, columns,
    precision: tl.constexpr, m_tile: tl.constexpr, n_tile: tl.constexpr, k_tile: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the gradient of w, rows by columns: the sum over all tokens and free entries."""
    block = tl.program_id(2)
    n = tl.program_id(0) * n_tile + tl.arange(0, n_tile)
    k = tl.program_id(1) * k_tile + tl.arange(0, k_tile)
    inside, summed = n < rows, k < columns
    a_place = tl.load(a_block + block) + tl.load(a_column + k, mask=summed, other=0)
    b_place = tl.load(b_block + block) + tl.load(b_row + n, mask=inside, other=0)
    total = tl.zeros((n_tile, k_tile), tl.float32)
    for start in range(0, tokens * free, m_tile):
        m = start + tl.arange(0, m_tile)
        live = m < tokens * free
        token = (m // free).to(tl.int64)
        place = b_place[:, None] + tl.load(b_free + m % free, mask=live, other=0)[None, :]
        left = tl.load(
            slope + token[None, :] * b_size + place, mask=live[None, :] & inside[:, None] & (place < b_size), other=0
        )
        place = a_place[None, :] + tl.load(a_free + m % free, mask=live, other=0)[:, None]
        right = tl.load(
            a + token[:, None] * a_size + place, mask=live[:, None] & summed[None, :] & (place < a_size), other=0
        )
        total = tl.dot(left, right, total, input_precision=precision)
    place = tl.load(w_block + block) + tl.load(w_row + n, mask=inside, other=0)[:, None]
    place += tl.load(w_column + k, mask=summed, other=0)[None, :]
    tl.store(dw + place, total.to(dw.dtype.element_ty), mask=inside[:, None] & summed[None, :])


def _tile(count: int) -> int:
    return int(min(TILE, max(16, triton.next_power_of_2(count))))


def _sizes(stage: Stage, tokens: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the counts that both kernels take, and their tiles."""
    _, free, rows, columns = stage.counts
    exact = torch.get_float32_matmul_precision() == "highest"
    tiles = {"m_tile": _tile(tokens * free), "n_tile": _tile(rows), "k_tile": _tile(columns)}
    return (tokens, stage.a_size, stage.b_size, free, rows, columns), tiles | {"precision": "ieee" if exact else "tf32"}


def _run(stage: Stage, a: Tensor, w: Tensor, b: Tensor, bias: Tensor | None, adds: bool) -> Tensor:
    counts, tiles = _sizes(stage, len(a))
    blocks, free, rows, _ = stage.counts
    grid = (triton.cdiv(len(a) * free, tiles["m_tile"]), triton.cdiv(rows, tiles["n_tile"]), blocks)
    _stage[grid](
        a, w, b, b if bias is None else bias, *stage.on(a.device), *counts, adds=adds, biased=bias is not None, **tiles
    )
    return b


def _gradient(stage: Stage, a: Tensor, slope: Tensor, w: Tensor) -> Tensor:
    counts, tiles = _sizes(stage, len(a))
    blocks, _, rows, columns = stage.counts
    grid = (triton.cdiv(rows, tiles["n_tile"]), triton.cdiv(columns, tiles["k_tile"]), blocks)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    _factor[grid](a, slope, dw, *stage.on(a.device), *counts, **tiles)
    return dw


# Chains --------------------------------------------------------------------------------------------------------------


class _Chain(torch.autograd.Function):
    """Saves the input and the factors only: the backward pass computes the activations again."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.spec, ctx.biased = spec, bias is not None
        ctx.save_for_backward(x, *factors)
        y = x.new_empty(*x.shape[:-1], spec.out_features)
        rows, result = x.view(-1, spec.in_features), y.view(-1, spec.out_features)
        for number, chain in enumerate(chains(spec)):
            *inner, last = _activations(chain, rows, factors)
            _run(chain[-1], last, factors[chain[-1].factor], result, None if number else bias, number > 0)
            del inner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        given, *factors = ctx.saved_tensors
        x, slope = given.view(-1, ctx.spec.in_features), slope.reshape(-1, ctx.spec.out_features).contiguous()
        needs, dx = ctx.needs_input_grad, torch.empty_like(x) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = [None] * len(factors)
        for number, chain in enumerate(chains(ctx.spec)):
            after = slope
            for step, a in reversed([*enumerate(_activations(chain, x, factors))]):
                stage, w = chain[step], factors[chain[step].factor]
                if needs[3 + stage.factor]:
                    found[stage.factor] = _gradient(stage, a, after, w)
                if step:
                    after = _run(stage.transposed, after, w, torch.empty_like(a), None, False)
                elif dx is not None:
                    _run(stage.transposed, after, w, dx, None, number > 0)
        dx = None if dx is None else dx.view(given.shape)
        return None, dx, slope.sum(0) if ctx.biased and needs[2] else None, *found


def _activations(chain: Sequence[Stage], x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return what each stage of a chain is given."""
    found = [x]
    for stage in chain[:-1]:
        b = x.new_empty(len(x), stage.b_size)
        found.append(_run(stage, found[-1], factors[stage.factor], b, None, False))
    return found


def chain(spec: Spec, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias for x of shape (..., in_features), with gradients of all, but not of gradients.

    Args:
        spec: of W.
        x: float32, float16 or bfloat16, on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
        factors: of the spec, of the dtype of x.
        bias: (out_features,) or None.
    Cost: one launch for each factor; sums are in float32. A backward pass computes the activations again.
    """
    whole = (None if tensor is None else tensor.contiguous() for tensor in (bias, *factors))
    with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it for the backward pass
        result: Tensor = _Chain.apply(spec, x.contiguous(), *whole)
    return result
