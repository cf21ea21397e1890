"""Tucker: W[o1 o2 .., i1 i2 ..] as a small core, multiplied along each mode by a matrix of orthonormal columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import check_range, register
from structlin.fitting import linalg, tensors
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.butterfly import Digits, DigitStructure, both_modes


@register
@dataclass(frozen=True)
class Tucker(DigitStructure):
    """A core with a rank per mode; the decomposition is the sequentially truncated HOSVD.

    It is within sqrt(d) of the best error for its ranks, d the number of modes. `rank` is one number, lowered to
    what each mode can have, or one per mode, those of the output first. With `tolerance` in its place, the ranks follow
    from the weight so that the relative error stays below it.
    """

    name: ClassVar[str] = "tucker"
    aliases: ClassVar[tuple[str, ...]] = ("hosvd",)
    rank: int | tuple[int, ...] | None = None
    in_modes: Digits | None = None
    out_modes: Digits | None = None
    tolerance: float | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        in_modes, out_modes = both_modes(in_features, out_features, None, self.in_modes, self.out_modes)
        sizes = (*out_modes, *in_modes)
        ranks: tuple[int, ...]
        if self.tolerance is not None:
            if self.rank is not None or weight is None:
                raise ValueError("tolerance gives the ranks from a weight: use it in from_linear, and without rank")
            core, _ = tensors.hosvd(_tensor(weight, out_modes, in_modes), tolerance=self.tolerance)
            ranks = tuple(core.shape)
        elif self.rank is None:
            raise ValueError("rank is missing; give one number, one per mode, or a tolerance with from_linear")
        elif isinstance(self.rank, int):
            check_range("rank", self.rank, max(sizes), ", the largest mode; use a smaller rank")
            ranks = _attainable([min(self.rank, size) for size in sizes])
        else:
            ranks = self.rank
        if len(ranks) != len(sizes) or any(not 1 <= r <= size for r, size in zip(ranks, sizes, strict=True)):
            raise ValueError(f"rank={ranks} must give each mode a rank from 1 to its size {sizes}, the output's first")
        if _attainable(ranks) != ranks:
            raise ValueError(f"rank={ranks} has a rank above the product of the others; at most {_attainable(ranks)}")
        return type(self)(rank=ranks, in_modes=in_modes, out_modes=out_modes)

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks of a resolved structure, those of the output's modes first."""
        assert isinstance(self.rank, tuple)
        return self.rank

    def spec(self, in_features: int, out_features: int) -> Spec:
        out_modes, in_modes = self.digits()
        count = len(out_modes)
        names = [f"{side}{k + 1}" for side in "oi" for k in range(count)]
        bonds = [f"{side}{k + 1}" for side in "ab" for k in range(count)]  # a of the output, b of the input
        sizes = dict(zip((*names, *bonds), (*out_modes, *in_modes, *self.ranks()), strict=True))
        pairs = [f"{name} {bond}" for name, bond in zip(names, bonds, strict=True)]
        text = f"{', '.join([*pairs[count:], ' '.join(bonds), *pairs[:count]])} -> {' '.join(names)}"
        factors = [*(f"in_{k}" for k in range(count)), "core", *(f"out_{k}" for k in range(count))]
        return Spec(in_features, out_features, (equation(text, factors, sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        out_modes, in_modes = self.digits()
        core, factors = tensors.hosvd(_tensor(weight, out_modes, in_modes), ranks=self.ranks())
        count = len(out_modes)
        return linalg.balance([*factors[count:], core, *factors[:count]])

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for count in (1, 2):
            out_modes, in_modes = (modes.balanced_modes(size, count) for size in (out_features, in_features))
            ranks = _ranks_within(budget, (*out_modes, *in_modes))
            if ranks:
                yield cls(rank=ranks, in_modes=in_modes, out_modes=out_modes)


def _tensor(weight: Tensor, out_modes: Digits, in_modes: Digits) -> Tensor:
    padded = linalg.pad_to(weight, math.prod(out_modes), math.prod(in_modes))
    return padded.reshape(*out_modes, *in_modes)


def _ranks_within(budget: int, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Find the largest ranks within a budget: the same share of each mode first, then each mode as far as it goes."""

    def cost(ranks: Sequence[int]) -> int:
        return math.prod(ranks) + sum(r * size for r, size in zip(ranks, sizes, strict=True))

    most = max(sizes)
    shares = (tuple(max(1, size * step // most) for size in sizes) for step in range(most, 0, -1))
    found = next((ranks for ranks in shares if cost(ranks) <= budget), None)
    for k, size in enumerate(sizes if found else ()):
        assert found is not None
        grown = ((*found[:k], r, *found[k + 1 :]) for r in range(size, found[k], -1))
        found = next((ranks for ranks in grown if cost(ranks) <= budget), found)
    return found and _attainable(found)


def _attainable(ranks: Sequence[int]) -> tuple[int, ...]:
    """Lower each rank to the product of the others: no tensor has more, so more of the core would be zero."""
    lowered = list(ranks)
    for _ in ranks:  # lowering one may lower another
        for k, rank in enumerate(lowered):
            lowered[k] = min(rank, math.prod(lowered[:k] + lowered[k + 1 :]))
    return tuple(lowered)


@layer_of(Tucker)
class TuckerLinear(StructuredLinear):
    """Apply W[o1 .., i1 ..] = sum core[a1 .., b1 ..] out_0[o1, a1] .. in_0[i1, b1] .., a Tucker decomposition.

    Cost: prod_k r_k + sum_k n_k r_k parameters for modes n_k with ranks r_k; the FLOPs per token are those of the plan.

    Args:
        rank: one number (lowered to what each mode can have), or one per mode, those of the output first.
        in_modes: whole numbers whose product is in_features or more (surplus is padded); None takes two balanced ones.
        out_modes: as many, likewise.
        tolerance: relative Frobenius error allowed, in place of rank; for `from_linear` only.
    Raises:
        ValueError: if modes do not cover the layer or a rank is out of range.
    Source: Tucker 1966; De Lathauwer, De Moor & Vandewalle 2000 (HOSVD); Vannieuwenhoven, Vandebril & Meerbergen 2012
        (sequential truncation).
    Example:
        >>> TuckerLinear(64, 64, rank=4, in_modes=(8, 8), out_modes=(8, 8)).num_parameters
        384
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int | tuple[int, ...] | None = None, in_modes: Digits | None = None, out_modes: Digits | None = None,
        tolerance: float | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Tucker(rank=rank, in_modes=in_modes, out_modes=out_modes, tolerance=tolerance)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
