"""Batches, epoch after epoch, from any position again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

Generators = dict[str, Tensor]  # state of torch's generators, by device type


def generators(device: torch.device) -> Generators:
    """Read the states of torch's global generators for the CPU and for a CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Generators, device: torch.device) -> None:
    """Undo what was drawn since `generators`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class Stream:
    """Read batches one by one, pass after pass, and know the position.

    Args:
        batches: what is iterated.
        epochs: passes, None for no limit.
        ahead: how many batches are read ahead in the first pass, to stay in `first`.
        device: whose generator states are kept besides the CPU's.
    """

    def __init__(self, batches: Iterable[Any], epochs: int | None, ahead: int, device: torch.device) -> None:
        self.batches, self.epochs, self.ahead, self.device = batches, epochs, ahead, device
        self.first: list[Any] = []
        self.epoch = 0
        self.position = 0  # batches taken in this epoch
        self.ended: str | None = None
        self.start_state = self.epoch_state = generators(device)
        self._iterator: Iterator[Any] | None = None

    def _open(self) -> Iterator[Any]:
        iterator = iter(self.batches)
        if self.epoch > 0:
            return iterator
        self.first = list(islice(iterator, self.ahead))
        return chain(self.first, iterator)

    def peek(self) -> list[Any]:
        """Open the first pass and return the batches that are read ahead."""
        if self._iterator is None and self.epoch == 0:
            self._iterator = self._open()
        return self.first

    def take(self) -> tuple[Any] | None:
        """Return the next batch in a tuple, or None at the end, for the reason in `ended`."""
        while self.epochs is None or self.epoch < self.epochs:
            if self._iterator is None:
                self.epoch_state = generators(self.device)
                self._iterator = self._open()
            for batch in self._iterator:
                self.position += 1
                return (batch,)
            if self.position == 0:
                if self.epoch == 0:
                    raise ValueError("batches is empty; give at least one batch")
                self.ended = "batches"
                return None
            self._iterator, self.position = None, 0
            self.epoch += 1
        self.ended = "epochs"
        return None

    def seek(self, epoch: int, position: int, start: Generators, in_epoch: Generators, now: Generators) -> None:
        """Go to a position by reading again all batches up to it, drawing what was drawn then.

        Raises:
            ValueError: if there are fewer batches than were read then.
        """
        set_generators(start, self.device)
        self.start_state = start
        for _ in range(epoch):
            for _batch in self._open():  # to the end: its generators move on
                pass
            self.epoch += 1
        if position:
            set_generators(in_epoch, self.device)
            self.epoch_state = in_epoch
            self._iterator = self._open()
            while self.position < position:
                if next(self._iterator, self) is self:
                    raise ValueError(
                        f"batches ends after {self.position} batches; the checkpoint has read {position} of a pass, "
                        "give the batches that it was written with"
                    )
                self.position += 1
        set_generators(now, self.device)
