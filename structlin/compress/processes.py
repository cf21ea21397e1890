"""Share work among the ranks of torch.distributed, if it is initialised; otherwise this process is the only rank.

Every rank calls each function of this file, in the same order. An error on one rank is raised on all: the others would
wait for it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structlin.compress.statistics import Statistics

T = TypeVar("T")
R = TypeVar("R")

_ENTRIES = 4096  # of each tensor, that are compared


def ranks() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def dealt(items: Sequence[T]) -> Sequence[T]:
    """Return the items that this rank takes; none if there are more ranks than items."""
    rank, size = ranks()
    return items[rank::size]


def gathered(work: Callable[[], R]) -> list[R]:
    """Call work on every rank and return what it returned, by rank; tensors of others are on the CPU."""
    rank, size = ranks()
    if size == 1:
        return [work()]
    own, packed = _tried(work)
    found: list[Any] = [None] * size
    dist.all_gather_object(found, packed)
    return [_opened(each, own if k == rank else None) for k, each in enumerate(found)]


def together(work: Callable[[], R]) -> R:
    """Call work on every rank and return this rank's result, unless another one has failed."""
    own: list[R] = []
    gathered(lambda: own.append(work()))
    return own[0]


def shared(work: Callable[[], R]) -> R:
    """Call work on rank 0 only and return its result on all ranks; tensors arrive on the CPU."""
    rank, size = ranks()
    if size == 1:
        return work()
    own, packed = _tried(work) if rank == 0 else (None, None)
    found: list[Any] = [packed]
    dist.broadcast_object_list(found)
    return _opened(found[0], own)


def spread(work: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T], costs: Sequence[float]) -> list[R]:
    """Return work(items), of which each rank does a part: the most costly item goes first, to the least loaded rank."""
    rank, size = ranks()
    loads, hands = [0.0] * size, [list[int]() for _ in range(size)]
    for number in sorted(range(len(items)), key=lambda n: -costs[n]):
        least = loads.index(min(loads))
        loads[least] += costs[number]
        hands[least].append(number)
    hands = [sorted(hand) for hand in hands]
    parts = gathered(lambda: list(work([items[number] for number in hands[rank]])))
    found = {n: r for hand, part in zip(hands, parts, strict=True) for n, r in zip(hand, part, strict=True)}
    return [found[number] for number in range(len(items))]


def summed(work: Callable[[], Statistics], dtype: torch.dtype = torch.float32) -> Statistics:
    """Call work on every rank and sum the statistics that it returns, to be rounded to a dtype."""
    own = together(work)
    return (own if ranks()[1] == 1 else own.all_reduce()).rounded(dtype)


def follow(tensors: Sequence[Tensor]) -> None:
    """Give tensors the values that they have on rank 0."""
    if ranks()[1] > 1:
        for own, value in zip(tensors, shared(lambda: [tensor.detach() for tensor in tensors]), strict=True):
            own.detach().copy_(value)


def check_same(model: nn.Module, batches: Any) -> None:
    """Refuse ranks that have other weights or batches than rank 0, as far as their sizes and first entries tell.

    Raises:
        ValueError: on all ranks.
    """
    if ranks()[1] == 1:
        return
    first, *others = gathered(lambda: [_digest(list(model.parameters())), _digest(batches)])
    for rank, other in enumerate(others, 1):
        for what, ours, theirs in zip(("another model", "other batches"), first, other, strict=True):
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-6, atol=0, equal_nan=True):
                raise ValueError(
                    f"rank {rank} has {what} than rank 0; give every rank the same model and all batches: they are "
                    "dealt to the ranks here"
                )


def _digest(value: Any) -> Tensor:
    """Return the size and the norm of the first entries of each tensor in nested mappings, tuples and lists."""
    starts = [(t.numel(), t.detach().flatten()[:_ENTRIES]) for t in _tensors(value) if not (t.is_meta or is_lazy(t))]
    norms = [(n, torch.linalg.vector_norm(s.to(torch.complex128)).item()) for n, s in starts]
    return torch.tensor(norms, dtype=torch.float64)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


# Messages ------------------------------------------------------------------------------------------------------------


def _tried(work: Callable[[], R]) -> tuple[R | Exception, bytes]:
    """Return the result or the error of work, and the same for other ranks."""
    try:
        own = work()
        return own, _packed(False, own)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return error, _packed(True, error)
        except Exception:  # every rank is to raise the same
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            plain.__cause__ = error
            return plain, _packed(True, plain)


def _packed(failed: bool, value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save((failed, value), buffer)
    return buffer.getvalue()


def _opened(packed: bytes, own: Any) -> Any:
    failed, value = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
    if failed:
        raise value if own is None else own
    return value if own is None else own
