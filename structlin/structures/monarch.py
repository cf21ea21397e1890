"""Monarch with a rank bond: every block of a blocks x blocks grid has low rank."""

from __future__ import annotations

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
class Monarch(Structure):
    """Block low rank in two stages; the decomposition is a truncated SVD of every block, optimal."""

    name: ClassVar[str] = "monarch"
    blocks: int
    rank: int = 1

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        smaller = min(in_features, out_features)
        check_range("blocks", self.blocks, smaller, f" for a {out_features} x {in_features} matrix; use fewer blocks")
        largest = min(modes.block_sides(self.blocks, in_features, out_features))
        check_range("rank", self.rank, largest, ", the smaller side of a block; use a smaller rank")
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        rows, columns = modes.block_sides(self.blocks, in_features, out_features)
        sizes = {"o1": self.blocks, "o2": rows, "i1": self.blocks, "i2": columns, "r": self.rank}
        text = "i1 o1 r i2, o1 o2 i1 r -> o1 o2 i1 i2"  # right[q, p] maps block q of the input to (p, q, rank)
        return Spec(in_features, out_features, (equation(text, ("right", "left"), sizes),))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        rows, columns = modes.block_sides(self.blocks, weight.shape[1], weight.shape[0])
        padded = linalg.pad_to(weight, self.blocks * rows, self.blocks * columns)
        grid = rearrange(padded, "(p o) (q i) -> p q o i", o=rows, i=columns)
        left, right = linalg.truncated_svd(grid, self.rank)  # (p, q, o, r), (p, q, r, i)
        return rearrange(right, "p q r i -> q p r i"), rearrange(left, "p q o r -> p o q r")

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for power in range(1, min(in_features, out_features).bit_length()):
            blocks = 2**power
            rows, columns = modes.block_sides(blocks, in_features, out_features)
            rank = min(budget // (blocks**2 * (rows + columns)), rows, columns)
            if rank >= 1:
                yield cls(blocks=blocks, rank=rank)


@layer_of(Monarch)
class MonarchLinear(StructuredLinear):
    """Apply W whose block (p, q) is left[p, :, q] @ right[q, p], in two block-diagonal stages.

    Cost: blocks rank (in + out) parameters, twice as many FLOPs per token.

    Args:
        blocks: blocks per side, 1 <= blocks <= min(in_features, out_features); the sizes are padded to a multiple.
        rank: rank of each block; 1 is the Monarch matrix of the paper (with blocks near the square root).
    Raises:
        ValueError: if blocks or rank is out of range.
    Source: Dao et al. 2022, Monarch; Qiu et al. 2024, Compute better spent (the rank bond).
    Example:
        >>> MonarchLinear(64, 64, blocks=8).num_parameters
        1024
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        blocks: int, rank: int = 1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Monarch(blocks=blocks, rank=rank)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
