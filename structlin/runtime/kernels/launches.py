"""Write a structured matrix as launches for a GPU: one for each factor, with tables of offsets. No Triton here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from structlin.equation.spec import Equation, Spec
from structlin.runtime.kernels.layouts import Link, links
from structlin.runtime.kernels.program import offsets, strides
from structlin.runtime.planner import Machine

SWITCH = "STRUCTLIN_TRITON"  # environment variable, "on" or "off" (the default)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tables, and pairs of (token, free entry), are counted in int32; the pairs of a last tile may lie beyond.
MOST = 2**31 - 2**10
MOST_BLOCKS = 2**16 - 1  # CUDA's third axis of a grid


def chosen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether $STRUCTLIN_TRITON asks for Triton, and it takes these: on a GPU, or in its interpreter."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and dtype in DTYPES and os.environ.get(SWITCH, "off").lower() == "on"


def countable(spec: Spec, rows: int) -> bool:
    """Return whether the launches of a matrix can count so many rows, and its factors' entries."""
    stages = [stage for chain in chains(spec) for stage in chain]
    sizes = [*map(math.prod, spec.shapes), *(max(stage.a_size, stage.b_size) for stage in stages)]
    pairs, blocks = (max(counts) for counts in zip(*((rows * s.counts[1], s.counts[0]) for s in stages), strict=True))
    return max(pairs, *sizes) <= MOST and blocks <= MOST_BLOCKS


def seconds(spec: Spec, rows: int, itemsize: int, machine: Machine) -> float:
    """Predict the time of a forward pass in s: each launch as a product of its sizes."""
    total = 0.0
    for stage in (stage for chain in chains(spec) for stage in chain):
        blocks, free, new, summed = stage.counts
        total += machine.product(blocks, rows * free, summed, new, itemsize)
    return total


@dataclass(frozen=True)
class Stage:
    """One factor w absorbed, for every token: over blocks g, free entries f, rows j, summed over columns q,

        b[b_block(g) + b_free(f) + b_row(j)] += sum_q w[w_block(g) + w_row(j) + w_column(q)]
                                                      a[a_block(g) + a_free(f) + a_column(q)].

    Blocks are the modes that factor and activations share and keep, free entries those of the activations only. All
    tables stand in one tensor, in the order of the fields.
    """  # fmt: skip

    factor: int
    a_size: int  # entries of a token in a; offsets beyond are of the padding, which reads as 0 and is not written
    b_size: int
    counts: tuple[int, int, int, int]  # of blocks, free entries, rows, columns
    tables: tuple[tuple[int, ...], ...]  # a_block, b_block, w_block, a_free, b_free, b_row, w_row, a_column, w_column

    @property
    def transposed(self) -> Stage:
        """The stage that maps the gradient of b to that of a."""
        a_block, b_block, w_block, a_free, b_free, b_row, w_row, a_column, w_column = self.tables
        tables = (b_block, a_block, w_block, b_free, a_free, a_column, w_column, b_row, w_row)
        blocks, free, rows, columns = self.counts
        return replace(
            self, a_size=self.b_size, b_size=self.a_size, counts=(blocks, free, columns, rows), tables=tables
        )

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tables on a device."""
        return _tables(self, device)


@lru_cache(maxsize=4096)
def _tables(stage: Stage, device: torch.device) -> tuple[Tensor, ...]:
    whole = torch.tensor([offset for table in stage.tables for offset in table], dtype=torch.int32, device=device)
    return whole.split([len(table) for table in stage.tables])


@lru_cache(maxsize=1024)
def chains(spec: Spec) -> tuple[tuple[Stage, ...], ...]:
    """Write the stages of each equation; the results of all equations are added."""
    return tuple(
        tuple(_stages(spec, eq, chain, numbers[0]))
        for (eq, numbers), chain in zip(spec.split(range(len(spec.factors))), links(spec, False), strict=True)
    )


def _stages(spec: Spec, eq: Equation, chain: Sequence[Link], first: int) -> Iterator[Stage]:
    size = spec.in_features
    for step, link in enumerate(chain):
        absorbed, last = link.absorbed, step == len(chain) - 1
        a, w, b = (strides(eq, modes) for modes in (link.before, eq.factors[absorbed.factor].modes, link.after))
        block, free = absorbed.batch, absorbed.free
        tables = (
            *(offsets(eq, block, places) for places in (a, b, w)),
            *(offsets(eq, free, places) for places in (a, b)),
            *(offsets(eq, absorbed.new, places) for places in (b, w)),
            *(offsets(eq, absorbed.summed, places) for places in (a, w)),
        )
        counts = (len(tables[0]), len(tables[3]), len(tables[5]), len(tables[7]))
        after = spec.out_features if last else eq.numel(link.after)
        yield Stage(first + absorbed.factor, size, after, counts, tables)
        size = after
