"""Sums of structures, W = W_1 + W_2 + ..., fitted jointly; low rank + K-matrix compresses best of all we tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.equation.structure import Family, Structure, register, registered, structure_class
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.runtime.contract import to_dense
from structlin.structures.blast import Blast
from structlin.structures.kaleidoscope import Kaleidoscope
from structlin.structures.lowrank import LowRank

_OPTIONS = 2  # candidates of each family but the first that the budget search tries
# Least share of a budget that the search keeps for the first family. The exceptions are measured
# (benchmarks/results/structures_tried.md): beside these structures, a small low rank is enough.
_SHARE = 0.5
_SHARES: dict[tuple[Family, ...], float] = {(LowRank, Kaleidoscope): 0.1, (LowRank, Blast): 0.2}


@register
@dataclass(frozen=True)
class Sum(Structure):
    """The sum of two or more structures of the same size.

    The decomposition fits the parts in turn, each to the residual of those before it. Refinement then moves all parts
    but a low-rank one, which is always the best for the others. `sum_of` and names such as "lowrank+kmatrix" give the
    family whose sizes a ratio finds.
    """

    name: ClassVar[str] = "sum"
    sized: ClassVar[bool] = False
    refine_steps: ClassVar[int] = 400
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

    def suited(self, weight: Tensor) -> Sum:
        if all(type(part).suited is Structure.suited for part in self.parts):
            return self
        parts, rest = [], weight
        for part in self.parts:
            parts.append(part.suited(rest))
            rest = rest - to_dense(*_fitted(parts[-1], rest))
        return Sum(parts=tuple(parts))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        factors: list[Tensor] = []
        rest = weight  # residual of the parts so far
        for part in self.parts:
            spec, found = _fitted(part, rest)
            rest = rest - to_dense(spec, found)
            factors += found
        return factors

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> NoReturn:
        raise ValueError("the parts of this sum are not named, so a ratio finds no sizes; use 'a+b', or give parts=")


def _fitted(part: Structure, weight: Tensor) -> tuple[Spec, list[Tensor]]:
    factors = [factor.to(weight.dtype) for factor in part.decompose(weight)]
    return part.spec(weight.shape[1], weight.shape[0]), factors


@dataclass(frozen=True)
class SumFamily:
    """All sums of one member of each family, for `within` and `fit`; `sum_of` makes it."""

    families: tuple[Family, ...]  # two or more; the first fills the budget that the others leave

    @property
    def name(self) -> str:
        """The names of the families, joined by a plus."""
        return "+".join(family.name for family in self.families)

    @property
    def refine_steps(self) -> int:
        """Default number of refinement steps of the members."""
        return Sum.refine_steps

    def candidates(self, in_features: int, out_features: int, budget: int) -> Iterator[Sum]:
        """Yield sums of at most `budget` parameters: the others share what the first leaves, it fills the rest."""
        first, *others = self.families
        share = _SHARES.get(self.families, _SHARE)
        for rest in _joined(others, in_features, out_features, int((1 - share) * budget)):
            used = sum(part.spec(in_features, out_features).num_parameters for part in rest)
            for head in first.candidates(in_features, out_features, budget - used):
                yield Sum(parts=(head.resolve(in_features, out_features), *rest))


def sum_of(*families: Family) -> SumFamily:
    """Return the family of sums whose sizes a ratio finds.

    Args:
        families: structure classes, two or more; the first fills the budget that the others leave.
    Raises:
        ValueError: if there are fewer than two.
    Example:
        >>> from structlin.fitting.budget import within
        >>> within(sum_of(LowRank, Blast), 64, 64, ratio=0.5)[0].parts
        (LowRank(rank=4), Blast(blocks=8, rank=8))
    """
    if len(families) < 2:
        raise ValueError(f"sum_of{families} has fewer than two families; a sum needs at least two")
    return SumFamily(families)


def family(name: str) -> Family:
    """Look up structures by name: a registered name, an alias, or names joined by a plus for their sum.

    Raises:
        ValueError: if a name is unknown; the message lists the known names and the nearest of them.
    Example:
        >>> family("kaleidoscope").name, family("lowrank + monarch").name
        ('kmatrix', 'lowrank+monarch')
    """
    found = [structure_class(part.strip()) for part in name.split("+")]
    return found[0] if len(found) == 1 else sum_of(*found)


def families() -> dict[str, Family]:
    """Return by name every registered structure whose sizes a ratio finds, and the two sums that "auto" tries."""
    sums = [SumFamily(pair) for pair in _SHARES]
    return {**registered(sized=True), **{found.name: found for found in sums}}


def _joined(
    families: Sequence[Family], in_features: int, out_features: int, budget: int
) -> Iterator[tuple[Structure, ...]]:
    """Yield one member of each family, each within an even share of the budget."""
    if not families:
        yield ()
        return
    for part in islice(families[0].candidates(in_features, out_features, budget // len(families)), _OPTIONS):
        resolved = part.resolve(in_features, out_features)
        used = resolved.spec(in_features, out_features).num_parameters
        for rest in _joined(families[1:], in_features, out_features, budget - used):
            yield (resolved, *rest)


@layer_of(Sum)
class SumLinear(StructuredLinear):
    """Apply a sum of structures: y = x (W_1 + W_2 + ...)^T + b.

    Cost: the sums of the parts' parameters and FLOPs.

    Args:
        parts: two or more structures, for example (LowRank(rank=20), Kaleidoscope(width=3)).
    Raises:
        ValueError: if there are fewer than two parts, or one does not fit the sizes.
    Source: sums of a low-rank and a structured matrix are common (robust PCA, LoRA). The joint fit that eliminates
        the low-rank part is ours.
    Example:
        >>> from structlin.structures import Kaleidoscope, LowRank
        >>> SumLinear(64, 64, parts=(LowRank(rank=4), Kaleidoscope())).num_parameters
        2048
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        parts: Sequence[Structure],
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Sum(parts=tuple(parts))
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
