"""PHM: parameterised hypercomplex multiplication, quaternions included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, register
from structlin.fitting import linalg
from structlin.fitting.linalg import Shape
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.kronecker import check_terms, kronecker_equation, max_terms, nearest

# The quaternion algebra as matrices of left multiplication by 1, i, j, k: q p = (sum_t q_t HAMILTON[t]) p.
HAMILTON = (
    ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
    ((0, -1, 0, 0), (1, 0, 0, 0), (0, 0, 0, -1), (0, 0, 1, 0)),
    ((0, 0, -1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, -1, 0, 0)),
    ((0, 0, 0, -1), (0, 0, -1, 0), (0, 1, 0, 0), (1, 0, 0, 0)),
)


@register
@dataclass(frozen=True)
class PHM(Structure):
    """Parameterised hypercomplex multiplication: n Kronecker terms with left factors n x n.

    The decomposition is the nearest Kronecker sum of n terms, optimal; with `algebra="hamilton"` the left factors
    are those of the quaternions, orthogonal to one another, and the right factors are projections, optimal too.
    """

    name: ClassVar[str] = "phm"
    n: int = 4
    algebra: str = "learned"

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        if self.n < 1:
            raise ValueError(f"n={self.n} is below 1; n divides the layer into n x n blocks")
        if self.algebra not in ("learned", "hamilton"):
            raise ValueError(f"algebra={self.algebra!r} is unknown; use 'learned' or 'hamilton'")
        if self.algebra == "hamilton" and self.n != 4:
            raise ValueError(f"n={self.n} with algebra='hamilton'; the quaternions have n=4")
        if self.algebra == "learned":
            check_terms("n", self.n, self.shape(in_features, out_features))
        return self

    def shape(self, in_features: int, out_features: int) -> Shape:
        """Return the factor shapes ((n, n), (o2, i2)), o2 and i2 rounded up."""
        return (self.n, self.n), (modes.split(out_features, self.n)[1], modes.split(in_features, self.n)[1])

    def spec(self, in_features: int, out_features: int) -> Spec:
        fixed = tuple(float(x) for matrix in HAMILTON for row in matrix for x in row)
        left = fixed if self.algebra == "hamilton" else None
        eq = kronecker_equation(self.n, self.shape(in_features, out_features), left)
        return Spec(in_features, out_features, (eq,))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        out_features, in_features = weight.shape
        shape = self.shape(in_features, out_features)
        if self.algebra == "learned":
            return nearest(weight, self.n, shape)
        left = torch.tensor(HAMILTON, dtype=linalg.working_dtype(weight), device=weight.device)
        (_, _), (o2, i2) = shape
        # The left factors are orthogonal with squared norm 4, so the projection is an inner product over 4.
        blocks = linalg.rearranged(linalg.pad_to(weight.to(left.dtype), 4 * o2, 4 * i2), shape)  # (16, o2 i2)
        return left, (left.flatten(1) @ blocks / 4).reshape(4, o2, i2)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        # The right factors shrink as 1 / n: the first n within the budget is the largest member.
        for n in range(2, max(in_features, out_features) + 1):
            candidate = cls(n=n)
            if n > max_terms(candidate.shape(in_features, out_features)):
                return
            if candidate.spec(in_features, out_features).num_parameters <= budget:
                yield candidate
                return


@layer_of(PHM)
class PHMLinear(StructuredLinear):
    """Apply W = sum_t left[t] (x) right[t] with n left factors n x n and n right factors (out / n) x (in / n).

    Cost: n^3 + in out / n parameters (in out / 4 for the quaternions), about as many FLOPs per token as dense.

    Args:
        n: the dimension of the algebra; the sizes are padded to a multiple.
        algebra: "learned" learns the left factors; "hamilton" fixes those of the quaternions (n = 4).
    Raises:
        ValueError: if n is below 1, exceeds the terms that any matrix needs, or is not 4 with the Hamilton product.
    Source: Zhang et al. 2021, Beyond fully-connected layers with quaternions; Parcollet et al. 2019.
    Example:
        >>> PHMLinear(64, 32, n=4).num_parameters
        576
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        n: int = 4, algebra: str = "learned",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = PHM(n=n, algebra=algebra)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
