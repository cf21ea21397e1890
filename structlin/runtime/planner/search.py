"""Search for the fastest predicted plan of an equation.

The factors form a chain. Neighbours may be merged into one operand first, and the input absorbs the operands from
either end of the chain. "Materialise" is the plan that merges all factors before they meet the input. The search
minimises the predicted time of products, layout copies included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from structlin.equation.spec import Equation, Modes, Spec, contraction
from structlin.runtime.planner.machine import Machine
from structlin.runtime.planner.plan import TOKENS, EquationPlan, Merge, Plan, Shape, Step, View
from structlin.runtime.planner.products import Merged, Product, Products
from structlin.runtime.planner.write import Writer

Order = Literal["auto", "forward", "backward", "materialise"]
ORDERS: tuple[Order, ...] = ("auto", "forward", "backward", "materialise")

_BEAM = 3  # layouts kept per position of the chain
_CHAIN = 24  # factors of the longest chain in which all merges of neighbours are searched
_LENGTH = 6  # neighbours that longer chains merge at most, unless all of them


@dataclass(frozen=True)
class _State:
    """A partial plan."""

    modes: Modes  # layout of the activations
    absorbed: tuple[tuple[int, int, Product], ...]  # for each operand so far: its factors lo..hi-1 and the product
    cost: float  # predicted time so far, in s


class _Search:
    """Dynamic programming over the positions of the chain, for one equation and one number of tokens."""

    def __init__(self, eq: Equation, tokens: int, itemsize: int, machine: Machine, folded: bool) -> None:
        self.eq = eq
        self.itemsize = itemsize
        self.machine = machine
        self.tokens = tokens
        self.folded = folded
        self.products = Products(eq, tokens, itemsize, machine, folded)
        self.external = frozenset((*eq.outputs, *eq.inputs))
        self.count = len(eq.factors)
        self.known: dict[tuple[int, int], Merged] = {}

    # Merging neighbours ------------------------------------------------------------------------------------------

    def merged(self, lo: int, hi: int) -> Merged:
        """Contract the factors lo..hi-1 with one another."""
        if hi - lo == 1:
            return Merged(self.eq.factors[lo].modes)
        if (lo, hi) not in self.known:
            # The optimal split in short chains, halves in long ones.
            middle = self.splits[lo, hi] if self.count <= _CHAIN else (lo + hi) // 2
            left, right = self.merged(lo, middle), self.merged(middle, hi)
            options = self.products.ways(left.modes, right.modes, self.outside(lo, hi))
            best = min(options, key=lambda option: option.seconds)
            seconds = 0.0 if self.folded else left.seconds + right.seconds + best.seconds
            self.known[lo, hi] = Merged(best.out, seconds, middle, best)
        return self.known[lo, hi]

    def training(self, lo: int, hi: int) -> float:
        """Predict the time to merge the factors lo..hi-1 and to differentiate that, in s."""
        merged = self.merged(lo, hi)
        if merged.product is None:
            return 0.0
        halves = self.training(lo, merged.middle) + self.training(merged.middle, hi)
        return halves + self.products.training(merged.product)

    def outside(self, lo: int, hi: int) -> frozenset[str]:
        """Return the modes that the merged factors lo..hi-1 must keep: those that something outside needs."""
        others = (*self.eq.factors[:lo], *self.eq.factors[hi:])
        return self.external.union(*(factor.modes for factor in others))

    @cached_property
    def splits(self) -> dict[tuple[int, int], int]:
        """Where to split each interval of factors for the cheapest merge, by matrix-chain dynamic programming.

        Costs leave out layout copies: `merged` chooses layouts afterwards.
        """
        held = {
            (lo, hi): self.outside(lo, hi) & {mode for factor in self.eq.factors[lo:hi] for mode in factor.modes}
            for lo in range(self.count)
            for hi in range(lo + 1, self.count + 1)
        }
        cost = dict.fromkeys(((i, i + 1) for i in range(self.count)), 0.0)
        split: dict[tuple[int, int], int] = {}
        for length in range(2, self.count + 1):
            for lo in range(self.count - length + 1):
                hi = lo + length
                options = []
                for middle in range(lo + 1, hi):
                    batch, rows, columns, summed = map(
                        self.products.numel, contraction(held[lo, middle], held[middle, hi], held[lo, hi])
                    )
                    if summed == 1:
                        seconds = self.machine.outer(batch, rows, columns, self.itemsize)
                    else:
                        seconds = self.machine.product(batch, rows, summed, columns, self.itemsize)
                    options.append((cost[lo, middle] + cost[middle, hi] + seconds, middle))
                cost[lo, hi], split[lo, hi] = min(options)
        return split

    # Absorbing the chain -----------------------------------------------------------------------------------------

    def sweep(self, forward: bool, lengths: Sequence[int], bound: float = math.inf) -> _State | None:
        """Find the best plan that absorbs groups of the given lengths from one end; None if all exceed `bound`."""
        states: list[list[_State]] = [[] for _ in range(self.count + 1)]
        states[0].append(_State((TOKENS, *self.eq.inputs), (), 0.0))
        for done in range(self.count):
            for state in _best(states[done]):
                for length in lengths:
                    if done + length <= self.count:
                        states[done + length].extend(self.absorb(state, done, length, forward, bound))
        return min(map(self.finished, states[-1]), key=lambda state: state.cost, default=None)

    def absorb(self, state: _State, done: int, length: int, forward: bool, bound: float) -> Iterator[_State]:
        """Yield the states after the next `length` factors, merged, are absorbed in one product."""
        lo = done if forward else self.count - done - length
        hi = lo + length
        merged = self.merged(lo, hi)
        if state.cost + merged.seconds > bound:
            return
        remaining = self.eq.factors[hi:] if forward else self.eq.factors[:lo]
        needed = frozenset((TOKENS, *self.eq.outputs)).union(*(factor.modes for factor in remaining))
        for product in self.products.ways(state.modes, merged.modes, needed):
            cost = state.cost + merged.seconds + product.seconds
            yield _State(product.out, (*state.absorbed, (lo, hi, product)), cost)

    def finished(self, state: _State) -> _State:
        """Add the cost of copying the result into (tokens, outputs) order."""
        ordered = (TOKENS, *self.eq.outputs)
        copy = 0.0 if self.in_order(state) else self.products.copy(state.modes, ordered)
        return replace(state, cost=state.cost + copy)

    def in_order(self, state: _State) -> bool:
        """Return whether the last product gives the output without a copy.

        A matrix product gives its transpose as well, by exchanging the operands: (W x^T)^T = x W^T.
        """
        outputs, (_, _, last) = self.eq.outputs, state.absorbed[-1]
        turned = state.modes == (*outputs, TOKENS) and not last.right_groups[0]
        return state.modes == (TOKENS, *outputs) or turned

    def plan(self, state: _State) -> EquationPlan:
        """Write a finished state as a plan."""
        writer = Writer(self.eq, self.merged)
        steps: list[Step] = []
        inner: list[int] = []  # entries per token
        saved = 0
        held: list[tuple[int, int]] = []
        modes: Modes = (TOKENS, *self.eq.inputs)
        shape: Shape = (-1, self.eq.padded_in)
        for lo, hi, product in state.absorbed:
            steps.append(writer.step(lo, hi, product, shape))
            before, after = (self.products.numel(some) // max(1, self.tokens) for some in (modes, product.out))
            inner += [before, after] if steps[-1].view.copy else [after]
            saved += before if steps[-1].view.copy or len(steps) > 1 else 0  # the input itself is there anyway
            external = len(steps) == len(state.absorbed) and self.in_order(state)  # the gradient of the output
            held.append((saved + before + (0 if external else after), self.products.numel(self.merged(lo, hi).modes)))
            modes, shape = product.out, writer.shape_of(product)
        last = inner.pop()  # the output itself, perhaps in another order
        copied = not self.in_order(state)
        ordered = (TOKENS, *self.eq.outputs)
        training = 2 * self.products.copy(modes, ordered) * copied
        training += sum(self.products.training(product) + self.training(lo, hi) for lo, hi, product in state.absorbed)
        result = writer.view(modes, ((), (TOKENS,), self.eq.outputs), copied, shape)
        return EquationPlan(
            self.eq, self.tokens, self.itemsize, self.machine, self.folded, tuple(writer.merges), tuple(steps), result,
            sum(inner), max([*inner, last * copied]), saved, tuple(held), state.cost, training,
        )  # fmt: skip


def _best(states: list[_State]) -> list[_State]:
    """Keep the cheapest state of each layout, and of these the cheapest few."""
    by_layout: dict[Modes, _State] = {}
    for state in sorted(states, key=lambda state: state.cost):
        by_layout.setdefault(state.modes, state)
    return list(by_layout.values())[:_BEAM]


@lru_cache(maxsize=1024)
def find_plan(
    spec: Spec, tokens: int, *, machine: Machine, itemsize: int = 4, order: Order = "auto", folded: bool = False
) -> Plan:  # fmt: skip
    """Search for the plan with the least predicted time; it is valid for any number of tokens, its costs for `tokens`.

    Args:
        order: "auto" searches; "forward" and "backward" absorb one factor at a time, beginning with the first or the
            last; "materialise" builds the dense matrix first.
        folded: the factors are constant; see `EquationPlan`.
    Raises:
        ValueError: if order is unknown.
    Example:
        >>> from structlin.equation.spec import equation
        >>> from structlin.runtime.planner import CPU
        >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 64, "r": 16, "i": 64})
        >>> print(find_plan(Spec(64, 64, (eq,)), 32, machine=CPU, order="backward"))
        o r, r i -> o i
        2 products for 32 tokens on cpu, 1 thread: 131,072 FLOPs, 28,672 B, 0.00792 ms predicted
          [r i] * [n i] -> [r n]           65,536 FLOPs         14,336 B  1 ops
          [r n] * [o r] -> [n o]           65,536 FLOPs         14,336 B  1 ops
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; use one of {ORDERS}")
    return Plan(tuple(_find(eq, tokens, itemsize, machine, order, folded) for eq in spec.equations))


def _find(eq: Equation, tokens: int, itemsize: int, machine: Machine, order: Order, folded: bool) -> EquationPlan:
    search = _Search(eq, tokens, itemsize, machine, folded)
    single = [1]
    every = [*range(1, search.count + 1)] if search.count <= _CHAIN else [*range(1, _LENGTH + 1), search.count]
    options: Sequence[_State | None]
    if order == "auto":
        # The sequential plans are quick to find, and their cost bounds the search.
        options = [search.sweep(forward, single) for forward in (True, False)]
        bound = min(state.cost for state in options if state)
        options = [*options, *(search.sweep(forward, every, bound) for forward in (True, False))]
    elif order == "materialise":
        options = [search.sweep(True, [search.count])]
    else:
        options = [search.sweep(order == "forward", single)]
    return search.plan(min((state for state in options if state), key=lambda state: state.cost))


@lru_cache(maxsize=1024)
def merge_plan(eq: Equation, *, machine: Machine) -> tuple[tuple[Merge, ...], View]:
    """Plan the dense matrix of an equation: merges of all factors, and how to read the last as (outputs, inputs)."""
    writer = Writer(eq, _Search(eq, 1, 4, machine, folded=False).merged)
    view = writer.dense()
    return tuple(writer.merges), view


@lru_cache(maxsize=1024)
def flops_per_token(spec: Spec) -> int:
    """Count the FLOPs for one token, one factor at a time, in the cheaper direction of each equation."""
    total = 0
    for eq in spec.equations:
        forward = range(len(eq.factors))
        total += min(sum(one.flops(eq) for one in eq.absorb(order)) for order in (forward, forward[::-1]))
    return total
