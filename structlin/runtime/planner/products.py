"""One product of two operands: the ways to do it as a matrix product or a stack of them, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

from structlin.equation.spec import Equation, Modes
from structlin.runtime.planner.machine import Machine
from structlin.runtime.planner.plan import TOKENS, Cost

Groups = tuple[Modes, Modes, Modes]  # the (batch, rows, columns) of an operand


@dataclass(frozen=True)
class Product:
    """One way to multiply two operands: which goes left, how each is read, and what it costs."""

    left: Modes
    right: Modes
    left_groups: Groups
    right_groups: Groups
    swapped: bool  # the factor goes left, the activations go right
    broadcast: bool  # the left operand is shared over the batch
    out: Modes
    copies: tuple[bool, bool]
    cost: Cost
    seconds: float

    @property
    def sides(self) -> tuple[tuple[Modes, Groups, bool], tuple[Modes, Groups, bool]]:
        """Left and right: modes, groups, and whether it is copied."""
        return (self.left, self.left_groups, self.copies[0]), (self.right, self.right_groups, self.copies[1])


@dataclass(frozen=True)
class Merged:
    """Neighbouring factors contracted with one another; a single factor has no product."""

    modes: Modes
    seconds: float = 0.0  # none where it is done once, beforehand
    middle: int = 0
    product: Product | None = None


class Products:
    """Products of the operands of one equation, for one number of tokens.

    Args:
        eq: the equation.
        tokens: rows of the input.
        itemsize: bytes per element.
        machine: cost record.
        folded: copies of factors are made once, beforehand, and cost nothing.
    """

    def __init__(self, eq: Equation, tokens: int, itemsize: int, machine: Machine, folded: bool) -> None:
        self.itemsize = itemsize
        self.machine = machine
        self.folded = folded
        self.size = {**eq.size, TOKENS: tokens}

    def numel(self, modes: Iterable[str]) -> int:
        return math.prod([self.size[mode] for mode in modes])

    def copy(self, modes: Modes, order: Modes) -> float:
        """Predict the time to bring a tensor with these modes into an order, in s."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(modes), reversed(order), strict=False))
        run = self.numel(mode for mode, _ in same)
        return self.machine.copy(self.numel(modes), self.itemsize, run, len(blocks(modes, order)))

    def ways(self, a: Modes, b: Modes, needed: frozenset[str]) -> Iterator[Product]:
        """All ways to multiply activations (or merged factors) `a` by a factor `b` in one batched product."""
        shared = [mode for mode in a if mode in b]
        batch = tuple(mode for mode in shared if mode in needed)
        summed = tuple(mode for mode in shared if mode not in needed)
        free_a = tuple(mode for mode in a if mode not in shared)
        free_b = tuple(mode for mode in b if mode not in shared)
        # x @ W, then W @ x: which one is free of copies depends on the layout of the activations.
        yield self.product(a, b, (batch, free_a, summed), (batch, summed, free_b), batch + free_a + free_b)
        yield self.product(
            b, a, (batch, free_b, summed), (batch, summed, free_a), batch + free_b + free_a, swapped=True
        )
        # Summed modes in the middle of the activations: share W over the leading modes, no copy at all.
        first = a.index(summed[0]) if summed else 0
        before, after = a[:first], a[first + len(summed) :]
        if not batch and before and after and a[first : first + len(summed)] == summed:
            yield self.product(
                b, a, ((), free_b, summed), (before, summed, after), before + free_b + after,
                swapped=True, broadcast=True,
            )  # fmt: skip

    def product(
        self, left: Modes, right: Modes, left_groups: Groups, right_groups: Groups, out: Modes,
        *, swapped: bool = False, broadcast: bool = False,
    ) -> Product:  # fmt: skip
        copies = _needs_copy(left, left_groups), _needs_copy(right, right_groups)
        if self.folded and TOKENS in out:  # the factor is copied once, beforehand
            copies = copies[0] and TOKENS in left, copies[1] and TOKENS in right
        sizes = self.numel(left), self.numel(right)
        sides = zip(sizes, copies, (left, right), (left_groups, right_groups), strict=True)
        copied = [(size, self.copy(modes, sum(groups, ()))) for size, copy, modes, groups in sides if copy]
        batch, summed, columns = map(self.numel, right_groups)
        rows = self.numel(left_groups[1])
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
    """Modes that stay neighbours in another order, together."""
    found: list[Modes] = [modes[:1]]
    for first, second in pairwise(modes):
        if order.index(second) == order.index(first) + 1:
            found[-1] += (second,)
        else:
            found.append((second,))
    return found


def _needs_copy(modes: Modes, groups: Groups) -> bool:
    """Whether reading a tensor with these modes as a (batch, rows, columns) stack copies it."""
    position = {mode: k for k, mode in enumerate(modes)}
    runs = all(position[b] == position[a] + 1 for group in groups for a, b in pairwise(group))
    # A stack whose innermost axis is the batch sends torch.bmm into a slow loop: copy it first.
    return not runs or (bool(modes) and modes[-1] in groups[0])
