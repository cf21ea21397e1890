"""The numbers of the compression literature (task, fidelity, size), and a look at what still runs dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structlin.batches import (
    Forward,
    check_several,
    copied,
    device_of,
    divergence,
    evaluating,
    pick,
    run,
    squared_error,
    to_device,
    unmasked,
)
from structlin.compress.data import Data
from structlin.compress.patched import model_runs
from structlin.compress.quality import Quality
from structlin.compress.report import Outcome, Report
from structlin.compress.workers import seeded

Evaluate = Callable[[nn.Module], float]


class Evaluator:
    """Compare models with a dense one on held-back batches, and by a task.

    The dense model runs once, when this is made; its outputs on the batches are kept.

    Args:
        model: the dense model.
        batches: held back from calibration and training; none: only task and size are measured.
        evaluate: a function of the model that measures a task.
        forward: `forward(model, batch)` calls a model, where a batch is not what it takes.
    Attributes:
        dense: the quality of the dense model.
    Example:
        >>> model = nn.Linear(4, 4)
        >>> evaluator = Evaluator(model, [torch.randn(8, 4)])
        >>> evaluator(model, "itself").cosine > 0.9999
        True
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] = (),
        *,
        evaluate: Evaluate | None = None,
        forward: Forward | None = None,
    ) -> None:
        check_several("batches", batches)
        self.batches = tuple(batches)
        self._evaluate, self._forward = evaluate, forward
        self._size = sum(parameter.numel() for parameter in model.parameters())
        self._reference = self._outputs(model)
        self.dense = self._quality(model, "dense", self._reference)

    @classmethod
    def of(cls, model: nn.Module, data: Data, evaluate: Evaluate | Evaluator | None) -> Evaluator | None:
        """Run a dense model over the held-back batches and by the task; None if there is neither."""
        if isinstance(evaluate, Evaluator):
            return evaluate
        if evaluate is None and not data.held_back:
            return None
        return cls(model, data.held_back, evaluate=evaluate, forward=data.forward)

    def __call__(self, model: nn.Module, stage: str, watching: AbstractContextManager[Any] | None = None) -> Quality:
        """Measure a model at a stage of its compression; `watching` is entered while it runs on its first batch."""
        return self._quality(model, stage, self._outputs(model, watching))

    def distance(self, model: nn.Module) -> float:
        """Return the mean distance from the dense outputs: KL divergence of logits, else relative squared error."""
        distances = [
            (divergence if _are_logits(kind, expected) else squared_error)(found, expected).item()
            for (_, found), (kind, expected) in zip(self._outputs(model), self._reference, strict=True)
        ]
        return sum(distances) / len(distances)

    def _outputs(
        self, model: nn.Module, watching: AbstractContextManager[Any] | None = None
    ) -> list[tuple[str, Tensor]]:
        """Run a model over the batches; keep the tensor that stands for each output, without masked positions."""
        found: list[tuple[str, Tensor]] = []
        with evaluating(model), torch.no_grad():
            for given in self.batches:
                batch = given if self._forward else to_device(given, device_of(model))
                with watching if watching is not None and not found else nullcontext():
                    kind, tensor = pick(run(model, copied(batch), self._forward))
                tensor = unmasked(tensor, batch)
                found.append((kind, tensor if tensor.ndim > 1 else tensor.unsqueeze(-1)))
        return found

    def _quality(self, model: nn.Module, stage: str, outputs: list[tuple[str, Tensor]]) -> Quality:
        size = sum(parameter.numel() for parameter in model.parameters()) / max(self._size, 1)
        task = None if self._evaluate is None else float(self._evaluate(model))
        if not outputs:
            return Quality(stage, size, task)
        pairs = [(found, expected) for (_, found), (_, expected) in zip(outputs, self._reference, strict=True)]
        counts = torch.tensor([expected[..., 0].numel() for _, expected in pairs], dtype=torch.float64)

        def mean(values: list[Tensor]) -> float:
            return ((torch.stack(values).cpu().double() * counts).sum() / counts.sum().clamp_min(1)).item()

        if _are_logits(*self._reference[0]):
            kl = mean([divergence(found, expected) for found, expected in pairs])
            same = [(found.argmax(-1) == expected.argmax(-1)).double().mean() for found, expected in pairs]
            return Quality(stage, size, task, kl=kl, top1=mean(same))
        cosines = [torch.cosine_similarity(_real(found), _real(expected), dim=-1).mean() for found, expected in pairs]
        return Quality(stage, size, task, cosine=mean(cosines))


def _real(output: Tensor) -> Tensor:
    """Return the real and the imaginary part of complex entries side by side."""
    return torch.view_as_real(output).flatten(-2) if output.is_complex() else output


def _are_logits(kind: str, output: Tensor) -> bool:
    """Whether the last axis of an output holds the scores of several classes."""
    return kind == "logits" and output.shape[-1] > 1


# Bypassed layers -----------------------------------------------------------------------------------------------------


class _Reads(TorchFunctionMode):
    """Note which of some tensors the functions of torch are given."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            parts = value if isinstance(value, tuple | list) else (value,)
            self.found.update(self.names[id(part)] for part in parts if id(part) in self.names)
        return func(*args, **(kwargs or {}))


def measured(report: Report, outcomes: Sequence[Outcome], evaluator: Evaluator | None, data: Data) -> Report:
    """Measure the compressed model, and mark the layers whose dense weight it still reads.

    A model may hold its modules in a plain list too, or have kept a bound `forward`: there nothing was swapped. Its
    first held-back batch shows it, or its first calibration batch.
    """
    left = {id(parameter) for parameter in report.model.parameters()}
    gone = {
        id(parameter): outcome.target.name
        for outcome in outcomes
        for user in outcome.target.users
        for parameter in user.module.parameters()
        if outcome.modules and id(parameter) not in left
    }
    reads = _Reads(gone)
    if evaluator is not None:
        report = report.measure("compressed", lambda model, stage: evaluator(model, stage, reads))
    if gone and not (evaluator is not None and evaluator.batches):
        for go in model_runs(report.model, data.batches[:1], data.forward):
            with evaluating(report.model), torch.no_grad(), seeded(0), reads:
                go()
    return replace(report, layers=tuple(replace(row, bypassed=row.name in reads.found) for row in report.layers))
