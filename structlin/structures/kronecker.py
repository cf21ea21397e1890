"""Kronecker: W = sum_t left[t] (x) right[t]; PHM and Shapeshifter are the same equation with other shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Equation, Spec, equation
from structlin.equation.structure import Structure, check_range, register
from structlin.fitting import linalg
from structlin.fitting.linalg import Shape
from structlin.layers.linear import StructuredLinear, layer_of


def kronecker_equation(terms: int, shape: Shape, left: tuple[float, ...] | None = None) -> Equation:
    """Write W = sum_t left[t] (x) right[t], with constant left factors where given."""
    (o1, i1), (o2, i2) = shape
    sizes = {"t": terms, "o1": o1, "i1": i1, "o2": o2, "i2": i2}
    constants = {"left": left} if left else None  # PHM fixes its algebra
    return equation("t o1 i1, t o2 i2 -> o1 o2 i1 i2", ("left", "right"), sizes, constants=constants)


def balanced_shape(in_features: int, out_features: int) -> Shape:
    """Return factor shapes ((o1, i1), (o2, i2)) with sides near the square roots and similar numbers of entries."""
    o_small, o_large = modes.balanced_modes(out_features, 2)
    i_small, i_large = modes.balanced_modes(in_features, 2)
    return (o_small, i_large), (o_large, i_small)


def max_terms(shape: Shape) -> int:
    """Return the number of terms that reproduces any matrix."""
    (o1, i1), (o2, i2) = shape
    return min(o1 * i1, o2 * i2)


def nearest(weight: Tensor, terms: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return left and right factors of the Kronecker sum nearest to the zero-padded weight."""
    (o1, i1), (o2, i2) = shape
    return linalg.nearest_kronecker(linalg.pad_to(weight, o1 * o2, i1 * i2), terms, shape)


def check_terms(name: str, terms: int, shape: Shape) -> None:
    """Raise ValueError for a number of terms outside 1..max_terms."""
    why = f" for factor shapes {shape[0]} and {shape[1]}; use fewer or more even factors"
    check_range(name, terms, max_terms(shape), why)


@register
@dataclass(frozen=True)
class Kronecker(Structure):
    """Sums of Kronecker products; the decomposition is Van Loan & Pitsianis', optimal for its shape."""

    name: ClassVar[str] = "kronecker"
    terms: int = 1
    shape: Shape | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        shape = balanced_shape(in_features, out_features) if self.shape is None else self.shape
        (o1, i1), (o2, i2) = shape
        if min(o1, i1, o2, i2) < 1 or o1 * o2 < out_features or i1 * i2 < in_features:
            raise ValueError(
                f"shape={shape} covers {o1 * o2} x {i1 * i2}, less than the layer's {out_features} x {in_features}; "
                "use ((o1, i1), (o2, i2)) with o1 o2 >= out_features and i1 i2 >= in_features"
            )
        check_terms("terms", self.terms, shape)
        return type(self)(terms=self.terms, shape=((o1, i1), (o2, i2)))

    def spec(self, in_features: int, out_features: int) -> Spec:
        assert self.shape is not None
        return Spec(in_features, out_features, (kronecker_equation(self.terms, self.shape),))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        assert self.shape is not None
        return nearest(weight, self.terms, self.shape)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        (o1, i1), (o2, i2) = balanced_shape(in_features, out_features)
        o_half, i_half = modes.split(out_features, 2)[1], modes.split(in_features, 2)[1]
        # Balanced, and the two shapes next to a plain low-rank product, which fit trained weights best.
        shapes: list[Shape] = [((o1, i1), (o2, i2)), ((2, i_half), (o_half, 2)), ((o_half, 2), (2, i_half))]
        for shape in shapes:
            size = sum(o * i for o, i in shape)
            terms = min(budget // size, max_terms(shape))
            if terms >= 1:
                yield cls(terms=terms, shape=shape)


@layer_of(Kronecker)
class KroneckerLinear(StructuredLinear):
    """Apply W = sum_t left[t] (x) right[t] without forming it.

    Cost: terms (o1 i1 + o2 i2) parameters, 2 terms min(i1 o2 (i2 + o1), o1 i2 (i1 + o2)) FLOPs per token.

    Args:
        terms: number of products, 1 <= terms <= min(o1 i1, o2 i2).
        shape: ((o1, i1), (o2, i2)) with o1 o2 >= out_features and i1 i2 >= in_features (surplus is padded); None
            takes sides near the square roots.
    Raises:
        ValueError: if shape is too small or terms out of range.
    Source: Van Loan & Pitsianis 1993, Approximation with Kronecker products.
    Example:
        >>> KroneckerLinear(64, 32, terms=2).structure.shape
        ((4, 8), (8, 8))
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        terms: int = 1, shape: Shape | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Kronecker(terms=terms, shape=shape)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
