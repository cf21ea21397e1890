"""Describe a contraction as data: a plan is a list of matrix products that prints itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from structlin.equation.spec import Equation
from structlin.runtime.costs import CHUNK, CHUNK_STEP
from structlin.runtime.planner.machine import Machine

TOKENS = "n"  # the token axis in a plan; no mode of an equation may have this name

Shape = tuple[int, ...]  # of factors or activations; -1 stands for the axis with the tokens


@dataclass(frozen=True)
class View:
    """How to read a tensor as a matrix (rows, columns) or a stack of matrices (batch, rows, columns).

    Three steps, each left out where it is None: reshape to `modes`, permute by `axes`, reshape to `shape`.
    """

    modes: Shape | None  # separates the axes to be permuted
    axes: tuple[int, ...] | None  # their new order
    shape: Shape | None  # of the matrix or stack
    copy: bool  # whether the layout in memory changes


@dataclass(frozen=True)
class Cost:
    """The counted cost of a product, layout copies included."""

    text: str
    flops: int
    nbytes: int
    ops: int


@dataclass(frozen=True)
class Merge:
    """A product of two slots: the factors come first, then the results of merges in order."""

    left: int
    right: int
    left_view: View
    right_view: View
    shared: bool  # the left operand is one matrix, multiplied with every matrix of the stack on the right
    cost: Cost


@dataclass(frozen=True)
class Step:
    """A product of the activations with a factor or merged factors."""

    factor: int  # slot, as in `Merge`
    factor_view: View
    view: View  # of the activations
    swapped: bool  # the factor is the left operand
    shared: bool  # the factor is one matrix, multiplied with every matrix of the stack of activations
    cost: Cost  # for the planned number of tokens


@dataclass(frozen=True)
class EquationPlan:
    """A contraction of one equation with an input of `tokens` rows; prints itself as a table.

    `flops`, `nbytes`, `seconds` and `training` hold for `tokens` rows; merges and steps hold for any number of rows.
    """

    equation: Equation
    tokens: int  # rows planned for
    itemsize: int  # bytes per element
    machine: Machine  # predicted the time
    folded: bool  # the factors are constant: merged and copied once, beforehand; costs leave this out
    merges: tuple[Merge, ...]  # products of factors only
    steps: tuple[Step, ...]  # products with the activations
    result: View  # how to read the last product as (tokens, outputs)
    inner: int  # entries per token of all activations between input and output, copies included
    widest: int  # entries per token of the largest of these, or of an output that is copied into order
    saved: int  # entries per token of the activations that products read, which a backward pass needs; input left out
    held: tuple[tuple[int, int], ...]  # for each product, when it is differentiated: entries per token of what is still
    # saved and of the gradients around it; entries of its operand's gradient
    seconds: float  # predicted
    training: float  # predicted, with the gradients of factors and input; autograd saves the activations

    @property
    def counted(self) -> tuple[Cost, ...]:
        """Costs of the products that run for each input."""
        merges = () if self.folded else tuple(merge.cost for merge in self.merges)
        return (*merges, *(step.cost for step in self.steps))

    @property
    def turned(self) -> bool:
        """Whether the last product, operands exchanged and transposed, gives (tokens, outputs) in order."""
        return self.steps[-1].swapped and self.result == View(None, (1, 0), None, False)

    @property
    def in_order(self) -> bool:
        """Whether the last product is one of two matrices that gives (tokens, outputs): it can add a bias as well."""
        return self.turned or (not self.steps[-1].swapped and self.result == View(None, None, None, False))

    @property
    def operands(self) -> int:
        """Entries of all operands that are multiplied with activations."""
        return sum(operand for _, operand in self.held)

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
        """Whether the plan builds the dense matrix first."""
        return len(self.steps) == 1 and len(self.merges) > 0

    def __str__(self) -> str:
        products = len(self.counted)
        kind = "materialise, then one product" if self.materialises else f"{products} product{'s' * (products > 1)}"
        folded = ", factors folded once" if self.folded else ""
        head = (
            f"{self.equation}\n{kind} for {self.tokens} tokens on {self.machine.name}{folded}: "
            f"{self.flops:,} FLOPs, {self.nbytes:,} B, {self.seconds * 1e3:.3g} ms predicted"
        )
        width = max(len(cost.text) for cost in self.counted)
        rows = [f"  {c.text:<{width}}  {c.flops:>15,} FLOPs  {c.nbytes:>13,} B  {c.ops} ops" for c in self.counted]
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class Plan:
    """The plans of all equations of a spec, in its order; their costs add up."""

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
    def training(self) -> float:
        """Predicted time of a training step in s."""
        return sum(part.training for part in self.parts)

    @property
    def materialises(self) -> bool:
        """Whether every equation builds its dense matrix first."""
        return all(part.materialises for part in self.parts)

    @property
    def summary(self) -> str:
        """The number of products of each equation, in words."""
        counts = [(part.materialises, len(part.counted)) for part in self.parts]
        return " + ".join("materialised" if m else f"{count} product{'s' * (count > 1)}" for m, count in counts)

    @property
    def inner(self) -> int:
        """Entries per token of all activations between input and output, over all equations."""
        return sum(part.inner for part in self.parts)

    @property
    def widest(self) -> int:
        """Entries per token of the largest activations of any equation."""
        return max(part.widest for part in self.parts)

    @property
    def saved(self) -> int:
        """Entries per token that autograd saves for the backward pass, over all equations."""
        return sum(part.saved for part in self.parts)

    def held(self, tokens: int) -> int:
        """Count the entries that autograd holds at most in a backward pass, outputs and their gradients left out."""
        most = 0
        for part in self.parts:
            known = sum(other.operands for other in self.parts if other is not part)
            for entries, operand in reversed(part.held):
                known += operand
                most = max(most, tokens * (entries + self.saved - part.saved) + known)
        return most

    @property
    def folds(self) -> tuple[object, ...]:
        """A key of the folded factors: equal for plans that can share them."""
        return tuple((part.merges, [(step.factor, step.factor_view) for step in part.steps]) for part in self.parts)

    @cached_property
    def chunk(self) -> int:
        """Tokens per chunk, so that the activations of a chunk fit a core's cache.

        A chunk of fewer than CHUNK tokens may overflow that cache up to four times: small chunks pay for operations.
        """
        widest = max(1, *(part.widest * part.itemsize for part in self.parts))
        room = min(self.parts[0].machine.core_cache / widest, 1 << 30)
        return max(1, int(max(room, min(CHUNK, 4 * room))) // CHUNK_STEP) * CHUNK_STEP

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))
