"""`TT`, a tensor in the tensor-train format, with indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.tensor_train.algebra import Train


class TT(Train):
    """A tensor A[i1, ..., id] = G1[i1] G2[i2] ... Gd[id], each G_k[i] an r_k x r_k+1 matrix, r_0 = r_d = 1.

    Besides `round`, `sum`, `dot`, `norm`, `full` and `from_full`: `+`, `-` and `*` with tensors in the format and with
    numbers, `/` with numbers, and indexing by whole numbers and slices.

    Args:
        cores: (r_k, n_k, r_k+1), of one dtype and device.
    Raises:
        ValueError: if neighbours disagree on a rank, or the outer ranks are not 1.
    Source: Oseledets 2011, Tensor-train decomposition.
    Example:
        >>> tensor = torch.arange(24.0).reshape(2, 3, 4)
        >>> train = TT.from_full(tensor, tolerance=1e-6)
        >>> train.ranks, (train * train + 1).round(tolerance=1e-6).ranks
        ((2, 2), (2, 3))
        >>> train[:, 1, 2].full().round()
        tensor([ 6., 18.])
    """

    axes: ClassVar[int] = 1

    @property
    def shape(self) -> torch.Size:
        """The shape of the full tensor."""
        return torch.Size(size[0] for size in self.modes)

    @classmethod
    def from_full(
        cls, tensor: Tensor, *, rank: int | Sequence[int] | None = None, tolerance: float | None = None,
        ratio: float | None = None,
    ) -> Self:  # fmt: skip
        """Decompose a tensor by TT-SVD; one of the three settings gives the ranks.

        Args:
            tensor: one axis or more, any float or complex dtype; computed in double precision.
            rank: the most that a bond may have, or one number per bond.
            tolerance: relative Frobenius error allowed.
            ratio: entries of the cores / entries of the tensor, at most; the ranks are those that lose least.
        Raises:
            ValueError: unless one of the three is given and in range.
        """
        return cls._decomposed(tensor, rank, tolerance, ratio)

    @classmethod
    def randn(
        cls, *shape: int, rank: int | Sequence[int], generator: torch.Generator | None = None, **options: Any
    ) -> Self:  # fmt: skip
        """Draw Gaussian cores, so that the entries of the tensor have mean 0 and variance 1.

        Args:
            shape: of the tensor.
            rank: one number for all bonds, or one per bond.
            generator: of the draw.
            **options: `dtype` and `device`, as for torch.randn.
        """
        bonds = [1, *([rank] * (len(shape) - 1) if isinstance(rank, int) else rank), 1]
        sizes = zip(bonds[:-1], shape, bonds[1:], strict=True)
        return cls([torch.randn(r, n, s, generator=generator, **options) / r**0.5 for r, n, s in sizes])

    def full(self) -> Tensor:
        """Compute the tensor, of all its entries."""
        return self._chain()

    def __getitem__(self, index: Any) -> TT | Tensor:
        """Take slices, and entries at whole numbers; at whole numbers in all places, the entry as a scalar.

        With a tensor or list of whole numbers in all places: the entries at these places, as torch gives them.

        Raises:
            IndexError: for other indices, too many of them, or one out of range.
        """
        places = list(index) if isinstance(index, tuple) else [index]
        if places.count(Ellipsis) > 1 or len(places) - places.count(Ellipsis) > len(self.cores):
            raise IndexError(f"an index of {len(places)} places has more than {self}")
        if Ellipsis in places:
            at = places.index(Ellipsis)
            places[at : at + 1] = [slice(None)] * (len(self.cores) - len(places) + 1)
        places += [slice(None)] * (len(self.cores) - len(places))
        if all(isinstance(place, Tensor | list) for place in places):
            return self._entries(places)
        if not all(isinstance(place, int | slice) for place in places):
            kinds = [type(place).__name__ for place in places]
            raise IndexError(f"places of {kinds}: use whole numbers, slices and ..., or lists in all places")
        cores: list[Tensor] = []
        carried = self.cores[0].new_ones(1, 1)  # the product of the matrices at whole numbers since the last core
        for core, place in zip(self.cores, places, strict=True):
            taken = core[:, place]
            if isinstance(place, int):
                carried = carried @ taken
            else:
                cores.append(torch.tensordot(carried, taken, 1))
                carried = torch.eye(core.shape[-1], dtype=self.dtype, device=self.device)
        if not cores:
            return carried.squeeze()
        cores[-1] = cores[-1] @ carried
        return TT(cores)

    def _entries(self, places: Sequence[Any]) -> Tensor:
        indices = torch.broadcast_tensors(*(torch.as_tensor(place, device=self.device) for place in places))
        rows = self.cores[0].new_ones(indices[0].numel(), 1, 1)
        for core, index in zip(self.cores, indices, strict=True):
            rows = rows @ core[:, index.reshape(-1)].transpose(0, 1)
        return rows.reshape(indices[0].shape)
