"""Find the fast algorithm of a dense matrix: butterflies with the digits in any of both orders, and circulants."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from structlin.equation import modes
from structlin.exact.maps import circulant
from structlin.exact.permutations import permutation
from structlin.exact.steps import Program, Step, to_layer
from structlin.exact.transforms import palindrome, reversal
from structlin.fitting import linalg
from structlin.structures.butterfly import Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear


def recover(matrix: Tensor, *, tolerance: float | None = None) -> KaleidoscopeLinear:
    """Write a dense square matrix as the K-matrix that it is: the DFT, Hadamard, a circulant, a permutation, ...

    Tried in this order: a permutation; a circulant matrix; a product of butterfly stages, with the digits of rows and
    columns in the same order, or those of the rows, or of the columns, reversed (the DFT has them reversed).
    Cost: O(n^2 log n), by hierarchical factorisation; nothing is trained.

    Args:
        matrix: (n, n), float or complex; dtype and device are those of the layer (complex for a circulant).
        tolerance: relative Frobenius error that is allowed; None takes 1e-5 in single and 1e-10 in double precision.
    Raises:
        ValueError: if the matrix is not square, or none of these maps.
    Source: Le, Zheng, Riccietti & Gribonval 2022 (hierarchical factorisation).
    Example:
        >>> dense = torch.fft.fft(torch.eye(16, dtype=torch.complex128))
        >>> recover(dense).num_parameters < dense.numel() * 2
        True
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"the matrix has shape {tuple(matrix.shape)}; it must be square")
    single = matrix.dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
    allowed = (1e-5 if single else 1e-10) if tolerance is None else tolerance
    given = matrix.detach()
    size = torch.linalg.vector_norm(given)
    for layer in _attempts(given):
        if torch.linalg.vector_norm(layer.to_dense().detach() - given) <= allowed * size:
            return layer
    raise ValueError(
        f"no butterfly, circulant or permutation is within {allowed:g} of this {len(given)} x {len(given)} matrix; "
        "fit one: KaleidoscopeLinear.from_linear"
    )


def _attempts(matrix: Tensor) -> Iterator[KaleidoscopeLinear]:
    """Write a matrix as one map after the other, whether it is that map or not."""
    n = len(matrix)
    order = matrix.abs().argmax(1)
    if n & (n - 1) == 0 and len(order.unique()) == n:
        yield permutation(order.cpu(), dtype=matrix.dtype, device=matrix.device)
    if math.prod(modes.digits(n, 2)) == n:
        yield circulant(matrix[:, 0])
    sizes = palindrome(n)
    turn = reversed_digits(sizes).to(matrix.device)
    programs: tuple[Program, ...] = (
        _stages(matrix, sizes),
        [*_stages(matrix[turn], sizes), *reversal(sizes)],
        [*reversal(sizes), *_stages(matrix[:, turn], sizes)],
    )
    for steps in programs:
        yield to_layer(steps, sizes, 1, matrix.dtype, matrix.device)


def _stages(matrix: Tensor, sizes: Digits) -> Program:
    """Project on the butterfly matrices: the stages as steps, of the last digit first."""
    stages = linalg.butterfly_projection(matrix, sizes, sizes)
    return [Step(len(sizes) - 1 - k, stage.cpu()) for k, stage in enumerate(stages)]


def reversed_digits(sizes: Digits) -> Tensor:
    """Return the index whose digits are those of each index in reverse order (sizes read the same from both ends)."""
    return torch.arange(math.prod(sizes)).reshape(sizes).permute(*range(len(sizes))[::-1]).flatten()
