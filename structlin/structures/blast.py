"""BLAST: a grid of blocks that share their row and column factors, coupled by a diagonal for each block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, check_range, register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of


@register
@dataclass(frozen=True)
class Blast(Structure):
    """Block (p, q) is left[p] diag(coupling[p, q]) right[q]: low rank, block diagonal and block low rank are members.

    There is no closed form: refinement starts from the truncated SVD, which has all couplings 1.
    """

    name: ClassVar[str] = "blast"
    refine_steps: ClassVar[int] = 300
    blocks: int
    rank: int

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        smaller = min(in_features, out_features)
        check_range("blocks", self.blocks, smaller, f" for a {out_features} x {in_features} matrix; use fewer blocks")
        check_range("rank", self.rank, smaller, ", the smaller side; use a smaller rank")
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        rows, columns = modes.block_sides(self.blocks, in_features, out_features)
        sizes = {"o1": self.blocks, "o2": rows, "i1": self.blocks, "i2": columns, "r": self.rank}
        text = "i1 r i2, o1 i1 r, o1 o2 r -> o1 o2 i1 i2"
        return Spec(in_features, out_features, (equation(text, ("right", "coupling", "left"), sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        rows, columns = modes.block_sides(self.blocks, weight.shape[1], weight.shape[0])
        left, right = linalg.truncated_svd(weight, self.rank)  # (out, rank), (rank, in)
        right = rearrange(linalg.pad_to(right, self.rank, self.blocks * columns), "r (q i) -> q r i", i=columns)
        left = rearrange(linalg.pad_to(left, self.blocks * rows, self.rank), "(p o) r -> p o r", o=rows)
        return linalg.balance([right, left.new_ones(self.blocks, self.blocks, self.rank), left])  # couplings of 1

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        # More blocks fit better, up to about the square root of the smaller side (results/structures_tried.md).
        most = 1 << (math.isqrt(min(in_features, out_features)).bit_length() - 1)
        for blocks in dict.fromkeys((most, max(1, most // 2))):
            sides = sum(modes.block_sides(blocks, in_features, out_features))
            rank = min(budget // (blocks * (sides + blocks)), in_features, out_features)
            if rank >= 1:
                yield cls(blocks=blocks, rank=rank)


@layer_of(Blast)
class BlastLinear(StructuredLinear):
    """Apply W whose block (p, q) is left[p] diag(coupling[p, q]) right[q].

    Cost: rank (in + out + blocks^2) parameters, twice as many FLOPs per token.

    Args:
        blocks: blocks per side, 1 <= blocks <= min(in_features, out_features); the sizes are padded to a multiple.
        rank: 1 <= rank <= min(in_features, out_features), of every block; blocks in a row or column share factors.
    Raises:
        ValueError: if blocks or rank is out of range.
    Source: Lee, Kwon, Qu & Kim 2024, BLAST: block-level adaptive structured matrices for efficient deep neural network
        inference. They fit by preconditioned gradient descent; we by `structlin.fitting.refine`.
    Example:
        >>> BlastLinear(64, 64, blocks=4, rank=8).num_parameters
        1152
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        blocks: int, rank: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Blast(blocks=blocks, rank=rank)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
