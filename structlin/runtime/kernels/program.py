"""Write a structured matrix as a program for the native kernel: stages with tables of offsets, as integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

from structlin.equation.spec import Equation, Modes, Spec
from structlin.runtime.costs import NATIVE_ROWS
from structlin.runtime.kernels.layouts import Link, links

SHORTEST_RUN = 4  # floats of the smallest vector: shorter runs of outer indices do not fill one
Chains = Sequence[Sequence[Link]]  # of each equation

INPUT, OUTPUT, FIRST, SECOND = range(4)  # buffers of activations; intermediates alternate between the last two


class Header(NamedTuple):
    """The first integers of a program; program.h has the same fields."""

    stages: int  # number of stages
    in_features: int
    out_features: int
    in_rows: int  # size of the padded input
    out_rows: int  # size of the padded output
    rows: int  # size of the largest intermediate
    widest: int  # most rows or columns of a stage
    block: int  # entries of the largest block of a factor that has to be gathered into order
    inputs: int  # position of the table of the input's places, 0 if all entries stay in place
    outputs: int  # the same for the output
    few: int  # position of the program for single tokens, 0 if this one serves them too
    few_tokens: int  # up to this many tokens run one by one


class Record(NamedTuple):
    """The integers of a stage; program.h has the same fields."""

    factor: int
    source: int
    target: int
    accumulates: int
    outer: int  # number of outer indices
    rows: int
    columns: int
    order: int  # 1: w_column counts up from 0; above: length of the runs in which all outer tables advance by one
    packed: int  # 1: a_column counts up from 0
    entries: int  # entries of w that the offsets reach
    shared: int
    a_outer: int  # position of this table; the other six follow
    w_outer: int
    b_outer: int
    b_row: int
    w_row: int
    a_column: int
    w_column: int


class Tables(NamedTuple):
    """Offsets of the outer indices, rows and columns of a stage in its input a, factor w and result b."""

    a_outer: tuple[int, ...]
    w_outer: tuple[int, ...]
    b_outer: tuple[int, ...]
    b_row: tuple[int, ...]
    w_row: tuple[int, ...]
    a_column: tuple[int, ...]
    w_column: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One factor absorbed.

    For outer indices i and rows j, summed over columns q:
    b[b_outer(i) + b_row(j)] += sum_q w[w_outer(i) + w_row(j) + w_column(q)] a[a_outer(i) + a_column(q)].
    Outer indices run over the modes that stay (batch and free), rows over the new ones, columns over those summed.
    """

    factor: int  # index of w
    source: int  # buffer of a
    target: int  # buffer of b
    accumulates: bool  # add to b instead of overwriting it
    shared: int  # length of the runs of outer indices that share their block of w and are contiguous in a and b
    tables: Tables

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of outer indices, rows and columns."""
        return len(self.tables.a_outer), len(self.tables.b_row), len(self.tables.a_column)

    @property
    def flops(self) -> int:
        """FLOPs for one token."""
        return 2 * math.prod(self.shape)

    def record(self, position: int) -> Record:
        """Write the stage down, its tables beginning at this position of the program."""
        tables = self.tables
        entries = max(tables.w_outer) + max(tables.w_row) + max(tables.w_column) + 1
        starts = accumulate(map(len, tables[:-1]), initial=position)
        order = 1 if _counts(tables.w_column) else _run(tables.a_outer, tables.w_outer, tables.b_outer)
        return Record(
            self.factor, self.source, self.target, self.accumulates, *self.shape, order, _counts(tables.a_column),
            entries, self.shared, *starts,
        )  # fmt: skip


def _counts(table: Sequence[int]) -> bool:
    """Return whether a table is 0, 1, 2, .."""
    return all(offset == k for k, offset in enumerate(table))


def _run(*tables: Sequence[int]) -> int:
    """Return the length of the runs in which all tables advance by one; 0 if it varies or does not fill a vector."""
    length = next((k for k in range(1, len(tables[0])) if any(t[k] != t[k - 1] + 1 for t in tables)), len(tables[0]))
    starts = range(0, len(tables[0]), length)
    even = all(t[k + d] == t[k] + d for t in tables for k in starts for d in range(length) if k + d < len(t))
    return length if length >= SHORTEST_RUN and len(tables[0]) % length == 0 and even else 0


def stages(spec: Spec, few: bool) -> tuple[Stage, ...]:
    """Write the stages of all equations, for tiles of tokens or for a few."""
    return _all_stages(spec, links(spec, few))


def _all_stages(spec: Spec, chains: Chains) -> tuple[Stage, ...]:
    found: list[Stage] = []
    for (eq, numbers), chain in zip(spec.split(range(len(spec.factors))), chains, strict=True):
        found += _stages(eq, chain, numbers[0], bool(found))
    return tuple(found)


@lru_cache(maxsize=1024)
def program(spec: Spec) -> tuple[int, ...]:
    """Write the program for tiles of tokens and, behind it, the one for a few tokens if its layouts differ."""
    few, tiles = links(spec, True), links(spec, False)
    if few == tiles:
        return program_of(spec, tiles)
    size = len(program_of(spec, tiles))
    return (*program_of(spec, tiles, size), *program_of(spec, few))


def program_of(spec: Spec, chains: Chains, other: int = 0) -> tuple[int, ...]:
    """Write a header, a record for each stage, then the tables; `other` is the position of another program."""
    chain = _all_stages(spec, chains)
    position = len(Header._fields) + len(Record._fields) * len(chain)
    records: list[int] = []
    tables: list[int] = []
    for stage in chain:
        records += stage.record(position + len(tables))
        tables += [offset for table in stage.tables for offset in table]
    eq, whole = spec.equations[0], chains[0]  # only a single equation permutes its input and output
    places: list[int] = []
    for table in (_places(eq, eq.inputs, whole[0].before), _places(eq, eq.outputs, whole[-1].after)):
        places.append(position + len(tables) if table else 0)
        tables += table
    inner = [max(stage.tables.b_outer) + max(stage.tables.b_row) + 1 for stage in chain if stage.target != OUTPUT]
    gathered = [stage for stage in chain if not _counts(stage.tables.w_column)]
    header = Header(
        stages=len(chain),
        in_features=spec.in_features,
        out_features=spec.out_features,
        in_rows=max(eq.padded_in for eq in spec.equations),
        out_rows=max(eq.padded_out for eq in spec.equations),
        rows=max(inner, default=0),
        widest=max(size for stage in chain for size in stage.shape[1:]),
        block=max((stage.shape[1] * stage.shape[2] for stage in gathered), default=0),
        inputs=places[0],
        outputs=places[1],
        few=other,
        few_tokens=NATIVE_ROWS,
    )
    return tuple(map(int, [*header, *records, *tables]))


def _stages(eq: Equation, chain: Sequence[Link], first: int, adds: bool) -> Iterator[Stage]:
    """Write the stages of a chain; `first` is the index of its first factor, `adds` keeps what the output holds."""
    source = INPUT
    for step, link in enumerate(chain):
        last = step == len(chain) - 1
        absorbed, outer = link.absorbed, link.outer
        a, w, b = (strides(eq, modes) for modes in (link.before, eq.factors[absorbed.factor].modes, link.after))
        target = OUTPUT if last else (FIRST, SECOND)[step % 2]
        tables = Tables(
            offsets(eq, outer, a), offsets(eq, outer, w), offsets(eq, outer, b),
            offsets(eq, absorbed.new, b), offsets(eq, absorbed.new, w),
            offsets(eq, absorbed.summed, a), offsets(eq, absorbed.summed, w),
        )  # fmt: skip
        yield Stage(first + absorbed.factor, source, target, last and adds, link.run(eq), tables)
        source = target


def _places(eq: Equation, natural: Modes, layout: Modes) -> tuple[int, ...]:
    """Return the places of an input's or output's entries in a layout; nothing if all stay in place."""
    return () if layout == natural else offsets(eq, natural, strides(eq, layout))


def strides(eq: Equation, modes: Modes) -> dict[str, int]:
    """Return the row-major stride of each mode."""
    return {mode: eq.numel(modes[k + 1 :]) for k, mode in enumerate(modes)}


def offsets(eq: Equation, modes: Modes, strides: Mapping[str, int]) -> tuple[int, ...]:
    """Return the offsets of all combinations of modes, the last innermost; a mode without a stride adds nothing."""
    steps = [range(0, eq.size[mode] * strides.get(mode, 0), strides[mode]) if mode in strides else [0] * eq.size[mode]
             for mode in modes]  # fmt: skip
    return tuple(map(sum, product(*steps)))
