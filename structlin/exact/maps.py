"""Maps given by vectors as K-matrices: circulant, Toeplitz, convolution, Fastfood, ACDC, low rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structlin.equation import modes
from structlin.exact.permutations import switches
from structlin.exact.steps import Program, Step, inverse, scaled, to_layer
from structlin.exact.transforms import binary, cosine, fourier, walsh
from structlin.structures.butterfly import Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear


def circulant(column: Tensor) -> KaleidoscopeLinear:
    """Write the circulant matrix W[j, k] = column[(j - k) mod n] as a K-matrix of width 1: F^-1 diag(F column) F.

    The digits need no reversal: what the transform leaves reversed, the inverse takes reversed.
    Cost: about 2 n sum(digits) complex entries.

    Args:
        column: (n,), the first column, n without a prime factor above 7; dtype and device are its own, made complex.
    Raises:
        ValueError: if n has a larger prime factor.
    Example:
        >>> circulant(torch.tensor([1.0, 2.0, 3.0, 4.0])).to_dense().real.round().int().tolist()
        [[1, 4, 3, 2], [2, 1, 4, 3], [3, 2, 1, 4], [4, 3, 2, 1]]
    """
    n = len(column)
    sizes = modes.digits(n, 2)
    if math.prod(sizes) != n:
        raise ValueError(f"n={n} has a prime factor above 7; pad the column to {math.prod(sizes)} entries")
    return to_layer(_filter(column, sizes), sizes, 1, *_complex(column))


def toeplitz(column: Tensor, row: Tensor) -> KaleidoscopeLinear:
    """Write the Toeplitz matrix W[j, k] = column[j - k] or row[k - j] as a K-matrix of width 1 and expansion 2.

    It is the corner of a circulant matrix of twice the size. Cost: about 8 n log2(n) complex entries.

    Args:
        column: (n,), the first column, n a power of two; dtype and device are its own, made complex.
        row: (n,), the first row; its first entry is not read.
    Raises:
        ValueError: if n is no power of two, or column and row differ in length.
    Example:
        >>> toeplitz(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])).to_dense().real.round().int().tolist()
        [[1, 5], [2, 1]]
    """
    if column.shape != row.shape:
        raise ValueError(f"column has {len(column)} entries and row {len(row)}; this map is square")
    sizes = binary(len(column))
    around = torch.cat([column, column.new_zeros(1), row[1:].flip(0)])
    return to_layer(_filter(around, (2 * sizes[0], *sizes[1:])), sizes, 2, *_complex(column))


def convolution(kernel: Tensor, n: int) -> KaleidoscopeLinear:
    """Write y[j] = sum_m kernel[m] x[j + m - p], zeros outside, as `conv1d` with padding p = (len - 1) // 2 has it.

    A Toeplitz matrix: a K-matrix of width 1 and expansion 2, whatever the length of the kernel.

    Args:
        kernel: (length,), at most n entries; dtype and device are its own, made complex.
        n: size, a power of two.
    Raises:
        ValueError: if the kernel has no entry or more than n, or n is no power of two.
    """
    if not 1 <= len(kernel) <= n:
        raise ValueError(f"the kernel has {len(kernel)} entries; a convolution of {n} takes 1 to {n}")
    before = (len(kernel) - 1) // 2
    column, row = kernel.new_zeros(n), kernel.new_zeros(n)
    column[: before + 1] = kernel[: before + 1].flip(0)
    row[: len(kernel) - before] = kernel[before:]
    return toeplitz(column, row)


def fastfood(scale: Tensor, gauss: Tensor, order: Tensor, signs: Tensor) -> KaleidoscopeLinear:
    """Write W = diag(scale) H diag(gauss) P H diag(signs), H Hadamard's matrix and P x = x[order], as a K-matrix.

    Cost: 2 n (2 log2(n) - 1) entries for each of its powers of B B*.

    Args:
        scale: (n,), n a power of two; dtype and device are those of the layer.
        gauss: (n,).
        order: (n,), a permutation.
        signs: (n,).
    Raises:
        ValueError: if n is no power of two, or a vector has another length.
    Source: Le, Sarlos & Smola 2013, Fastfood (without its normalisation).
    """
    sizes = binary(len(scale))
    _check_lengths(len(scale), gauss, order, signs)
    steps = [_diagonal(signs, sizes), *walsh(sizes), *switches(order, sizes)]
    steps += [_diagonal(gauss, sizes), *walsh(sizes), _diagonal(scale, sizes)]
    return to_layer(steps, sizes, 1, scale.dtype, scale.device)


def acdc(a: Tensor, d: Tensor) -> KaleidoscopeLinear:
    """Write W = C^T diag(d) C diag(a), C the orthonormal cosine transform, as a K-matrix with complex factors.

    Args:
        a: (n,), n a power of two; dtype and device are its own, made complex.
        d: (n,).
    Raises:
        ValueError: if n is no power of two, or the lengths differ.
    Source: Moczulski, Denil, Appleyard & de Freitas 2016, ACDC: a structured efficient linear layer.
    """
    sizes = binary(len(a))
    _check_lengths(len(a), d)
    steps = [_diagonal(a, sizes), *cosine(sizes), _diagonal(d, sizes), *inverse(cosine(sizes))]
    return to_layer(steps, sizes, 1, *_complex(a))


def low_rank(left: Tensor, right: Tensor) -> KaleidoscopeLinear:
    """Write W = left right^T as a K-matrix of width 1 whose expansion is the rank.

    A matrix of ones is a butterfly; each of the copies of x in the expansion goes through one, between its vectors.
    Cost: about 4 rank n log2(n) entries.

    Args:
        left: (n, rank), n a power of two; dtype and device are those of the layer.
        right: (n, rank).
    Raises:
        ValueError: if n is no power of two, or the shapes differ.
    Source: Dao et al. 2020, Kaleidoscope (low rank as K-matrices); the expansion is ours.
    """
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)}; both are (n, rank)")
    n, rank = left.shape
    sizes = binary(n)
    first, *others = sizes
    exact = torch.promote_types(left.dtype, torch.float64)
    u, v = (part.detach().cpu().to(exact).T.reshape(rank, *sizes).movedim(1, -1) for part in (left, right))
    copied = torch.diag_embed(v).movedim(0, -3).flatten(-3, -2)  # (.., slot and digit, digit): the input's is slot 0
    copied = torch.nn.functional.pad(copied, (0, (rank - 1) * first))
    gathered = torch.nn.functional.pad(
        u.movedim(0, -1).repeat_interleave(first, -1), (0, 0, 0, (rank - 1) * first)
    )  # (.., digit, slot and digit): sums over the digit, too
    ones = [Step(d, torch.ones(size, size, dtype=torch.float64)) for d, size in enumerate(others, start=1)]
    steps = [Step(0, copied), *ones, Step(0, gathered)]
    return to_layer(steps, sizes, rank, left.dtype, left.device)


def _filter(column: Tensor, sizes: Digits) -> Program:
    """Multiply the spectrum by that of a column."""
    forward = fourier(sizes)
    spectrum = torch.fft.fft(column.detach().cpu().to(torch.complex128))
    reversed_ = spectrum.reshape(*reversed(sizes)).permute(*range(len(sizes))[::-1]).flatten()
    return [*forward, scaled(sizes, len(sizes) - 1, reversed_), *inverse(forward)]


def _diagonal(vector: Tensor, sizes: Digits) -> Step:
    exact = torch.promote_types(vector.dtype, torch.float64)
    return scaled(sizes, 0, vector.detach().cpu().to(exact))


def _complex(vector: Tensor) -> tuple[torch.dtype, torch.device]:
    return torch.promote_types(vector.dtype, torch.complex64), vector.device


def _check_lengths(n: int, *vectors: Tensor) -> None:
    lengths = [len(vector) for vector in vectors]
    if any(length != n for length in lengths):
        raise ValueError(f"vectors of {lengths} entries beside one of {n}; all have the same length")
