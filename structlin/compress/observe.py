"""Run a model with hooks on its linear maps, and sum products of what they see."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from structlin.compress.targets import Target, module_names

K = TypeVar("K")
Forward = Callable[[nn.Module, Any], Any]
Mask = str | Callable[[Any], Tensor | None] | None
Place = tuple[nn.Module, str, nn.Module]  # parent, attribute, original


class _ReachedError(BaseException):
    """All wanted layers were called; no model catches it by `except Exception`."""


# Sums ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """What one input adds to the sums, and the layers that received it."""

    same: Callable[[Tensor], bool]
    partner: Tensor | None
    names: list[str]
    products: list[Tensor]
    tokens: int


class Sums:
    """Sums of products of inputs, one for each set of layers that received the same inputs.

    A layer's sum is that of all sets that it is in. An input is recognised while it is alive and unchanged; what it
    adds waits until the layers that receive it are known: they are a set of an earlier pass and no part of a larger
    one, one of them gets its next input, or the pass ends. A layer that comes later still, or with a copy, counts for
    itself: sharing is lost then, nothing else.

    Args:
        dtype: of the products and sums, its complex counterpart for complex inputs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.totals: dict[frozenset[str], list[Tensor]] = {}
        self.tokens: Counter[frozenset[str]] = Counter()
        self.known: frozenset[frozenset[str]] = frozenset()  # the sets of earlier passes
        self.waiting: list[_Seen] = []

    def add(self, name: str, x: Tensor, keep: Tensor | None, partner: Tensor | None = None) -> None:
        """Take the input of a layer, the mask of its rows, and rows whose product with them is summed too."""
        with plainly(x.device):
            for seen in self.waiting:
                if seen.same(x) and seen.partner is partner and name not in seen.names:
                    seen.names.append(name)
                    break
            else:
                self.settle(name)
                rows = as_rows(x, keep, self.dtype)
                seen = _Seen(_recogniser(x), partner, [name], _products(name, rows, partner), len(rows))
                self.waiting.append(seen)
            found = frozenset(seen.names)
            if found in self.known and not any(found < larger for larger in self.known):
                self._settle(seen)

    def settle(self, name: str | None = None) -> None:
        """Add what waits to the sums: that of one layer, or all of it at the end of a pass."""
        for seen in [seen for seen in self.waiting if name is None or name in seen.names]:
            self._settle(seen)
        if name is None:
            self.known = frozenset(self.totals)

    def _settle(self, seen: _Seen) -> None:
        self.waiting.remove(seen)
        key = frozenset(seen.names)
        self.tokens[key] += seen.tokens
        if key in self.totals:
            for total, product in zip(self.totals[key], seen.products, strict=True):
                total.add_(product)
        else:
            self.totals[key] = seen.products

    def result(self, targets: Sequence[Target], count: int) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
        """Sums by name, `count` for each, shared by the layers that are in the same sets; and tokens by name."""
        found: dict[tuple[frozenset[str], ...], list[Tensor]] = {}
        sums: list[dict[str, Tensor]] = [{} for _ in range(count)]
        tokens: dict[str, int] = {}
        for target in targets:
            keys = tuple(key for key in self.totals if target.name in key)
            if not keys:
                found[keys] = [zeros(target, target.linear.in_features, self.dtype) for _ in range(count)]
            elif keys not in found:
                first, *rest = (self.totals[key] for key in keys)
                found[keys] = [sum(others, start) for start, *others in zip(first, *rest, strict=True)]
            for part, value in zip(sums, found[keys], strict=True):
                part[target.name] = value
            tokens[target.name] = sum(self.tokens[key] for key in keys)
        return sums, tokens


class Held:
    """The inputs of one forward pass, by module and call; those that are the same are held once.

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
                rows = as_rows(x, self.keep, self.dtype)
                if rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    rows = rows.clone()  # the model may write into x
                self.live.append((_recogniser(x), rows))
            self.rows[linear].append(rows)


def _recogniser(x: Tensor) -> Callable[[Tensor], bool]:
    """Return a test for this very tensor, unchanged; it does not keep the tensor alive."""
    if x.is_inference():  # it has no version: a change would go unseen
        return lambda other: False
    reference, version = weakref.ref(x), x._version
    return lambda other: reference() is other and other._version == version


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Compute in the dtype given, without gradients, whatever mode the model runs in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def as_rows(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Flatten the leading axes, leave out the masked rows if the mask has those axes, and cast."""
    x = x.detach()
    rows = rearrange(x, "... i -> (...) i")
    if keep is not None and keep.shape == x.shape[:-1]:
        rows = x[keep.to(x.device)]
    return rows.to(dtype.to_complex() if x.is_complex() else dtype)


def _products(name: str, rows: Tensor, partner: Tensor | None) -> list[Tensor]:
    if partner is not None and partner.shape != rows.shape:
        shapes = tuple(partner.shape), tuple(rows.shape)
        raise ValueError(f"layer {name!r}: inputs of shapes {shapes} without and with the swaps; leave it out of names")
    products = [left.mT @ rows.conj() for left in (rows, partner) if left is not None]
    if not all(product.isfinite().all() for product in products):
        raise ValueError(not_finite(name, "inputs", rows.dtype))
    return products


def not_finite(name: str, what: str, dtype: torch.dtype) -> str:
    """Say what to look for where a sum is not finite."""
    return f"layer {name!r}: NaN or infinite {what}, or too large to square in {dtype}; look for them in this batch"


def scalar(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the target's sums."""
    return dtype.to_complex() if target.linear.weight.is_complex() else dtype


def zeros(target: Target, size: int, dtype: torch.dtype, diagonal: bool = False) -> Tensor:
    """Return an empty sum of the target, (size, size), or a real one (size,)."""
    kind = dtype if diagonal else scalar(target, dtype)
    return torch.zeros((size,) if diagonal else (size, size), dtype=kind, device=target.linear.weight.device)


# Running the model ---------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Clear all training flags, and the fast path of `nn.TransformerEncoder` that reads weights past the hooks."""
    flags = {module: module.training for root in roots for module in root.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def hooked(
    modules: Iterable[tuple[nn.Module, K]],
    take: Callable[[K, Tensor], None],
    give: Callable[[K, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Show `take` the input of each call of a module under its key, and put the output through `give`."""

    def before(module: nn.Module, args: Any, kwargs: Any, *, key: K) -> None:
        take(key, args[0] if args else next(iter(kwargs.values())))

    def after(module: nn.Module, args: Any, result: Tensor, *, key: K) -> Tensor | None:
        return give(key, result) if give else None

    handles = []
    try:
        for module, key in modules:
            handles.append(module.register_forward_pre_hook(partial(before, key=key), with_kwargs=True))
            if give:
                handles.append(module.register_forward_hook(partial(after, key=key), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: nn.Module,
    batch: Any,
    forward: Forward | None,
    modules: Mapping[nn.Module, nn.Module],
    take: Callable[[nn.Module, Tensor], None],
    stop: bool,
) -> None:
    """Run a model with hooks (module -> key); with `stop`, only until every module was called."""
    missing = set(modules.values())

    def take_and_stop(key: nn.Module, x: Tensor) -> None:
        take(key, x)
        missing.discard(key)
        if stop and not missing:
            raise _ReachedError

    try:
        with hooked(modules.items(), take_and_stop):
            call(model, batch, forward)
    except _ReachedError:
        pass


def find_places(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> list[Place]:
    """Find where the modules to swap are: parent, attribute, original."""
    owned = module_names(model)
    for module in swaps:
        if module not in owned:
            raise ValueError(
                f"swaps has a {type(module).__name__} that is not a module of the model; take it from there"
            )
    return [(parent, key, m) for parent in owned for key, m in parent._modules.items() if m is not None and m in swaps]


@contextmanager
def swapped(places: Sequence[Place], swaps: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Put modules in the places of others for a while."""
    try:
        for parent, attribute, original in places:
            parent._modules[attribute] = swaps[original]
        yield
    finally:
        for parent, attribute, original in places:
            parent._modules[attribute] = original


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def moved(batch: Any, device: torch.device | None) -> Any:
    """Move the tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [moved(value, device) for value in batch]
        return values if isinstance(batch, list) else tuple(values)
    return batch


def call(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Call a model on a batch of any kind."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(f"a batch is a {type(batch).__name__}; pass tensors, tuples, lists or mappings, or forward=...")


def kept(mask: Mask, batch: Any) -> Tensor | None:
    """Return the mask of a batch as booleans, or None for all rows."""
    if callable(mask):
        found = mask(batch)
    else:
        found = batch.get("attention_mask") if mask == "auto" and isinstance(batch, Mapping) else None
        found = found if isinstance(found, Tensor) and found.ndim == 2 else None
    if found is not None and not ((found == 0) | (found == 1)).all():
        raise ValueError(
            "the mask of a batch has other values than 0 and 1; pass mask=callable(batch) with such values"
        )
    return None if found is None else found.bool()
