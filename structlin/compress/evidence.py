"""What is known about a model besides its weights: statistics of its inputs, batches to run, batches held back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structlin.compress.calibrate import collect_statistics
from structlin.compress.observe import Forward, call, device_of, evaluating, moved
from structlin.compress.statistics import Statistics
from structlin.fitting.objective import Root
from structlin.heal.losses import distillation_loss as output_distance

HELD_BACK = 0.1  # share of the calibration batches that checks are made on
MOST_HELD_BACK = 8  # batches


@dataclass(frozen=True)
class Evidence:
    """Calibration, in the form that fits and checks need it.

    Args:
        statistics: Grams by name, or None: fits are then in the Frobenius norm.
        batches: what the statistics were collected from, if that was given; for sequential compensation.
        held_back: batches that the statistics do not know, for checks from end to end.
        forward: calls the model on a batch.
    """

    statistics: Statistics | None = None
    batches: tuple[Any, ...] = ()
    held_back: tuple[Any, ...] = ()
    forward: Forward | None = None

    def grams(self, name: str) -> tuple[Root | None, Tensor | None]:
        """Return the input Gram's root and the output Gram of a layer, None where unknown."""
        if self.statistics is None or not self.statistics.tokens.get(name):
            return None, None
        return self.statistics.root(name), self.statistics.output_grams.get(name)

    def outputs(self, model: nn.Module) -> list[Any]:
        """Run the model over the held-back batches in evaluation mode."""
        with evaluating(model), torch.no_grad():
            device = device_of(model)
            return [call(model, b if self.forward else moved(b, device), self.forward) for b in self.held_back]

    def distance(self, model: nn.Module, reference: list[Any]) -> float:
        """Compare the model with reference outputs: mean KL divergence of logits, else mean relative squared error."""
        pairs = zip(self.outputs(model), reference, self.held_back, strict=True)
        distances = [output_distance(found, expected, batch).item() for found, expected, batch in pairs]
        return sum(distances) / len(distances)


def gather(
    model: nn.Module,
    calibration: Statistics | Iterable[Any] | None,
    validation: Iterable[Any] | None,
    forward: Forward | None,
    tied: str,
) -> Evidence:
    """Collect statistics where batches are given; without `validation`, a tenth of them (at most 8) is held back.

    Raises:
        TypeError: if calibration is neither statistics nor an iterable of batches.
        ValueError: if it holds fewer than two batches and there is no validation.
    """
    held_back = tuple(validation) if validation is not None else ()
    if calibration is None or isinstance(calibration, Statistics):
        return Evidence(calibration, (), held_back, forward)
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(f"calibration is a {type(calibration).__name__}; give Statistics or an iterable of batches")
    batches = tuple(calibration)
    if not batches:
        raise ValueError("calibration holds no batch; give at least one")
    if validation is None and len(batches) > 1:
        count = min(MOST_HELD_BACK, max(1, round(HELD_BACK * len(batches))))
        # Evenly spread: batches are often sorted by length.
        chosen = {round((k + 0.5) * len(batches) / count - 0.5) for k in range(count)}
        held_back = tuple(batch for k, batch in enumerate(batches) if k in chosen)
        batches = tuple(batch for k, batch in enumerate(batches) if k not in chosen)
    statistics = collect_statistics(model, batches, forward=forward, tied=tied)
    return Evidence(statistics, batches, held_back, forward)
