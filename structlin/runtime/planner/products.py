"""List the ways to contract two operands as one matrix product or stack of products, each with its cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

from structlin.equation.spec import Equation, Modes, contraction
from structlin.runtime.planner.machine import Machine
from structlin.runtime.planner.plan import TOKENS, Cost

Groups = tuple[Modes, Modes, Modes]  # an operand read as a stack: modes of (batch, rows, columns)


@dataclass(frozen=True)
class Product:
    """One way to multiply two operands."""

    left: Modes  # layout of the left operand
    right: Modes
    left_groups: Groups  # how to read the left operand: (batch, rows, summed)
    right_groups: Groups  # (batch, summed, columns)
    swapped: bool  # the factor is the left operand, the activations are the right one
    broadcast: bool  # the left operand is one matrix for the whole batch
    out: Modes  # layout of the result
    copies: tuple[bool, bool]  # whether reading the left, and the right, copies it into another layout
    cost: Cost
    seconds: float  # predicted

    @property
    def sides(self) -> tuple[tuple[Modes, Groups, bool], tuple[Modes, Groups, bool]]:
        """The left and the right operand: layout, groups, whether it is copied."""
        return (self.left, self.left_groups, self.copies[0]), (self.right, self.right_groups, self.copies[1])


@dataclass(frozen=True)
class Merged:
    """Neighbouring factors contracted with one another."""

    modes: Modes  # layout of the result
    seconds: float = 0.0  # predicted; 0 where folded
    middle: int = 0  # index of the factor that the right half begins with
    product: Product | None = None  # of the two halves; None for a single factor


class Products:
    """The products of one equation for one number of tokens; if folded, copies of factors cost nothing."""

    def __init__(self, eq: Equation, tokens: int, itemsize: int, machine: Machine, folded: bool) -> None:
        self.itemsize = itemsize
        self.machine = machine
        self.folded = folded
        self.size = {**eq.size, TOKENS: tokens}

    def numel(self, modes: Iterable[str]) -> int:
        """Count the entries of a tensor with these modes, tokens included."""
        return math.prod([self.size[mode] for mode in modes])

    def copy(self, modes: Modes, order: Modes) -> float:
        """Predict the time to copy a tensor with these modes into another order, in s."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(modes), reversed(order), strict=False))
        run = self.numel(mode for mode, _ in same)  # innermost entries that stay neighbours
        return self.machine.copy(self.numel(modes), self.itemsize, run=run, axes=len(blocks(modes, order)))

    def ways(self, a: Modes, b: Modes, needed: frozenset[str]) -> Iterator[Product]:
        """Yield all ways to multiply activations (or merged factors) `a` by a factor `b` in one batched product."""
        batch, free_a, free_b, summed = contraction(a, b, needed)
        # x @ W, then W @ x: which one is free of copies depends on the layout of the activations.
        yield self.product(a, b, (batch, free_a, summed), (batch, summed, free_b), batch + free_a + free_b)
        yield self.product(
            b, a, (batch, free_b, summed), (batch, summed, free_a), batch + free_b + free_a, swapped=True
        )
        # Where the summed modes are neighbours in the middle of the activations, (before, summed, after) is a view:
        # W is broadcast over the leading modes, and nothing is copied.
        first = a.index(summed[0]) if summed else 0
        before, after = a[:first], a[first + len(summed) :]
        if not batch and before and after and a[first : first + len(summed)] == summed:
            yield self.product(
                b, a, ((), free_b, summed), (before, summed, after), before + free_b + after,
                swapped=True, broadcast=True,
            )  # fmt: skip

    def training(self, product: Product) -> float:
        """Predict the time of a product with its gradients in s: three products, and layout copies there and back."""
        batch, summed, columns = map(self.numel, product.right_groups)
        rows = self.numel(product.left_groups[1])
        once = self.machine.product(batch, rows, summed, columns, self.itemsize)
        left = self.machine.product(batch, rows, columns, summed, self.itemsize)
        right = self.machine.product(batch, summed, rows, columns, self.itemsize)
        if product.broadcast:  # the gradient of the one matrix is one product
            left = self.machine.product(1, rows, batch * columns, summed, self.itemsize)
        return left + right + once + 2 * max(0.0, product.seconds - once)

    def product(
        self, left: Modes, right: Modes, left_groups: Groups, right_groups: Groups, out: Modes,
        *, swapped: bool = False, broadcast: bool = False,
    ) -> Product:  # fmt: skip
        """Count and time one way."""
        half = self.itemsize < 4
        copies = needs_copy(left, left_groups, half), needs_copy(right, right_groups, half)
        if self.folded and TOKENS in out:  # only the operand with tokens is copied for each input
            copies = copies[0] and TOKENS in left, copies[1] and TOKENS in right
        sizes = self.numel(left), self.numel(right)
        sides = zip(sizes, copies, (left, right), (left_groups, right_groups), strict=True)
        copied = [(size, self.copy(modes, sum(groups, ()))) for size, copy, modes, groups in sides if copy]
        batch, summed, columns = map(self.numel, right_groups)
        rows = self.numel(left_groups[1])
        if summed == 1 and TOKENS not in out:  # factors: multiplied entry by entry
            seconds = self.machine.outer(batch, rows, columns, self.itemsize)
        else:
            seconds = self.machine.product(batch, rows, summed, columns, self.itemsize)
        seconds += sum(seconds for _, seconds in copied)
        cost = Cost(
            f"[{' '.join(left)}] * [{' '.join(right)}] -> [{' '.join(out)}]",
            2 * self.numel(out) * summed,
            self.itemsize * (sum(sizes) + self.numel(out) + 2 * sum(size for size, _ in copied)),
            1 + len(copied),
        )
        return Product(left, right, left_groups, right_groups, swapped, broadcast, out, copies, cost, seconds)


def blocks(modes: Modes, order: Modes) -> list[Modes]:
    """Group the modes that stay neighbours, in the same order, in another layout."""
    found: list[Modes] = [modes[:1]]
    for first, second in pairwise(modes):
        if order.index(second) == order.index(first) + 1:
            found[-1] += (second,)
        else:
            found.append((second,))
    return found


def needs_copy(modes: Modes, groups: Groups, half: bool) -> bool:
    """Return whether reading a tensor with these modes as a (batch, rows, columns) stack copies it."""
    position = {mode: k for k, mode in enumerate(modes)}
    # Each group has to be one axis with one stride.
    runs = all(position[b] == position[a] + 1 for group in groups for a, b in pairwise(group))
    if not runs or not modes or not groups[0]:
        return not runs
    # torch.bmm falls to a slow loop where the batch is the innermost axis: copy first. In two-byte dtypes it makes
    # such a copy itself, for each product, where the batch stands between transposed rows and columns.
    return modes[-1] in groups[0] or (half and modes[0] in groups[2] and modes[-1] in groups[1])
