"""Tensor train: W[o1 o2 .., i1 i2 ..] = G1[o1, i1] G2[o2, i2] ..., a product of small matrices."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, check_range, register
from structlin.fitting import linalg, trains
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear, build, layer_of

_MOST_CORES = 32


@register
@dataclass(frozen=True)
class TensorTrain(Structure):
    """TT-matrices; the decomposition is TT-SVD, within sqrt(d - 1) of the best error for its ranks.

    `rank` is one number, lowered to the maximum at each bond, or one per bond. With `tolerance` in its place, the ranks
    follow from the weight so that the relative error stays below it.
    """

    name: ClassVar[str] = "tt"
    aliases: ClassVar[tuple[str, ...]] = ("tensortrain",)
    rank: int | tuple[int, ...] | None = None
    in_modes: tuple[int, ...] | None = None
    out_modes: tuple[int, ...] | None = None
    cores: int = 3
    tolerance: float | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        out_modes, in_modes = self._modes(in_features, out_features)
        ranks: tuple[int, ...]
        if self.tolerance is not None:
            if self.rank is not None or weight is None:
                raise ValueError("tolerance gives the ranks from a weight: use it in from_linear, and without rank")
            padded = linalg.pad_to(weight, math.prod(out_modes), math.prod(in_modes))
            cores = trains.tt_svd(trains.tt_matrix(padded, out_modes, in_modes), tolerance=self.tolerance, axes=2)
            ranks = tuple(core.shape[-1] for core in cores[:-1])
        elif self.rank is None:
            raise ValueError("rank is missing; give one number, one per bond, or a tolerance with from_linear")
        else:
            ranks = _checked_ranks(self.rank, bond_maxima(out_modes, in_modes))
        return type(self)(rank=ranks, in_modes=in_modes, out_modes=out_modes, cores=len(in_modes))

    def _modes(self, in_features: int, out_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        given = [m for m in (self.out_modes, self.in_modes) if m is not None]
        count = len(given[0]) if given else self.cores
        if not 2 <= count <= _MOST_CORES or any(len(m) != count or min(m) < 1 for m in given):
            raise ValueError(
                f"out_modes={self.out_modes}, in_modes={self.in_modes}, cores={self.cores}: "
                f"use 2 to {_MOST_CORES} modes from 1, as many for the output as for the input"
            )
        # Pair small output modes with large input modes, so that the cores have similar sizes.
        out_modes = tuple(self.out_modes or modes.balanced_modes(out_features, count))
        in_modes = tuple(self.in_modes or modes.balanced_modes(in_features, count)[::-1])
        if math.prod(out_modes) < out_features or math.prod(in_modes) < in_features:
            raise ValueError(
                f"out_modes={out_modes} and in_modes={in_modes} cover {math.prod(out_modes)} x {math.prod(in_modes)}, "
                f"less than the {out_features} x {in_features} of the layer; use larger modes"
            )
        return out_modes, in_modes

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return ranks, output modes and input modes of a resolved structure."""
        assert isinstance(self.rank, tuple)
        assert self.in_modes
        assert self.out_modes
        return self.rank, self.out_modes, self.in_modes

    def spec(self, in_features: int, out_features: int) -> Spec:
        ranks, out_modes, in_modes = self.sizes()
        count = len(in_modes)
        sizes = {f"r{k + 1}": rank for k, rank in enumerate(ranks)}
        sizes |= {f"o{k + 1}": size for k, size in enumerate(out_modes)}
        sizes |= {f"i{k + 1}": size for k, size in enumerate(in_modes)}
        cores = [f"r{k} o{k + 1} i{k + 1} r{k + 1}" for k in range(count)]
        cores[0] = cores[0].removeprefix("r0 ")
        cores[-1] = cores[-1].removesuffix(f" r{count}")
        outer = [f"o{k + 1}" for k in range(count)] + [f"i{k + 1}" for k in range(count)]
        text = f"{', '.join(cores)} -> {' '.join(outer)}"
        eq = equation(text, [f"core_{k}" for k in range(count)], sizes)
        return Spec(in_features, out_features, (eq,))

    def decompose(self, weight: Tensor) -> Iterator[Tensor]:
        ranks, out_modes, in_modes = self.sizes()
        padded = linalg.pad_to(weight, math.prod(out_modes), math.prod(in_modes))
        cores = trains.tt_svd(trains.tt_matrix(padded, out_modes, in_modes), ranks=ranks, axes=2)
        return self.stored(cores)

    def stored(self, cores: Sequence[Tensor]) -> Iterator[Tensor]:
        """Bring cores (r, o, i, r') into the shapes of the equation; the outer two have no outer bond."""
        balanced = linalg.balance(cores)
        bonds = (1, *self.sizes()[0], 1)
        for k, core in enumerate(balanced):
            # The bond of a zero-padded weight may come out smaller than asked for: fill up with zeros.
            full = core.new_zeros(bonds[k], *core.shape[1:3], bonds[k + 1])
            full[: core.shape[0], :, :, : core.shape[3]] = core
            first, last = k == 0, k == len(balanced) - 1
            yield full[0] if first else full[..., 0] if last else full

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for count in (2, 3):
            out_modes = modes.balanced_modes(out_features, count)
            in_modes = modes.balanced_modes(in_features, count)[::-1]
            ranks = _ranks_within(budget, out_modes, in_modes)
            if ranks:
                yield cls(rank=ranks, in_modes=in_modes, out_modes=out_modes, cores=count)


def bond_maxima(out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...]:
    """Return the largest useful rank of each bond: the smaller side of its unfolding."""
    sizes = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return tuple(min(math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(len(sizes) - 1))


def _checked_ranks(rank: int | Sequence[int], maxima: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(rank, int):
        check_range("rank", rank, max(maxima), ", the maximum over the bonds; use a smaller rank")
        return tuple(min(rank, largest) for largest in maxima)
    ranks = tuple(rank)
    if len(ranks) != len(maxima) or any(not 1 <= r <= m for r, m in zip(ranks, maxima, strict=True)):
        raise ValueError(f"rank={ranks} must give each bond a rank from 1 to its maximum {maxima}")
    return ranks


def _ranks_within(budget: int, out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...] | None:
    """Find the largest ranks within a budget: uniform ones first, then each bond in turn as far as it goes."""
    maxima = bond_maxima(out_modes, in_modes)

    def size(ranks: Sequence[int]) -> int:
        bonds = (1, *ranks, 1)
        return sum(bonds[k] * o * i * bonds[k + 1] for k, (o, i) in enumerate(zip(out_modes, in_modes, strict=True)))

    def largest(options: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        fitting = bisect_right(options, budget, key=size)  # sizes ascend along the list
        return options[fitting - 1] if fitting else None

    ranks = largest([tuple(min(r, m) for m in maxima) for r in range(1, max(maxima) + 1)])
    for k, maximum in enumerate(maxima):
        if ranks is not None:
            ranks = largest([(*ranks[:k], r, *ranks[k + 1 :]) for r in range(ranks[k], maximum + 1)])
    return ranks


@layer_of(TensorTrain)
class TTLinear(StructuredLinear):
    """Apply a TT-matrix: W[o1 .. od, i1 .. id] = G1[o1, i1] ... Gd[od, id], each G a small matrix.

    Cost: sum_k r_k-1 o_k i_k r_k parameters; the FLOPs per token are those of the plan (`layer.plan(tokens=1)`).

    Args:
        rank: one number (lowered to the maximum at each bond), or one per bond.
        in_modes: d whole numbers whose product is in_features or more (surplus is padded); None takes balanced ones.
        out_modes: d whole numbers, likewise.
        cores: d, if no modes are given.
        tolerance: relative Frobenius error allowed, in place of rank; for `from_linear` only.
    Raises:
        ValueError: if modes do not cover the layer or a rank is out of range.
    Source: Novikov et al. 2015, Tensorizing Neural Networks; Oseledets 2011 for TT-SVD and rounding.
    Example:
        >>> TTLinear(64, 64, rank=2, in_modes=(4, 4, 4), out_modes=(4, 4, 4)).num_parameters
        128
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        rank: int | tuple[int, ...] | None = None, in_modes: tuple[int, ...] | None = None,
        out_modes: tuple[int, ...] | None = None, cores: int = 3, tolerance: float | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = TensorTrain(rank=rank, in_modes=in_modes, out_modes=out_modes, cores=cores, tolerance=tolerance)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)

    def rounded(self, *, rank: int | tuple[int, ...] | None = None, tolerance: float = 0.0) -> TTLinear:
        """Return a layer of lower ranks by TT-rounding, without forming the dense matrix.

        Args:
            rank: the new ranks, one number or one per bond; None lets the tolerance decide.
            tolerance: relative Frobenius error allowed.
        Returns:
            A new layer with the same bias, flags and dtype.
        Raises:
            ValueError: if a rank is out of range or the tolerance negative.
        Source: Oseledets 2011, algorithm 2.
        """
        structure = self.structure
        assert isinstance(structure, TensorTrain)
        _, out_modes, in_modes = structure.sizes()
        first, *middle, last = (core.detach() for core in self.factors)
        cores = [first.unsqueeze(0), *middle, last.unsqueeze(-1)]
        ranks = None if rank is None else _checked_ranks(rank, bond_maxima(out_modes, in_modes))
        rounded = trains.tt_round(cores, ranks=ranks, tolerance=tolerance)
        bonds = tuple(core.shape[-1] for core in rounded[:-1])
        smaller = TensorTrain(rank=bonds, in_modes=in_modes, out_modes=out_modes, cores=structure.cores)
        layer = build(smaller, self.in_features, self.out_features, self.bias is not None, device="meta")
        assert isinstance(layer, TTLinear)
        layer.fill([core.to(first.dtype) for core in smaller.stored(rounded)], self.bias, self.is_trained)
        return layer.train(self.training)


class TTEmbedding(StructuredEmbedding):
    """Look up rows of a table in the TT format: T[o1 .. od, i1 .. id] = G1[o1, i1] ... Gd[od, id].

    The table is never built: a token reads one slice of each core, and multiplies them.

    Cost: sum_k r_k-1 o_k i_k r_k parameters.

    Args:
        num_embeddings: rows, as for `nn.Embedding`, as embedding_dim and padding_idx are.
        rank: one number (lowered to the maximum at each bond), or one per bond.
        row_modes: d whole numbers whose product is num_embeddings or more; None takes balanced ones.
        column_modes: d whole numbers for embedding_dim, likewise.
        cores: d, if no modes are given.
    Raises:
        ValueError: if modes do not cover the table or a rank is out of range.
    Source: Khrulkov et al. 2019, Tensorized embedding layers.
    Example:
        >>> TTEmbedding(24, 12, rank=2, row_modes=(4, 6), column_modes=(3, 4)).linear.num_parameters
        72
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *,
        rank: int | tuple[int, ...], row_modes: tuple[int, ...] | None = None,
        column_modes: tuple[int, ...] | None = None, cores: int = 3, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = TensorTrain(rank=rank, in_modes=column_modes, out_modes=row_modes, cores=cores)
        drawn = StructuredEmbedding.from_structure(
            num_embeddings, embedding_dim, structure=structure, device=device, dtype=dtype
        )
        super().__init__(drawn.linear, padding_idx)
