"""Describe a structure as data: multilinear equations over named modes, without tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

from structlin.equation.ties import Tie

Modes = tuple[str, ...]
T = TypeVar("T")


class Contraction(NamedTuple):
    """The modes of a product of two operands, by their role."""

    batch: Modes  # in both operands, and kept
    first: Modes  # in the first operand only
    second: Modes  # in the second operand only
    summed: Modes  # in both operands, and needed nowhere else


def contraction(first: Collection[str], second: Collection[str], needed: Collection[str]) -> Contraction:
    """Classify the modes of two operands; shared modes keep the order of the first operand.

    `needed` are the modes that must survive: those of the result and of operands still to come.

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
    """One small tensor of an equation."""

    name: str  # in the layer and in the `state_dict`
    modes: Modes  # the names of its axes, in storage order
    constant: tuple[float, ...] | None = None  # entries, row-major, if not learned (for instance the quaternions')
    tie: Tie | None = None  # the pattern in which its entries share the numbers of the parameter, if they do

    @property
    def learned(self) -> bool:
        """Whether the factor is a parameter."""
        return self.constant is None


class Absorption(NamedTuple):
    """The effect of one factor on the activations that it is multiplied with."""

    factor: int  # its index in the equation
    batch: Modes  # shared with the activations, and kept
    free: Modes  # of the activations only
    new: Modes  # of the factor only
    summed: Modes  # shared with the activations, and summed over

    @property
    def kept(self) -> Modes:
        """Modes of the activations afterwards, in no particular layout."""
        return self.batch + self.free + self.new

    def flops(self, eq: Equation) -> int:
        """FLOPs for one token."""
        return 2 * eq.numel(self.kept + self.summed)


@dataclass(frozen=True)
class Equation:
    """The contraction of named factors into a matrix with output and input modes.

    A mode that is neither an output nor an input mode is a bond, and summed. The output modes index the rows, the
    input modes the columns, both row-major.
    """

    factors: tuple[Factor, ...]  # ordered as a chain; a contraction may start at either end
    outputs: Modes  # of the rows
    inputs: Modes  # of the columns
    sizes: tuple[tuple[str, int], ...]  # (mode, size) pairs: hashable, unlike a dict

    @cached_property
    def size(self) -> Mapping[str, int]:
        """The size of each mode."""
        return dict(self.sizes)

    @cached_property
    def padded_in(self) -> int:
        """Length of the padded input: the product of the input modes."""
        return self.numel(self.inputs)

    @cached_property
    def padded_out(self) -> int:
        """Length of the output before it is cut: the product of the output modes."""
        return self.numel(self.outputs)

    def numel(self, modes: Sequence[str]) -> int:
        """Count the entries of a tensor with these modes."""
        return math.prod(self.size[mode] for mode in modes)

    def shape(self, modes: Sequence[str]) -> tuple[int, ...]:
        """Return the shape of a tensor with these modes."""
        return tuple(self.size[mode] for mode in modes)

    def stored(self, factor: Factor) -> tuple[int, ...]:
        """Return the shape of the tensor that a layer holds for a factor: a tied one has fewer entries than modes."""
        shape = self.shape(factor.modes)
        return shape if factor.tie is None else (factor.tie.numbers, *shape[2:])

    def absorb(self, order: Sequence[int]) -> tuple[Absorption, ...]:
        """Contract an input with the factors one by one, in the given order of their indices.

        A mode is summed when its last factor is absorbed, unless it is an output mode.

        Example:
            >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3})
            >>> eq.absorb([1, 0])[0]
            Absorption(factor=1, batch=(), free=(), new=('r',), summed=('i',))
        """
        found = []
        state = self.inputs  # modes of the activations
        for step, k in enumerate(order):
            needed = {*self.outputs, *(mode for later in order[step + 1 :] for mode in self.factors[later].modes)}
            # The factor comes first: summed modes stand in its order, along which it is read.
            batch, new, free, summed = contraction(self.factors[k].modes, state, needed)
            found.append(Absorption(k, batch, free, new, summed))
            state = found[-1].kept
        return tuple(found)

    def __str__(self) -> str:
        terms = ", ".join(" ".join(f.modes) + (f" ({f.tie.kind})" if f.tie else "") for f in self.factors)
        return f"{terms} -> {' '.join(self.outputs)} {' '.join(self.inputs)}"


def equation(
    text: str,
    names: Sequence[str],
    sizes: Mapping[str, int],
    *,
    constants: Mapping[str, Sequence[float]] | None = None,
    ties: Mapping[str, Tie] | None = None,
) -> Equation:
    """Parse and check an equation, for instance `"o r, r i -> o i"`.

    Output modes begin with `o`, input modes with `i`; all other modes are bonds, and summed.

    Args:
        text: the modes of each factor, an arrow, then the output modes and the input modes.
        names: one name per factor.
        sizes: the size of every mode.
        constants: entries of the factors that are not learned, row-major, by factor name.
        ties: the patterns of the factors that have some, by factor name.
    Raises:
        ValueError: if a size is missing or below 1, names and factors differ in number, no factor has an external
            mode, or fewer than two factors share a bond.
    Example:
        >>> str(equation("o r, r i -> o i", ("left", "right"), {"o": 4, "r": 2, "i": 3}))
        'o r, r i -> o i'
    """
    tied = ties or {}
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
        factors=tuple(Factor(n, m, fixed.get(n), tied.get(n)) for n, m in zip(names, factor_modes, strict=True)),
        outputs=tuple(mode for mode in external if mode.startswith("o")),
        inputs=tuple(mode for mode in external if mode.startswith("i")),
        sizes=tuple((mode, sizes[mode]) for mode in sorted({*counts, *external})),
    )


@dataclass(frozen=True)
class Spec:
    """A structured matrix: the sum of one or more equations, cut to (out_features, in_features).

    Each equation divides the same input and output into modes of its own. Where their product exceeds the features,
    the input is padded with zeros and the surplus outputs are cut.

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
        """The shape of the tensor of each factor, in the order of `factors`."""
        return tuple(eq.stored(factor) for eq in self.equations for factor in eq.factors)

    @cached_property
    def tied(self) -> bool:
        """Whether a factor has fewer entries than its modes say."""
        return any(factor.tie is not None for factor in self.factors)

    @cached_property
    def written(self) -> int:
        """Number of entries that the tied factors have when they are written out."""
        return sum(eq.numel(factor.modes) for eq in self.equations for factor in eq.factors if factor.tie is not None)

    @cached_property
    def untied(self) -> Spec:
        """The same equations with every factor written out."""
        if not self.tied:
            return self
        factors = ((eq, tuple(replace(factor, tie=None) for factor in eq.factors)) for eq in self.equations)
        return replace(self, equations=tuple(replace(eq, factors=written) for eq, written in factors))

    @cached_property
    def num_parameters(self) -> int:
        """Number of learned entries (constants and bias excluded)."""
        return sum(math.prod(s) for f, s in zip(self.factors, self.shapes, strict=True) if f.learned)

    def split(self, sequence: Sequence[T]) -> Iterator[tuple[Equation, Sequence[T]]]:
        """Pair each equation with its part of a sequence with one item (tensor, gradient, index) per factor."""
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
