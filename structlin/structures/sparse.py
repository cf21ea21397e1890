"""Sparse: W has entries in fixed places, or blocks of them; the others are zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, check_range, register
from structlin.equation.ties import Tie
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.runtime.contract.tied import as_text, bits
from structlin.structures.tied import blocked, mean

MOST_PLACES = 1 << 20  # that a ratio asks for: of a larger matrix it keeps blocks


@register
@dataclass(frozen=True)
class Sparse(Structure):
    """Blocks of one side, in fixed places of a grid; the decomposition copies them.

    Open places are those of the largest norm when a weight is fitted (with Grams, of its inputs and outputs), and
    spread by a fixed hash in a layer from scratch.
    """

    name: ClassVar[str] = "sparse"
    count: int  # places kept
    block: int = 1
    places: str | None = field(default=None, repr=False)  # base64, see `structlin.equation.ties`

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        rows, columns = self._grid(in_features, out_features)
        check_range("count", self.count, rows * columns, f", the places of a {rows} x {columns} grid; use fewer")
        if self.places is not None:
            kept = int(bits(self.places, rows * columns).sum())
            if kept != self.count:
                raise ValueError(f"places keep {kept} blocks, count={self.count}; give the same number")
        return self

    def _grid(self, in_features: int, out_features: int) -> tuple[int, int]:
        return grid(in_features, out_features, self.block)

    def spec(self, in_features: int, out_features: int) -> Spec:
        grid, side = self._grid(in_features, out_features), (self.block, self.block)
        tie = Tie("places", self.count, self.places or "")
        return blocked(in_features, out_features, tie, grid=grid, side=side, across=True)

    def suited(self, weight: Tensor) -> Self:
        if self.places is not None:
            return self
        rows, columns = self._grid(weight.shape[1], weight.shape[0])
        padding = (0, columns * self.block - weight.shape[1], 0, rows * self.block - weight.shape[0])
        score = F.pad(weight.abs().square(), padding).view(rows, self.block, columns, self.block).sum((1, 3)).flatten()
        kept = torch.zeros(rows * columns, dtype=torch.bool)
        kept[score.argsort(descending=True, stable=True)[: self.count].cpu()] = True
        return type(self)(count=self.count, block=self.block, places=as_text(kept))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        return mean(self.spec(weight.shape[1], weight.shape[0]), weight)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        block = 1
        while (count := -(-out_features // block) * -(-in_features // block)) > MOST_PLACES:
            block *= 2
        if budget >= block**2:
            yield cls(count=min(budget // block**2, count), block=block)


def grid(in_features: int, out_features: int, block: int) -> tuple[int, int]:
    """Return the rows and columns of blocks.

    Raises:
        ValueError: if the block is larger than the matrix, or below 1.
    """
    largest = max(in_features, out_features)
    check_range("block", block, largest, ", the larger side of the matrix; use a smaller block")
    return -(-out_features // block), -(-in_features // block)


def _kept(places: Tensor | str, in_features: int, out_features: int, block: int) -> dict[str, Any]:
    """Return the fields of a structure that keeps the places that are true."""
    wanted = grid(in_features, out_features, block)
    if isinstance(places, str):
        kept = bits(places, math.prod(wanted))
    elif tuple(places.shape) == wanted:
        kept = places.bool()
    else:
        raise ValueError(f"places have shape {tuple(places.shape)}; give {wanted}, a place for each block of {block}")
    return {"count": int(kept.sum()), "places": as_text(kept)}


@layer_of(Sparse)
class SparseLinear(StructuredLinear):
    """Apply a matrix with blocks of learned entries in fixed places, the others zero.

    Cost: count block^2 parameters, and one bit per place in a checkpoint; the FLOPs of a dense product. `from_linear`
    keeps the blocks of the largest norm, with a Gram G of |W[o, i]| sqrt(G[i, i]).

    Args:
        ratio: share of the entries, 0 to 1, in place of a count.
        places: (out_features, in_features), true where an entry is learned, in place of a ratio; one place for each
            block where these are larger; or the structure's.
        count: number of places that are kept.
        block: side of the blocks.
    Raises:
        ValueError: if not just one of ratio, places and count says how many entries there are, or one is out of range.
    Source: Sun et al. 2023, Wanda (the choice of places with a Gram).
    Example:
        >>> SparseLinear(64, 64, ratio=0.25).num_parameters
        1024
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        ratio: float | None = None, places: Tensor | str | None = None, count: int | None = None, block: int = 1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        given = {"ratio": ratio, "places": places} if count is None else {"ratio": ratio, "count": count}
        if sum(value is not None for value in given.values()) != 1 or not 0 < (1 if ratio is None else ratio) <= 1:
            raise ValueError(f"ratio={ratio}; give a share above 0 and up to 1, or places=, or count=, and not several")
        in_features, out_features = operator.index(in_features), operator.index(out_features)
        fields: dict[str, Any] = {} if places is None else _kept(places, in_features, out_features, block)
        if ratio is not None:
            count = max(int(ratio * math.prod(grid(in_features, out_features, block)) + 1e-9), 1)
        structure = Sparse(block=block, **(fields if count is None else fields | {"count": count}))
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, places: Tensor | str | None = None, **options: Any) -> Self:
        """Take the entries of the largest scores, or given places, and fit them; see `StructuredLinear.from_linear`."""
        if places is not None:
            options = _kept(places, linear.in_features, linear.out_features, options.get("block", 1)) | options
        return super().from_linear(linear, **options)
