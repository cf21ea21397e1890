"""What healing minimises: the distance between what student and teacher make of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from structlin.heal import data
from structlin.heal.data import Forward, pick, to_device
from structlin.heal.losses import block_distance, divergence
from structlin.heal.losses import distillation_loss as output_distance

__all__ = [
    "Forward",
    "Loss",
    "Objective",
    "Recorded",
    "block_distance",
    "divergence",
    "find_blocks",
    "output_distance",
    "pick",
    "recording",
    "unmasked",
]

Loss = Callable[[Any, Any, Any], Tensor]
Recorded = dict[str, list[Tensor]]  # block -> its outputs, one per call


def unmasked(found: Tensor, expected: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Keep the positions of a mapping's `attention_mask` of both."""
    return data.unmasked(found, batch), data.unmasked(expected, batch)


# Blocks --------------------------------------------------------------------------------------------------------------


def find_blocks(student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | str) -> tuple[str, ...]:
    """Name the modules that match globs; of a glob's matches within one another only the outermost counts.

    Raises:
        ValueError: if a glob matches nothing, or the teacher lacks a module.
    """
    names = [name for name, _ in student.named_modules() if name]
    known = {name for name, _ in teacher.named_modules()}
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches: list[str] = []
        for name in names:  # a parent comes before its children
            if fnmatchcase(name, pattern) and not any(name.startswith(f"{outer}.") for outer in matches):
                matches.append(name)
        if not matches:
            raise ValueError(f"blocks: {pattern!r} matches no module of the student; names are like {names[:3]}")
        missing = [name for name in matches if name not in known]
        if missing:
            raise ValueError(f"blocks: the teacher has no module {missing[0]!r}; name modules that both models have")
        found |= dict.fromkeys(matches)
    if not found:
        raise ValueError('blocks names no module; use globs such as "encoder.layer.*"')
    return tuple(found)


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[Recorded]:
    """Record the outputs of modules by forward hooks, which are removed at the end."""
    recorded: Recorded = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: recorded[name].append(pick(output)[1])

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


# The objective -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, a function of the student's parameters.

    Args:
        student: the model that learns.
        teacher: the model that it learns from.
        device: where the batches go.
        loss: of the outputs, None to leave them out.
        forward: how a model is called.
        found: what the student's blocks give, filled by hooks.
        expected: what the teacher's blocks give.
    """

    student: nn.Module
    teacher: nn.Module
    device: torch.device
    loss: Loss | None
    forward: Forward
    found: Recorded
    expected: Recorded

    def __call__(self, batch: Any) -> Tensor:
        """Run both models and compare them."""
        batch = to_device(batch, self.device)
        try:
            with torch.no_grad():
                theirs = self.forward(self.teacher, batch)
            ours = self.forward(self.student, batch)
            parts = [self.loss(ours, theirs, batch)] if self.loss is not None else []
            if self.expected:
                parts.append(block_distance(self.found, self.expected, batch))
        finally:
            for outputs in (*self.found.values(), *self.expected.values()):
                outputs.clear()
        for part in parts:
            if not isinstance(part, Tensor) or part.numel() != 1:
                what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"loss returned {what}; it returns a tensor with one number")
        return torch.stack([part.reshape(()) for part in parts]).sum()
