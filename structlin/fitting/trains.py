"""Tensor trains: decomposition and rounding by truncated SVDs, with derivatives that need no gap inside what is kept.

A train of tensors is a product of cores (r_k, ..., r_k+1) with r_0 = r_d = 1; the axes between the bonds are its modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structlin.fitting.linalg import leading_unsigned, working_dtype

Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

_NOISE = 1e-13  # relative to the largest singular value, in float64
_SMALL = 1 << 13  # entries up to which LAPACK's SVD is faster than an eigenproblem of the Gram matrix


def tt_matrix(weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """Reorder a matrix (o1 o2 .., i1 i2 ..) into the modes of a TT-matrix: (o1, i1, o2, i2, ...)."""
    count = len(out_modes)
    tensor = weight.reshape(*out_modes, *in_modes)
    return tensor.permute([axis for k in range(count) for axis in (k, count + k)])


def tt_svd(
    tensor: Tensor, *, ranks: Sequence[int] | None = None, tolerance: float = 0.0, axes: int = 1
) -> list[Tensor]:  # fmt: skip
    """Decompose a tensor into cores by successive truncated SVDs.

    Cost: one eigenproblem per bond. The error is at most sqrt(d - 1) times that of the best cores of these ranks;
    with a tolerance, the relative Frobenius error is at most the tolerance. Differentiable, see `truncated`.

    Args:
        tensor: `axes` times d axes, any float or complex dtype.
        ranks: the d - 1 bond ranks, lowered to their unfolding's maximum; None lets the tolerance decide.
        tolerance: relative Frobenius error allowed in all, used when ranks is None.
        axes: axes of the tensor in each core: 1, or 2 for a TT-matrix (o1, i1, o2, i2, ...).
    Returns:
        Cores (r_k, ..., r_k+1) with r_0 = r_d = 1, in the working dtype, all but the last left-orthogonal.
    Raises:
        ValueError: if the tolerance is negative or NaN.
    Source: Oseledets 2011, Tensor-train decomposition.
    Example:
        >>> cores = tt_svd(torch.ones(2, 2, 3, 3), tolerance=1e-8, axes=2)
        >>> [tuple(core.shape) for core in cores]
        [(1, 2, 2, 1), (1, 3, 3, 1)]
    """
    sizes = [tensor.shape[k : k + axes] for k in range(0, tensor.ndim, axes)]
    rest = tensor.to(working_dtype(tensor)).reshape(1, -1)
    allowed = loss_per_cut(rest, tolerance, len(sizes) - 1)
    cores = []
    for bond, size in enumerate(sizes[:-1]):
        unfolding = rest.reshape(rest.shape[0] * size.numel(), -1)
        left, rest = truncated(unfolding, None if ranks is None else ranks[bond], allowed)
        cores.append(left.reshape(-1, *size, left.shape[1]))
    cores.append(rest.reshape(-1, *sizes[-1], 1))
    return cores


def tt_round(
    cores: Sequence[Tensor], *, ranks: Sequence[int] | None = None, tolerance: float = 0.0
) -> list[Tensor]:  # fmt: skip
    """Reduce the ranks of a train without forming it: orthogonalise from the right, then truncate from the left.

    Differentiable, see `truncated`.

    Args:
        cores: (r_k, ..., r_k+1) with r_0 = r_d = 1, any float or complex dtype.
        ranks: the new bond ranks, lowered to the present ones; None lets the tolerance decide.
        tolerance: relative Frobenius error allowed in all, used when ranks is None.
    Returns:
        Cores of lower rank, in the working dtype.
    Raises:
        ValueError: if the tolerance is negative or NaN.
    Source: Oseledets 2011, algorithm 2.
    Example:
        >>> a = [torch.ones(1, 2, 2, 1), torch.ones(1, 3, 3, 1)]
        >>> doubled = [torch.cat([a[0], a[0]], 3), torch.cat([a[1], a[1]], 0)]
        >>> [tuple(core.shape) for core in tt_round(doubled, tolerance=1e-8)]
        [(1, 2, 2, 1), (1, 3, 3, 1)]
    """
    work = right_orthogonal(cores)
    allowed = loss_per_cut(work[0], tolerance, len(work) - 1)  # the other cores are orthogonal: work[0] has the norm
    for k in range(len(work) - 1):
        left, rest = truncated(work[k].flatten(0, -2), None if ranks is None else ranks[k], allowed, _svd)
        work[k] = left.reshape(*work[k].shape[:-1], left.shape[1])
        work[k + 1] = (rest @ work[k + 1].flatten(1)).reshape(-1, *work[k + 1].shape[1:])
    return work


def right_orthogonal(cores: Sequence[Tensor]) -> list[Tensor]:
    """Rewrite a train, in the working dtype, with orthonormal rows (r_k, ... r_k+1) in all cores but the first."""
    work = [core.to(working_dtype(core)) for core in cores]
    for k in range(len(work) - 1, 0, -1):
        rows = work[k].flatten(1).mH
        q, r = _Orthogonal.apply(rows) if rows.requires_grad else torch.linalg.qr(rows)
        work[k] = q.mH.reshape(-1, *work[k].shape[1:])
        work[k - 1] = work[k - 1] @ r.mH
    return work


def tt_norm(cores: Sequence[Tensor]) -> Tensor:
    """Compute the Frobenius norm of a train from triangular factors; nothing is squared."""
    if any(core.requires_grad for core in cores):
        return torch.linalg.vector_norm(right_orthogonal(cores)[0])
    work, *others = cores if cores[0].dtype is working_dtype(cores[0]) else [c.to(working_dtype(c)) for c in cores]
    for core in others:
        rows, bond = work.reshape(-1, len(core)), len(core)
        few = core is others[-1] and core.numel() <= 2 * bond**2  # columns: their product is quicker, and is the end
        if len(rows) > bond and not few:
            rows = torch.linalg.qr(rows, mode="r")[1]  # the triangular factor stands for all cores before
        work = rows @ core.flatten(1)
    return torch.linalg.vector_norm(work)


def loss_per_cut(tensor: Tensor, tolerance: float, bonds: int) -> float:
    """Return the norm that each of several truncations may lose (Oseledets 2011, theorem 2.2)."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is negative or NaN; use a relative error from 0 to 1")
    return tolerance * torch.linalg.vector_norm(tensor.detach()).item() / math.sqrt(max(bonds, 1))


def truncated(matrix: Tensor, rank: int | None, allowed: float, svd: Svd = leading_unsigned) -> tuple[Tensor, Tensor]:
    """Return orthonormal left vectors (m, rank) and the rest (rank, n); None: the least rank that loses `allowed`.

    The derivatives are those of functions of the product left @ rest, as everything that is computed from a train is.
    They need a gap between the singular values that are kept and those that are not; torch.linalg.svd needs one
    between any two.
    """
    if matrix.requires_grad:
        return _Truncated.apply(matrix, rank, allowed, svd)
    left, values, right = svd(matrix)
    rank = _least(values, allowed) if rank is None else rank
    return left[:, :rank], right[:rank] * values[:rank, None]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a core, which is small in most trains."""
    return torch.linalg.svd(matrix, full_matrices=False) if matrix.numel() <= _SMALL else leading_unsigned(matrix)


def tails(values: Tensor) -> Tensor:
    """Return the norms of descending singular values from each on."""
    return values.square().flip(0).cumsum(0).flip(0).sqrt()


def _least(values: Tensor, allowed: float) -> int:
    """Return how many descending singular values to keep so that the others have at most a norm."""
    return max(int((values.flip(0).square().cumsum(0) > allowed**2).sum()), 1)


class _Truncated(torch.autograd.Function):
    """M = U S V^H + U' S' V'^H -> U, U^H M, differentiated in the gauge U^H dU = 0."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rank: int | None, allowed: float, svd: Svd) -> tuple[Tensor, Tensor]:
        left, values, right = svd(matrix)
        ctx.rank = rank = _least(values, allowed) if rank is None else rank
        ctx.save_for_backward(left, values, right)
        return left[:, :rank], right[:rank] * values[:rank, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, left_grad: Tensor, rest_grad: Tensor) -> tuple[Tensor, None, None, None]:
        (left, values, right), rank = ctx.saved_tensors, ctx.rank
        kept, lost = left[:, :rank], left[:, rank:]
        s, t = values[:rank], values[rank:]
        tail = t[:, None] * right[rank:]
        # dU = U' F (U'^H dM V S + S' V'^H dM^H U) + (what is outside of both) dM V / S, with F = 1 / (s^2 - t^2).
        toward = left_grad + lost @ (tail @ rest_grad.mH)
        inside = lost.mH @ toward
        outside = toward - kept @ (kept.mH @ toward) - lost @ inside
        noise = _NOISE * values[0]  # values below it are zero but for rounding, and have no directions
        weighed = inside * _inverse(s.square() - t.square()[:, None], noise**2)
        grad = kept @ rest_grad + kept @ (weighed.mH @ tail)
        return grad + (lost @ (weighed * s) + outside * _inverse(s, noise)) @ right[:rank], None, None, None


class _Orthogonal(torch.autograd.Function):
    """M -> Q, R, differentiated in the gauge Q^H dQ = 0; M may have dependent columns, unlike for torch.linalg.qr."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(matrix)
        ctx.save_for_backward(q, r)
        return q, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, r_grad: Tensor) -> Tensor:
        q, r = ctx.saved_tensors
        outside = q_grad - q @ (q.mH @ q_grad)
        return q @ r_grad + outside @ torch.linalg.pinv(r).mH


def _inverse(values: Tensor, noise: Tensor) -> Tensor:
    """Invert what is above the noise; the rest gives 0."""
    return torch.where(values > noise, 1 / values, 0.0)
