"""What a healing is given and what it gives back: settings, checked when they are made, and a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

Parameters = str | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class HealOptions:
    """Settings of `heal`. Give at least one of steps, seconds and epochs; training stops at the first limit reached.

    Args:
        steps: limit on optimizer steps.
        seconds: limit on time, measurements included. Given alone it also sets the schedule, and runs differ.
        epochs: limit on passes over the batches.
        mode: "end" compares outputs; "blocks" compares the outputs of the modules named by `blocks`.
        blocks: globs on dotted names, such as "encoder.layer.*". `*` matches dots too, but of nested matches of one
            glob only the outermost counts.
        lr: peak learning rate of the default optimizer: 5 % linear warm-up, then a cosine to 0.
        optimizer: maps the list of parameters to an optimizer that replaces AdamW without weight decay, whose eps is
            1e-8, or 2.4e-4 for parameters in float16. Its learning rates become the peaks of the same schedule; its
            `step` must need no closure.
        parameters: "all"; "factors" for biases and the parameters of structured layers and norms; or a predicate of
            (name, parameter). Frozen parameters stay frozen.
        every: steps between measurements.
        patience: measurements in a row without improvement on the validation batches after which training stops.
        checkpoint: a file that every measurement replaces. If it exists, the run resumes from it: on the CPU exactly as
            if uninterrupted, given the same student and batches. The batches of the current pass are read again and
            skipped; the states of torch's generators, and of a DataLoader's own, are restored. Limits, `lr` and `every`
            may change in between; the optimizer's other options are those of the file. A checksum shows any damage.
        clip: limit on the gradient's norm, None for none.
        held_back: share of the batches that only measurements see, where they are a list or tuple and there is no
            validation; less than one batch is none.
    """

    steps: int | None = None
    seconds: float | None = None
    epochs: int | None = None
    mode: str = "end"
    blocks: Sequence[str] | str | None = None
    lr: float = 1e-3
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    parameters: Parameters = "all"
    every: int = 50
    patience: int | None = None
    checkpoint: str | Path | None = None
    clip: float | None = 1.0
    held_back: float = 0.1

    def __post_init__(self) -> None:
        if self.steps is self.seconds is self.epochs is None:
            raise ValueError("nothing ends the training; give steps=, seconds= or epochs=")
        for name in ("steps", "epochs", "patience", "every"):
            count = getattr(self, name)
            if not (count is None and name != "every") and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"{name}={count}; give a whole number from 1")
        for name in ("seconds", "clip", "lr"):
            amount = getattr(self, name)
            if not (amount is None and name != "lr") and not 0 < amount < math.inf:
                raise ValueError(f"{name}={amount}; give a positive finite number")
        if not 0 <= self.held_back < 1:
            raise ValueError(f"held_back={self.held_back}; give a share of the batches from 0 to below 1")
        if self.mode not in ("end", "blocks"):
            raise ValueError(f'mode={self.mode!r}; use "end" or "blocks"')
        if (self.mode == "blocks") != bool(self.blocks):
            raise ValueError(f'mode={self.mode!r} with blocks={self.blocks!r}; give mode="blocks" and blocks= together')
        if not callable(self.parameters) and self.parameters not in ("all", "factors"):
            raise ValueError(f'parameters={self.parameters!r}; use "all", "factors" or a predicate (name, parameter)')


class HealStep(NamedTuple):
    """One measurement: optimizer steps and seconds so far, mean training loss since the last one, validation loss."""

    step: int
    seconds: float
    loss: float
    validation: float | None


@dataclass(frozen=True)
class HealReport:
    """The result of `heal`; prints as two lines.

    Args:
        steps: optimizer steps done, those before a resumption included.
        seconds: time taken, likewise.
        loss_before: loss at the start, on the validation batches or, without them, on the first training batches.
        loss_after: loss of the student's final weights, on the same batches.
        best_step: the step that gave the student's final weights; 0 if they are those of the start.
        stopped: "steps", "epochs", "seconds", "patience", or "batches" if an iterator was exhausted.
        trained: number of trained scalars.
        validated: whether the losses are on validation batches.
        history: one measurement every `every` steps, and one at the end.
    """

    steps: int
    seconds: float
    loss_before: float
    loss_after: float
    best_step: int
    stopped: str
    trained: int
    validated: bool
    history: tuple[HealStep, ...] = field(repr=False)

    def to_json(self) -> str:
        """Return everything as JSON; each row of the history is an object."""
        return json.dumps({**asdict(self), "history": [row._asdict() for row in self.history]}, indent=2)

    def __str__(self) -> str:
        what = "validation batches" if self.validated else "the first training batches"
        kept = "" if self.best_step == self.steps else f"; the weights of step {self.best_step:,} are kept"
        return (
            f"healed {self.trained:,} parameters in {self.steps:,} steps, {self.seconds:.1f} s, "
            f"stopped by {self.stopped}{kept}\n"
            f"loss on {what}: {self.loss_before:.4g} -> {self.loss_after:.4g}"
        )
