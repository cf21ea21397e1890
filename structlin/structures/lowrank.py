"""Low rank: W = left @ right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, check_range, register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of


@register
@dataclass(frozen=True)
class LowRank(Structure):
    """Matrices of bounded rank; the decomposition is the truncated SVD, optimal by Eckart & Young 1936."""

    name: ClassVar[str] = "lowrank"
    rank: int

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        why = f" for a {out_features} x {in_features} matrix; use a rank up to the smaller side"
        check_range("rank", self.rank, min(in_features, out_features), why)
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        sizes = {"o": out_features, "r": self.rank, "i": in_features}
        return Spec(in_features, out_features, (equation("o r, r i -> o i", ("left", "right"), sizes),))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        return linalg.truncated_svd(weight, self.rank)  # (out, rank), (rank, in)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        rank = min(budget // (in_features + out_features), in_features, out_features)
        if rank >= 1:
            yield cls(rank=rank)


@layer_of(LowRank)
class LowRankLinear(StructuredLinear):
    """Apply y = (x right^T) left^T + b with left (out, rank) and right (rank, in).

    Cost: rank (in + out) parameters, 2 rank (in + out) FLOPs per token.

    Args:
        rank: 1 <= rank <= min(in_features, out_features).
    Raises:
        ValueError: if rank is out of range.
    Source: Eckart & Young 1936 for `from_linear`.
    Example:
        >>> LowRankLinear(64, 32, rank=4)(torch.ones(5, 64)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, structure=LowRank(rank=rank), device=device, dtype=dtype)
