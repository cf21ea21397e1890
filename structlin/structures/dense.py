"""Dense: a matrix without structure, as it remains of a layer whose hidden units were removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, register
from structlin.layers.linear import StructuredLinear, layer_of


@register
@dataclass(frozen=True)
class Dense(Structure):
    """All matrices: one factor, which is the weight itself."""

    name: ClassVar[str] = "dense"
    sized: ClassVar[bool] = False

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        sizes = {"o": out_features, "i": in_features}
        return Spec(in_features, out_features, (equation("o i -> o i", ("matrix",), sizes),))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.clone(),)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        if in_features * out_features <= budget:
            yield cls()


@layer_of(Dense)
class DenseLinear(StructuredLinear):
    """Apply y = x matrix^T + b with matrix (out, in): an `nn.Linear` among the structured layers.

    A compressed model holds it where hidden units of an MLP were removed: it has fewer inputs or outputs than the
    layer that it replaced, and `to_dense_` gives it zeros in their place.
    Cost: in out parameters, 2 in out FLOPs per token.
    Example:
        >>> DenseLinear(64, 32)(torch.ones(5, 64)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, structure=Dense(), device=device, dtype=dtype)
