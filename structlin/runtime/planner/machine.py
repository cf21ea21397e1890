"""Predict what matrix products and copies cost on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from structlin.runtime import costs


@dataclass(frozen=True)
class Machine:
    """Rates of a machine (FLOP/s, B/s, s, B), from which the planner predicts the times of products and copies."""

    name: str  # shown in plans
    flops: float  # rate of large float32 products; a multiply and an add are 2
    bandwidth: float  # of operands in a cache
    op: float  # fixed cost of an operation, Python included
    half_flops: float | None = None  # rate in two-byte dtypes; None: as in float32
    half_op: float = 0.0  # extra cost of an operation in two-byte dtypes
    far_bandwidth: float | None = None  # of operands beyond the last cache; None: `bandwidth`
    cache: float = math.inf  # size of the last cache
    core_cache: float = math.inf  # size of the cache next to a core; a chunk's activations should fit
    copy_bandwidth: float | None = None  # of layout copies that separate neighbours, read + written; None: `bandwidth`
    transpose_bandwidth: float | None = None  # of copies that transpose a matrix; None: `copy_bandwidth`
    native: float = 1.0  # time of the native kernel for tiles of tokens / time predicted by its own record
    native_few: float = 1.0  # the same ratio for a few tokens
    per_row: float = costs.PER_ROW  # of n rows, a product loses the time of per_row more: `thinness`
    tile: int = 0  # rows and columns of a product are rounded up to multiples; 0: a CPU, where `thinness` applies

    def product(self, batch: int, rows: int, summed: int, columns: int, itemsize: int) -> float:
        """Predict the time of a product (batch, rows, summed) x (batch, summed, columns) in s.

        A roofline: the larger of compute time and memory time, plus the fixed cost of an operation.
        """
        nbytes = itemsize * batch * (rows * summed + summed * columns + rows * columns)
        half = itemsize < 4
        moved, slower = float(nbytes), 1.0
        if self.tile:
            rows, columns = _up(rows, self.tile), _up(columns, self.tile)
        else:
            if half:
                moved *= 4 / itemsize  # the conversion makes two-byte entries as slow as float32
                rows, columns = _at_least(batch, rows, columns)
            slower = thinness(batch, rows, summed, columns, self.per_row)
            slower *= costs.HALF_STACK if half and batch > 1 else 1
        flops = 2.0 * batch * rows * summed * columns
        rate = self.half_flops or self.flops if half else self.flops * 4 / itemsize
        return max(flops * slower / rate, moved / self._bandwidth(nbytes)) + self.op + half * self.half_op

    def outer(self, batch: int, rows: int, columns: int, itemsize: int) -> float:
        """Predict the time of outer products, (batch, rows, 1) x (batch, 1, columns) entry by entry, in s."""
        nbytes = max(itemsize, 4) * batch * (rows + columns + rows * columns)
        seconds = nbytes / min(self._bandwidth(nbytes), self.transpose_bandwidth or math.inf)
        return max(seconds, 2.0 * batch * rows * columns / self.flops) + self.op

    def copy(self, entries: float, itemsize: int, *, run: int = 1, axes: int = 3) -> float:
        """Predict the time of a copy in s: `run` entries stay neighbours, `axes` axes change places."""
        rate = self.copy_bandwidth or self.bandwidth
        if run * itemsize >= costs.LINE:
            rate = self.bandwidth
        elif axes == 2:  # a transposition
            rate = self.transpose_bandwidth or rate
        return 2 * entries * max(itemsize, 4) / rate + self.op  # two-byte entries take as long as float32

    def _bandwidth(self, nbytes: float) -> float:
        return self.bandwidth if nbytes <= self.cache else self.far_bandwidth or self.bandwidth


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _at_least(batch: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of a product in a two-byte dtype that takes as long and is not thin."""
    if batch == columns == 1:  # as fast as a single row
        rows, columns = columns, rows
    return max(rows, costs.HALF_ROWS), max(columns, costs.HALF_COLUMNS)


def thinness(batch: int, rows: int, summed: int, columns: int, per_row: float) -> float:
    """Return the slowdown of a thin matrix product on a CPU: its time / the time that its FLOPs suggest.

    Stacks of tiny products and of matrix-vector products fall to slow loops. Few rows, short sums and few columns run
    below the full rate. A single matrix times a vector is fast. `costs` has the numbers.
    """
    if min(batch, rows, summed, columns) == 0:
        return 1.0
    if batch > 1 and rows * summed * columns < costs.TINY:
        return costs.TINY_STACK
    if batch > 1 and columns == 1:
        return costs.VECTOR_STACK
    thin = 1 + (per_row / rows if rows >= costs.ROWS else costs.FEW_ROWS) + costs.PER_SUM / summed
    if columns >= costs.COLUMNS or (batch == columns == 1):
        return thin + min(costs.PER_COLUMN / columns, costs.MOST_COLUMN)
    return (thin + costs.NARROW_EXTRA) * costs.NARROW / columns


CPU = Machine(**costs.CPU)
CPU_AMX = Machine(**costs.CPU_AMX)
H200 = Machine(**costs.H200)
NATIVE = Machine(**costs.NATIVE)
NATIVE_FEW = Machine(**costs.NATIVE_FEW)


def dense_seconds(in_features: int, out_features: int, tokens: int, *, itemsize: int = 4, machine: Machine) -> float:
    """Predict the time of `F.linear` in s."""
    return machine.product(1, tokens, in_features, out_features, itemsize)


def bucket(tokens: int) -> int:
    """Round up to a power of two; numbers of tokens in one bucket share a plan."""
    return 1 << max(tokens - 1, 0).bit_length()
