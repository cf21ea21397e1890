"""Choose how to contract an equation with a batch of tokens: pure integer code, tested without tensors.

A plan is a list of matrix products. The factors form a chain; neighbours may be merged into one operand first, and
the input absorbs the operands from either end of the chain. "Materialise" is the plan that merges everything before
it meets the input. The search minimises the predicted time: FLOPs, bytes moved (layout copies included) and ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from structlin.spec import Equation, Modes, Spec

Order = Literal["auto", "forward", "backward", "materialise"]
ORDERS: tuple[Order, ...] = ("auto", "forward", "backward", "materialise")

TOKENS = "n"  # the name of the token axis in a plan; mode names of equations must differ from it
_BEAM = 3  # layouts kept per position of the chain


@dataclass(frozen=True)
class Machine:
    """What an operation costs.

    Args:
        name: shown in plans.
        flops: matrix product rate in FLOP/s (a multiply and an add are 2).
        bandwidth: memory traffic in B/s.
        op: fixed cost of one operation in s.
    """

    name: str
    flops: float
    bandwidth: float
    op: float

    def seconds(self, flops: float, nbytes: float, ops: float) -> float:
        """Predicted time: the three costs added, as little overlaps on a CPU."""
        return flops / self.flops + nbytes / self.bandwidth + ops * self.op


# One AVX-512 core at float32: GEMM rate, DRAM bandwidth and op cost measured in benchmarks of the TT layer.
CPU = Machine("cpu, 1 thread, float32", flops=90e9, bandwidth=28e9, op=8e-6)


@dataclass(frozen=True)
class View:
    """How an operand becomes a (batch, rows, columns) stack; sizes below 0 stand for that many times the tokens."""

    axes: tuple[int, ...]
    shape: tuple[int, int, int]
    copy: bool
    broadcast: bool = False  # the operand lacks the batch axis: it is shared by stride 0


@dataclass(frozen=True)
class Step:
    """One batched matrix product; operands are numbered: factors first, then the input, then results in order."""

    left: int
    right: int
    left_view: View
    right_view: View
    out_modes: Modes
    out_shape: tuple[int, ...]
    text: str
    flops: int
    nbytes: int
    ops: int


@dataclass(frozen=True)
class EquationPlan:
    """A contraction of one equation with an input of `tokens` rows; prints itself as a table.

    `flops`, `nbytes` and `seconds` are predictions for `tokens`; the steps are right for any number of tokens.
    `axes` puts the modes of the last result into (tokens, outputs) order.
    """

    equation: Equation
    tokens: int
    itemsize: int
    machine: Machine
    steps: tuple[Step, ...]
    axes: tuple[int, ...]
    flops: int
    nbytes: int
    seconds: float

    @property
    def materialises(self) -> bool:
        """Whether the dense matrix is built first."""
        return sum(TOKENS in step.out_modes for step in self.steps) == 1 and len(self.steps) > 1

    def __str__(self) -> str:
        kind = "materialise, then one product" if self.materialises else f"{len(self.steps)} products"
        head = (
            f"{self.equation}\n{kind} for {self.tokens} tokens on {self.machine.name}: "
            f"{self.flops:,} FLOPs, {self.nbytes:,} B, {self.seconds * 1e3:.3g} ms predicted"
        )
        width = max(len(step.text) for step in self.steps)
        rows = [f"  {s.text:<{width}}  {s.flops:>15,} FLOPs  {s.nbytes:>13,} B  {s.ops} ops" for s in self.steps]
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class Plan:
    """The plans of all equations of a spec, in its order; their predicted costs add up."""

    parts: tuple[EquationPlan, ...]

    @property
    def flops(self) -> int:
        """FLOPs for the planned number of tokens."""
        return sum(part.flops for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes read and written, layout copies included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """Predicted time in s."""
        return sum(part.seconds for part in self.parts)

    @property
    def materialises(self) -> bool:
        """Whether every equation builds its dense matrix first."""
        return all(part.materialises for part in self.parts)

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))


@dataclass(frozen=True)
class _Operand:
    slot: int
    modes: Modes


@dataclass(frozen=True)
class _State:
    """A partial plan: the current operand, the steps that led to it, and their cost."""

    operand: _Operand
    steps: tuple[Step, ...]
    cost: float


class _Search:
    """Dynamic programming over the positions of the chain, for one equation and one number of tokens."""

    def __init__(self, eq: Equation, tokens: int, itemsize: int, machine: Machine) -> None:
        self.eq = eq
        self.tokens = tokens
        self.itemsize = itemsize
        self.machine = machine
        self.external = frozenset((*eq.outputs, *eq.inputs))
        self.count = len(eq.factors)

    # Sizes -----------------------------------------------------------------------------------------------------

    def numel(self, modes: Sequence[str]) -> int:
        return math.prod(self.tokens if mode == TOKENS else self.eq.size[mode] for mode in modes)

    def encoded(self, modes: Sequence[str]) -> int:
        size = self.eq.numel([mode for mode in modes if mode != TOKENS])
        return -size if TOKENS in modes else size

    def seconds(self, steps: Sequence[Step]) -> float:
        return self.machine.seconds(
            sum(s.flops for s in steps), sum(s.nbytes for s in steps), sum(s.ops for s in steps)
        )

    # One product -------------------------------------------------------------------------------------------------

    def view(self, modes: Modes, groups: tuple[Modes, Modes, Modes], broadcast: bool = False) -> View:
        axes = tuple(modes.index(mode) for group in groups for mode in group)
        contiguous_runs = all(
            position + 1 == following
            for group in groups
            for position, following in zip(
                [modes.index(m) for m in group], [modes.index(m) for m in group[1:]], strict=False
            )
        )
        # A stack whose innermost axis is the batch sends torch.bmm into a slow loop: copy it first.
        copy = not contiguous_runs or (bool(modes) and modes[-1] in groups[0])
        shape = (self.encoded(groups[0]), self.encoded(groups[1]), self.encoded(groups[2]))
        return View(axes, shape, copy, broadcast)

    def product(self, a: _Operand, b: _Operand, needed: frozenset[str], slot: int) -> Iterator[Step]:
        """All ways to multiply activation (or factor) `a` by factor `b` in one batched product."""
        shared = [mode for mode in a.modes if mode in b.modes]
        batch = tuple(mode for mode in shared if mode in needed)
        summed = tuple(mode for mode in shared if mode not in needed)
        free_a = tuple(mode for mode in a.modes if mode not in shared)
        free_b = tuple(mode for mode in b.modes if mode not in shared)
        # x @ W, then W @ x: which one is free of copies depends on the layout of the activations.
        yield self.step(
            a, b, self.view(a.modes, (batch, free_a, summed)), self.view(b.modes, (batch, summed, free_b)),
            batch + free_a + free_b, slot, summed,
        )  # fmt: skip
        yield self.step(
            b, a, self.view(b.modes, (batch, free_b, summed)), self.view(a.modes, (batch, summed, free_a)),
            batch + free_b + free_a, slot, summed,
        )  # fmt: skip
        # Summed modes in the middle of the activations: share W over the leading modes, no copy at all.
        first = a.modes.index(summed[0]) if summed else 0
        if not batch and first > 0 and a.modes[first : first + len(summed)] == summed:
            before, after = a.modes[:first], a.modes[first + len(summed) :]
            if after:
                shared_view = self.view(b.modes, ((), free_b, summed), broadcast=True)
                yield self.step(
                    b,
                    a,
                    shared_view,
                    self.view(a.modes, (before, summed, after)),
                    before + free_b + after,
                    slot,
                    summed,
                )

    def step(
        self, left: _Operand, right: _Operand, left_view: View, right_view: View, out: Modes, slot: int, summed: Modes
    ) -> Step:
        copied = sum(
            2 * self.numel(operand.modes)
            for operand, view in ((left, left_view), (right, right_view))
            if view.copy
        )  # fmt: skip
        moved = self.numel(left.modes) + self.numel(right.modes) + self.numel(out) + copied
        return Step(
            left.slot, right.slot, left_view, right_view, out, tuple(self.encoded((mode,)) for mode in out),
            f"[{' '.join(left.modes)}] * [{' '.join(right.modes)}] -> [{' '.join(out)}]",
            flops=2 * self.numel((*out, *summed)),
            nbytes=self.itemsize * moved,
            ops=1 + left_view.copy + right_view.copy,
        )  # fmt: skip

    # Merging neighbours ------------------------------------------------------------------------------------------

    def merged(self, start: int, stop: int, slot: int) -> tuple[_Operand, tuple[Step, ...]]:
        """Contract the factors start..stop-1 with one another; results are numbered from `slot`."""

        def build(lo: int, hi: int, free: int) -> tuple[_Operand, tuple[Step, ...]]:
            if hi - lo == 1:
                return _Operand(lo, self.eq.factors[lo].modes), ()
            middle = self.splits[lo, hi]
            left, left_steps = build(lo, middle, free)
            right, right_steps = build(middle, hi, free + len(left_steps))
            free += len(left_steps) + len(right_steps)
            step = self.best_product(left, right, self.outside(lo, hi), free)
            return _Operand(free, step.out_modes), (*left_steps, *right_steps, step)

        return build(start, stop, slot)

    def best_product(self, a: _Operand, b: _Operand, needed: frozenset[str], slot: int) -> Step:
        return min(self.product(a, b, needed, slot), key=lambda step: self.seconds([step]))

    def outside(self, start: int, stop: int) -> frozenset[str]:
        """Modes that the merged factors start..stop-1 must keep."""
        others = (*self.eq.factors[:start], *self.eq.factors[stop:])
        return self.external | {mode for factor in others for mode in factor.modes}

    @cached_property
    def splits(self) -> dict[tuple[int, int], int]:
        """Matrix-chain dynamic programming: where to split each interval of factors so that merging it is cheapest."""
        cost: dict[tuple[int, int], float] = {(i, i + 1): 0.0 for i in range(self.count)}
        modes: dict[tuple[int, int], Modes] = {(i, i + 1): f.modes for i, f in enumerate(self.eq.factors)}
        split: dict[tuple[int, int], int] = {}
        for length in range(2, self.count + 1):
            for lo in range(self.count - length + 1):
                hi = lo + length
                options = []
                for middle in range(lo + 1, hi):
                    a, b = _Operand(0, modes[lo, middle]), _Operand(1, modes[middle, hi])
                    step = self.best_product(a, b, self.outside(lo, hi), 2)
                    total = cost[lo, middle] + cost[middle, hi] + self.seconds([step])
                    options.append((total, middle, step.out_modes))
                cost[lo, hi], split[lo, hi], modes[lo, hi] = min(options, key=lambda option: option[:2])
        return split

    # Absorbing the chain -----------------------------------------------------------------------------------------

    def sweep(self, forward: bool, lengths: Sequence[int]) -> _State:
        """Best plan that absorbs groups of the given lengths from one end of the chain."""
        start = _State(_Operand(self.count, (TOKENS, *self.eq.inputs)), (), 0.0)
        states: list[list[_State]] = [[start], *([] for _ in range(self.count))]
        for done in range(self.count):
            for state in _best(states[done]):
                for length in lengths:
                    stop = done + length
                    if stop <= self.count:
                        states[stop].extend(self.absorb(state, done, stop, forward))
        return min(map(self.finished, states[-1]), key=lambda state: state.cost)

    def absorb(self, state: _State, done: int, stop: int, forward: bool) -> Iterator[_State]:
        lo, hi = (done, stop) if forward else (self.count - stop, self.count - done)
        remaining = self.eq.factors[hi:] if forward else self.eq.factors[:lo]
        needed = frozenset((TOKENS, *self.eq.outputs, *(mode for factor in remaining for mode in factor.modes)))
        slot = self.count + 1 + len(state.steps)
        operand, merge = self.merged(lo, hi, slot)
        slot += len(merge)
        for step in self.product(state.operand, operand, needed, slot):
            steps = (*merge, step)
            yield _State(_Operand(slot, step.out_modes), state.steps + steps, state.cost + self.seconds(steps))

    def finished(self, state: _State) -> _State:
        """Add the cost of bringing the result into (tokens, outputs) order."""
        if state.operand.modes == (TOKENS, *self.eq.outputs):
            return state
        nbytes = 2 * self.itemsize * self.numel(state.operand.modes)
        return _State(state.operand, state.steps, state.cost + self.machine.seconds(0, nbytes, 1))

    def plan(self, state: _State) -> EquationPlan:
        modes = state.operand.modes
        return EquationPlan(
            self.eq, self.tokens, self.itemsize, self.machine, state.steps,
            axes=tuple(modes.index(mode) for mode in (TOKENS, *self.eq.outputs)),
            flops=sum(step.flops for step in state.steps),
            nbytes=sum(step.nbytes for step in state.steps),
            seconds=state.cost,
        )  # fmt: skip


def _best(states: list[_State]) -> list[_State]:
    """The cheapest state of each layout, the cheapest layouts only."""
    by_layout: dict[Modes, _State] = {}
    for state in sorted(states, key=lambda state: state.cost):
        by_layout.setdefault(state.operand.modes, state)
    return list(by_layout.values())[:_BEAM]


@lru_cache(maxsize=1024)
def find_plan(
    spec: Spec, tokens: int, *, itemsize: int = 4, machine: Machine = CPU, order: Order = "auto"
) -> Plan:  # fmt: skip
    """Search for the fastest predicted plan.

    Args:
        spec: the structured matrix.
        tokens: rows of the input.
        itemsize: bytes per element.
        machine: cost record.
        order: "auto" searches; "forward" and "backward" absorb one factor at a time from the first or the last;
            "materialise" builds the dense matrix first.
    Returns:
        A Plan, right for any number of tokens and predicted for `tokens`.
    Raises:
        ValueError: if order is unknown.
    Example:
        >>> from structlin.spec import equation
        >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 64, "r": 4, "i": 64})
        >>> print(find_plan(Spec(64, 64, (eq,)), 32, order="backward"))
        o r, r i -> o i
        2 products for 32 tokens on cpu, 1 thread, float32: 32,768 FLOPs, 19,456 B, 0.0171 ms predicted
          [n i] * [r i] -> [n r]           16,384 FLOPs          9,728 B  1 ops
          [n r] * [o r] -> [n o]           16,384 FLOPs          9,728 B  1 ops
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; use one of {ORDERS}")
    return Plan(tuple(_find(eq, tokens, itemsize, machine, order) for eq in spec.equations))


def _find(eq: Equation, tokens: int, itemsize: int, machine: Machine, order: Order) -> EquationPlan:
    search = _Search(eq, tokens, itemsize, machine)
    if order == "auto":
        lengths = range(1, search.count + 1)
        state = min((search.sweep(forward, lengths) for forward in (True, False)), key=lambda state: state.cost)
    elif order == "materialise":
        state = search.sweep(True, [search.count])
    else:
        state = search.sweep(order == "forward", [1])
    return search.plan(state)


@lru_cache(maxsize=1024)
def dense_plan(eq: Equation) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """Steps that merge all factors, and the axes that bring the result into (outputs, inputs) order."""
    search = _Search(eq, 1, 4, CPU)
    operand, steps = search.merged(0, search.count, search.count + 1)
    return steps, tuple(operand.modes.index(mode) for mode in (*eq.outputs, *eq.inputs))


@lru_cache(maxsize=1024)
def flops_per_token(spec: Spec) -> int:
    """FLOPs of the cheaper sequential order (first factor first or last factor first), for one token."""
    return sum(min(_find(eq, 1, 4, CPU, order).flops for order in ("forward", "backward")) for eq in spec.equations)


def bucket(tokens: int) -> int:
    """The power of two at or above `tokens`: plans are shared within it."""
    return 1 << max(tokens - 1, 0).bit_length()
