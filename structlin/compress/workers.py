"""Independent fits side by side: a thread for each of torch's, each computing with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], items: Sequence[T], progress: bool | None, what: str) -> Iterator[R]:
    """Yield work(item) for all items, in order; an error ends all of them.

    Small products gain little from threads within them: on two cores, two layers at a time are nearly twice as fast as
    two threads on one. torch's number of threads is one meanwhile, and is restored at the end.

    Args:
        work: a function without side effects.
        items: its arguments.
        progress: show a progress bar on stderr (needs tqdm); None shows it on a terminal.
        what: its label.
    """
    threads = torch.get_num_threads()
    count = min(threads, len(items))
    if count < 2:
        yield from map(work, bar(items, len(items), progress, what))
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="structlin", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from bar(pool.map(work, items), len(items), progress, what)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def bar(items: Iterable[T], total: int | None, progress: bool | None, what: str) -> Iterable[T]:
    """Show a progress bar over items where asked for and possible."""
    if progress is False:
        return items
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415  # optional, and `import structlin` must not import it
    except ImportError:
        return items
    shown: Iterable[T] = tqdm(items, desc=what, total=total, unit="layer", disable=None if progress is None else False)
    return shown
