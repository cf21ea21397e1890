"""Look up rows of the matrix from the rows of its factors, so that the dense matrix is never built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from structlin.equation.spec import Equation, Modes, Spec
from structlin.runtime.contract.tied import expanded
from structlin.runtime.costs import LOOKUP_BYTES
from structlin.runtime.eager import constant, transformed
from structlin.runtime.planner import TOKENS

Pieces = tuple[tuple[int, Modes], ...]  # for each factor in the order of contraction: its index, the modes afterwards


def look_up(spec: Spec, factors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return rows of the matrix (differentiable).

    A row number has one digit per output mode. Each factor is indexed at the digits of its output modes; what remains,
    bonds and input modes, is contracted for each token. Cost: `entries_per_token` beside the result, for as many
    tokens at a time as keep this below twice the result or LOOKUP_BYTES; under torch.compile and torch.func for all.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
        rows: numbers of rows, shape (tokens,), int32 or int64.
    Returns:
        The rows, shape (tokens, in_features).
    Raises:
        IndexError: if a number lies outside 0 to out_features - 1 (on CUDA: an assertion of the device).
    """
    tokens, itemsize = rows.shape[0], factors[0].element_size()  # len(rows) would be a constant of torch.export's graph
    if tokens == 0:  # one row, cut to none: the result keeps its graph
        return look_up(spec, factors, rows.new_zeros(1))[:0]
    if is_compiling() or transformed():  # one graph for all numbers of tokens; torch.func takes no checkpoints
        return _contracted(spec, rows, *factors)
    room = max(LOOKUP_BYTES // itemsize, 2 * tokens * spec.in_features)
    most = max(1, room // entries_per_token(spec))
    if tokens <= most:
        return _contracted(spec, rows, *factors)
    if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
        run = partial(checkpoint, _contracted, spec, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([run(chunk, *factors) for chunk in rows.split(most)])
    out = factors[0].new_empty(tokens, spec.in_features)
    for chunk, part in zip(rows.split(most), out.split(most), strict=True):
        part.copy_(_contracted(spec, chunk, *factors))
    return out


def entries_per_token(spec: Spec) -> int:
    """Count the entries that one step of a look-up holds for each token, at most: its operands and its result."""
    return max(_widest(eq, _pieces(eq)) for eq in spec.equations)


def _contracted(spec: Spec, rows: Tensor, *factors: Tensor) -> Tensor:
    total = None
    for eq, part in spec.split(expanded(spec, factors)):
        digits = _digits(eq, rows, spec.out_features)
        state: Tensor | None = None
        kept: Modes = ()
        for k, after in _pieces(eq):
            piece, modes = _indexed(eq, k, part[k], digits), _left(eq, k)
            axes = {mode: axis for axis, mode in enumerate(dict.fromkeys((*kept, *modes)))}
            numbers = [[axes[mode] for mode in some] for some in (kept, modes, after)]
            operands = [piece, numbers[1]] if state is None else [state, numbers[0], piece, numbers[1]]
            state, kept = torch.einsum(*operands, numbers[2]), after
        assert state is not None
        found = state.reshape(rows.shape[0], eq.padded_in)[:, : spec.in_features]
        total = found if total is None else total + found
    assert total is not None
    return total


def _digits(eq: Equation, rows: Tensor, out_features: int) -> dict[str, Tensor]:
    """Split row numbers into one digit per output mode, the last one fastest; rows are row-major over the modes."""
    # A number outside the matrix may have digits that exist (padding, -1): give it one that no mode has.
    rest = torch.where((rows >= 0) & (rows < out_features), rows, eq.padded_out)
    found = {}
    for mode in reversed(eq.outputs[1:]):
        found[mode] = rest % eq.size[mode]
        rest = rest // eq.size[mode]
    return {**found, eq.outputs[0]: rest}


def _indexed(eq: Equation, k: int, factor: Tensor, digits: dict[str, Tensor]) -> Tensor:
    """Index the output modes of a factor, if it has any: modes as by `_left`."""
    modes = eq.factors[k].modes
    outputs = [mode for mode in modes if mode in digits]
    if not outputs:
        return factor
    others = [mode for mode in modes if mode not in digits]
    front = factor.permute([modes.index(mode) for mode in (*outputs, *others)])
    return front[tuple(digits[mode] for mode in outputs)]


@constant
def _pieces(eq: Equation) -> Pieces:
    return _found(eq)


@lru_cache(maxsize=1024)
def _found(eq: Equation) -> Pieces:
    """Contract from the end of the chain that holds fewer entries per token."""
    forward = range(len(eq.factors))
    return min((tuple(_sequence(eq, order)) for order in (forward, forward[::-1])), key=partial(_widest, eq))


def _sequence(eq: Equation, order: Sequence[int]) -> Iterator[tuple[int, Modes]]:
    """Yield each factor with the modes that are left once it is contracted with those before it."""
    state: Modes = ()
    for step, k in enumerate(order):
        needed = {TOKENS, *eq.inputs, *(mode for later in order[step + 1 :] for mode in eq.factors[later].modes)}
        held = dict.fromkeys((*state, *_left(eq, k)))
        state = tuple(mode for mode in held if mode in needed)
        yield k, state if step + 1 < len(order) else (TOKENS, *eq.inputs)


def _left(eq: Equation, k: int) -> Modes:
    """Return the modes of a factor once its output modes are indexed."""
    modes = eq.factors[k].modes
    others = tuple(mode for mode in modes if mode not in eq.outputs)
    return modes if others == modes else (TOKENS, *others)


def _widest(eq: Equation, pieces: Pieces) -> int:
    """Count the entries of a token in the largest step: operands and result. Factors without tokens are no copies."""
    widest = before = 0
    for k, after in pieces:
        modes = _left(eq, k)
        result = eq.numel([mode for mode in after if mode != TOKENS])
        widest = max(widest, before + (eq.numel(modes[1:]) if TOKENS in modes else 0) + result)
        before = result
    return widest
