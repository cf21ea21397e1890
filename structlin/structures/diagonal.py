"""Diagonal and block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, check_range, register
from structlin.equation.ties import Tie
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.tied import blocked, mean


@register
@dataclass(frozen=True)
class Diagonal(Structure):
    """Blocks on the diagonal, or single entries where `blocks` is open; the decomposition copies them, optimal."""

    name: ClassVar[str] = "diagonal"
    aliases: ClassVar[tuple[str, ...]] = ("blockdiagonal",)
    blocks: int | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        if self.blocks is not None:
            why = f" for a {out_features} x {in_features} matrix; use at most as many blocks as the smaller side"
            check_range("blocks", self.blocks, min(in_features, out_features), why)
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        count = self.blocks
        grid = (out_features, in_features) if count is None else (count, count)
        side = (1, 1) if count is None else (-(-out_features // count), -(-in_features // count))
        return blocked(in_features, out_features, Tie("diagonal", min(grid)), grid=grid, side=side, across=True)

    def decompose(self, weight: Tensor) -> list[Tensor]:
        return mean(self.spec(weight.shape[1], weight.shape[0]), weight)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for blocks in range(1, min(in_features, out_features) + 1):
            if blocks * -(-out_features // blocks) * -(-in_features // blocks) <= budget:
                yield cls(blocks=blocks)
                return


@layer_of(Diagonal)
class DiagonalLinear(StructuredLinear):
    """Multiply each number by a learned one, or each group of them by a matrix of its own.

    Cost: min(in, out) parameters without blocks, in out / blocks with them; 2 FLOPs per parameter and token.
    `flops_per_token` counts the dense product, which runs under torch.compile.

    Args:
        blocks: number of blocks; None: single entries, surplus inputs are dropped and surplus outputs zero.
    Raises:
        ValueError: if blocks is out of range.
    Example:
        >>> DiagonalLinear(64, 64).num_parameters, DiagonalLinear(64, 32, blocks=4).num_parameters
        (64, 512)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        blocks: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, structure=Diagonal(blocks=blocks), device=device, dtype=dtype)
