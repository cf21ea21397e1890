"""`TTMatrix`, a matrix in the tensor-train format, with its products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.fitting.trains import tt_matrix
from structlin.layers.linear import build
from structlin.runtime.contract import apply
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import find_plan
from structlin.structures import TensorTrain, TTLinear
from structlin.tensor_train.algebra import Train
from structlin.tensor_train.tensor import TT

_FEW = 1 << 14  # entries of a dense operand up to which finding and reading a plan costs more than it saves


class TTMatrix(Train):
    """A matrix W[o1 .. od, i1 .. id] = G1[o1, i1] ... Gd[od, id], each G_k[o, i] an r_k x r_k+1 matrix.

    What `TT` has, but for indexing; and `@` with vectors and matrices, dense or in the format, and `.mT`.

    Args:
        cores: (r_k, o_k, i_k, r_k+1), of one dtype and device.
    Raises:
        ValueError: if neighbours disagree on a rank, or the outer ranks are not 1.
    Source: Novikov et al. 2015, Tensorizing Neural Networks.
    Example:
        >>> matrix = TTMatrix.from_full(torch.eye(8), (2, 2, 2), (2, 2, 2), tolerance=1e-6)
        >>> matrix.ranks, round(float((matrix @ torch.arange(8.0))[3]), 4)
        ((1, 1), 3.0)
    """

    axes: ClassVar[int] = 2

    @property
    def out_modes(self) -> tuple[int, ...]:
        """The o_k."""
        return tuple(size[0] for size in self.modes)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """The i_k."""
        return tuple(size[1] for size in self.modes)

    @property
    def shape(self) -> torch.Size:
        """The shape of the full matrix, (o1 o2 .., i1 i2 ..)."""
        return torch.Size((math.prod(self.out_modes), math.prod(self.in_modes)))

    @classmethod
    def from_full(
        cls, matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], *,
        rank: int | Sequence[int] | None = None, tolerance: float | None = None, ratio: float | None = None,
    ) -> Self:  # fmt: skip
        """Decompose a matrix by TT-SVD; one of the three settings gives the ranks.

        Args:
            matrix: (o1 o2 .., i1 i2 ..), any float or complex dtype; computed in double precision.
            out_modes: the o_k.
            in_modes: the i_k, as many.
            rank: the most that a bond may have, or one number per bond.
            tolerance: relative Frobenius error allowed.
            ratio: entries of the cores / entries of the matrix, at most; the ranks are those that lose least.
        Raises:
            ValueError: unless the modes fit the matrix, and one of the three is given and in range.
        """
        given = (math.prod(out_modes), math.prod(in_modes))
        if tuple(matrix.shape) != given or len(out_modes) != len(in_modes):
            raise ValueError(f"out_modes={tuple(out_modes)} and in_modes={tuple(in_modes)} do not fit a matrix of "
                             f"shape {tuple(matrix.shape)}")  # fmt: skip
        return cls._decomposed(tt_matrix(matrix, out_modes, in_modes), rank, tolerance, ratio)

    @classmethod
    def from_layer(cls, layer: TTLinear) -> Self:
        """Return the matrix of a layer; its cores are the layer's parameters. Surplus of the modes is part of it."""
        first, *middle, last = layer.factors
        return cls([first.unsqueeze(0), *middle, last.unsqueeze(-1)])

    def to_layer(self, bias: Tensor | None = None) -> TTLinear:
        """Return a layer that computes y = W x + b, with copies of the cores and the bias, all to be trained."""
        rows, columns = self.shape
        structure = TensorTrain(self.ranks, self.in_modes, self.out_modes, len(self.cores))
        layer = build(structure, columns, rows, bias is not None, device="meta")
        assert isinstance(layer, TTLinear)
        given = None if bias is None else bias.detach().requires_grad_()
        layer.fill([core.detach().clone() for core in self._outer()], given)
        return layer

    def full(self) -> Tensor:
        """Compute the matrix (o1 o2 .., i1 i2 ..), of all its entries."""
        count = len(self.cores)
        return self._chain().permute(*range(0, 2 * count, 2), *range(1, 2 * count, 2)).reshape(self.shape)

    @property
    def mT(self) -> Self:  # noqa: N802 (torch's name)
        """The transpose."""
        return type(self)([core.transpose(1, 2) for core in self.cores])

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: TT) -> TT: ...
    @overload
    def __matmul__(self, other: Self) -> Self: ...

    def __matmul__(self, other: Tensor | TT | Self) -> Tensor | TT | Self:
        """Multiply by a vector (in,) or matrix (in, columns); by a `TT` or `TTMatrix`, whose ranks are multiplied.

        A dense operand is contracted core by core in the cheapest order, O(n r^2 columns max(in, out)) at most.

        Raises:
            ValueError: if sizes or modes do not fit.
        """
        if isinstance(other, Tensor):
            return self._applied(other)
        if self.in_modes != tuple(size[0] for size in other.modes):
            raise ValueError(f"{self} has in_modes {self.in_modes}, and {other} has others")
        return type(other)([_product(*pair) for pair in zip(self.cores, other.cores, strict=True)])

    def _applied(self, other: Tensor) -> Tensor:
        rows, columns = self.shape
        if other.ndim not in (1, 2) or other.shape[0] != columns:
            raise ValueError(f"{self} multiplies vectors ({columns},) and matrices ({columns}, ..), not "
                             f"{tuple(other.shape)}")  # fmt: skip
        if 0 < other.numel() <= _FEW:
            y = self._in_turn(other)
            return y.squeeze(0) if other.ndim == 1 else y.mT
        structure = TensorTrain(self.ranks, self.in_modes, self.out_modes, len(self.cores))
        spec, x = structure.spec(columns, rows), other.unsqueeze(0) if other.ndim == 1 else other.mT
        plan = find_plan(spec, x.shape[0], machine=machine_of(x.device), itemsize=x.element_size())
        y = apply(spec, self._outer(), x, plan)
        return y.squeeze(0) if other.ndim == 1 else y.mT

    def _in_turn(self, x: Tensor) -> Tensor:
        """Multiply (in, ..) by one core after the other: (columns, out)."""
        for core in self.cores:  # x: (bond, mode, later modes, columns, modes made so far)
            r, o, i, s = core.shape
            x = (core.permute(1, 3, 0, 2).reshape(o * s, r * i) @ x.reshape(r * i, -1)).view(o, -1).mT
        return x.reshape(-1, self.shape[0])

    def _outer(self) -> list[Tensor]:
        """Return the cores in the shapes of the layer's equation: the outer two have one bond."""
        cores = list(self.cores)
        cores[0] = cores[0].squeeze(0)
        cores[-1] = cores[-1].squeeze(-1)
        return cores


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two cores over the mode they share: (r, o, i, s) by (t, i, .., u) -> (r t, o, .., s u)."""
    (r, o, i, s), (t, _, *j, u) = a.shape, b.shape
    product = a.transpose(2, 3).reshape(r * o * s, i) @ b.transpose(0, 1).reshape(i, -1)
    return product.view(r, o, s, t, math.prod(j), u).permute(0, 3, 1, 4, 2, 5).reshape(r * t, o, *j, s * u)
