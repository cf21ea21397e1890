"""The discrete Fourier, cosine, sine and Hadamard transforms as butterflies and K-matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structlin.equation import modes
from structlin.exact.steps import Program, Step, moved, scaled, to_layer, values
from structlin.structures.butterfly import ButterflyLinear, Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear

Device = torch.device | str | None

# Fourier -------------------------------------------------------------------------------------------------------------


def dft(n: int, *, dtype: torch.dtype = torch.complex64, device: Device = None) -> KaleidoscopeLinear:
    """Write the discrete Fourier transform, F[k, j] = exp(-2 pi i j k / n), as a K-matrix.

    Cost: 2 n sum(digits) entries for each of two powers of B B*: O(n log n) at the powers of two.

    Args:
        n: size. Prime factors that n has an odd number of times share one digit, in the middle.
        dtype: complex64 or complex128.
        device: of the layer.
    Raises:
        ValueError: if n is below 1 or the dtype is real.
    Source: Cooley & Tukey 1965; Dao et al. 2020, Kaleidoscope (DFT in (B B*)^2).
    Example:
        >>> x = torch.randn(8, dtype=torch.complex128)
        >>> torch.allclose(dft(8, dtype=torch.complex128)(x), torch.fft.fft(x))
        True
    """
    sizes = palindrome(n)
    return to_layer(fourier(sizes) + reversal(sizes), sizes, 1, complex_only(dtype), device)


def idft(n: int, *, dtype: torch.dtype = torch.complex64, device: Device = None) -> KaleidoscopeLinear:
    """Write the inverse of `dft` as a K-matrix, with the factor 1 / n, as `torch.fft.ifft` has it.

    Args:
        n: as for `dft`, like all other arguments.
    Example:
        >>> x = torch.randn(12, dtype=torch.complex128)
        >>> torch.allclose(idft(12, dtype=torch.complex128)(x), torch.fft.ifft(x))
        True
    """
    sizes = palindrome(n)
    steps = [Step(step.digit, step.blocks.conj() / sizes[step.digit]) for step in fourier(sizes)]
    return to_layer(steps + reversal(sizes), sizes, 1, complex_only(dtype), device)


def fourier(sizes: Digits) -> Program:
    """Transform an index with given digits, the first digit first; the digits of the frequency come out reversed.

    The frequency is k_0 + sizes_0 (k_1 + sizes_1 (k_2 ..)) for output digits k_0, k_1, ...
    """
    found = []
    for d, size in enumerate(sizes):
        digits = values(sizes, d)
        rest = _index(digits[d + 1 :], sizes[d + 1 :])  # of the less significant digits
        length = math.prod(sizes[d:])
        old, new = torch.arange(size), torch.arange(size).unsqueeze(-1)
        turns = (rest.unsqueeze(-1) * new + old * new * (length // size)) % length  # (other digits .., new, old)
        found.append(Step(d, torch.polar(torch.ones(()).double(), -2 * math.pi * turns.double() / length)))
    return found


def _index(digits: list[Tensor], sizes: Digits) -> Tensor:
    found = torch.zeros((), dtype=torch.long)
    for digit, size in zip(digits, sizes, strict=True):
        found = found * size + digit
    return found


def reversal(sizes: Digits, count: int | None = None) -> Program:
    """Reverse the order of the first digits (None: of all), whose sizes read the same from both ends."""
    count = len(sizes) if count is None else count
    pairs = [(d, count - 1 - d) for d in range(count // 2)]

    first, second, third = list[Step](), list[Step](), list[Step]()
    for a, b in pairs:  # (a, b) -> (a, b + a) -> (b, b + a) -> (b, a)
        early, late = values(sizes, a), values(sizes, b)
        first.append(moved(sizes, b, late[b] + late[a]))
        second.append(moved(sizes, a, early[b] - early[a]))
        third.append(moved(sizes, b, late[b] - late[a]))
    return [*first, *second, *third]


def palindrome(n: int) -> Digits:
    """Factor n into digits that read the same from both ends, as small as they can be.

    Example:
        >>> palindrome(16), palindrome(8), palindrome(12), palindrome(24), palindrome(7)
        ((2, 2, 2, 2), (2, 2, 2), (2, 3, 2), (2, 6, 2), (7,))
    """
    if n < 1:
        raise ValueError(f"n={n} is below 1; give the size of the transform")
    sides, middle = list[int](), 1
    while n > 1:
        prime = modes.divisors(n)[1]
        if n % prime**2 == 0:
            sides.append(prime)
            n //= prime**2
        else:
            middle *= prime
            n //= prime
    return (*sides, *([middle] if middle > 1 or not sides else []), *reversed(sides))


def complex_only(dtype: torch.dtype) -> torch.dtype:
    """Raise ValueError for a dtype that is not complex."""
    if not dtype.is_complex:
        raise ValueError(
            f"dtype={dtype} is real; this map has complex factors: use torch.complex64 or torch.complex128"
        )
    return dtype


# Cosine and sine -----------------------------------------------------------------------------------------------------


def dct(n: int, *, dtype: torch.dtype = torch.complex64, device: Device = None) -> KaleidoscopeLinear:
    """Write the orthonormal cosine transform (DCT-II) as a K-matrix; its factors are complex, the product is real.

    C[k, j] = s_k cos(pi (2 j + 1) k / (2 n)), s_0 = sqrt(1 / n), s_k = sqrt(2 / n).

    Args:
        n: a power of two.
        dtype: complex64 or complex128.
        device: of the layer.
    Raises:
        ValueError: if n is no power of two or the dtype is real.
    Source: Makhoul 1980, A fast cosine transform in one and two dimensions.
    Example:
        >>> c = dct(8, dtype=torch.complex128).to_dense()
        >>> torch.allclose(c @ c.mT, torch.eye(8, dtype=c.dtype))
        True
    """
    sizes = binary(n)
    return to_layer(cosine(sizes), sizes, 1, complex_only(dtype), device)


def dst(n: int, *, dtype: torch.dtype = torch.complex64, device: Device = None) -> KaleidoscopeLinear:
    """Write the orthonormal sine transform (DST-II) as a K-matrix: `dct` of x_j (-1)^j, in reversed order.

    S[k, j] = s_k sin(pi (2 j + 1) (k + 1) / (2 n)), s_{n-1} = sqrt(1 / n), all other s_k = sqrt(2 / n).

    Args:
        n: as for `dct`, like all other arguments.
    """
    sizes = binary(n)
    signs = 1.0 - 2 * (torch.arange(n) % 2).double()
    flips = [moved(sizes, d, 1 - values(sizes, d)[d]) for d in range(len(sizes))]
    steps = [scaled(sizes, 0, signs), *cosine(sizes), *flips]
    return to_layer(steps, sizes, 1, complex_only(dtype), device)


def cosine(sizes: Digits) -> Program:
    """Write the orthonormal DCT-II over binary digits by a Fourier transform of the same length.

    With v = (x_0, x_2, .., x_3, x_1) and V its transform, X_k = s_k (w^k V_k + w^-k V_-k) / 2, w = exp(-i pi / (2 n)).
    """
    n, count = math.prod(sizes), len(sizes)
    # Even entries in order, odd ones behind them backwards, and all digits reversed: the last digit of x says whether
    # an entry is odd, and stays where it is.
    order = reversal(sizes, count - 1)
    order += [moved(sizes, d, v[d] + v[-1]) for d in range(count - 1) for v in [values(sizes, d)]]
    transform = [step.mirrored() for step in reversed(fourier(sizes))]
    # k and -k come to differ in the first digit only when k's other digits are negated where the first is 1: a digit
    # flips if any after it is 1.
    negated = []
    for d in range(1, count):
        v = values(sizes, d)
        negated.append(moved(sizes, d, v[d] + v[0] * (_index(v[d + 1 :], sizes[d + 1 :]) > 0)))
    return [*order, *transform, *negated, Step(0, _both(n).view(*sizes[1:], sizes[0], sizes[0])), *negated]


def _both(n: int) -> Tensor:
    """Return for each k below n / 2 the matrix from (V_k, V_-k) to (X_k, X_-k); k = 0 stands for 0 and n / 2."""
    k = torch.arange(n)
    weights = torch.polar(torch.ones(()).double(), -math.pi * k.double() / (2 * n)) * math.sqrt(2 / n) / 2
    if n == 1:
        return torch.ones(1, 1, 1, dtype=torch.complex128)
    half = n // 2
    found = torch.zeros(half, 2, 2, dtype=torch.complex128)
    up = k[1:half]
    found[1:, 0, 0], found[1:, 0, 1] = weights[up], weights[up].conj()
    found[1:, 1, 1], found[1:, 1, 0] = weights[n - up], weights[n - up].conj()
    found[0, 0, 0], found[0, 1, 1] = math.sqrt(1 / n), 2 * weights[half].real
    return found


def binary(n: int) -> Digits:
    """Return the binary digits of the sizes that `dct` takes."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"n={n} is no power of two; pad the input to {1 << max(n - 1, 0).bit_length()}")
    return (2,) * (n.bit_length() - 1) or (1,)


# Hadamard ------------------------------------------------------------------------------------------------------------


def hadamard(n: int, *, dtype: torch.dtype = torch.float32, device: Device = None) -> ButterflyLinear:
    """Write the Hadamard matrix in Sylvester's order, entries 1 and -1, as a butterfly with 2 n log2(n) entries.

    Args:
        n: a power of two.
        dtype: any float or complex dtype.
        device: of the layer.
    Raises:
        ValueError: if n is no power of two.
    Example:
        >>> hadamard(4).to_dense().int().tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    sizes = binary(n)
    layer = ButterflyLinear(n, n, bias=False, in_modes=sizes, out_modes=sizes, dtype=dtype, device=device)
    with torch.no_grad():
        for factor, step in zip(layer.factors, walsh(sizes), strict=True):
            factor.copy_(step.blocks.expand(factor.shape))
    return layer


def walsh(sizes: Digits) -> Program:
    """Transform each binary digit by [[1, 1], [1, -1]]."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return [Step(d, one if size == 2 else one[:1, :1]) for d, size in enumerate(sizes)]
