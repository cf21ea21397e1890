"""Read each factor of an equation as a matrix: what it gives along the rows, what it sums over along the columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from structlin.equation.spec import Absorption, Equation, Spec


@dataclass(frozen=True)
class Unfolding:
    """How one factor lies in a matrix (rows, columns).

    Rows run over the modes that the factor keeps or adds when the activations meet it, columns over those summed.

    Args:
        modes: in the order of the matrix, the rows' before the columns'.
        shape: their sizes.
        axes: for each axis of the factor its place in `modes`.
        rows: number of rows.
        columns: number of columns.
    """

    modes: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rows: int
    columns: int


def application(eq: Equation) -> tuple[Absorption, ...]:
    """Return the absorptions of all factors one by one, from the cheaper end; of equal ends from the last factor.

    Example:
        >>> from structlin.equation.spec import equation
        >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3})
        >>> [step.factor for step in application(eq)]
        [1, 0]
    """
    numbers = range(len(eq.factors))
    ends = [eq.absorb(numbers[::-1]), eq.absorb(numbers)]
    return min(ends, key=lambda steps: sum(step.flops(eq) for step in steps))


@lru_cache(maxsize=1024)
def unfoldings(spec: Spec) -> tuple[Unfolding, ...]:
    """Return the unfolding of each factor, in the order of the spec."""
    found: list[Unfolding] = []
    for eq in spec.equations:
        steps = {step.factor: step for step in application(eq)}
        found += (_unfolding(eq, steps[k]) for k in range(len(eq.factors)))
    return tuple(found)


def _unfolding(eq: Equation, step: Absorption) -> Unfolding:
    rows, columns = step.batch + step.new, step.summed
    modes = rows + columns
    return Unfolding(
        modes, eq.shape(modes), tuple(modes.index(mode) for mode in eq.factors[step.factor].modes), eq.numel(rows),
        math.prod(eq.shape(columns)),
    )  # fmt: skip
