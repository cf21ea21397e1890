"""Products of Kronecker sums: W = prod_l sum_t left_l[t] (x) right_l[t], the matrices of Shapeshifter's theory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import register
from structlin.fitting import linalg
from structlin.fitting.linalg import Shape
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.butterfly import Digits, DigitStructure, both_modes
from structlin.structures.kronecker import check_terms, nearest

T = TypeVar("T")


@register
@dataclass(frozen=True)
class KroneckerChain(DigitStructure):
    """Several Kronecker sums one after the other; the layers but one are square, on the smaller side of the weight.

    There is no closed form. Refinement starts from the nearest Kronecker sum in the layer that is not square, and
    identities in the others; their further terms have a cyclic shift on the left and zeros on the right, where the
    gradient is not zero. No two have the same, so that none stay copies of each other.
    """

    name: ClassVar[str] = "kronchain"
    aliases: ClassVar[tuple[str, ...]] = ("kronecker_chain",)
    refine_steps: ClassVar[int] = 500
    repeats: ClassVar[tuple[str, ...]] = ("depth",)
    terms: int = 1
    depth: int = 2
    in_modes: Digits | None = None
    out_modes: Digits | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        in_modes, out_modes = both_modes(in_features, out_features, None, self.in_modes, self.out_modes)
        if len(in_modes) != 2:
            raise ValueError(
                f"in_modes={in_modes}, out_modes={out_modes}; a Kronecker product of two has two modes each"
            )
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} is below 1; give the number of Kronecker sums in the product")
        found = type(self)(self.terms, self.depth, in_modes, out_modes)
        for shape in found.shapes():
            check_terms("terms", self.terms, shape)
        return found

    def shapes(self) -> list[Shape]:
        """Return ((o1, i1), (o2, i2)) of each layer of a resolved structure, in the order of application."""
        (o1, o2), (i1, i2) = self.digits()
        m1, m2 = (o1, o2) if self._narrows() else (i1, i2)
        return self._ordered([((o1, i1), (o2, i2))], [((m1, m1), (m2, m2))] * (self.depth - 1))

    def _narrows(self) -> bool:
        out_modes, in_modes = self.digits()
        return math.prod(out_modes) < math.prod(in_modes)

    def _ordered(self, changing: list[T], square: list[T]) -> list[T]:
        """Put what belongs to the layer that is not square, and to the square ones, into the order of application."""
        return changing + square if self._narrows() else square + changing

    def spec(self, in_features: int, out_features: int) -> Spec:
        names, pairs = [], []
        sizes: dict[str, int] = {}
        old = ("i1", "i2")
        for k, ((o1, i1), (o2, i2)) in enumerate(self.shapes()):
            new = ("o1", "o2") if k == self.depth - 1 else (f"a{k}", f"b{k}")
            sizes |= {f"t{k}": self.terms, old[0]: i1, old[1]: i2, new[0]: o1, new[1]: o2}
            names += [f"left_{k}", f"right_{k}"]
            pairs += [f"t{k} {new[0]} {old[0]}", f"t{k} {new[1]} {old[1]}"]
            old = new
        return Spec(in_features, out_features, (equation(f"{', '.join(pairs)} -> o1 o2 i1 i2", names, sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        (o1, o2), (i1, i2) = self.digits()
        pair = list(nearest(weight, self.terms, ((o1, i1), (o2, i2))))
        one, other = (
            torch.eye(size, dtype=linalg.working_dtype(weight), device=weight.device)
            for size in ((o1, o2) if self._narrows() else (i1, i2))
        )
        shifts = torch.stack([_shift(one, *divmod(t, len(one))) for t in range(self.terms)])
        rights = torch.stack([other, *[torch.zeros_like(other)] * (self.terms - 1)])
        return linalg.balance(self._ordered(pair, [shifts, rights] * (self.depth - 1)))

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        in_modes, out_modes = (modes.balanced_modes(size, 2) for size in (in_features, out_features))
        for depth in (2, 3):
            one = cls(1, depth, in_modes, out_modes)
            size = one.spec(in_features, out_features).num_parameters
            most = min(min(o1 * i1, o2 * i2) for (o1, i1), (o2, i2) in one.shapes())
            terms = min(budget // size, most)
            if terms >= 1:
                yield cls(terms, depth, in_modes, out_modes)


def _shift(identity: Tensor, wave: int, by: int) -> Tensor:
    """Return a cyclic shift whose rows are weighted by a Hartley wave; such matrices are orthogonal to each other."""
    turns = 2 * math.pi * wave * torch.arange(len(identity), dtype=torch.float64) / len(identity)
    return (identity * (turns.cos() + turns.sin()).to(identity)).roll(by, 0)


@layer_of(KroneckerChain)
class KroneckerChainLinear(StructuredLinear):
    """Apply W = prod_l sum_t left_l[t] (x) right_l[t], a product of `depth` sums of `terms` Kronecker products.

    Cost: terms (o1 i1 + o2 i2) parameters for each layer ((o1, i1), (o2, i2)); the FLOPs per token are those of the
    plan. With enough layers of few terms, such products are all matrices (see `structlin.exact.orthogonal`).

    Args:
        terms: number of Kronecker products in each sum.
        depth: number of sums in the product; 1 is `KroneckerLinear`.
        in_modes: two whole numbers whose product is in_features or more (surplus is padded); None takes balanced ones.
        out_modes: two, likewise.
    Raises:
        ValueError: if modes do not cover the layer, or terms or depth is out of range.
    Source: Panahi, Saeedi & Arodz 2021, Shapeshifter: a parameter-efficient transformer using factorized reshaped
        matrices.
    Example:
        >>> KroneckerChainLinear(64, 64, terms=2, depth=3).num_parameters
        768
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        terms: int = 1, depth: int = 2, in_modes: Digits | None = None, out_modes: Digits | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = KroneckerChain(terms, depth, in_modes, out_modes)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
