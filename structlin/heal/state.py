"""Interruption: the position in the batches, and the file from which a run resumes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

VERSION = 3


class Stream:
    """Batches one by one, pass after pass, which a later run can continue; an iterator gives one pass."""

    def __init__(self, batches: Iterable[Any], epochs: int | None, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._limit = 1 if isinstance(batches, Iterator) else epochs
        # A DataLoader and its sampler may have generators of their own, which decide the order.
        own = [getattr(owner, "generator", None) for owner in (batches, getattr(batches, "sampler", None))]
        cuda = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
        known = dict.fromkeys((torch.default_generator, *cuda, *own))
        self._generators = [generator for generator in known if isinstance(generator, torch.Generator)]
        self._start = self._opened = self._states()  # before the first pass, and before the current one
        self.epoch = self._taken = 0
        self._pass: Iterator[Any] | None = None

    def read_ahead(self, count: int) -> list[Any]:
        """Open the first pass and return its first batches, which are yielded again."""
        self._pass = iter(self.batches)
        first = list(islice(self._pass, count))
        self._pass = chain(first, self._pass)
        return first

    def __iter__(self) -> Iterator[Any]:
        while self._limit is None or self.epoch < self._limit:
            if self._pass is None:
                self._opened = self._states()
                self._pass = iter(self.batches)
            for batch in self._pass:
                self._taken += 1
                yield batch
            if not self._taken and not self.epoch:
                raise ValueError("batches is empty; give at least one batch")
            if not self._taken:
                return
            self._pass, self.epoch, self._taken = None, self.epoch + 1, 0

    def position(self) -> tuple[Any, ...]:
        """Return what `resume` needs."""
        return self.epoch, self._taken, self._start, self._opened, self._states()

    def resume(self, position: tuple[Any, ...], ahead: int) -> list[Any]:
        """Read the current pass again up to a position, and return the first `ahead` batches of the first pass."""
        after = self._states()  # of an error
        try:
            self.epoch, self._taken, self._start, self._opened, now = position
            self._restore(self._start)
            first = self.read_ahead(ahead) if ahead else []
            if self.epoch or not ahead:  # otherwise the first pass is the current one, and is open
                self._restore(self._opened)
                self._pass = iter(self.batches) if self._taken else None
            if (found := sum(1 for _ in islice(self._pass or (), self._taken))) < self._taken:
                raise ValueError(
                    f"batches ends after {found} batches; the checkpoint has read {self._taken} of a pass, give the "
                    "batches that it was written with"
                )
            after = now
            return first
        finally:
            self._restore(after)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, and replace an older file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        with fresh.open("wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut may leave an empty file
        if found := get_unsafe_globals_in_checkpoint(fresh):  # they could not be read again by weights_only=True
            raise TypeError(f"the optimizer's state holds {found[0]}, which is not stored; use checkpoint=None")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_state(path: Path, about: Mapping[str, str]) -> dict[str, Any]:
    """Read what `write_state` wrote, without running code in it, and refuse a file whose "about" differs."""
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file; name a file, such as {str(path / 'heal')!r}")
    try:
        with path.open("rb") as file:  # given a path, torch would go by its suffix
            content: dict[str, Any] = torch.load(file, weights_only=True)
        version, theirs = content["version"], content["about"]
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path}: not a checkpoint of this version of heal; delete it to start again") from error
    if version != VERSION:
        raise ValueError(f"{path}: format version {version}, this structlin reads {VERSION}; delete it to start again")
    lines = [
        f"{name} is {about.get(name, 'missing')}, in the file {theirs.get(name, 'missing')}"
        for name in {**about, **theirs}
        if about.get(name) != theirs.get(name)
    ]
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ValueError(
            f"{path} is of another healing: {'; '.join(lines[:3])}{more}. Give the student, parameters and optimizer "
            "that it was written with, or delete it to start again"
        )
    return content
