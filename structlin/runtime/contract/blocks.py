"""Differentiate products with the dense matrix by blocks of rows: the whole is never in memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from structlin.equation.spec import Equation, Spec
from structlin.runtime.contract.forward import to_dense


@dataclass(frozen=True)
class Block:
    """Rows of the matrix of one equation: an index of each leading output mode, and some of the next mode.

    Args:
        spec: what gives these rows.
        start: the first of them.
        ranges: (start, stop) of the modes that are cut, by name.
    """

    spec: Spec
    start: int
    ranges: Mapping[str, tuple[int, int]]

    @property
    def rows(self) -> slice:
        """The rows of the whole matrix."""
        return slice(self.start, self.start + self.spec.out_features)

    def cut(self, factors: Sequence[Tensor | None]) -> list[Tensor]:
        """The parts of factors, or of tensors like them, that give these rows, as views; of those that there are."""
        parts = []
        for factor, tensor in zip(self.spec.factors, factors, strict=True):
            if tensor is not None:
                cuts = (slice(*self.ranges.get(mode, (None,))) for mode in factor.modes)
                parts.append(tensor[tuple(cuts)])
        return parts


@lru_cache(maxsize=1024)
def blocks(spec: Spec, eq: Equation, most: int) -> tuple[Block, ...]:
    """Divide an equation of a spec into blocks of at most so many rows."""
    cut = next(k for k in range(len(eq.outputs)) if eq.numel(eq.outputs[k + 1 :]) <= most)
    leading, mode, inner = eq.outputs[:cut], eq.outputs[cut], eq.numel(eq.outputs[cut + 1 :])
    size = eq.size[mode]
    length = -(-size // -(-size // (most // inner)))  # as equal as can be
    found = []
    indices = itertools.product(*map(range, eq.shape(leading)))
    starts = range(0, size, length)
    for number, (index, start) in enumerate(itertools.product(indices, starts)):
        row = (number // len(starts) * size + start) * inner
        ranges = {name: (i, i + 1) for name, i in zip(leading, index, strict=True)}
        ranges[mode] = start, min(start + length, size)
        lengths = {name: stop - first for name, (first, stop) in ranges.items()}
        rows = min(lengths[mode] * inner, spec.out_features - row)
        if rows > 0:
            sizes = tuple((name, lengths.get(name, whole)) for name, whole in eq.sizes)
            part = Spec(spec.in_features, rows, (replace(eq, sizes=sizes),))
            found.append(Block(part, row, ranges))
    return tuple(found)


def pulled_back(
    spec: Spec, x: Tensor, factors: Sequence[Tensor], slopes: Tensor, of_input: bool, wanted: Sequence[int], most: int
) -> tuple[Tensor, ...]:
    """Differentiate y = x W^T without a graph, by blocks of at most so many rows of W: see `gradients`."""
    sums = [torch.zeros_like(factor) if k in wanted else None for k, factor in enumerate(factors)]
    of_x = torch.zeros_like(x) if of_input else None
    for (eq, part), (_, totals) in zip(spec.split(factors), spec.split(sums), strict=True):
        for block in blocks(spec, eq, most):
            _pull(block, part, x, slopes[:, block.rows], of_x, totals)
    return tuple(total for total in (of_x, *sums) if total is not None)


def _pull(
    block: Block, factors: Sequence[Tensor], x: Tensor, slopes: Tensor, of_x: Tensor | None,
    sums: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Add the gradients for one block."""
    leaves = [part.detach() for part in block.cut(factors)]
    learned = [k for k, total in enumerate(sums) if total is not None]
    with torch.enable_grad():
        weight = to_dense(block.spec, [leaf.requires_grad_(k in learned) for k, leaf in enumerate(leaves)])
    if of_x is not None:
        of_x.addmm_(slopes, weight.detach().conj())
    if learned:
        found = torch.autograd.grad(weight, [leaves[k] for k in learned], slopes.mT @ x.conj())
        for total, gradient in zip(block.cut(sums), found, strict=True):
            total.add_(gradient)
