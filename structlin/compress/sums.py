"""Sums of products of the inputs that linear maps get, one for all layers that get the same inputs."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from structlin.compress.targets import Target

EXACT = 4096  # features up to which exact sums are in float64


@dataclass(eq=False)
class _Seen:
    """One input, held back until it is known which layers receive it."""

    same: Callable[[Tensor], bool]
    partner: Tensor | None
    names: list[str]
    rows: Tensor


class Sums:
    """Sum products of inputs: layers that are fed the same tensor share one sum.

    An input is the same while the tensor lives and is not written into. It is held back until the set of layers that
    receive it is known, then its products are added to that set's total. The set is known when it is that of an earlier
    pass and part of no larger one, when one of its layers gets its next input, or when the pass ends. A layer that
    comes later than that, or with a copy, is counted by itself: memory is lost then, nothing else. The sum of a layer
    is that over all sets that it is in.

    Args:
        dtype: of the products and sums, its complex counterpart for complex inputs.
        exact: sum in float64, up to 4096 features: rounded to float32, sums do not depend on the order of the batches.
        blank: names of which only the sharing is wanted: sums that no other name is in stay zero.
    """

    def __init__(self, dtype: torch.dtype, exact: bool = False, blank: Collection[str] = ()) -> None:
        self.dtype, self.exact, self.blank = dtype, exact, frozenset(blank)
        self.totals: dict[frozenset[str], list[Tensor]] = {}
        self.tokens: Counter[frozenset[str]] = Counter()
        self.known: frozenset[frozenset[str]] = frozenset()  # sets of the passes before this one
        self.waiting: list[_Seen] = []

    def add(self, name: str, x: Tensor, keep: Tensor | None, partner: Tensor | None = None) -> None:
        """Add the input of a layer, masked by `keep`; with a partner (rows, in), add partner^T conj(x) too."""
        with plainly(x.device):
            for seen in self.waiting:
                if seen.same(x) and seen.partner is partner and name not in seen.names:
                    seen.names.append(name)
                    break
            else:
                self.settle(name)
                seen = _Seen(_recogniser(x), partner, [name], own_rows(x, keep, self.dtype))
                _check_alike(name, seen.rows, partner)
                self.waiting.append(seen)
            found = frozenset(seen.names)
            if found in self.known and not any(found < larger for larger in self.known):
                self._settle(seen)

    def settle(self, name: str | None = None) -> None:
        """Add held-back products to the totals: those of one layer, or all at the end of a pass."""
        for seen in [seen for seen in self.waiting if name is None or name in seen.names]:
            self._settle(seen)
        if name is None:
            self.known = frozenset(self.totals)

    def _settle(self, seen: _Seen) -> None:
        self.waiting.remove(seen)
        key = frozenset(seen.names)
        self.tokens[key] += len(seen.rows)
        lefts = [] if key <= self.blank else [left for left in (seen.rows, seen.partner) if left is not None]
        totals = self.totals.setdefault(key, [])
        with plainly(seen.rows.device):
            for number, left in enumerate(lefts):
                right = seen.rows.conj()
                if number == len(totals):
                    product = left.mT @ right
                    totals.append(product.to(sum_dtype(product.dtype, len(product), self.exact)))
                elif totals[number].dtype == right.dtype:
                    totals[number].addmm_(left.mT, right)  # no product beside the total: a wide layer's is large
                else:
                    totals[number] += left.mT @ right
                _check_finite(seen.names[0], totals[number])

    def result(self, targets: Sequence[Target], count: int) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
        """Return `count` sums for each name and the tokens; layers that are in the same sets share their tensors."""
        found: dict[tuple[frozenset[str], ...], list[Tensor]] = {}
        sums: list[dict[str, Tensor]] = [{} for _ in range(count)]
        tokens: dict[str, int] = {}
        for name, target in {part: one for one in targets for part in one.parts}.items():
            keys = tuple(key for key in self.totals if name in key)
            if not keys:
                size = target.linear.in_features
                dtype = sum_dtype(self.dtype, size, self.exact)
                found[keys] = [zeros(target, size, dtype) for _ in range(count)]
            elif keys not in found and not self.totals[keys[0]]:
                blank = torch.zeros((), dtype=scalar(target, self.dtype), device=target.linear.weight.device)
                found[keys] = [blank.expand(2 * [target.linear.in_features])] * count
            elif keys not in found:
                first, *rest = (self.totals[key] for key in keys)
                found[keys] = [sum(others, start) for start, *others in zip(first, *rest, strict=True)]
            for part, value in zip(sums, found[keys], strict=True):
                part[name] = value
            tokens[name] = sum(self.tokens[key] for key in keys)
        return sums, tokens


class Held:
    """The inputs of one forward pass by module and call; equal ones are stored once.

    Args:
        keep: mask of the rows.
        dtype: of the rows.
    """

    def __init__(self, keep: Tensor | None, dtype: torch.dtype) -> None:
        self.keep, self.dtype = keep, dtype
        self.rows: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self.taken: Counter[nn.Module] = Counter()
        self.live: list[tuple[Callable[[Tensor], bool], Tensor]] = []

    def take(self, linear: nn.Module) -> Tensor | None:
        """Return the rows of the module's next call; None after the last one."""
        number, held = self.taken[linear], self.rows[linear]
        self.taken[linear] += 1
        return held[number] if number < len(held) else None

    def add(self, linear: nn.Module, x: Tensor) -> None:
        """Hold the rows of one call."""
        with plainly(x.device):
            rows = next((rows for same, rows in self.live if same(x)), None)
            if rows is None:
                rows = own_rows(x, self.keep, self.dtype)
                self.live.append((_recogniser(x), rows))
            self.rows[linear].append(rows)


def _recogniser(x: Tensor) -> Callable[[Tensor], bool]:
    """Return a test for this very tensor, unchanged since; it does not keep the tensor alive."""
    if x.is_inference():  # inference tensors have no version counter: a write would go unseen
        return lambda other: False
    reference, version = weakref.ref(x), x._version
    return lambda other: reference() is other and other._version == version


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Switch off inference mode, gradients and autocast, in which the model may be running."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def as_rows(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Flatten the leading axes, drop rows that a mask of these axes leaves out, and cast: (rows, features)."""
    x = x.detach()
    rows = rearrange(x, "... i -> (...) i")
    if keep is not None and keep.shape == x.shape[:-1]:
        rows = x[keep.to(x.device)]
    return rows.to(dtype.to_complex() if x.is_complex() else dtype)


def own_rows(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the same in memory of its own: the model may write into x."""
    rows = as_rows(x, keep, dtype)
    return rows.clone() if rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else rows


def _check_alike(name: str, rows: Tensor, partner: Tensor | None) -> None:
    if partner is not None and partner.shape != rows.shape:
        shapes = tuple(partner.shape), tuple(rows.shape)
        raise ValueError(f"layer {name!r}: inputs of shapes {shapes} without and with the swaps; leave it out of names")


def _check_finite(name: str, total: Tensor) -> None:
    # An extreme is NaN if any entry is; unlike isfinite(), it takes no memory.
    parts = torch.view_as_real(total) if total.is_complex() else total
    if total.numel() and not all(extreme.isfinite() for extreme in parts.aminmax()):
        raise ValueError(not_finite(name, "inputs", total.dtype))


def not_finite(name: str, what: str, dtype: torch.dtype) -> str:
    """Write the message for a sum that is not finite."""
    return f"layer {name!r}: NaN or infinite {what}, or too large to square in {dtype}; look for them in this batch"


def sum_dtype(dtype: torch.dtype, size: int, exact: bool) -> torch.dtype:
    """Return the dtype of sums of (size, size) products."""
    return torch.promote_types(dtype, torch.float64) if exact and size <= EXACT else dtype


def scalar(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the target's sums."""
    return dtype.to_complex() if target.linear.weight.is_complex() else dtype


def zeros(target: Target, size: int, dtype: torch.dtype, diagonal: bool = False) -> Tensor:
    """Return a zero sum for the target: (size, size), or real and (size,) for a diagonal."""
    kind = dtype if diagonal else scalar(target, dtype)
    return torch.zeros((size,) if diagonal else (size, size), dtype=kind, device=target.linear.weight.device)
