"""Plans: lists of matrix products as data, which print themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from structlin.equation.spec import Equation
from structlin.runtime.planner.machine import Machine

TOKENS = "n"  # the name of the token axis in a plan; mode names of equations must differ from it

CHUNK, CHUNK_STEP = 128, 16  # tokens that a chunk should have, and what it has a multiple of

Shape = tuple[int, ...]  # of activations: -1 is the axis with the tokens


@dataclass(frozen=True)
class View:
    """How a tensor is read as a matrix (rows, columns), or as a stack of them (batch, rows, columns).

    What is None is not needed.

    Args:
        modes: shape to split it into, where its axes are to be permuted.
        axes: their new order.
        shape: of the matrix or stack.
        copy: whether the layout changes in memory.
    """

    modes: Shape | None
    axes: tuple[int, ...] | None
    shape: Shape | None
    copy: bool


@dataclass(frozen=True)
class Cost:
    """What a product is predicted to cost, layout copies included."""

    text: str
    flops: int
    nbytes: int
    ops: int


@dataclass(frozen=True)
class Merge:
    """A product of two factors, or of what came of them.

    Args:
        left: its number: factors first, then results in order.
        right: the other's.
        left_view: how it is read.
        right_view: how the other is read.
        shared: the left one is a matrix, shared by all of the stack on the right.
        cost: once.
    """

    left: int
    right: int
    left_view: View
    right_view: View
    shared: bool
    cost: Cost


@dataclass(frozen=True)
class Step:
    """A product of the activations with a factor (or what came of some).

    Args:
        factor: its number.
        factor_view: how it is read.
        view: how the activations are read.
        swapped: the factor goes left.
        shared: the factor is a matrix, shared by all of the stack of activations.
        cost: for the planned number of tokens.
    """

    factor: int
    factor_view: View
    view: View
    swapped: bool
    shared: bool
    cost: Cost


@dataclass(frozen=True)
class EquationPlan:
    """A contraction of one equation with an input of `tokens` rows; prints itself as a table.

    `flops`, `nbytes` and `seconds` are predictions for `tokens`; the steps are right for any number of tokens.
    Where `folded`, merges and copies of factors are not part of them: they are done once.

    Args:
        equation: what is contracted.
        tokens: rows planned for.
        itemsize: bytes per element.
        machine: the record that times are predicted by.
        folded: see above.
        merges: products of factors only.
        steps: products with the activations.
        result: how the last of them is read as (tokens, outputs).
        inner: entries per token that stand between input and output: results of steps, and copies of them.
        widest: entries per token of the largest of these, or of an output that has to be brought into order.
        seconds: predicted time.
    """

    equation: Equation
    tokens: int
    itemsize: int
    machine: Machine
    folded: bool
    merges: tuple[Merge, ...]
    steps: tuple[Step, ...]
    result: View
    inner: int
    widest: int
    seconds: float

    @property
    def counted(self) -> tuple[Cost, ...]:
        """Costs of the products that are done for each input."""
        merges = () if self.folded else tuple(merge.cost for merge in self.merges)
        return (*merges, *(step.cost for step in self.steps))

    @property
    def flops(self) -> int:
        """FLOPs for the planned number of tokens."""
        return sum(cost.flops for cost in self.counted)

    @property
    def nbytes(self) -> int:
        """Bytes read and written, layout copies included."""
        return sum(cost.nbytes for cost in self.counted)

    @property
    def materialises(self) -> bool:
        """Whether the dense matrix is built first."""
        return len(self.steps) == 1 and len(self.merges) > 0

    def __str__(self) -> str:
        products = len(self.counted)
        kind = "materialise, then one product" if self.materialises else f"{products} product{'s' * (products > 1)}"
        kept = ", factors folded once" if self.folded else ""
        head = (
            f"{self.equation}\n{kind} for {self.tokens} tokens on {self.machine.name}{kept}: "
            f"{self.flops:,} FLOPs, {self.nbytes:,} B, {self.seconds * 1e3:.3g} ms predicted"
        )
        width = max(len(cost.text) for cost in self.counted)
        rows = [f"  {c.text:<{width}}  {c.flops:>15,} FLOPs  {c.nbytes:>13,} B  {c.ops} ops" for c in self.counted]
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

    @property
    def summary(self) -> str:
        """The number of products of each equation, in a few words."""
        counts = [(part.materialises, len(part.counted)) for part in self.parts]
        return " + ".join("materialised" if m else f"{count} product{'s' * (count > 1)}" for m, count in counts)

    @property
    def inner(self) -> int:
        """Entries per token that stand between input and output, over all equations."""
        return sum(part.inner for part in self.parts)

    @property
    def widest(self) -> int:
        """Entries per token of the largest activations between input and output."""
        return max(part.widest for part in self.parts)

    @property
    def folds(self) -> tuple[object, ...]:
        """What is made of the factors: equal for plans that can share it."""
        return tuple((part.merges, [(step.factor, step.factor_view) for step in part.steps]) for part in self.parts)

    @cached_property
    def chunk(self) -> int:
        """Tokens at a time: activations stay in a core's own cache, or close to it where that would be few tokens."""
        widest = max(1, *(part.widest * part.itemsize for part in self.parts))
        room = min(self.parts[0].machine.core_cache / widest, 1 << 30)
        return max(1, int(max(room, min(CHUNK, 4 * room))) // CHUNK_STEP) * CHUNK_STEP

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))
