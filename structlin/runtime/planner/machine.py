"""What operations cost on a machine: records that the planner weighs plans by."""

from __future__ import annotations

import math
from dataclasses import dataclass

LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, from which the times of products and copies are predicted.

    Args:
        name: shown in plans.
        flops: rate of large matrix products in float32, in FLOP/s (a multiply and an add are 2).
        bandwidth: of operands that are in a cache, in B/s.
        op: fixed cost of one operation, the Python around it included, in s.
        half_flops: rate in two-byte dtypes, in FLOP/s; as in float32 where not given.
        half_op: what an operation costs more in two-byte dtypes, in s.
        far_bandwidth: of operands beyond the last cache, in B/s; as within it where not given.
        cache: bytes of that cache.
        core_cache: bytes of activations that are worked on at a time, so that they stay close to a core.
        copies: of copies into another layout in which neighbours come apart, bytes read and written, in B/s; as
            `bandwidth` where not given.
        turns: of copies that are transpositions of matrices, likewise; as `copies` where not given.
        native: how many times longer the native kernel takes for tiles of tokens than its own record says.
        native_few: the same for a few tokens.
        tile: rows and columns that a product is rounded up to; 0 for a CPU, where `thinness` says what thin ones cost.
    """

    name: str
    flops: float
    bandwidth: float
    op: float
    half_flops: float | None = None
    half_op: float = 0.0
    far_bandwidth: float | None = None
    cache: float = math.inf
    core_cache: float = math.inf
    copies: float | None = None
    turns: float | None = None
    native: float = 1.0
    native_few: float = 1.0
    tile: int = 0

    def product(self, batch: int, rows: int, summed: int, columns: int, itemsize: int = 4) -> float:
        """Predict the time of a product (batch, rows, summed) x (batch, summed, columns) in s.

        Its FLOPs or its bytes, whichever take longer, and an operation.
        """
        nbytes = itemsize * batch * (rows * summed + summed * columns + rows * columns)
        if self.tile:
            flops = 2.0 * batch * _up(rows, self.tile) * summed * _up(columns, self.tile)
            slower = 1.0
        else:
            rows = rows if itemsize >= 4 else _up(rows, HALF_ROWS)
            slower = thinness(batch, rows, summed, columns) * (HALF_STACK if itemsize < 4 and batch > 1 else 1)
            flops = 2.0 * batch * rows * summed * columns
        half = itemsize < 4
        rate = self.half_flops or self.flops if half else self.flops * 4 / itemsize
        return max(flops * slower / rate, nbytes / self._bandwidth(nbytes)) + self.op + half * self.half_op

    def copy(self, entries: float, itemsize: int = 4, run: int = 1, axes: int = 3) -> float:
        """Predict the time to bring so many entries into another layout, in s.

        Two-byte entries take as long as float32.

        Args:
            entries: how many.
            itemsize: bytes of each.
            run: how many neighbours stay together.
            axes: how many change places; two are a transposition.
        """
        rate = self.copies or self.bandwidth
        if run * itemsize >= LINE:
            rate = self.bandwidth
        elif axes == 2:
            rate = self.turns or rate
        return 2 * entries * max(itemsize, 4) / rate + self.op

    def _bandwidth(self, nbytes: float) -> float:
        return self.bandwidth if nbytes <= self.cache else self.far_bandwidth or self.bandwidth


# Products in two-byte dtypes on a CPU, as measured: 1 to 16 rows take the same time, and stacks of strided matrices
# are brought into another layout first.
HALF_ROWS, HALF_STACK = 16, 2.5


def _up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def thinness(batch: int, rows: int, summed: int, columns: int) -> float:
    """How many times longer a matrix product takes than its FLOPs say because it is thin.

    Fitted to products timed with torch 2.13 and MKL on one AVX-512 core: a stack of tiny products goes through a
    scalar loop, one of products with single columns through a slow kernel; below 16 columns a product costs as much as
    one with 32; few rows or short sums run at a part of the rate, below 8 rows at a third. A single matrix times a
    vector is fast.
    """
    if min(batch, rows, summed, columns) == 0:
        return 1.0
    if batch > 1 and rows * summed * columns < 400:
        return 44.0
    if batch > 1 and columns == 1:
        return 32.0
    thin = 1 + (4.4 / rows if rows >= 8 else 2.0) + 2.5 / summed
    if columns >= 16 or (batch == columns == 1):
        return thin + min(4.5 / columns, 1.0)
    return (thin + 0.28) * 32 / columns


# One AVX-512 core (AMD EPYC, torch 2.13 with MKL).
CPU = Machine(
    "cpu, 1 thread", flops=96e9, bandwidth=60e9, op=3e-6, half_flops=430e9, half_op=12e-6, far_bandwidth=22e9,
    cache=24 << 20, core_cache=512 << 10, copies=7e9, turns=17e9,
)  # fmt: skip

# NVIDIA H200, from its data sheet (TF32 off); the cost of an operation is an estimate. Nothing of it was measured here.
H200 = Machine(
    "NVIDIA H200 (data sheet)", flops=67e12, bandwidth=4.8e12, op=6e-6, half_flops=989e12, copies=2.4e12, tile=64
)  # fmt: skip

# The native kernel on the same core as CPU: all stages in one operation, tiles of tokens in cache.
NATIVE = Machine("native cpu kernel, 1 thread", flops=140e9, bandwidth=40e9, op=3e-6)
# Up to so many tokens it goes row by row; `kernels.layouts` says what that takes, beyond reading the factors.
NATIVE_ROWS = 3
NATIVE_FEW = Machine("native cpu kernel, few tokens", flops=48e9, bandwidth=65e9, op=2.5e-6)


def dense_seconds(
    in_features: int, out_features: int, tokens: int, itemsize: int = 4, machine: Machine = CPU
) -> float:  # fmt: skip
    """Predict the time of `F.linear` in s."""
    return machine.product(1, tokens, in_features, out_features, itemsize)


def bucket(tokens: int) -> int:
    """The power of two at or above `tokens`: plans are shared within it."""
    return 1 << max(tokens - 1, 0).bit_length()
