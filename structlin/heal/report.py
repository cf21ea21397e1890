"""What a healing did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import NamedTuple


class HealStep(NamedTuple):
    """One measurement.

    Args:
        step: optimizer steps done.
        seconds: time since the start, earlier parts of a resumed run included.
        loss: mean training loss of the steps since the last measurement.
        validation: mean loss over the validation batches, None without them.
    """

    step: int
    seconds: float
    loss: float
    validation: float | None


@dataclass(frozen=True)
class HealReport:
    """The result of `heal`; prints as two lines.

    Args:
        steps: optimizer steps done, those before a resumption included.
        seconds: time taken, that before a resumption included.
        loss_before: loss at the start, on the validation batches or, without them, on the first training batches.
        loss_after: loss of the weights that the student has now, on the same batches.
        best_step: the step whose weights the student has now; 0 are those of the start.
        stopped: by "steps", "epochs", "seconds", "patience", or "batches" where an iterator ran out.
        trained: entries of the parameters that were trained.
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
        """Write everything as JSON; a row of the history is an object."""
        rows = [row._asdict() for row in self.history]
        return json.dumps({**asdict(self), "history": rows}, indent=2)

    def __str__(self) -> str:
        what = "validation batches" if self.validated else "the first training batches"
        kept = "" if self.best_step == self.steps else f"; the weights of step {self.best_step:,} are kept"
        return (
            f"healed {self.trained:,} parameters in {self.steps:,} steps, {self.seconds:.1f} s, "
            f"stopped by {self.stopped}{kept}\n"
            f"loss on {what}: {self.loss_before:.4g} -> {self.loss_after:.4g}"
        )
