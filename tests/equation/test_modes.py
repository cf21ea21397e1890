"""Padding to balanced modes and to small prime factors: as by trying every size, in no time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin.equation import modes


def prime_factors(n: int) -> list[int]:
    found, d = [], 2
    while n > 1:
        while n % d == 0:
            n, found = n // d, [*found, d]
        d += 1
    return found


@settings(deadline=None)
@given(n=st.integers(1, 500), largest=st.integers(2, 60))
def test_next_smooth_is_the_next(n: int, largest: int) -> None:
    expected = next(m for m in range(n, 2 * n + 1) if max(prime_factors(m), default=1) <= largest)
    assert modes.next_smooth(n, largest) == expected


@settings(deadline=None)
@given(n=st.integers(1, 500), count=st.integers(1, 12))
def test_padded_is_the_next_balanced_size(n: int, count: int) -> None:
    expected = next(m for m in range(n, 2 * n + 1) if modes.balanced(m, count)[-1] <= modes.BALANCE * m ** (1 / count))
    assert modes.padded(n, count) == expected


@settings(deadline=None)
@given(n=st.integers(1, 500), radix=st.integers(2, 70))
def test_digits_are_small_factors_of_the_next_size(n: int, radix: int) -> None:
    found = modes.digits(n, radix)
    product = 1
    for digit in found:
        product *= digit
    assert product == modes.next_smooth(n, max(radix, modes.SMOOTH))
    assert max(prime_factors(product), default=1) <= max(radix, modes.SMOOTH)
    *_, last = found
    assert last == radix or product % radix or product == 1


@pytest.mark.parametrize("n", [250_002, 2**23 + 9, 1_700_000_001, 2**31 - 1])
def test_no_size_takes_long(n: int) -> None:
    start = time.process_time()
    for count in range(2, 33):
        assert n <= modes.padded(n, count) < 2 * n
    for radix in (2, 3, 8, 1000, n - 1, n):
        assert modes.digits(n, radix)
    assert time.process_time() - start < 3
