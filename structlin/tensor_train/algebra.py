"""What tensors and matrices in the TT format share: a product of cores, and all that can be computed core by core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from structlin.fitting.budget import check_ratio
from structlin.fitting.linalg import leading
from structlin.fitting.trains import tails, tt_norm, tt_round, tt_svd


class Train:
    """A product of d cores (r_k, modes of k, r_k+1), r_0 = r_d = 1; results are new trains, which may share cores.

    All operations are differentiable. Costs in n entries per mode and rank r: sums of trains copy cores; `*` gives
    ranks r_a r_b for O(d n r_a^2 r_b^2); `sum` O(d n r^2); `dot`, `norm` and `round` O(d n r^3).

    Args:
        cores: of one dtype and device.
    Raises:
        ValueError: if neighbours disagree on a rank, or the outer ranks are not 1.
    """

    axes: ClassVar[int]  # modes per core

    def __init__(self, cores: Sequence[Tensor]) -> None:
        self.cores = tuple(cores)
        shapes = [core.shape for core in self.cores]
        bond, fits = 1, bool(shapes)
        for shape in shapes:
            fits = fits and len(shape) == self.axes + 2 and shape[0] == bond
            bond = shape[-1] if shape else 0
        if not fits or bond != 1:
            found = [tuple(shape) for shape in shapes]
            raise ValueError(
                f"cores of shapes {found} are no {type(self).__name__}: each has {self.axes + 2} axes, its first as "
                "large as the last of the core before it, and the outer two are 1"
            )

    @property
    def modes(self) -> tuple[torch.Size, ...]:
        """The sizes of the modes of each core."""
        return tuple(core.shape[1:-1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d - 1 ranks between cores."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def num_parameters(self) -> int:
        """The number of entries of all cores."""
        return sum(core.numel() for core in self.cores)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the cores."""
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the cores."""
        return self.cores[0].device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert all cores, as `Tensor.to` does."""
        return type(self)([core.to(*args, **kwargs) for core in self.cores])

    def detach(self) -> Self:
        """Return the same train outside of the graph."""
        return type(self)([core.detach() for core in self.cores])

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether gradients reach the cores."""
        for core in self.cores:
            core.requires_grad_(requires_grad)
        return self

    def __repr__(self) -> str:
        modes = " x ".join("x".join(map(str, size)) for size in self.modes)
        return f"{type(self).__name__}({modes}, ranks={self.ranks}, {self.dtype})"

    # Algebra ---------------------------------------------------------------------------------------------------------

    def __add__(self, other: Self | complex | Tensor) -> Self:
        """Add a train, ranks r_a + r_b, or a constant to every entry, ranks r + 1."""
        terms = (self, other if isinstance(other, Train) else self._filled(other))
        self._check(terms[1])
        if len(self.cores) == 1:
            return self._of([terms[0].cores[0] + terms[1].cores[0]])
        # The bond of the sum is both bonds side by side: the middle cores are block diagonal.
        cores = []
        for k, pair in enumerate(zip(*(term._flat() for term in terms), strict=True)):
            first, last = k == 0, k == len(self.cores) - 1
            a, b = pair
            if not last and not first:
                a, b = pad(a, (0, b.shape[-1])), pad(b, (a.shape[-1], 0))
            cores.append(torch.cat([a, b], -1 if first else 0))
        return self._of(cores)

    __radd__ = __add__

    def __mul__(self, other: Self | complex | Tensor) -> Self:
        """Multiply entry by entry with a train, ranks r_a r_b, or with a constant, ranks r."""
        if not isinstance(other, Train):
            first, *others = self._flat()
            first = first * self._number(other)
            return self._of([first, *(core.to(first.dtype) for core in others)])  # complex, if the constant is
        self._check(other)
        pairs = zip(self._flat(), other._flat(), strict=True)
        return self._of([(a[:, None, :, :, None] * b[None, :, :, None, :]).flatten(3).flatten(0, 1) for a, b in pairs])

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: Self | complex | Tensor) -> Self:
        return self + -other

    def __rsub__(self, other: complex | Tensor) -> Self:
        return -self + other

    def __truediv__(self, other: complex | Tensor) -> Self:
        return self * (1 / other)

    def sum(self) -> Tensor:
        """Compute the sum of all entries, a scalar."""
        row = torch.ones(1, dtype=self.dtype, device=self.device)
        for core in self._flat():
            row = row @ core.sum(1)
        return row.squeeze(0)

    def dot(self, other: Self) -> Tensor:
        """Compute the sum of conj(self) * other, a scalar (as torch.vdot)."""
        self._check(other)
        bond = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        for a, b in zip(self._flat(), other._flat(), strict=True):
            bond = a.flatten(0, 1).mH @ torch.tensordot(bond, b, 1).flatten(0, 1)
        return bond.squeeze()

    def norm(self) -> Tensor:
        """Compute the Frobenius norm; near zero, too, to the digits of the largest core: nothing is squared."""
        return tt_norm(self._flat()).to(self.dtype.to_real())

    def round(self, *, rank: int | Sequence[int] | None = None, tolerance: float = 0.0) -> Self:
        """Return the train of lower ranks next to this one (TT-rounding), computed in double precision.

        The error is at most sqrt(d - 1) times that of the best train of these ranks; with a tolerance, the relative
        Frobenius error is at most the tolerance. The derivatives are those of functions of the tensor, not of single
        cores, and need a gap between the singular values that are kept and those that are not.

        Args:
            rank: the most that a bond may have, or one number per bond; None lets the tolerance decide.
            tolerance: relative Frobenius error allowed.
        Raises:
            ValueError: if a rank is below 1, or the tolerance negative.
        Source: Oseledets 2011, algorithm 2.
        """
        ranks = _ranks(rank, len(self.cores) - 1)
        return self._of([c.to(self.dtype) for c in tt_round(self._flat(), ranks=ranks, tolerance=tolerance)])

    # For the kinds ---------------------------------------------------------------------------------------------------

    def _flat(self) -> list[Tensor]:
        """Return the cores with one mode each: (r_k, n_k, r_k+1)."""
        return list(self.cores) if self.axes == 1 else [core.flatten(1, -2) for core in self.cores]

    def _of(self, cores: Sequence[Tensor]) -> Self:
        """Return a train of the same modes from cores with one mode each."""
        if self.axes == 1:
            return type(self)(cores)
        pairs = zip(cores, self.modes, strict=True)
        return type(self)([core.reshape(core.shape[0], *size, core.shape[-1]) for core, size in pairs])

    def _filled(self, value: complex | Tensor) -> Self:
        return type(self)([torch.ones(1, *n, 1, dtype=self.dtype, device=self.device) for n in self.modes]) * value

    def _number(self, value: complex | Tensor) -> complex | Tensor:
        if not isinstance(value, Number | Tensor) or (isinstance(value, Tensor) and value.ndim):
            raise TypeError(f"{value!r} is neither a {type(self).__name__} nor a number")
        return value

    def _check(self, other: Train) -> None:
        if type(self) is not type(other) or self.modes != other.modes:
            raise ValueError(f"{self} and {other} have different modes")

    def _chain(self) -> Tensor:
        """Multiply the cores: all modes in turn, without the outer bonds."""
        product = self.cores[0]
        for core in self.cores[1:]:
            product = product.reshape(-1, len(core)) @ core.flatten(1)
        return product.reshape([n for size in self.modes for n in size])

    @classmethod
    def _decomposed(
        cls, tensor: Tensor, rank: int | Sequence[int] | None, tolerance: float | None, ratio: float | None
    ) -> Self:  # fmt: skip
        """Decompose a tensor whose axes are the modes in turn; its dtype is kept."""
        if sum(option is not None for option in (rank, tolerance, ratio)) != 1:
            raise ValueError(f"rank={rank}, tolerance={tolerance}, ratio={ratio}: give one of the three")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"the tensor has dtype {tensor.dtype}, which its cores cannot have; convert it to a float one"
            )
        ranks = _ranks(rank, tensor.ndim // cls.axes - 1) if ratio is None else _within(tensor, ratio, cls.axes)
        cores = tt_svd(tensor, ranks=ranks, tolerance=tolerance or 0.0, axes=cls.axes)
        return cls([core.to(tensor.dtype) for core in cores])


def total(terms: Sequence[Train], *, tolerance: float = 0.0) -> Any:
    """Add many trains pair by pair, and round the sums of pairs to their true ranks on the way.

    The ranks on the way are those of the sums, not of the terms together: rounding the sum of k terms of rank r at
    once costs O(k^3 r^3).

    Args:
        terms: trains of the same modes.
        tolerance: Frobenius error allowed at the end, relative to the sum, besides rounding (1e-14 of the terms).
    Raises:
        ValueError: if there are no terms, or their modes differ.
    """
    if not terms:
        raise ValueError("a sum needs one term or more")
    while len(terms) > 1:
        pairs = [terms[k : k + 2] for k in range(0, len(terms), 2)]
        terms = [(pair[0] + pair[1]).round(tolerance=1e-15) if len(pair) > 1 else pair[0] for pair in pairs]
    return terms[0].round(tolerance=tolerance)


def _ranks(rank: int | Sequence[int] | None, bonds: int) -> list[int] | None:
    if rank is None:
        return None
    ranks = [rank] * bonds if isinstance(rank, int) else list(rank)
    if len(ranks) != bonds or min(ranks, default=1) < 1:
        raise ValueError(f"rank={rank} must give each of {bonds} bonds a rank of 1 or more")
    return ranks


def _within(tensor: Tensor, ratio: float, axes: int) -> list[int]:
    """Choose ranks for a share of the tensor's entries: each bond loses singular values up to the same norm."""
    check_ratio(ratio)
    sizes = [math.prod(tensor.shape[k : k + axes]) for k in range(0, tensor.ndim, axes)]
    exact = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
    cuts = [tails(leading(exact.reshape(math.prod(sizes[:k]), -1))[1]) for k in range(1, len(sizes))]

    def ranks(loss: float) -> list[int]:
        return [max(int((cut > loss).sum()), 1) for cut in cuts]

    def size(loss: float) -> int:
        bonds = [1, *ranks(loss), 1]
        return sum(bonds[k] * n * bonds[k + 1] for k, n in enumerate(sizes))

    losses = torch.cat([*cuts, exact.new_zeros(1).real]).sort(descending=True)[0].tolist()
    low, high = 0, len(losses)  # sizes grow along the losses: the last that fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(losses[middle]) <= ratio * tensor.numel() else (low, middle)
    if size(losses[low]) > ratio * tensor.numel():
        raise ValueError(f"ratio={ratio} is too small: ranks of 1 keep {sum(sizes)} of {tensor.numel()} entries")
    return ranks(losses[low])
