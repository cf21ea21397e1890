"""Run a model with hooks on some of its modules: watch inputs and outputs, or let other modules answer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from structlin.batches import pick

K = TypeVar("K")


class _ReachedError(BaseException):
    """All wanted layers were called; no model catches it by `except Exception`."""


@contextmanager
def hooked(
    modules: Iterable[tuple[nn.Module, K]],
    take: Callable[[K, Tensor], None],
    give: Callable[[K, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Show `take` the input of each call of a module under its key, and put the output through `give`.

    The key of a stack of matrices is a sequence: its call names the matrix after the input.
    """

    def part(args: Any, key: Any) -> K:
        return key[args[1]] if len(args) > 1 and isinstance(key, tuple) else key

    def before(module: nn.Module, args: Any, kwargs: Any, *, key: K) -> None:
        take(part(args, key), args[0] if args else next(iter(kwargs.values())))

    def after(module: nn.Module, args: Any, result: Tensor, *, key: K) -> Tensor | None:
        return give(part(args, key), result) if give else None

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


@contextmanager
def replaced(modules: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Let other modules answer in place of some for a while: the model keeps its modules.

    Hooks on the old modules run as ever. Opened modules answer too, for their leaves to be called.
    """
    before = {old: vars(old).get("forward") for old in modules}
    try:
        for old, new in modules.items():
            # Not `new.forward`, unless both share hooks: an opened module has hooks of its own on its root.
            vars(old)["forward"] = new.forward if new._forward_hooks is old._forward_hooks else new.__call__
        yield
    finally:
        for old, forward in before.items():
            if forward is None:
                vars(old).pop("forward", None)
            else:
                vars(old)["forward"] = forward


class OutputSearch:
    """Find the leaf whose output is the model's output, in the first pass that is shown.

    Attributes:
        key: of the leaf, None while none is found.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.open = True
        self._outputs: list[tuple[weakref.ref[Tensor], Any]] = []

    def note(self, key: Any, y: Tensor) -> Tensor:
        """Remember the output of a leaf, as long as it lives."""
        self._outputs.append((weakref.ref(y), key))
        return y

    def settle(self, result: Any) -> None:
        """Compare with the output of the model, a tensor or a view of it, and end the search."""
        _, found = pick(result)
        same = (key for y, key in reversed(self._outputs) if y() is not None and (y() is found or y() is found._base))
        self.key, self.open = next(same, None), False
        self._outputs.clear()


def run_until(
    go: Callable[[], Any], modules: Mapping[nn.Module, K], take: Callable[[K, Tensor], None], stop: bool
) -> None:
    """Run a model with hooks (module -> key); with `stop`, only until every module was called."""
    missing = set(modules.values())

    def take_and_stop(key: K, x: Tensor) -> None:
        take(key, x)
        missing.discard(key)
        if stop and not missing:
            raise _ReachedError

    try:
        with hooked(modules.items(), take_and_stop):
            go()
    except _ReachedError:
        pass
