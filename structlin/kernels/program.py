"""Write a structured matrix as a program for the native kernel: stages with tables of offsets, as integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from structlin.spec import Equation, Modes, Spec

HEADER, RECORD = 8, 17  # integers, as in chain.cpp
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
        tables: x, v, o over the outer i; r, m over the rows; c, n over the columns q.
    """

    factor: int
    source: int
    target: int
    accumulate: bool
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
        return [self.factor, *buffers, *self.shape, order, _counts(c), entries, *starts]


def _counts(table: Sequence[int]) -> bool:
    """Whether a table is 0, 1, 2, .."""
    return all(offset == k for k, offset in enumerate(table))


def _run(*tables: Sequence[int]) -> int:
    """The length of the runs in which all outer tables advance by one, 0 if it is below 4 or varies."""
    length = next((k for k in range(1, len(tables[0])) if any(t[k] != t[k - 1] + 1 for t in tables)), len(tables[0]))
    starts = range(0, len(tables[0]), length)
    even = all(t[k + d] == t[k] + d for t in tables for k in starts for d in range(length) if k + d < len(t))
    return length if length >= SHORTEST_RUN and len(tables[0]) % length == 0 and even else 0


@lru_cache(maxsize=1024)
def stages(spec: Spec) -> tuple[Stage, ...]:
    """Find the stages of all equations, each chain in its cheaper direction."""
    found: list[Stage] = []
    first = 0
    for eq in spec.equations:
        found += _stages(eq, _cheaper(eq), first, bool(found))
        first += len(eq.factors)
    return tuple(found)


@lru_cache(maxsize=1024)
def cost(spec: Spec) -> tuple[int, int]:
    """FLOPs of the stages for one token, and the entries of factors that a single token has to put in order first.

    Cheap, also where the tables would be huge.
    """
    costs = [_cost(eq, _cheaper(eq)) for eq in spec.equations]
    return sum(flops for flops, _ in costs), sum(turned for _, turned in costs)


@lru_cache(maxsize=1024)
def program(spec: Spec) -> tuple[int, ...]:
    """Write the program of a spec: a header, a record for each stage, then the tables."""
    chain = stages(spec)
    position = HEADER + RECORD * len(chain)
    records: list[int] = []
    tables: list[int] = []
    for stage in chain:
        records += stage.record(position + len(tables))
        tables += [offset for table in stage.tables for offset in table]
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
    ]
    return tuple(map(int, [*header, *records, *tables]))


@dataclass(frozen=True)
class _Role:
    """What one factor does: its modes that stay, those of the activations that it does not touch, new and summed."""

    factor: int
    batch: Modes
    free: Modes
    new: Modes
    summed: Modes

    def flops(self, eq: Equation) -> int:
        return 2 * eq.numel(self.batch + self.free + self.new + self.summed)

    def in_order(self, eq: Equation) -> bool:
        """Whether the factor's innermost modes are those that are summed, or one that is shared."""
        modes = eq.factors[self.factor].modes
        return modes[len(modes) - len(self.summed) :] == self.summed or modes[-1] in self.batch


def _roles(eq: Equation, forward: bool) -> tuple[_Role, ...]:
    """Absorb the factors of an equation one by one."""
    order = range(len(eq.factors)) if forward else range(len(eq.factors) - 1, -1, -1)
    roles = []
    state: Modes = eq.inputs
    for step, k in enumerate(order):
        modes = eq.factors[k].modes
        needed = {*eq.outputs, *(mode for later in order[step + 1 :] for mode in eq.factors[later].modes)}
        known = [mode for mode in modes if mode in state]
        role = _Role(
            k,
            batch=tuple(mode for mode in known if mode in needed),
            free=tuple(mode for mode in state if mode not in modes),
            new=tuple(mode for mode in modes if mode not in state),
            summed=tuple(mode for mode in known if mode not in needed),
        )
        roles.append(role)
        state = role.batch + role.free + role.new
    return tuple(roles)


def _cost(eq: Equation, roles: Sequence[_Role]) -> tuple[int, int]:
    turned = [eq.factors[role.factor].modes for role in roles if not role.in_order(eq)]
    return sum(role.flops(eq) for role in roles), sum(eq.numel(modes) for modes in turned)


def _cheaper(eq: Equation) -> tuple[_Role, ...]:
    """The direction with fewer FLOPs; where they are nearly equal, with factors that are in order."""

    def weight(roles: tuple[_Role, ...]) -> float:
        flops, turned = _cost(eq, roles)
        return flops + 0.1 * turned

    return min((_roles(eq, True), _roles(eq, False)), key=weight)


def _stages(eq: Equation, roles: Sequence[_Role], first: int, accumulate: bool) -> Iterator[Stage]:
    """Lay the activations out and write the tables; `first` is the number of the equation's first factor."""
    layout: Modes = eq.inputs
    source = INPUT
    for step, role in enumerate(roles):
        last = step == len(roles) - 1
        outer = role.batch + role.free
        # The next sum runs over the innermost modes, in the order of its factor, or its vectors along a shared mode.
        innermost = () if last else _innermost(eq, roles[step + 1])
        out = eq.outputs if last else tuple(m for m in outer + role.new if m not in innermost) + innermost
        a, w, b = (_strides(eq, modes) for modes in (layout, eq.factors[role.factor].modes, out))
        target = OUTPUT if last else (FIRST, SECOND)[step % 2]
        tables = (
            _offsets(eq, outer, a), _offsets(eq, outer, w), _offsets(eq, outer, b),
            _offsets(eq, role.new, b), _offsets(eq, role.new, w),
            _offsets(eq, role.summed, a), _offsets(eq, role.summed, w),
        )  # fmt: skip
        yield Stage(first + role.factor, source, target, last and accumulate, tables)
        layout, source = out, target


def _innermost(eq: Equation, role: _Role) -> Modes:
    final = eq.factors[role.factor].modes[-1]
    return (final,) if final in role.batch else role.summed


def _strides(eq: Equation, modes: Modes) -> dict[str, int]:
    """Row-major strides by mode."""
    return {mode: eq.numel(modes[k + 1 :]) for k, mode in enumerate(modes)}


def _offsets(eq: Equation, modes: Modes, strides: Mapping[str, int]) -> tuple[int, ...]:
    """Offsets of all combinations of modes, the last innermost; a mode without a stride does not move."""
    steps = [range(0, eq.size[mode] * strides.get(mode, 0), strides[mode]) if mode in strides else [0] * eq.size[mode]
             for mode in modes]  # fmt: skip
    return tuple(map(sum, product(*steps)))
