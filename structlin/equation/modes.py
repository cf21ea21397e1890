"""Integers into modes: divisors, balanced factorisations, mixed radix digits, and the one padding rule."""

from __future__ import annotations

import math
from functools import lru_cache

BALANCE = 2.0  # largest mode / geometric mean of the modes, up to which a factorisation needs no padding
SMOOTH = 7  # `digits` pads only numbers that have a prime factor above this and above the radix
_RARE = 31  # numbers without a larger prime factor are so rare that it is faster to list them than to look for them


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """Return all divisors of n, ascending.

    Example:
        >>> divisors(12)
        (1, 2, 3, 4, 6, 12)
    """
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def pairs(n: int) -> list[tuple[int, int]]:
    """Return all (first, second) whose product is n, the first ascending.

    Example:
        >>> pairs(6)
        [(1, 6), (2, 3), (3, 2), (6, 1)]
    """
    return [(first, n // first) for first in divisors(n)]


@lru_cache(maxsize=4096)
def balanced(n: int, count: int) -> tuple[int, ...]:
    """Factor n into `count` modes, as equal as its divisors allow, ascending.

    Example:
        >>> balanced(384, 2), balanced(1024, 3), balanced(97, 2)
        ((16, 24), (8, 8, 16), (1, 97))
    """
    if count == 1:
        return (n,)
    root = n ** (1 / count)  # rounded: 1e-12 lets an exact root count on both sides
    # Try the nearest divisors on both sides of the root, and take the one that leads to the smaller largest mode.
    below = max((d for d in divisors(n) if d <= root * (1 + 1e-12)), default=1)
    above = min((d for d in divisors(n) if d >= root * (1 - 1e-12)), default=n)
    options = [tuple(sorted((d, *balanced(n // d, count - 1)))) for d in {below, above}]
    return min(options, key=lambda modes: (modes[-1], -modes[0]))


@lru_cache(maxsize=4096)
def padded(n: int, count: int) -> int:
    """Return the smallest m >= n whose `count` modes are balanced: the largest is at most `BALANCE` times their mean.

    A prime has no balanced modes: without padding, its structure would be as large as the dense matrix.

    Example:
        >>> padded(384, 2), padded(97, 2), padded(1021, 2)
        (384, 98, 1023)
    """
    largest = int(BALANCE * (2 * n) ** (1 / count))  # mode of any m up to the next power of two, which is balanced
    while balanced(n, count)[-1] > BALANCE * n ** (1 / count):
        n = next_smooth(n + 1, largest)
    return n


@lru_cache(maxsize=4096)
def next_smooth(n: int, largest: int) -> int:
    """Return the smallest m >= n without a prime factor above `largest`, at least 2.

    Example:
        >>> next_smooth(97, 7), next_smooth(2**30 + 1, 3)
        (98, 1088391168)
    """
    if largest > _RARE:
        while not _is_smooth(n, largest):
            n += 1
        return n
    power = 1 << (n - 1).bit_length()
    odd = [1]  # products of odd primes
    for prime in (p for p in range(3, largest + 1, 2) if all(p % d for d in range(3, p, 2))):
        for m in odd:  # also over what is appended
            if m * prime <= power:
                odd.append(m * prime)
    return min(m << (-(-n // m) - 1).bit_length() for m in odd)


def _is_smooth(n: int, largest: int) -> bool:
    for d in range(2, largest + 1):
        while n % d == 0:
            n //= d
        if n <= largest or d * d > n:  # what is left has no factor, or only small ones
            return n <= largest
    return False


@lru_cache(maxsize=4096)
def balanced_modes(n: int, count: int) -> tuple[int, ...]:
    """Return balanced modes of `padded(n, count)`, ascending."""
    return balanced(padded(n, count), count)


@lru_cache(maxsize=4096)
def split(n: int, first: int) -> tuple[int, int]:
    """Return (first, rest) with the smallest rest such that first * rest >= n.

    Example:
        >>> split(1536, 2), split(97, 2)
        ((2, 768), (2, 49))
    """
    return first, -(-n // first)


def block_sides(blocks: int, in_features: int, out_features: int) -> tuple[int, int]:
    """Return rows and columns of one block of a blocks x blocks grid, rounded up."""
    return split(out_features, blocks)[1], split(in_features, blocks)[1]


def digits(n: int, radix: int) -> tuple[int, ...]:
    """Factor n into digits, most significant first: `radix` as often as it divides n, small primes before it.

    n is padded to the next number without a prime factor above max(radix, SMOOTH).

    Raises:
        ValueError: if radix is below 2.
    Example:
        >>> digits(16, 2), digits(384, 2), digits(384, 8), digits(97, 2)
        ((2, 2, 2, 2), (3, 2, 2, 2, 2, 2, 2, 2), (6, 8, 8), (7, 7, 2))
    """
    if radix < 2:
        raise ValueError(f"radix={radix} is below 2; use 2 for the classic butterfly or None for two stages")
    n = next_smooth(n, max(radix, SMOOTH))
    count = 0
    while n % radix == 0:
        n, count = n // radix, count + 1
    rest: list[int] = []
    prime = 2
    while n > 1:
        if n % prime:
            prime = prime + 1 if prime * prime < n else n  # a composite never divides: its primes came before it
            continue
        n //= prime
        if rest and rest[-1] * prime <= radix:  # multiply small primes into one digit up to the radix
            rest[-1] *= prime
        else:
            rest.append(prime)
    return (*sorted(rest, reverse=True), *([radix] * count)) or (1,)


def same_length(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pad the shorter of two digit tuples with leading ones.

    Example:
        >>> same_length((2, 2, 2), (5,))
        ((2, 2, 2), (1, 1, 5))
    """
    length = max(len(first), len(second))
    return (1,) * (length - len(first)) + first, (1,) * (length - len(second)) + second
