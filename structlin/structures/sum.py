"""Sums of structures: W = W_1 + W_2 + ..., fitted jointly; low rank + K-matrix is the strongest that we know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, register
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.runtime.contract import to_dense
from structlin.structures.blast import Blast
from structlin.structures.kaleidoscope import Kaleidoscope
from structlin.structures.lowrank import LowRank

_OPTIONS = 2  # candidates of each family but the first that the budget search tries


@register
@dataclass(frozen=True)
class Sum(Structure):
    """The sum of any structures of the same size.

    The decomposition takes the parts in turn, each from what those before it left; refinement then moves all of them,
    and a low-rank part is always kept at its best for the others. Named sums (subclasses with `families`)
    also find their sizes from a ratio.
    """

    name: ClassVar[str] = "sum"
    sized: ClassVar[bool] = False
    refine_steps: ClassVar[int] = 400
    families: ClassVar[tuple[type[Structure], ...]] = ()
    # The least share of the budget that the budget search gives to the first family.
    share: ClassVar[float] = 0.5
    parts: tuple[Structure, ...]

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Sum:
        if len(self.parts) < 2:
            raise ValueError(f"parts={self.parts} has fewer than two structures; a sum needs at least two")
        return Sum(parts=tuple(part.resolve(in_features, out_features, weight) for part in self.parts))

    def spec(self, in_features: int, out_features: int) -> Spec:
        equations = []
        for k, part in enumerate(self.parts):
            for eq in part.spec(in_features, out_features).equations:
                named = tuple(replace(factor, name=f"part_{k}_{factor.name}") for factor in eq.factors)
                equations.append(replace(eq, factors=named))
        return Spec(in_features, out_features, tuple(equations))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        factors: list[Tensor] = []
        rest = weight
        for part in self.parts:
            found = [factor.to(weight.dtype) for factor in part.decompose(rest)]
            rest = rest - to_dense(part.spec(weight.shape[1], weight.shape[0]), found)
            factors += found
        return factors

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Sum]:
        """Members whose other families get what the first one's share leaves, and the first what they leave."""
        if not cls.families:
            raise ValueError("a sum of unnamed parts has no sizes to find; give parts=, or use a sum with a name")
        first, *others = cls.families
        for rest in _joined(others, in_features, out_features, int((1 - cls.share) * budget)):
            used = sum(part.spec(in_features, out_features).num_parameters for part in rest)
            for head in first.candidates(in_features, out_features, budget - used):
                yield Sum(parts=(head.resolve(in_features, out_features), *rest))


def _joined(
    families: Sequence[type[Structure]], in_features: int, out_features: int, budget: int
) -> Iterator[tuple[Structure, ...]]:
    """Members of all families, each within an even share of the budget."""
    if not families:
        yield ()
        return
    for part in islice(families[0].candidates(in_features, out_features, budget // len(families)), _OPTIONS):
        resolved = part.resolve(in_features, out_features)
        used = resolved.spec(in_features, out_features).num_parameters
        for rest in _joined(families[1:], in_features, out_features, budget - used):
            yield (resolved, *rest)


@register
@dataclass(frozen=True)
class LowRankKaleidoscope(Sum):
    """Low rank + K-matrix."""

    name: ClassVar[str] = "lowrank+kmatrix"
    sized: ClassVar[bool] = True
    families: ClassVar[tuple[type[Structure], ...]] = (LowRank, Kaleidoscope)
    share: ClassVar[float] = 0.1


@register
@dataclass(frozen=True)
class LowRankBlast(Sum):
    """Low rank + BLAST."""

    name: ClassVar[str] = "lowrank+blast"
    sized: ClassVar[bool] = True
    families: ClassVar[tuple[type[Structure], ...]] = (LowRank, Blast)
    share: ClassVar[float] = 0.2


@layer_of(Sum)
class SumLinear(StructuredLinear):
    """Apply a sum of structures: y = x (W_1 + W_2 + ...)^T + b.

    Cost: the sums of the parts' parameters and FLOPs.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias.
        parts: two or more structures, such as (LowRank(rank=20), Kaleidoscope(width=3)).
        device: of the parameters.
        dtype: of the parameters.
    Raises:
        ValueError: if there are fewer than two parts, or one does not fit the sizes.
    Source: sums of a low-rank and a structured matrix are common (robust PCA, LoRA); the joint fit with the
        low-rank part eliminated is ours.
    Example:
        >>> from structlin.structures import Kaleidoscope, LowRank
        >>> SumLinear(64, 64, parts=(LowRank(rank=4), Kaleidoscope())).num_parameters
        2048
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        parts: Sequence[Structure],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        structure = Sum(parts=tuple(parts))
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
