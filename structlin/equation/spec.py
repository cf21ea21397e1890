"""Describe a structure as data: multilinear equations over named modes, without tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

Modes = tuple[str, ...]
T = TypeVar("T")


class Contraction(NamedTuple):
    """The modes of a product of two operands, sorted by what happens to them.

    Args:
        batch: held by both operands and kept.
        first: held by the first operand only.
        second: held by the second operand only.
        summed: held by both operands and needed by nothing else.
    """

    batch: Modes
    first: Modes
    second: Modes
    summed: Modes


def contraction(first: Collection[str], second: Collection[str], needed: Collection[str]) -> Contraction:
    """Sort the modes of two operands; shared modes stand in the order of the first operand.

    Args:
        first: modes of an operand.
        second: modes of the other.
        needed: modes that must survive: those of the result and of operands still to come.
    Example:
        >>> contraction(("o", "r"), ("r", "i"), {"o", "i"})
        Contraction(batch=(), first=('o',), second=('i',), summed=('r',))
    """
    shared = [mode for mode in first if mode in second]
    return Contraction(
        batch=tuple(mode for mode in shared if mode in needed),
        first=tuple(mode for mode in first if mode not in second),
        second=tuple(mode for mode in second if mode not in first),
        summed=tuple(mode for mode in shared if mode not in needed),
    )


@dataclass(frozen=True)
class Factor:
    """One small tensor of an equation.

    Args:
        name: its name in the layer and in the `state_dict`.
        modes: the names of its axes, in storage order.
        constant: fixed entries, row-major, if the factor is not learned (for instance the Hamilton factors of a
            quaternion layer).
    """

    name: str
    modes: Modes
    constant: tuple[float, ...] | None = None

    @property
    def learned(self) -> bool:
        """Whether the factor is a parameter."""
        return self.constant is None


class Absorption(NamedTuple):
    """What one factor does to the activations that absorb it.

    Args:
        factor: its index in the equation.
        batch: modes that it shares with the activations and leaves.
        free: modes of the activations that it does not touch.
        new: modes that it adds.
        summed: modes that it shares with the activations and sums over.
    """

    factor: int
    batch: Modes
    free: Modes
    new: Modes
    summed: Modes

    @property
    def kept(self) -> Modes:
        """Modes of the activations afterwards, in no layout in particular."""
        return self.batch + self.free + self.new

    def flops(self, eq: Equation) -> int:
        """FLOPs for one token."""
        return 2 * eq.numel(self.kept + self.summed)


@dataclass(frozen=True)
class Equation:
    """The contraction of named factors into a matrix with output and input modes.

    A mode that is neither an output nor an input mode is a bond, and summed. The matrix has the output modes as rows
    and the input modes as columns, both row-major.

    Args:
        factors: ordered as a chain; a contraction may start at either end.
        outputs: modes of the rows.
        inputs: modes of the columns.
        sizes: (mode, size) pairs.
    """

    factors: tuple[Factor, ...]
    outputs: Modes
    inputs: Modes
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def size(self) -> Mapping[str, int]:
        """The size of each mode."""
        return dict(self.sizes)

    @cached_property
    def padded_in(self) -> int:
        """Length of the input once it is padded: the product of the input modes."""
        return self.numel(self.inputs)

    @cached_property
    def padded_out(self) -> int:
        """Length of the output before surplus rows are cut: the product of the output modes."""
        return self.numel(self.outputs)

    def numel(self, modes: Sequence[str]) -> int:
        """Count the entries of a tensor with these modes."""
        return math.prod(self.size[mode] for mode in modes)

    def shape(self, modes: Sequence[str]) -> tuple[int, ...]:
        """Return the shape of a tensor with these modes."""
        return tuple(self.size[mode] for mode in modes)

    def absorb(self, order: Sequence[int]) -> tuple[Absorption, ...]:
        """Contract an input with the factors one by one and say what each of them does.

        A mode is summed when its last factor is absorbed, unless it is an output mode.

        Args:
            order: indices of all factors, in the order in which they are absorbed.
        Example:
            >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3})
            >>> eq.absorb([1, 0])[0]
            Absorption(factor=1, batch=(), free=(), new=('r',), summed=('i',))
        """
        found = []
        state = self.inputs
        for step, k in enumerate(order):
            needed = {*self.outputs, *(mode for later in order[step + 1 :] for mode in self.factors[later].modes)}
            batch, new, free, summed = contraction(self.factors[k].modes, state, needed)
            found.append(Absorption(k, batch, free, new, summed))
            state = found[-1].kept
        return tuple(found)

    def __str__(self) -> str:
        terms = ", ".join(" ".join(factor.modes) for factor in self.factors)
        return f"{terms} -> {' '.join(self.outputs)} {' '.join(self.inputs)}"


def equation(
    text: str, names: Sequence[str], sizes: Mapping[str, int], *, constants: Mapping[str, Sequence[float]] | None = None
) -> Equation:
    """Parse and check an equation, for instance `"o r, r i -> o i"`.

    Names of output modes begin with `o`, names of input modes with `i`; all other modes are bonds, and summed.

    Args:
        text: the modes of each factor, an arrow, then the output modes and the input modes.
        names: one name per factor.
        sizes: the size of every mode.
        constants: entries of the factors that are not learned, row-major, by factor name.
    Returns:
        The equation.
    Raises:
        ValueError: if a size is missing or below 1, names and factors differ in number, no factor holds an external
            mode, or fewer than two factors hold a bond.
    Example:
        >>> str(equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3}))
        'o r, r i -> o i'
    """
    fixed = {name: tuple(values) for name, values in (constants or {}).items()}
    left, _, right = text.partition("->")
    factor_modes = [tuple(term.split()) for term in left.split(",")]
    external = tuple(right.split())
    if len(factor_modes) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(factor_modes)} factors in {text!r} but names {tuple(names)}; give one distinct name each"
        )
    counts = Counter(mode for modes in factor_modes for mode in modes)
    for mode in {*counts, *external}:
        if sizes.get(mode, 0) < 1:
            raise ValueError(f"mode {mode!r} of {text!r} has size {sizes.get(mode)}; sizes are whole numbers from 1")
        if counts[mode] < (1 if mode in external else 2):
            raise ValueError(f"mode {mode!r} of {text!r} is held by {counts[mode]} factors; a bond needs two")
        if mode[0] in "oi" and mode not in external:
            raise ValueError(f"mode {mode!r} of {text!r} must stand after the arrow; bonds begin with neither o nor i")
    return Equation(
        factors=tuple(Factor(n, m, fixed.get(n)) for n, m in zip(names, factor_modes, strict=True)),
        outputs=tuple(mode for mode in external if mode.startswith("o")),
        inputs=tuple(mode for mode in external if mode.startswith("i")),
        sizes=tuple((mode, sizes[mode]) for mode in sorted({*counts, *external})),
    )


@dataclass(frozen=True)
class Spec:
    """A structured matrix: the sum of one or more equations, cut to (out_features, in_features).

    Each equation has its own modes over the same input and output. Where the product of its modes exceeds the
    features, the input is padded with zeros and the surplus outputs are dropped.

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        equations: the summands; factor names are distinct over all of them.
    Raises:
        ValueError: if an equation is too small for the features, or two factors share a name.
    """

    in_features: int
    out_features: int
    equations: tuple[Equation, ...]

    def __post_init__(self) -> None:
        for eq in self.equations:
            if eq.padded_in < self.in_features or eq.padded_out < self.out_features:
                raise ValueError(
                    f"modes of {eq} cover {eq.padded_out} x {eq.padded_in}, less than the "
                    f"{self.out_features} x {self.in_features} of the layer; use larger modes"
                )
        names = [factor.name for factor in self.factors]
        if len(set(names)) != len(names):
            raise ValueError(f"factor names {names} are not distinct; name each factor of a sum differently")

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """All factors, one equation after another."""
        return tuple(factor for eq in self.equations for factor in eq.factors)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each factor, in the order of `factors`."""
        return tuple(eq.shape(factor.modes) for eq in self.equations for factor in eq.factors)

    @cached_property
    def num_parameters(self) -> int:
        """Number of learned entries (constants and bias excluded)."""
        return sum(math.prod(s) for f, s in zip(self.factors, self.shapes, strict=True) if f.learned)

    def split(self, sequence: Sequence[T]) -> Iterator[tuple[Equation, Sequence[T]]]:
        """Pair each equation with its part of a sequence that has one item per factor.

        Args:
            sequence: one item per factor, in the order of `factors`: tensors, gradients, indices.
        """
        start = 0
        for eq in self.equations:
            yield eq, sequence[start : start + len(eq.factors)]
            start += len(eq.factors)

    @property
    def ratio(self) -> float:
        """Learned entries / entries of the dense matrix."""
        return self.num_parameters / (self.in_features * self.out_features)

    def __str__(self) -> str:
        return " + ".join(str(eq) for eq in self.equations)
