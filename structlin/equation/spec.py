"""A structure as data: multilinear equations over named modes, without tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Modes = tuple[str, ...]


@dataclass(frozen=True)
class Factor:
    """One small tensor of an equation.

    Args:
        name: its name in the layer and in the `state_dict`.
        modes: the names of its axes, in storage order.
        constant: the fixed entries, row-major, of a factor that is not learned (such as the Hamilton factors of a
            quaternion layer).
    """

    name: str
    modes: Modes
    constant: tuple[float, ...] | None = None

    @property
    def learned(self) -> bool:
        """Whether the factor is a parameter."""
        return self.constant is None


@dataclass(frozen=True)
class Equation:
    """The contraction of named factors into a matrix with output and input modes.

    A mode is summed when it is neither an output nor an input mode. The matrix has the output modes
    as its rows and the input modes as its columns, both row-major.

    Args:
        factors: in the order in which a chain is naturally contracted (either end may go first).
        outputs: the modes of the rows.
        inputs: the modes of the columns.
        sizes: (mode, size) pairs.
    """

    factors: tuple[Factor, ...]
    outputs: Modes
    inputs: Modes
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def size(self) -> Mapping[str, int]:
        """Size of each mode by name."""
        return dict(self.sizes)

    @cached_property
    def padded_in(self) -> int:
        """Product of the input modes: the input length that the contraction works on."""
        return self.numel(self.inputs)

    @cached_property
    def padded_out(self) -> int:
        """Product of the output modes."""
        return self.numel(self.outputs)

    def numel(self, modes: Sequence[str]) -> int:
        """Number of elements of a tensor with these modes."""
        return math.prod(self.size[mode] for mode in modes)

    def shape(self, modes: Sequence[str]) -> tuple[int, ...]:
        """Shape of a tensor with these modes."""
        return tuple(self.size[mode] for mode in modes)

    def __str__(self) -> str:
        terms = ", ".join(" ".join(factor.modes) for factor in self.factors)
        return f"{terms} -> {' '.join(self.outputs)} {' '.join(self.inputs)}"


def equation(
    text: str, names: Sequence[str], sizes: Mapping[str, int], *, constants: Mapping[str, Sequence[float]] | None = None
) -> Equation:
    """Read an equation such as `"o r, r i -> o i"`.

    Modes whose name begins with `o` are output modes, with `i` input modes; all others are bonds, which are summed.

    Args:
        text: the modes of each factor, an arrow, then the output modes and the input modes.
        names: one name per factor.
        sizes: the size of every mode.
        constants: the entries of the factors that are not learned, row-major, by factor name.
    Returns:
        The checked equation.
    Raises:
        ValueError: if a size is missing or below 1, if names and factors differ in number, if an external mode
            is held by no factor, or a bond by fewer than two.
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

    Each equation has modes of its own over the same input and output. Where the product of its modes exceeds the
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
        """All factors, equation by equation."""
        return tuple(factor for eq in self.equations for factor in eq.factors)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every factor, in the order of `factors`."""
        return tuple(eq.shape(factor.modes) for eq in self.equations for factor in eq.factors)

    @cached_property
    def num_parameters(self) -> int:
        """Number of learned entries (constants and bias excluded)."""
        return sum(math.prod(s) for f, s in zip(self.factors, self.shapes, strict=True) if f.learned)

    @property
    def ratio(self) -> float:
        """Learned entries / entries of the dense matrix."""
        return self.num_parameters / (self.in_features * self.out_features)

    def __str__(self) -> str:
        return " + ".join(str(eq) for eq in self.equations)
