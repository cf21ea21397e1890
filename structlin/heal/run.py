"""The training loop: steps, measurements, the best weights, and interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from structlin.heal.options import HealOptions
from structlin.heal.report import HealReport, HealStep
from structlin.heal.state import Stream, load_optimizer, read_state, stored_tensors, write_state

PROBE = 4  # number of training batches that are judged if there is no validation
WARM_UP = 0.05  # share of the schedule
LEAST = 0.02  # share of the peak learning rate at the start, where time as the schedule would give 0
COUNTS = ("step", "loss_before", "best_step", "best_score", "without_improvement")  # of a run, in its checkpoint


def learning_rate(progress: float) -> float:
    """Return the share of the peak learning rate at a progress of 0 to 1: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, LEAST)
    return (1 + math.cos(math.pi * (min(progress, 1) - WARM_UP) / (1 - WARM_UP))) / 2


@dataclass(eq=False)
class Run:
    """A healing under way; the fields with defaults are its state, which a checkpoint holds."""

    student: nn.Module
    objective: Callable[[Any], Tensor]  # batch -> loss
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, nn.Parameter]
    stream: Stream
    validation: Iterable[Any] | None
    options: HealOptions
    length: int | None  # steps of the schedule, None if time sets it
    step: int = 0
    loss_before: float = math.nan
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_score: float = math.inf
    without_improvement: int = 0  # measurements since the best one
    history: list[HealStep] = field(default_factory=list)

    def run(self, advance: Callable[..., None]) -> HealReport:
        """Resume or start, train until a limit is reached, and keep the best weights."""
        self.start = time.perf_counter()
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.window: list[float] = []  # training losses since the last measurement
        self.path = None if self.options.checkpoint is None else Path(self.options.checkpoint)
        if self.path is not None and self.path.exists():
            self._resume(self.path)
        else:
            self.judged = self.stream.read_ahead(PROBE) if self.validation is None else self.validation
            self._keep()
            self.loss_before = self._judge("before the first step")
            if self.validation is not None:
                self.best_score = self.loss_before
        advance(self.step)
        batches = iter(self.stream)
        while (stopped := self._limit()) is None:
            try:
                batch = next(batches)
            except StopIteration:
                stopped = "epochs" if self.stream.epoch == self.options.epochs else "batches"
                break
            loss = self._train(batch)
            if self.step % self.options.every == 0:
                self._measure()
            advance(text=f"loss {loss:.4g}")
        if self.window:
            self._measure()
        return self._finish(stopped)

    def _limit(self) -> str | None:
        most = self.options
        if most.steps is not None and self.step >= most.steps:
            return "steps"
        if most.patience is not None and self.without_improvement >= most.patience:
            return "patience"
        return "seconds" if most.seconds is not None and self._seconds() >= most.seconds else None

    def _seconds(self) -> float:
        return time.perf_counter() - self.start  # a resumed run starts as early as it has run before

    def _train(self, batch: Any) -> float:
        done = self._seconds() / (self.options.seconds or 1) if self.length is None else (self.step + 0.5) / self.length
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            rate = peak * learning_rate(done)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        self.optimizer.zero_grad()
        loss = self.objective(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the trained parameters; train others, or correct loss=")
        self.window.append(loss.item())
        if not math.isfinite(self.window[-1]):
            self._fail(f"the training loss is {self.window[-1]} at step {self.step}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf))
        if not math.isfinite(norm):
            self._fail(f"the gradient's norm is {norm} at step {self.step}")
        self.optimizer.step()
        self.step += 1
        return self.window[-1]

    @torch.no_grad()
    def _judge(self, when: str) -> float:
        """Return the mean loss over the validation batches or the first training batches."""
        kind = "validation" if self.validation is not None else "first training"
        losses = [self.objective(batch).item() for batch in self.judged]
        if not losses:
            raise ValueError(
                f"{'batches' if self.validation is None else 'validation'} is empty; give at least one batch"
            )
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            self._fail(f"the loss on the {kind} batches is {mean} {when}")
        return mean

    def _measure(self) -> None:
        loss = sum(self.window) / len(self.window)
        validation = None if self.validation is None else self._judge(f"at step {self.step}")
        self.window.clear()
        self.history.append(HealStep(self.step, self._seconds(), loss, validation))
        score = loss if validation is None else validation
        self.without_improvement += 1
        if score < self.best_score:
            self.best_score, self.without_improvement = score, 0
            self._keep()
        if self.path is not None:
            self._save(self.path)

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
        validated = self.validation is not None
        if validated:
            self._restore_best()
        loss, step = (self.best_score, self.best_step) if validated else (self._judge("at the end"), self.step)
        trained = sum(parameter.numel() for parameter in self.trained.values())
        seconds, history = self._seconds(), tuple(self.history)
        return HealReport(self.step, seconds, self.loss_before, loss, step, stopped, trained, validated, history)

    # Interruption ----------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, str]:
        """Describe what must be the same when the run is resumed."""
        places = {
            parameter: f"trained as number {number} of group {index}"
            for index, group in enumerate(self.optimizer.param_groups)
            for number, parameter in enumerate(group["params"])
        }
        return {
            "mode": self.options.mode,
            "blocks": str(self.options.blocks),
            "validated": str(self.validation is not None),
            "device": str(self.stream.device),
            "the optimizer": type(self.optimizer).__name__,
            **{
                name: f"{tuple(tensor.shape)} {tensor.dtype} {places.get(tensor, 'not trained')}"
                for name, tensor in stored_tensors(self.student).items()
            },
        }

    def _save(self, path: Path) -> None:
        content = {
            "about": self._about(),
            "counts": {name: getattr(self, name) for name in COUNTS},
            "history": [tuple(row) for row in self.history],
            "position": self.stream.position(),
            "student": {name: tensor.detach() for name, tensor in stored_tensors(self.student).items()},
            "best": self.best if self.best_step != self.step else {},
            "optimizer": self.optimizer.state_dict(),
        }
        write_state(path, content)

    @torch.no_grad()
    def _resume(self, path: Path) -> None:
        content = read_state(path, self._about())
        first = self.stream.resume(content["position"], PROBE if self.validation is None else 0)
        self.judged = first if self.validation is None else self.validation
        load_optimizer(self.optimizer, content["optimizer"])
        for name, tensor in stored_tensors(self.student).items():
            tensor.copy_(content["student"][name])
        self._keep()
        self.best |= content["best"]
        vars(self).update(content["counts"], history=[HealStep(*row) for row in content["history"]])
        self.start -= self.history[-1].seconds
