"""Write a structured matrix as a program for the native kernel: stages with tables of offsets, as integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from structlin.equation.spec import Equation, Modes, Spec
from structlin.runtime.kernels.layouts import Link, links

HEADER, RECORD = 11, 18  # integers, as in chain.cpp
SHORTEST_RUN = 4  # of outer indices, in floats of the smallest vector
INPUT, OUTPUT, FIRST, SECOND = range(4)  # buffers; the last two in turn


@dataclass(frozen=True)
class Stage:
    """One factor absorbed: b[o(i) + r(j)] += sum_q w[v(i) + m(j) + n(q)] a[x(i) + c(q)] for outer i and rows j.

    Args:
        factor: number of w.
        source: buffer of a.
        target: buffer of b.
        accumulate: add to b instead of overwriting it.
        shared: outer i that follow one another share w, and have neighbouring a and b, in runs of this length.
        tables: x, v, o over the outer i; r, m over the rows; c, n over the columns q.
    """

    factor: int
    source: int
    target: int
    accumulate: bool
    shared: int
    tables: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of outer, rows and columns."""
        x, _, _, r, _, c, _ = self.tables
        return len(x), len(r), len(c)

    @property
    def flops(self) -> int:
        """For one token."""
        return 2 * math.prod(self.shape)

    def record(self, position: int) -> list[int]:
        """Write the stage down, its tables beginning at a position of the program."""
        x, v, o, _, m, c, n = self.tables
        entries = max(v) + max(m) + max(n) + 1  # of the factor
        starts = []
        for table in self.tables:
            starts.append(position)
            position += len(table)
        buffers = self.source, self.target, self.accumulate
        order = 1 if _counts(n) else _run(x, v, o)
        return [self.factor, *buffers, *self.shape, order, _counts(c), entries, self.shared, *starts]


def _counts(table: Sequence[int]) -> bool:
    """Whether a table is 0, 1, 2, .."""
    return all(offset == k for k, offset in enumerate(table))


def _run(*tables: Sequence[int]) -> int:
    """The length of the runs in which all outer tables advance by one, 0 if it is below 4 or varies."""
    length = next((k for k in range(1, len(tables[0])) if any(t[k] != t[k - 1] + 1 for t in tables)), len(tables[0]))
    starts = range(0, len(tables[0]), length)
    even = all(t[k + d] == t[k] + d for t in tables for k in starts for d in range(length) if k + d < len(t))
    return length if length >= SHORTEST_RUN and len(tables[0]) % length == 0 and even else 0


def stages(spec: Spec, few: bool) -> tuple[Stage, ...]:
    """Write the tables of all chains, for tiles of tokens or for a few."""
    found: list[Stage] = []
    for (eq, numbers), chain in zip(spec.split(range(len(spec.factors))), links(spec, few), strict=True):
        found += _stages(eq, chain, numbers[0], bool(found))
    return tuple(found)


@lru_cache(maxsize=1024)
def program(spec: Spec) -> tuple[int, ...]:
    """Write the program of a spec: that for tiles of tokens, which knows where the one for a few begins behind it."""
    size = len(_program(spec, False, 0))
    if links(spec, True) == links(spec, False):
        return _program(spec, False, 0)
    return (*_program(spec, False, size), *_program(spec, True, 0))


def _program(spec: Spec, few: bool, other: int) -> tuple[int, ...]:
    """A header, a record for each stage, then the tables."""
    chain = stages(spec, few)
    position = HEADER + RECORD * len(chain)
    records: list[int] = []
    tables: list[int] = []
    for stage in chain:
        records += stage.record(position + len(tables))
        tables += [offset for table in stage.tables for offset in table]
    eq, whole = spec.equations[0], links(spec, few)[0]  # several equations take inputs and outputs as they are
    places: list[int] = []
    for table in (_places(eq, eq.inputs, whole[0].before), _places(eq, eq.outputs, whole[-1].after)):
        places.append(position + len(tables) if table else 0)
        tables += table
    inner = [max(stage.tables[2]) + max(stage.tables[3]) + 1 for stage in chain if stage.target != OUTPUT]
    header = [
        len(chain),
        spec.in_features,
        spec.out_features,
        max(eq.padded_in for eq in spec.equations),
        max(eq.padded_out for eq in spec.equations),
        max(inner, default=0),
        max(size for stage in chain for size in stage.shape[1:]),
        max((stage.shape[1] * stage.shape[2] for stage in chain if not _counts(stage.tables[6])), default=0),
        *places,
        other,
    ]
    return tuple(map(int, [*header, *records, *tables]))


def _stages(eq: Equation, chain: Sequence[Link], first: int, accumulate: bool) -> Iterator[Stage]:
    """Write the tables of a chain; `first` is the number of the equation's first factor."""
    source = INPUT
    for step, link in enumerate(chain):
        last = step == len(chain) - 1
        role, outer = link.absorbed, link.outer
        a, w, b = (_strides(eq, modes) for modes in (link.before, eq.factors[role.factor].modes, link.after))
        target = OUTPUT if last else (FIRST, SECOND)[step % 2]
        tables = (
            _offsets(eq, outer, a), _offsets(eq, outer, w), _offsets(eq, outer, b),
            _offsets(eq, role.new, b), _offsets(eq, role.new, w),
            _offsets(eq, role.summed, a), _offsets(eq, role.summed, w),
        )  # fmt: skip
        yield Stage(first + role.factor, source, target, last and accumulate, link.run(eq), tables)
        source = target


def _places(eq: Equation, natural: Modes, layout: Modes) -> tuple[int, ...]:
    """Where the entries of an input or output stand in a layout; nothing where they stay in place."""
    return () if layout == natural else _offsets(eq, natural, _strides(eq, layout))


def _strides(eq: Equation, modes: Modes) -> dict[str, int]:
    """Row-major strides by mode."""
    return {mode: eq.numel(modes[k + 1 :]) for k, mode in enumerate(modes)}


def _offsets(eq: Equation, modes: Modes, strides: Mapping[str, int]) -> tuple[int, ...]:
    """Offsets of all combinations of modes, the last innermost; a mode without a stride does not move."""
    steps = [range(0, eq.size[mode] * strides.get(mode, 0), strides[mode]) if mode in strides else [0] * eq.size[mode]
             for mode in modes]  # fmt: skip
    return tuple(map(sum, product(*steps)))
