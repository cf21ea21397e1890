"""Choose how to contract an equation with a batch of tokens: pure integer code, tested without tensors.

A plan is a list of matrix products. The factors form a chain; neighbours may be merged into one operand first, and
the input absorbs the operands from either end of the chain. "Materialise" is the plan that merges everything before
it meets the input. The search minimises the predicted time: FLOPs, bytes moved (layout copies included) and ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

from structlin.spec import Equation, Modes, Spec

Order = Literal["auto", "forward", "backward", "materialise"]
ORDERS: tuple[Order, ...] = ("auto", "forward", "backward", "materialise")

TOKENS = "n"  # the name of the token axis in a plan; mode names of equations must differ from it
_BEAM = 3  # layouts kept per position of the chain
_CHAIN = 24  # factors up to which all merges of neighbours are searched
_LENGTH = 6  # longer chains merge at most so many neighbours, or all


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


def thinness(batch: int, rows: int, columns: int) -> float:
    """How many times longer a matrix product takes than its FLOPs say because its result is thin.

    Measured with torch 2.13 and MKL on an AVX-512 core: below 16 columns a product costs as much as one with 32; with
    few rows it runs at a third of the rate; a single matrix times a vector has a fast path of its own.
    """
    thin_rows = 1 + min(4.4 / max(rows, 1), 1.7)
    if columns >= 16 or columns == 0:
        return thin_rows
    return 2.7 if batch == columns == 1 else thin_rows * 32 / columns


# One AVX-512 core at float32: GEMM rate, DRAM bandwidth, and the cost of an op with the Python around it.
CPU = Machine("cpu, 1 thread, float32", flops=90e9, bandwidth=28e9, op=8e-6)


# The native kernel on the same core: all stages in one op, tiles of tokens in cache.
NATIVE = Machine("native cpu kernel, 1 thread, float32", flops=140e9, bandwidth=40e9, op=5e-6)
# Up to so many tokens it goes row by row, along the factors.
NATIVE_ROWS = 3
TURNED = 15  # how many times longer it takes to read an entry of a factor that is not stored in the order of its sums
NATIVE_FEW = Machine("native cpu kernel, few tokens", flops=35e9, bandwidth=55e9, op=5e-6)


# A dense product on the same core: bytes from the last cache or beyond it, and rates with few and with many tokens.
_NEAR, _NEAR_BANDWIDTH, _FAR_BANDWIDTH = 16 << 20, 55e9, 21e9
_FEW_TOKENS, _FEW_FLOPS = 16, 60e9


def dense_seconds(in_features: int, out_features: int, tokens: int, itemsize: int = 4) -> float:
    """Predict the time of `F.linear` in s: its bytes or its FLOPs, whichever take longer, and an op."""
    nbytes = itemsize * (in_features * out_features + tokens * (in_features + out_features))
    rate = _FEW_FLOPS if tokens < _FEW_TOKENS else CPU.flops
    moved = nbytes / (_NEAR_BANDWIDTH if nbytes <= _NEAR else _FAR_BANDWIDTH)
    return max(2 * in_features * out_features * tokens / rate, moved) + 3e-6


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


Groups = tuple[Modes, Modes, Modes]  # the (batch, rows, columns) of an operand


@dataclass(frozen=True)
class _Product:
    """One way to multiply two operands: which goes left, how each is read, and what it costs."""

    left: Modes
    right: Modes
    left_groups: Groups
    right_groups: Groups
    swapped: bool  # the factor goes left, the activations go right
    broadcast: bool  # the left operand is shared over the batch
    out: Modes
    copies: tuple[bool, bool]
    flops: int
    nbytes: int
    seconds: float

    @property
    def ops(self) -> int:
        return 1 + sum(self.copies)


@dataclass(frozen=True)
class _Merged:
    """Neighbouring factors contracted with one another; a single factor has no product."""

    modes: Modes
    seconds: float
    middle: int = 0
    product: _Product | None = None


@dataclass(frozen=True)
class _State:
    """A partial plan: the modes of the activations, the merged factors that they absorbed, and the cost so far."""

    modes: Modes
    absorbed: tuple[tuple[int, int, _Product], ...]
    cost: float


class _Search:
    """Dynamic programming over the positions of the chain, for one equation and one number of tokens."""

    def __init__(self, eq: Equation, tokens: int, itemsize: int, machine: Machine) -> None:
        self.eq = eq
        self.itemsize = itemsize
        self.machine = machine
        self.tokens = tokens
        self.size = {**eq.size, TOKENS: tokens}
        self.external = frozenset((*eq.outputs, *eq.inputs))
        self.count = len(eq.factors)
        self.known: dict[tuple[int, int], _Merged] = {}

    def numel(self, modes: Iterable[str]) -> int:
        return math.prod([self.size[mode] for mode in modes])

    # One product -------------------------------------------------------------------------------------------------

    def products(self, a: Modes, b: Modes, needed: frozenset[str]) -> Iterator[_Product]:
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
    ) -> _Product:  # fmt: skip
        copies = _needs_copy(left, left_groups), _needs_copy(right, right_groups)
        left_size, right_size, out_size = self.numel(left), self.numel(right), self.numel(out)
        moved = (1 + 2 * copies[0]) * left_size + (1 + 2 * copies[1]) * right_size + out_size
        flops = 2 * out_size * self.numel(left_groups[2])
        nbytes = self.itemsize * moved
        stack, rows, columns = self.numel(right_groups[0]), self.numel(left_groups[1]), self.numel(right_groups[2])
        seconds = self.machine.seconds(flops * thinness(stack, rows, columns), nbytes, 1 + sum(copies))
        return _Product(left, right, left_groups, right_groups, swapped, broadcast, out, copies, flops, nbytes, seconds)

    # Merging neighbours ------------------------------------------------------------------------------------------

    def merged(self, lo: int, hi: int) -> _Merged:
        """Contract the factors lo..hi-1 with one another."""
        if hi - lo == 1:
            return _Merged(self.eq.factors[lo].modes, 0.0)
        if (lo, hi) not in self.known:
            middle = self.middle(lo, hi)
            left, right = self.merged(lo, middle), self.merged(middle, hi)
            options = self.products(left.modes, right.modes, self.outside(lo, hi))
            best = min(options, key=lambda option: option.seconds)
            seconds = left.seconds + right.seconds + best.seconds
            self.known[lo, hi] = _Merged(best.out, seconds, middle, best)
        return self.known[lo, hi]

    def outside(self, lo: int, hi: int) -> frozenset[str]:
        """Modes that the merged factors lo..hi-1 must keep."""
        others = (*self.eq.factors[:lo], *self.eq.factors[hi:])
        return self.external.union(*(factor.modes for factor in others))

    def middle(self, lo: int, hi: int) -> int:
        """Where to split the factors lo..hi-1 for merging: the optimum in short chains, the middle in long ones."""
        return self.splits[lo, hi] if self.count <= _CHAIN else (lo + hi) // 2

    @cached_property
    def splits(self) -> dict[tuple[int, int], int]:
        """Matrix-chain dynamic programming: where to split each interval of factors so that merging it is cheapest.

        Costs are those of products without copies: layouts are settled afterwards, in `merged`.
        """
        kept = {
            (lo, hi): self.outside(lo, hi) & {mode for factor in self.eq.factors[lo:hi] for mode in factor.modes}
            for lo in range(self.count)
            for hi in range(lo + 1, self.count + 1)
        }
        size = {interval: self.numel(modes) for interval, modes in kept.items()}
        cost = dict.fromkeys(((i, i + 1) for i in range(self.count)), 0.0)
        split: dict[tuple[int, int], int] = {}
        for length in range(2, self.count + 1):
            for lo in range(self.count - length + 1):
                hi = lo + length
                options = []
                for middle in range(lo + 1, hi):
                    a, b = (lo, middle), (middle, hi)
                    flops = 2 * size[a] * size[b] // self.numel(kept[a] & kept[b])
                    nbytes = self.itemsize * (size[a] + size[b] + size[lo, hi])
                    options.append((cost[a] + cost[b] + self.machine.seconds(flops, nbytes, 1), middle))
                cost[lo, hi], split[lo, hi] = min(options)
        return split

    # Absorbing the chain -----------------------------------------------------------------------------------------

    def sweep(self, forward: bool, lengths: Sequence[int], bound: float = math.inf) -> _State | None:
        """Best plan that absorbs groups of the given lengths from one end of the chain, none if all exceed `bound`."""
        states: list[list[_State]] = [[] for _ in range(self.count + 1)]
        states[0].append(_State((TOKENS, *self.eq.inputs), (), 0.0))
        for done in range(self.count):
            for state in _best(states[done]):
                for length in lengths:
                    if done + length <= self.count:
                        states[done + length].extend(self.absorb(state, done, length, forward, bound))
        return min(map(self.finished, states[-1]), key=lambda state: state.cost, default=None)

    def absorb(self, state: _State, done: int, length: int, forward: bool, bound: float) -> Iterator[_State]:
        lo = done if forward else self.count - done - length
        hi = lo + length
        merged = self.merged(lo, hi)
        if state.cost + merged.seconds > bound:
            return
        remaining = self.eq.factors[hi:] if forward else self.eq.factors[:lo]
        needed = frozenset((TOKENS, *self.eq.outputs)).union(*(factor.modes for factor in remaining))
        for product in self.products(state.modes, merged.modes, needed):
            cost = state.cost + merged.seconds + product.seconds
            yield _State(product.out, (*state.absorbed, (lo, hi, product)), cost)

    def finished(self, state: _State) -> _State:
        """Add the cost of bringing the result into (tokens, outputs) order."""
        if state.modes == (TOKENS, *self.eq.outputs):
            return state
        nbytes = 2 * self.itemsize * self.numel(state.modes)
        return _State(state.modes, state.absorbed, state.cost + self.machine.seconds(0, nbytes, 1))

    # Writing the plan down ---------------------------------------------------------------------------------------

    def plan(self, state: _State) -> EquationPlan:
        steps: list[Step] = []
        slot = self.count  # of the activations: the input comes after the factors
        for lo, hi, product in state.absorbed:
            factor = self.write_merged(lo, hi, steps)
            slot = self.write(product, slot, factor, steps)
        return EquationPlan(
            self.eq, self.tokens, self.itemsize, self.machine, tuple(steps),
            axes=tuple(state.modes.index(mode) for mode in (TOKENS, *self.eq.outputs)),
            flops=sum(step.flops for step in steps),
            nbytes=sum(step.nbytes for step in steps),
            seconds=state.cost,
        )  # fmt: skip

    def write_merged(self, lo: int, hi: int, steps: list[Step]) -> int:
        """Append the steps that merge the factors lo..hi-1; return the number of the result."""
        merged = self.merged(lo, hi)
        if merged.product is None:
            return lo
        left = self.write_merged(lo, merged.middle, steps)
        right = self.write_merged(merged.middle, hi, steps)
        return self.write(merged.product, left, right, steps)

    def write(self, product: _Product, a: int, b: int, steps: list[Step]) -> int:
        left, right = (b, a) if product.swapped else (a, b)
        text = f"[{' '.join(product.left)}] * [{' '.join(product.right)}] -> [{' '.join(product.out)}]"
        step = Step(
            left, right,
            self.view(product.left, product.left_groups, product.copies[0], product.broadcast),
            self.view(product.right, product.right_groups, product.copies[1]),
            product.out, tuple(self.encoded((mode,)) for mode in product.out),
            text, product.flops, product.nbytes, product.ops,
        )  # fmt: skip
        steps.append(step)
        return self.count + len(steps)

    def view(self, modes: Modes, groups: Groups, copy: bool, broadcast: bool = False) -> View:
        axes = tuple(modes.index(mode) for group in groups for mode in group)
        batch, rows, columns = groups
        return View(axes, (self.encoded(batch), self.encoded(rows), self.encoded(columns)), copy, broadcast)

    def encoded(self, modes: Modes) -> int:
        size = self.eq.numel([mode for mode in modes if mode != TOKENS])
        return -size if TOKENS in modes else size


def _needs_copy(modes: Modes, groups: Groups) -> bool:
    """Whether reading a tensor with these modes as a (batch, rows, columns) stack copies it."""
    position = {mode: k for k, mode in enumerate(modes)}
    runs = all(position[b] == position[a] + 1 for group in groups for a, b in pairwise(group))
    # A stack whose innermost axis is the batch sends torch.bmm into a slow loop: copy it first.
    return not runs or (bool(modes) and modes[-1] in groups[0])


def _best(states: list[_State]) -> list[_State]:
    """The cheapest state of each layout, the cheapest layouts only."""
    by_layout: dict[Modes, _State] = {}
    for state in sorted(states, key=lambda state: state.cost):
        by_layout.setdefault(state.modes, state)
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
        >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 64, "r": 16, "i": 64})
        >>> print(find_plan(Spec(64, 64, (eq,)), 32, order="backward"))
        o r, r i -> o i
        2 products for 32 tokens on cpu, 1 thread, float32: 131,072 FLOPs, 28,672 B, 0.0187 ms predicted
          [n i] * [r i] -> [n r]           65,536 FLOPs         14,336 B  1 ops
          [n r] * [o r] -> [n o]           65,536 FLOPs         14,336 B  1 ops
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; use one of {ORDERS}")
    return Plan(tuple(_find(eq, tokens, itemsize, machine, order) for eq in spec.equations))


def _find(eq: Equation, tokens: int, itemsize: int, machine: Machine, order: Order) -> EquationPlan:
    search = _Search(eq, tokens, itemsize, machine)
    single = [1]
    every = [*range(1, search.count + 1)] if search.count <= _CHAIN else [*range(1, _LENGTH + 1), search.count]
    options: Sequence[_State | None]
    if order == "auto":
        # The sequential plans are quick to find, and what costs more than they do need not be searched.
        options = [search.sweep(forward, single) for forward in (True, False)]
        bound = min(state.cost for state in options if state)
        options = [*options, *(search.sweep(forward, every, bound) for forward in (True, False))]
    elif order == "materialise":
        options = [search.sweep(True, [search.count])]
    else:
        options = [search.sweep(order == "forward", single)]
    return search.plan(min((state for state in options if state), key=lambda state: state.cost))


@lru_cache(maxsize=1024)
def dense_plan(eq: Equation) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """Steps that merge all factors, and the axes that bring the result into (outputs, inputs) order."""
    search = _Search(eq, 1, 4, CPU)
    steps: list[Step] = []
    search.write_merged(0, search.count, steps)
    modes = search.merged(0, search.count).modes
    return tuple(steps), tuple(modes.index(mode) for mode in (*eq.outputs, *eq.inputs))


@lru_cache(maxsize=1024)
def flops_per_token(spec: Spec) -> int:
    """FLOPs of the cheaper sequential order (first factor first or last factor first), for one token."""
    return sum(min(_find(eq, 1, 4, CPU, order).flops for order in ("forward", "backward")) for eq in spec.equations)


def bucket(tokens: int) -> int:
    """The power of two at or above `tokens`: plans are shared within it."""
    return 1 << max(tokens - 1, 0).bit_length()
