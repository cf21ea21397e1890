"""Any orthogonal, and so any square, matrix as a product of sums of Kronecker products (Shapeshifter's theorem)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.structures.kronchain import KroneckerChainLinear

# One factor of a product: the identity but for some m x m matrices, each for the indices (a, b) with one value of a
# digit: of the first digit a, or of the second digit b.
Layer = tuple[bool, dict[int, Tensor]]


def orthogonal(matrix: Tensor, terms: int = 2) -> KroneckerChainLinear:
    """Write an orthogonal matrix, n = m^2, exactly as a product of sums of `terms` Kronecker products, factors m x m.

    An index is a pair (a, b). I (x) I + sum_t E_aa (x) (R_t - I) turns the parts of a vector with terms - 1 values of a
    by R_t, each alone. For each column of the matrix, such layers turn every part onto one b, and a layer
    I (x) I + (R - I) (x) E_bb turns what is left onto the diagonal. The slides' proof takes three layers for each
    Givens rotation, 3 n^2 / 2 with two terms; this takes at most n (ceil(m / (terms - 1)) + 1).

    Args:
        matrix: (n, n), real, n the square of m; dtype and device are those of the layer.
        terms: 2 to m + 1.
    Raises:
        ValueError: if n is no square, terms is out of range, or the matrix is not orthogonal.
    Source: Panahi, Saeedi & Arodz 2021, Shapeshifter (products of Kronecker sums are universal).
    Example:
        >>> turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
        >>> layer = orthogonal(turn)
        >>> torch.allclose(layer.to_dense(), turn), layer.structure.depth <= 9 * 4
        (True, True)
    """
    m = _side(matrix, terms)
    exact = matrix.detach().cpu().double()
    if (exact @ exact.mT - torch.eye(len(exact)).double()).abs().max() > min(1e3 * torch.finfo(matrix.dtype).eps, 0.05):
        raise ValueError("matrix is not orthogonal; use `structlin.exact.square`, or torch.linalg.qr first")
    return _to_layer(_turns(exact, m, terms), m, terms, matrix)


def square(matrix: Tensor, terms: int = 2) -> KroneckerChainLinear:
    """Write any real square matrix, n = m^2, as such a product, by its singular value decomposition.

    The diagonal takes ceil(m / (terms - 1)) layers more than two orthogonal matrices.

    Args:
        matrix: (n, n), like all arguments as for `orthogonal`.
        terms: 2 to m + 1.
    """
    m = _side(matrix, terms)
    left, values, right = torch.linalg.svd(matrix.detach().cpu().double())
    diagonal: list[Layer] = [
        (True, {a: torch.diag(values.view(m, m)[a]) for a in some}) for some in _shares(range(m), terms)
    ]
    return _to_layer([*_turns(right, m, terms), *diagonal, *_turns(left, m, terms)], m, terms, matrix)


def _side(matrix: Tensor, terms: int) -> int:
    m = math.isqrt(len(matrix)) if matrix.ndim else 0
    if matrix.ndim != 2 or matrix.shape != (m * m, m * m) or m < 2 or matrix.is_complex():
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; give a real one of size n x n, n = 4, 9, 16, ..")
    if not 2 <= terms <= m + 1:
        raise ValueError(f"terms={terms} is outside 2..{m + 1} for factors {m} x {m}")
    return m


def _turns(matrix: Tensor, m: int, terms: int) -> list[Layer]:
    """Return layers whose product is an orthogonal matrix, the first applied first."""
    rest, found = matrix.reshape(m, m, -1).clone(), list[Layer]()

    def turn(by_first: bool, turns: dict[int, Tensor]) -> None:
        for digit, reflection in turns.items():
            part = rest[digit] if by_first else rest[:, digit]
            part.copy_(reflection @ part)
        found.append((by_first, {digit: reflection.mT for digit, reflection in turns.items()}))

    for column in range(m * m):
        a, b = divmod(column, m)
        for some in _shares(range(a, m), terms):  # what lies before the column is done: it stays
            turn(True, {k: _onto(rest[k, :, column], b, b if k == a else 0) for k in some})
        turn(False, {b: _onto(rest[:, b, column], a, a)})
    return found[::-1]  # rest is the identity now, and each layer was undone


def _shares(values: Sequence[int], terms: int) -> list[Sequence[int]]:
    return [values[k : k + terms - 1] for k in range(0, len(values), terms - 1)]


def _onto(vector: Tensor, place: int, start: int) -> Tensor:
    """Return the reflection that maps the entries of a vector from `start` on onto the place, to a positive entry."""
    head = vector.clone()
    head[:start] = 0
    wanted = torch.zeros_like(head)
    wanted[place] = head.norm()
    normal = head - wanted
    length = normal.norm()
    eye = torch.eye(len(vector), dtype=vector.dtype)
    if length <= 1e-300:
        return eye
    normal /= length
    return eye - 2 * torch.outer(normal, normal)


def _to_layer(layers: Sequence[Layer], m: int, terms: int, like: Tensor) -> KroneckerChainLinear:
    made = KroneckerChainLinear(
        m * m, m * m, bias=False, terms=terms, depth=len(layers), in_modes=(m, m), out_modes=(m, m), dtype=like.dtype,
        device=like.device,
    )  # fmt: skip
    eye = torch.eye(m, dtype=torch.float64)
    with torch.no_grad():
        pairs = zip(made.factors[0::2], made.factors[1::2], strict=True)
        for (by_first, turns), (left, right) in zip(layers, pairs, strict=True):
            one, other = (left, right) if by_first else (right, left)
            one.zero_()
            other.zero_()
            one[0] = other[0] = eye
            for t, (digit, matrix) in enumerate(turns.items(), start=1):
                one[t, digit, digit] = 1
                other[t] = matrix - eye
    return made
