"""Shapeshifter: a low-rank product of the reordered weight, in both readings of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, check_range, register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.kronecker import balanced_shape, check_terms, kronecker_equation, max_terms, nearest


@register
@dataclass(frozen=True)
class Shapeshifter(Structure):
    """A low-rank product of the reordered weight whose factors have about 2 rank sqrt(in out) parameters.

    `order="kron"` reorders as Van Loan & Pitsianis do (a Kronecker sum with all sides near square roots).
    `order="reshape"` reads the weight row-major as a nearly square matrix. Both decompositions are SVDs of the
    reordered weight, optimal.
    """

    name: ClassVar[str] = "shapeshifter"
    rank: int
    order: str = "kron"

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        if self.order not in ("kron", "reshape"):
            raise ValueError(f"order={self.order!r} is unknown; use 'kron' or 'reshape'")
        if self.order == "kron":
            check_terms("rank", self.rank, balanced_shape(in_features, out_features))
            return self
        rows, columns = _reshaped(in_features, out_features)
        why = f" for the weight read as {rows} x {columns}; use a rank up to the smaller side"
        check_range("rank", self.rank, min(rows, columns), why)
        return self

    def spec(self, in_features: int, out_features: int) -> Spec:
        if self.order == "kron":
            eq = kronecker_equation(self.rank, balanced_shape(in_features, out_features))
        elif out_features >= in_features:  # part of the rows moves to the columns
            o1, o2 = _square_split(out_features, in_features)
            sizes = {"o1": o1, "o2": o2, "r": self.rank, "i": in_features}
            eq = equation("o1 r, r o2 i -> o1 o2 i", ("left", "right"), sizes)
        else:
            i2, i1 = _square_split(in_features, out_features)
            sizes = {"o": out_features, "i1": i1, "i2": i2, "r": self.rank}
            eq = equation("o i1 r, r i2 -> o i1 i2", ("left", "right"), sizes)
        return Spec(in_features, out_features, (eq,))

    def decompose(self, weight: Tensor) -> tuple[Tensor, ...]:
        out_features, in_features = weight.shape
        if self.order == "kron":
            return nearest(weight, self.rank, balanced_shape(in_features, out_features))
        eq = self.spec(in_features, out_features).equations[0]
        rows, columns = _reshaped(in_features, out_features)
        padded = linalg.pad_to(weight, eq.padded_out, eq.padded_in).reshape(rows, columns)
        left, right = linalg.truncated_svd(padded, self.rank)  # (rows, rank), (rank, columns)
        return left.reshape(eq.shape(eq.factors[0].modes)), right.reshape(eq.shape(eq.factors[1].modes))

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        shape = balanced_shape(in_features, out_features)
        sides = _reshaped(in_features, out_features)
        # Parameters per rank, and the largest rank.
        sizes = {"kron": (sum(o * i for o, i in shape), max_terms(shape)), "reshape": (sum(sides), min(sides))}
        for order, (size, largest) in sizes.items():
            rank = min(budget // size, largest)
            if rank >= 1:
                yield cls(rank=rank, order=order)


def _square_split(large: int, small: int) -> tuple[int, int]:
    """Split the larger side into (rest, moved): with `moved` on the other side the weight is nearly square."""
    moved = max(round((large / small) ** 0.5), 1)
    return -(-large // moved), moved


def _reshaped(in_features: int, out_features: int) -> tuple[int, int]:
    """Return rows and columns of the weight read as a nearly square matrix."""
    rest, moved = _square_split(max(in_features, out_features), min(in_features, out_features))
    if out_features >= in_features:
        return rest, moved * in_features
    return out_features * moved, rest


@layer_of(Shapeshifter)
class ShapeshifterLinear(StructuredLinear):
    """Apply a weight whose reordering into a nearly square matrix has low rank.

    Cost: about 2 rank sqrt(in out) parameters.

    Args:
        rank: 1 <= rank <= the smaller side of the reordered weight.
        order: "kron" reshapes and rearranges (Kronecker terms, all four sides near square roots); "reshape" only
            reshapes (for a square weight the truncated SVD).
    Raises:
        ValueError: if rank or order is out of range.
    Source: Panahi, Saeedi & Arodz 2021, Shapeshifter. The paper's code was never published: "kron" follows its
        abstract, "reshape" the course project. The authors round square roots up; we take the nearest balanced
        factors.
    Example:
        >>> ShapeshifterLinear(64, 64, rank=2).num_parameters
        256
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int, order: str = "kron",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Shapeshifter(rank=rank, order=order)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
