"""Run a model with hooks on some of its modules: watch inputs and outputs, or let other modules answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from structlin.batches import Forward, run

K = TypeVar("K")


class _ReachedError(BaseException):
    """All wanted layers were called; no model catches it by `except Exception`."""


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


@contextmanager
def replaced(modules: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Let other modules answer in place of some for a while: the model keeps its modules.

    The dense modules run too, and their results are dropped. Hooks of the caller see the new result.
    """

    def answer(_module: nn.Module, args: Any, kwargs: Any, _result: Any, *, new: nn.Module) -> Any:
        return new.forward(*args, **kwargs)  # a replacement shares its hooks with the old module: they run once

    handles = []
    try:
        for old, new in modules.items():
            hook = partial(answer, new=new)
            handles.append(old.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until(
    model: nn.Module,
    batch: Any,
    forward: Forward | None,
    modules: Mapping[nn.Module, K],
    take: Callable[[K, Tensor], None],
    stop: bool,
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
            run(model, batch, forward)
    except _ReachedError:
        pass
