"""The loop of a healing: steps, measurements, the best weights, and where it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from structlin.heal.data import Advance
from structlin.heal.objective import Objective
from structlin.heal.report import HealReport, HealStep
from structlin.heal.state import (
    differences,
    optimizer_differences,
    pack_optimizer,
    read_state,
    stored_tensors,
    unpack_optimizer,
    write_state,
)
from structlin.heal.stream import Stream, generators, set_generators

WARM_UP = 0.05  # share of the schedule
LEAST = 0.02  # of the warm-up at its first step, where time is what counts


def learning_rate(progress: float) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then half a cosine; progress is 0 to 1."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, LEAST)
    return (1 + math.cos(math.pi * (min(progress, 1) - WARM_UP) / (1 - WARM_UP))) / 2


@dataclass(frozen=True)
class Limits:
    """What ends a healing, and what it does every so often.

    Args:
        steps: most steps, None for any number.
        seconds: most time, None for any.
        length: steps of the schedule, None where time is its measure.
        every: steps between measurements.
        patience: measurements without improvement, None for any number.
        clip: largest norm of the gradient, infinity for any.
    """

    steps: int | None
    seconds: float | None
    length: int | None
    every: int
    patience: int | None
    clip: float


@dataclass
class Run:
    """A healing under way."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, nn.Parameter]
    stream: Stream
    validation: Iterable[Any] | None
    limits: Limits
    checkpoint: Path | None
    about: Mapping[str, Any]  # must be equal when a checkpoint is read
    step: int = 0
    loss_before: float = math.nan
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_score: float = math.inf
    without_improvement: int = 0
    history: list[HealStep] = field(default_factory=list)
    window: list[float] = field(default_factory=list)  # losses since the last measurement

    def __post_init__(self) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.trained.items()}
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._start = time.perf_counter()

    # The loop ----------------------------------------------------------------------------------------------------

    def run(self, advance: Advance) -> HealReport:
        """Resume or start, train until a limit is met, and put the best weights in place."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)
        else:
            self._begin()
        advance(self.step)
        while (stopped := self._limit()) is None:
            batch = self.stream.take()
            if batch is None:
                stopped = self.stream.ended
                break
            self._train(batch[0])
            if self.step % self.limits.every == 0:
                self._measure()
            advance(text=f"loss {self.window[-1] if self.window else self.history[-1].loss:.4g}")
        assert stopped is not None
        if self.window:
            self._measure()
        return self._finish(stopped)

    def _limit(self) -> str | None:
        limits = self.limits
        if limits.steps is not None and self.step >= limits.steps:
            return "steps"
        if limits.patience is not None and self.without_improvement >= limits.patience:
            return "patience"
        return "seconds" if limits.seconds is not None and self.seconds >= limits.seconds else None

    @property
    def seconds(self) -> float:
        """Time since the start, earlier parts included."""
        return time.perf_counter() - self._start

    def _begin(self) -> None:
        self._keep()
        self.loss_before = self._judge("before the first step")
        if self.validation is not None:
            self.best_score = self.loss_before

    def _train(self, batch: Any) -> None:
        limits = self.limits
        if limits.length is not None:
            progress = (self.step + 0.5) / limits.length
        else:
            assert limits.seconds is not None
            progress = self.seconds / limits.seconds
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * learning_rate(progress))
            else:
                group["lr"] = peak * learning_rate(progress)
        self.optimizer.zero_grad()
        loss = self.objective(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the trained parameters; train others, or correct loss=")
        value = loss.item()
        if not math.isfinite(value):
            self._fail(f"the training loss is {value} at step {self.step}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), limits.clip))
        if not math.isfinite(norm):
            self._fail(f"the gradient's norm is {norm} at step {self.step}")
        self.optimizer.step()
        self.step += 1
        self.window.append(value)

    # Measurements ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _judge(self, when: str) -> float:
        """Average the loss over the validation batches or the first training batches."""
        batches = self.stream.peek() if self.validation is None else self.validation
        losses = [self.objective(batch).item() for batch in batches]
        if not losses:
            what = "batches" if self.validation is None else "validation"
            raise ValueError(f"{what} is empty; give at least one batch")
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            what = "the first training batches" if self.validation is None else "the validation batches"
            self._fail(f"the loss on {what} is {mean} {when}")
        return mean

    def _measure(self) -> None:
        validation = None if self.validation is None else self._judge(f"at step {self.step}")
        loss = sum(self.window) / len(self.window)
        self.window.clear()
        self.history.append(HealStep(self.step, self.seconds, loss, validation))
        score = loss if validation is None else validation
        self.without_improvement += 1
        if score < self.best_score:
            self.best_score, self.without_improvement = score, 0
            self._keep()
        if self.checkpoint is not None:
            self._save(self.checkpoint)

    @torch.no_grad()
    def _keep(self) -> None:
        self.best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.best_step = self.step

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self.best.items():
            self.trained[name].copy_(value)

    def _fail(self, what: str) -> NoReturn:
        self._restore_best()
        raise RuntimeError(
            f"{what}; the student has the weights of step {self.best_step} again, the best so far. Lower the learning "
            "rate, clip the gradients, or use a wider dtype"
        )

    def _finish(self, stopped: str) -> HealReport:
        if self.validation is not None:
            self._restore_best()
            loss_after, kept = self.best_score, self.best_step
        else:
            loss_after, kept = self._judge("after the last step"), self.step
        return HealReport(
            self.step, self.seconds, self.loss_before, loss_after, kept, stopped,
            sum(parameter.numel() for parameter in self.trained.values()), self.validation is not None,
            tuple(self.history),
        )  # fmt: skip

    # Interruption ------------------------------------------------------------------------------------------------

    def _save(self, path: Path) -> None:
        tensors = {f"student.{name}": value for name, value in stored_tensors(self.objective.student).items()}
        if self.best_step != self.step:
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
        states = {
            "start": self.stream.start_state,
            "epoch": self.stream.epoch_state,
            "now": generators(self.objective.device),
        }
        for when, devices in states.items():
            tensors |= {f"generator.{when}.{kind}": state for kind, state in devices.items()}
        optimizer_tensors, optimizer = pack_optimizer(self.optimizer, self.names)
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors.items()}
        content = {
            "about": self.about, "step": self.step, "seconds": self.seconds, "loss_before": self.loss_before,
            "best_step": self.best_step, "best_score": self.best_score,
            "without_improvement": self.without_improvement, "history": self.history,
            "epoch": self.stream.epoch, "position": self.stream.position, "optimizer": optimizer,
        }  # fmt: skip
        write_state(path, tensors, content)

    @torch.no_grad()
    def _resume(self, path: Path) -> None:
        tensors, content = read_state(path)
        student = stored_tensors(self.objective.student)
        found = part(tensors, "student.")
        different = [
            f"{key} is {value!r}, in the file {content['about'].get(key)!r}"
            for key, value in self.about.items()
            if value != content["about"].get(key)
        ]
        different += differences(student, found)
        different += optimizer_differences(self.optimizer, self.names, content["optimizer"])
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise ValueError(
                f"{path} is of another healing: {'; '.join(different[:3])}{more}. Give the student, parameters and "
                "optimizer that it was written with, or delete it to start anew"
            )
        start, in_epoch, now = (part(tensors, f"generator.{when}.") for when in ("start", "epoch", "now"))
        before = generators(self.objective.device)
        try:
            self.stream.seek(content["epoch"], content["position"], start, in_epoch, now)
        except BaseException:
            set_generators(before, self.objective.device)
            raise
        unpack_optimizer(self.optimizer, self.names, part(tensors, "optimizer."), content["optimizer"])
        for name, value in found.items():
            student[name].copy_(value)
        for name in ("step", "loss_before", "best_score", "without_improvement"):
            setattr(self, name, content[name])
        self.history = [HealStep(*row) for row in content["history"]]
        self._keep()
        self.best_step = content["best_step"]
        self.best |= {name: value.to(self.best[name].device) for name, value in part(tensors, "best.").items()}
        self._start = time.perf_counter() - content["seconds"]


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
