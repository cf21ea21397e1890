"""CP: W[o1 o2 .., i1 i2 ..] as a sum of products of one vector for each mode (canonical polyadic decomposition)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import check_range, register
from structlin.fitting import linalg, tensors, trains
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.butterfly import Digits, DigitStructure, both_modes


@register
@dataclass(frozen=True)
class CP(DigitStructure):
    """Sums of rank-1 tensors over the modes of output and input.

    There is no closed form. Refinement starts from orthogonal terms: of the weight's nearest Kronecker terms, whose two
    factors are matrices, the singular values and vectors of both; the terms with the largest products go on. With more
    than two modes a side, each vector of a side is broken up in the same way.
    """

    name: ClassVar[str] = "cp"
    aliases: ClassVar[tuple[str, ...]] = ("parafac", "candecomp")
    refine_steps: ClassVar[int] = 300
    rank: int
    in_modes: Digits | None = None
    out_modes: Digits | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        in_modes, out_modes = both_modes(in_features, out_features, None, self.in_modes, self.out_modes)
        sizes = (*out_modes, *in_modes)
        largest = math.prod(sizes) // max(sizes)
        check_range("rank", self.rank, largest, f", which any tensor with modes {sizes} has; use a smaller rank")
        return type(self)(rank=self.rank, in_modes=in_modes, out_modes=out_modes)

    def spec(self, in_features: int, out_features: int) -> Spec:
        out_modes, in_modes = self.digits()
        count = len(out_modes)
        names = [f"{side}{k + 1}" for side in "oi" for k in range(count)]
        sizes = {**dict(zip(names, (*out_modes, *in_modes), strict=True)), "r": self.rank}
        terms = [f"{name} r" for name in (*names[count:], *names[:count])]
        factors = [f"{side}_{k}" for side in ("in", "out") for k in range(count)]
        return Spec(in_features, out_features, (equation(f"{', '.join(terms)} -> {' '.join(names)}", factors, sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        out_modes, in_modes = self.digits()
        padded = linalg.pad_to(weight, math.prod(out_modes), math.prod(in_modes))
        pairs = trains.tt_matrix(padded, out_modes, in_modes).to(linalg.working_dtype(weight))
        vectors = tensors.orthogonal_terms(pairs, self.rank)  # o1, i1, o2, i2, .., each (size, rank)
        return linalg.balance([*vectors[1::2], *vectors[0::2]])

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for count in (2, 3):
            out_modes, in_modes = (modes.balanced_modes(size, count) for size in (out_features, in_features))
            sizes = (*out_modes, *in_modes)
            rank = min(budget // sum(sizes), math.prod(sizes) // max(sizes))
            if rank >= 1:
                yield cls(rank=rank, in_modes=in_modes, out_modes=out_modes)


@layer_of(CP)
class CPLinear(StructuredLinear):
    """Apply W[o1 .., i1 ..] = sum_r out_0[o1, r] .. in_0[i1, r] .., a sum of rank-1 tensors.

    Cost: rank sum_k n_k parameters for modes n_k, 2 rank (in + out) FLOPs per token and less than that beside: at the
    ratios of other structures the rank is large, and the layer slow; it is for very small sizes.

    Args:
        rank: number of terms, from 1 to the product of all modes but the largest.
        in_modes: whole numbers whose product is in_features or more (surplus is padded); None takes two balanced ones.
        out_modes: as many, likewise.
    Raises:
        ValueError: if modes do not cover the layer or rank is out of range.
    Source: Hitchcock 1927; Carroll & Chang 1970; Harshman 1970; Kolda & Bader 2009. The start from orthogonal terms is
        ours.
    Example:
        >>> CPLinear(64, 64, rank=4, in_modes=(8, 8), out_modes=(8, 8)).num_parameters
        128
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int, in_modes: Digits | None = None, out_modes: Digits | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = CP(rank=rank, in_modes=in_modes, out_modes=out_modes)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
