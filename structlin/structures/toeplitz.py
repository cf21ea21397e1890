"""Toeplitz blocks: W is constant along the diagonals of each block."""

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
class Toeplitz(Structure):
    """A grid of `blocks` x `blocks` Toeplitz matrices; the decomposition is the mean of each diagonal, optimal."""

    name: ClassVar[str] = "toeplitz"
    blocks: int = 1

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        why = (
            f" for a {out_features} x {in_features} matrix; use at most as many blocks as the smaller side has entries"
        )
        check_range("blocks", self.blocks, min(in_features, out_features), why)
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        side = height, width = -(-out_features // self.blocks), -(-in_features // self.blocks)
        tie = Tie("toeplitz", height + width - 1)
        return blocked(in_features, out_features, tie, grid=(self.blocks, self.blocks), side=side)

    def decompose(self, weight: Tensor) -> list[Tensor]:
        return mean(self.spec(weight.shape[1], weight.shape[0]), weight)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for blocks in range(min(in_features, out_features), 0, -1):
            if blocks**2 * (-(-out_features // blocks) - (-in_features // blocks) - 1) <= budget:
                yield cls(blocks=blocks)
                return


@layer_of(Toeplitz)
class ToeplitzLinear(StructuredLinear):
    """Apply a matrix of Toeplitz blocks, constant along their diagonals, by FFT.

    With one block W[o, i] = values[o - i + in_features - 1].
    Cost: about blocks (in + out) parameters, O(blocks (in + out) (log n + blocks)) FLOPs per token by FFT, n the sum of
    a block's sides. Where the dense product is predicted to be faster, and under torch.compile, W is written out;
    `flops_per_token` counts that product.

    Args:
        blocks: number of blocks along each side.
    Raises:
        ValueError: if blocks is out of range.
    Example:
        >>> ToeplitzLinear(64, 32).num_parameters
        95
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        blocks: int = 1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, structure=Toeplitz(blocks=blocks), device=device, dtype=dtype)
