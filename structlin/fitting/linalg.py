"""Closed-form decompositions: tensors in, tensors out, any float or complex dtype, batched where noted.

All rest on one routine: the singular vectors from the Gram matrix of the smaller side, in float64. Projecting on them
needs no inverse, so zero and singular matrices need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

Shape = tuple[tuple[int, int], tuple[int, int]]


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that decompositions compute in: float64, or complex128 for a complex tensor."""
    return torch.complex128 if tensor.is_complex() else torch.float64


def pad_to(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Pad the last two axes of a matrix with zeros to (rows, columns)."""
    surplus = (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2])
    return torch.nn.functional.pad(matrix, surplus) if any(surplus) else matrix


def leading(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a singular value decomposition from the Gram matrix of the smaller side.

    matrix = left @ (values * right). Cost: one Gram product and one symmetric eigenproblem of the smaller side.

    Args:
        matrix: shape (..., m, n), float64 or complex128.
    Returns:
        left (..., m, k) with orthonormal columns, values (..., k) descending and real, right (..., k, n) with rows of
        norm 1 (or 0 where the value is 0); k = min(m, n). The largest entry of each left vector is positive.
    """
    return _fix_signs(*leading_unsigned(matrix))


def leading_unsigned(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `leading` does, with the signs that the eigenproblem gives: less work where signs do not matter."""
    m, n = matrix.shape[-2:]
    if m > n:  # the Gram matrix of the transpose is the smaller one
        left, values, right = leading_unsigned(matrix.mH)
        return right.mH, values, left.mH
    vectors = leading_vectors(matrix @ matrix.mH, m)
    rows = vectors.mH @ matrix  # values * right
    values = torch.linalg.vector_norm(rows, dim=-1)
    return vectors, values, rows / torch.where(values > 0, values, 1).unsqueeze(-1)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """Return orthonormal eigenvectors (..., n, rank) of the largest eigenvalues of (..., n, n), the largest first."""
    return torch.linalg.eigh(gram)[1][..., -rank:].flip(-1)


def _fix_signs(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the largest entry of each left vector positive, so that the decomposition is deterministic."""
    top = left.abs().argmax(dim=-2, keepdim=True)  # (..., 1, k)
    phase = torch.sgn(torch.gather(left, -2, top))
    phase = torch.where(phase == 0, torch.ones_like(phase), phase)
    return left * phase.conj(), values, right * phase.mT


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the best approximation of a given rank; each factor takes the root of the singular values.

    matrix ~ left @ right. Cost: see `leading`.

    Args:
        matrix: shape (..., m, n), any float or complex dtype.
        rank: number of terms, 1 <= rank <= min(m, n).
    Returns:
        left (..., m, rank) and right (..., rank, n), in the working dtype.
    Raises:
        ValueError: if rank is out of range.
    Source: Eckart & Young 1936.
    Example:
        >>> left, right = truncated_svd(torch.ones(3, 2), 1)
        >>> torch.allclose(left @ right, torch.ones(3, 2, dtype=torch.float64))
        True
    """
    largest = min(matrix.shape[-2:])
    if not 1 <= rank <= largest:
        raise ValueError(f"rank={rank} is outside 1..{largest} for a {matrix.shape[-2]} x {matrix.shape[-1]} matrix")
    exact = matrix.to(working_dtype(matrix))
    if exact.shape[-2] > exact.shape[-1]:  # the Gram matrix of the transpose is the smaller one
        right, left = _truncated_svd(exact.mH, rank)
        return left.mH, right.mH
    return _truncated_svd(exact, rank)


def _truncated_svd(wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    vectors = leading_vectors(wide @ wide.mH, rank)
    rows = vectors.mH @ wide
    values = torch.linalg.vector_norm(rows, dim=-1)
    left, _, right = _fix_signs(vectors, values, rows)
    root = torch.where(values > 0, values, 1).sqrt()
    return left * values.sqrt().unsqueeze(-2), right / root.unsqueeze(-1)


def rearranged(weight: Tensor, shape: Shape) -> Tensor:
    """Rearrange a weight so that Kronecker products become rank-1 matrices (Van Loan & Pitsianis 1993).

    Args:
        weight: (o1 o2, i1 i2).
        shape: ((o1, i1), (o2, i2)).
    Returns:
        Matrix (o1 i1, o2 i2).
    """
    (o1, i1), (o2, i2) = shape
    return rearrange(weight, "(o1 o2) (i1 i2) -> (o1 i1) (o2 i2)", o1=o1, o2=o2, i1=i1, i2=i2)


def nearest_kronecker(weight: Tensor, terms: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Compute the nearest sum of Kronecker products in the Frobenius norm.

    weight ~ sum_t left[t] (x) right[t].  Cost: an eigenproblem of size min(o1 i1, o2 i2).

    Args:
        weight: (o1 o2, i1 i2), any float or complex dtype.
        terms: number of products, 1 <= terms <= min(o1 i1, o2 i2).
        shape: ((o1, i1), (o2, i2)).
    Returns:
        left (terms, o1, i1) and right (terms, o2, i2), in the working dtype.
    Raises:
        ValueError: if terms is out of range.
    Source: Van Loan & Pitsianis 1993, Approximation with Kronecker products.
    Example:
        >>> left, right = nearest_kronecker(torch.eye(6), 1, ((2, 2), (3, 3)))
        >>> torch.allclose(torch.kron(left[0], right[0]), torch.eye(6, dtype=torch.float64))
        True
    """
    (o1, i1), (o2, i2) = shape
    left, right = truncated_svd(rearranged(weight, shape), terms)
    return rearrange(left, "(o i) t -> t o i", o=o1, i=i1), rearrange(right, "t (o i) -> t o i", o=o2, i=i2)


def butterfly_projection(weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> list[Tensor]:
    """Project a matrix on the butterfly matrices with given digits, by hierarchical rank-1 approximations.

    W[o1..ok, i1..ik] = prod_s F_s[i_<s, o_>s, o_s, i_s].
    For fixed i_1 and o_>1, the entries of a butterfly form a rank-1 matrix in (o_1; i_>1): its left vector is a block
    of F_1, and the right vectors form butterflies of the remaining digits. Exact on true butterflies. Cost: O(n^2) per
    stage, 2 n^2 r FLOPs in all for radix r.

    Args:
        weight: (prod out_modes, prod in_modes), any float or complex dtype.
        out_modes: output digits, most significant first.
        in_modes: input digits, as many.
    Returns:
        Stages in order of application (last digit first), stage s of shape (i_1..i_s-1, o_s+1..o_k, o_s, i_s), in the
        working dtype, with equal norms per entry.
    Source: Le, Zheng, Riccietti & Gribonval 2022 (hierarchical factorisation); Dao et al. 2022 (Monarch projection).
        Ours works on the Gram matrix of the smaller side.
    Example:
        >>> h = torch.tensor([[1., 1.], [1., -1.]])
        >>> stages = butterfly_projection(torch.kron(h, h), (2, 2), (2, 2))
        >>> [tuple(stage.shape) for stage in stages]
        [(2, 2, 2), (2, 2, 2)]
    """
    exact = weight if weight.dtype in (torch.float64, torch.complex128, torch.complex64) else weight.float()
    rest = exact.unsqueeze(0)  # (i_<s, o_s.., i_s..), one digit less of both sides in each round
    stages = []
    for s in range(len(out_modes) - 1):
        o, i = out_modes[s], in_modes[s]
        left, rest = _peel(rearrange(rest, "b (o p) (i j) -> b i p o j", o=o, i=i))
        stages.append(rearrange(left, "b i p o -> b p o i").reshape(*in_modes[:s], *out_modes[s + 1 :], o, i))
    rest = rest.to(working_dtype(rest))
    stages.append(rest.reshape(*in_modes[:-1], out_modes[-1], in_modes[-1]))
    return balance(stages[::-1])


def _peel(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Split (b, i, p, o, j) into unit left vectors (b, i, p, o) and the rest (b i, p, j)."""
    if blocks.shape[0] == 1:  # the first and by far the largest level: products of views, no copy of the weight
        pairs = [_leading_pair(blocks[0, i]) for i in range(blocks.shape[1])]
        left, right = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return left.unsqueeze(0), right
    left, right = _leading_pair(blocks.flatten(0, 2))
    return left.unflatten(0, blocks.shape[:3]), right.reshape(-1, blocks.shape[2], blocks.shape[4])


def _leading_pair(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Best rank-1 approximation of (b, m, n) as unit left (b, m) and scaled right (b, n); Gram of the smaller side."""
    if blocks.shape[-2] > blocks.shape[-1]:  # transpose, and move the norm to the right
        right, left = _leading_pair(blocks.mT)
        norm = torch.linalg.vector_norm(left, dim=-1, keepdim=True)
        return left / torch.where(norm > 0, norm, 1), right * norm
    dtype = working_dtype(blocks)
    _, vectors = torch.linalg.eigh(torch.bmm(blocks, blocks.mH).to(dtype))
    left = vectors[..., -1]
    right = torch.bmm(left.conj().unsqueeze(-2).to(blocks.dtype), blocks).squeeze(-2)
    return left, right.to(dtype)


def balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale the factors of a product to the same root mean square entry; if one is zero, leave all as they are."""
    sizes = [torch.linalg.vector_norm(factor) / math.sqrt(factor.numel()) for factor in factors]
    if any(size == 0 for size in sizes):
        return list(factors)
    mean = torch.stack(sizes).log().mean().exp()
    return [factor * (mean / size).to(factor.dtype) for factor, size in zip(factors, sizes, strict=True)]
