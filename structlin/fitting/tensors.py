"""Closed-form decompositions of tensors with several modes: Tucker's, and sums of orthogonal rank-1 terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.fitting import linalg, trains


def hosvd(
    tensor: Tensor, *, ranks: Sequence[int] | None = None, tolerance: float = 0.0
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Compute the sequentially truncated higher-order singular value decomposition.

    tensor ~ core x_1 factors[0] x_2 factors[1] ...  Each mode is cut after those before it. The error is at most
    sqrt(d) times that of the best decomposition with these ranks; with a tolerance, the relative Frobenius error is at
    most the tolerance. Cost: one Gram product and one eigenproblem for each mode.

    Args:
        tensor: d axes, any float or complex dtype.
        ranks: one for each mode, at most its size and the product of the other ranks; None lets the tolerance decide.
        tolerance: relative Frobenius error allowed in all, used when ranks is None.
    Returns:
        The core, and for each mode a matrix (size, rank) with orthonormal columns, in the working dtype.
    Raises:
        ValueError: if the tolerance is negative or NaN.
    Source: Vannieuwenhoven, Vandebril & Meerbergen 2012.
    Example:
        >>> core, factors = hosvd(torch.ones(4, 3, 2), tolerance=1e-8)
        >>> tuple(core.shape), [tuple(factor.shape) for factor in factors]
        ((1, 1, 1), [(4, 1), (3, 1), (2, 1)])
    """
    core = tensor.to(linalg.working_dtype(tensor))
    allowed = trains.loss_per_cut(core, tolerance, core.ndim)
    factors = []
    for mode in range(core.ndim):
        unfolding = core.movedim(mode, 0).flatten(1)
        factor, rest = trains.truncated(unfolding, None if ranks is None else ranks[mode], allowed)
        factors.append(factor)
        core = torch.movedim(rest.unflatten(1, core.movedim(mode, 0).shape[1:]), 0, mode)
    return core, factors


def orthogonal_terms(pairs: Tensor, rank: int) -> list[Tensor]:
    """Write a tensor (o1, i1, o2, i2, ..) as a sum of rank-1 terms, of which the largest are kept.

    The unfolding between the first pair of modes and the others has singular vectors; those of the pair are matrices
    with singular vectors of their own, those of the others are tensors of the same kind with a pair less. All products
    of one branch are orthogonal. Terms of no weight fill up what is missing.

    Args:
        pairs: 2 d axes, float64 or complex128.
        rank: number of terms.
    Returns:
        For each mode the vectors of all terms, (size, rank), each with its part of the term's weight.
    """
    weights, vectors = _terms(pairs.unsqueeze(0), rank)
    roots = weights[0].pow(1 / pairs.ndim)
    missing = rank - len(roots)
    return [torch.nn.functional.pad((part[0] * roots[:, None]).mT, (0, missing)) for part in vectors]


def _terms(pairs: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """Return the largest weights (batch, terms) of each tensor of a batch, and their vectors (batch, terms, size)."""
    if pairs.ndim == 3:
        left, values, right = linalg.leading(pairs)
        keep = min(rank, values.shape[1])
        return values[:, :keep], [left.mT[:, :keep], right[:, :keep]]
    batch, o, i, *others = pairs.shape
    left, values, right = linalg.leading(pairs.reshape(batch, o * i, math.prod(others)))
    count = min(rank, values.shape[1])
    heads, tails = left.mT[:, :count].reshape(-1, o, i), right[:, :count].reshape(-1, *others)
    weights, first = _terms(heads, rank)  # (batch count, p)
    weights_of_rest, rest = _terms(tails, rank)  # (batch count, q)
    products = values[:, :count, None, None] * (weights[:, :, None] * weights_of_rest[:, None, :]).unflatten(
        0, (batch, -1)
    )
    _, p, q = products.shape[1:]
    chosen = products.flatten(1).topk(min(rank, count * p * q)).indices  # (batch, terms)
    term, a, b = chosen // (p * q), chosen // q % p, chosen % q
    at = torch.arange(batch, device=pairs.device)[:, None] * count + term
    return products.flatten(1).gather(1, chosen), [*(part[at, a] for part in first), *(part[at, b] for part in rest)]
