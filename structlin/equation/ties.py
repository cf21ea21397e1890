"""Ties: factors whose entries share a few numbers in a pattern; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["circulant", "toeplitz", "diagonal", "places"]


@dataclass(frozen=True)
class Tie:
    """The pattern by which the first two modes of a factor share numbers.

    The factor is F[row, column, ..] = values[pattern[row, column], ..], or 0 where the pattern has no number; only the
    values, (numbers, ..), are a parameter. `runtime.contract.tied` writes the patterns:

    - circulant: (row - column) mod numbers.
    - toeplitz: row - column + columns - 1.
    - diagonal: row where row = column, else none.
    - places: the places that are kept, counted row-major. They are the set bits of `bits`, or, where that is empty,
      spread by a fixed hash.
    """

    kind: Kind
    numbers: int
    bits: str = ""  # base64 of one bit per place, row-major, the first in the lowest bit of a byte

    @property
    def once(self) -> bool:
        """Whether each number stands in one place; otherwise every place has a number."""
        return self.kind in ("diagonal", "places")

    def density(self, rows: int, columns: int) -> float:
        """Return the share of the places that have a number."""
        return self.numbers / (rows * columns) if self.once else 1.0
