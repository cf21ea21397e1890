"""The result of a healing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import NamedTuple


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
