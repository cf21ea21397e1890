"""Circulant blocks: W is constant along the wrapped diagonals of each block."""

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
class Circulant(Structure):
    """A grid of circulant blocks of one side; the decomposition is the mean of each wrapped diagonal, optimal."""

    name: ClassVar[str] = "circulant"
    block: int | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        largest = max(in_features, out_features)
        block = largest if self.block is None else self.block
        check_range("block", block, largest, ", the larger side of the matrix; use a smaller block")
        return type(self)(block=block)

    def spec(self, in_features: int, out_features: int) -> Spec:
        assert self.block is not None
        grid = -(-out_features // self.block), -(-in_features // self.block)
        tie = Tie("circulant", self.block)
        return blocked(in_features, out_features, tie, grid=grid, side=(self.block, self.block))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        return mean(self.spec(weight.shape[1], weight.shape[0]), weight)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for block in range(1, max(in_features, out_features) + 1):
            if -(-out_features // block) * -(-in_features // block) * block <= budget:
                yield cls(block=block)  # the smallest block that fits has the most parameters
                return


@layer_of(Circulant)
class CirculantLinear(StructuredLinear):
    """Apply W[o, i] = values[(o - i) mod block] in each block, by FFT: diagonal in the Fourier basis.

    Cost: in out / block parameters, O((in + out) log block + in out / block) FLOPs per token by FFT. Where the dense
    product is predicted to be faster, and under torch.compile, W is written out; `flops_per_token` counts that product.

    Args:
        block: side of the blocks; None takes the larger of the two sizes, which is one circulant, cut to the layer.
    Raises:
        ValueError: if block is out of range.
    Source: Cheng et al. 2015; block-circulant layers: Ding et al. 2017, CirCNN.
    Example:
        >>> CirculantLinear(64, 64).num_parameters
        64
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        block: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Circulant(block=block)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
