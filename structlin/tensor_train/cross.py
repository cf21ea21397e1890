"""Cross interpolation: a tensor train of a function of indices, from few of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from structlin.tensor_train.tensor import TT

SWEEPS = 12  # forth and back, at most
SAMPLES = 2000  # random places where the train is compared with the function
FLAT = 1.05  # a submatrix has almost the largest volume once no entry of the interpolation exceeds this


def cross(
    function: Callable[[Tensor], Tensor], shape: Sequence[int], *, tolerance: float = 1e-8, max_rank: int = 100,
    generator: torch.Generator | None = None,
) -> TT:  # fmt: skip
    """Approximate the tensor of a function's values, without evaluating all of them.

    Two neighbouring cores at a time are fitted to the function on the indices that the other bonds keep; an SVD gives
    the rank of the bond between them, and rows of almost the largest volume its new indices.
    Cost: O(d n^2 r^2) values for each of a few sweeps, and O(d n^2 r^3) FLOPs.

    Args:
        function: maps whole numbers (count, d), one row for each place, to values (count,), float or complex.
        shape: of the tensor, d sizes, two or more.
        tolerance: relative Frobenius error, measured at random places.
        max_rank: the most that a bond may have.
        generator: of the first indices and the random places; None is the same draw in every call.
    Raises:
        ValueError: if the shape has fewer than two sizes, or the function returns another shape or no finite values.
        RuntimeError: if the error at random places stays above the tolerance: the rank is too small, or the function
            has features that the samples miss.
    Source: Oseledets & Tyrtyshnikov 2010, TT-cross approximation for multidimensional arrays; Savostyanov & Oseledets
        2011 (two cores at a time).
    Example:
        >>> train = cross(lambda at: 1 / (1.0 + at.double().sum(1)), (20, 20, 20, 20))
        >>> max(train.ranks) < 12
        True
    """
    sizes = list(shape)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"shape={tuple(sizes)}; give two or more sizes from 1")
    drawn = torch.Generator().manual_seed(0) if generator is None else generator
    d = len(sizes)

    def places(count: int, kept: Sequence[int]) -> Tensor:
        return torch.stack([torch.randint(n, (count,), generator=drawn) for n in kept], 1)

    # Indices of what lies in front of each core, and behind it: (rank, number of modes).
    left: list[Tensor] = [torch.zeros(1, 0, dtype=torch.long) for _ in range(d)]
    right = [places(2, sizes[k:]) for k in range(d)] + [torch.zeros(1, 0, dtype=torch.long)]
    test = places(SAMPLES, sizes)
    wanted = _values(function, test)
    size, error = torch.linalg.vector_norm(wanted), math.inf
    for _ in range(SWEEPS):
        cores: list[Tensor] = []
        for k in range(d - 1):
            u, s, v, rows, _ = _superblock(
                function, left[k], sizes[k], sizes[k + 1], right[k + 2], tolerance / d, max_rank
            )
            chosen = _volume(u)
            pivots = u[chosen]
            left[k + 1] = rows[chosen]
            cores.append(torch.linalg.solve(pivots, u, left=False).unflatten(0, (-1, sizes[k])))
        cores.append((pivots * s @ v).unflatten(1, (sizes[-1], 1)))
        train = TT(cores)
        error = (torch.linalg.vector_norm(_at(cores, test) - wanted) / size.clamp_min(1e-300)).item()
        if error <= tolerance:
            return train
        for k in reversed(range(d - 1)):
            _, _, v, _, columns = _superblock(
                function, left[k], sizes[k], sizes[k + 1], right[k + 2], tolerance / d, max_rank
            )
            right[k + 1] = columns[_volume(v.mT)]
    raise RuntimeError(
        f"the error at {SAMPLES} random places is {error:.2g} after {SWEEPS} sweeps, above tolerance={tolerance:g}, "
        f"with ranks {train.ranks}; give a larger max_rank={max_rank} or tolerance, or use TT.from_full"
    )


def _values(function: Callable[[Tensor], Tensor], places: Tensor) -> Tensor:
    found = function(places).detach()
    if found.shape != places.shape[:1] or not torch.isfinite(found).all():
        raise ValueError(f"the function returned {tuple(found.shape)} for {len(places)} places, or values not finite")
    return found.to(torch.promote_types(found.dtype, torch.float64))


def _superblock(
    function: Callable[[Tensor], Tensor], before: Tensor, n: int, m: int, behind: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the truncated SVD of two modes between kept indices, and the indices of its rows and columns."""
    rows = torch.cat([before.repeat_interleave(n, 0), torch.arange(n).repeat(len(before)).unsqueeze(1)], 1)
    columns = torch.cat([torch.arange(m).repeat_interleave(len(behind)).unsqueeze(1), behind.repeat(m, 1)], 1)
    both = torch.cat([rows.repeat_interleave(len(columns), 0), columns.repeat(len(rows), 1)], 1)
    u, s, v = torch.linalg.svd(_values(function, both).view(len(rows), len(columns)), full_matrices=False)
    tail = s.flip(0).square().cumsum(0).flip(0).sqrt()  # the error of keeping the first k
    rank = max(1, min(int((tail > tolerance * tail[0]).sum()), most))
    return u[:, :rank], s[:rank], v[:rank], rows, columns


def _volume(matrix: Tensor) -> Tensor:
    """Return rows of a tall matrix that span almost the largest volume (maxvol)."""
    count = matrix.shape[1]
    _, pivots = torch.linalg.lu_factor(matrix)
    order = list(range(len(matrix)))
    for k, pivot in enumerate((pivots[:count] - 1).tolist()):
        order[k], order[pivot] = order[pivot], order[k]
    chosen = torch.tensor(order[:count])
    for _ in range(10 * count):
        ratios = torch.linalg.solve(matrix[chosen], matrix, left=False).abs()
        row, column = divmod(int(ratios.argmax()), count)
        if ratios[row, column] <= FLAT:
            break
        chosen[column] = row
    return chosen


def _at(cores: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return the entries of a train at places (count, d)."""
    state = cores[0].new_ones(len(places), 1, 1)
    for core, index in zip(cores, places.unbind(1), strict=True):
        state = state @ core[:, index].movedim(1, 0)
    return state.flatten()
