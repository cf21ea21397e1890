"""The training loop: steps, measurements, the best weights, and resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin.heal.options import HealOptions, HealReport, HealStep
from structlin.heal.state import Stream, read_state, write_state

PROBE = 4  # number of training batches that are judged if there is no validation
WARM_UP = 0.05  # share of the schedule
LEAST = 0.02  # share of the peak learning rate at the start, where time as the schedule would give 0


def learning_rate(progress: float) -> float:
    """Return the share of the peak learning rate at a progress of 0 to 1: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, LEAST)
    return (1 + math.cos(math.pi * (min(progress, 1) - WARM_UP) / (1 - WARM_UP))) / 2


@dataclass(eq=False)
class Run:
    """A healing under way; the best step and the patience spent follow from its history."""

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
    history: list[HealStep] = field(default_factory=list)
    window: list[float] = field(default_factory=list)  # training losses since the last measurement

    def run(self, advance: Callable[..., None]) -> HealReport:
        """Resume or start, train until a limit is reached, and keep the best weights."""
        self.start = time.perf_counter()
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.path = None if self.options.checkpoint is None else Path(self.options.checkpoint)
        if self.path is not None and self.path.exists():
            self._resume(self.path)
        else:
            self.judged = self.stream.read_ahead(PROBE) if self.validation is None else self.validation
            self._keep()
            self.loss_before = self._judge("before the first step")
        advance(self.step)
        batches = iter(self.stream)
        while (stopped := self._limit()) is None:
            try:
                batch = next(batches)
            except StopIteration:
                stopped = "epochs" if self.stream.epoch == self.options.epochs else "batches"
                break
            self._train(batch)
            advance(text=f"loss {self.window[-1]:.4g}")
            if self.step % self.options.every == 0:
                self._measure()
        if self.window:
            self._measure()
        return self._finish(stopped)

    def _limit(self) -> str | None:
        since_best = sum(row.step > self._best().step for row in self.history)
        for name, done in (("steps", self.step), ("patience", since_best), ("seconds", self._seconds())):
            most = getattr(self.options, name)
            if most is not None and done >= most:
                return name
        return None

    def _seconds(self) -> float:
        return time.perf_counter() - self.start  # a resumed run starts as early as it has run before

    def _best(self) -> HealStep:
        """Return the first measurement with the lowest loss; the start is one if there is a validation."""
        start = HealStep(0, 0.0, math.inf, None if self.validation is None else self.loss_before)
        return min((start, *self.history), key=_score)

    def _train(self, batch: Any) -> None:
        done = self._seconds() / (self.options.seconds or 1) if self.length is None else (self.step + 0.5) / self.length
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            rate = peak * learning_rate(done)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        self.optimizer.zero_grad()
        loss = self.objective(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the trained parameters; train others, or correct loss=")
        self.window.append(self._finite(loss.item(), "the training loss", f"at step {self.step}"))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf)
        self._finite(norm.item(), "the gradient's norm", f"at step {self.step}")
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def _judge(self, when: str) -> float:
        """Return the mean loss over the validation batches or the first training batches."""
        name, kind = ("batches", "first training") if self.validation is None else ("validation", "validation")
        losses = [self.objective(batch).item() for batch in self.judged]
        if not losses:
            raise ValueError(f"{name} is empty; give at least one batch")
        return self._finite(sum(losses) / len(losses), f"the loss on the {kind} batches", when)

    def _finite(self, value: float, what: str, when: str) -> float:
        """Return a finite number; otherwise restore the best weights and raise."""
        if math.isfinite(value):
            return value
        self._restore_best()
        raise RuntimeError(
            f"{what} is {value} {when}; the student has the weights of step {self._best().step} again, the best so "
            "far. Lower the learning rate, clip the gradients, or use a wider dtype"
        )

    def _measure(self) -> None:
        loss = sum(self.window) / len(self.window)
        validation = None if self.validation is None else self._judge(f"at step {self.step}")
        self.window.clear()
        self.history.append(HealStep(self.step, self._seconds(), loss, validation))
        if self._best().step == self.step:
            self._keep()
        if self.path is not None:
            self._save(self.path)

    def _keep(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self.kept.items():
            self.trained[name].copy_(value)

    def _finish(self, stopped: str) -> HealReport:
        validated = self.validation is not None
        if validated:
            self._restore_best()
        loss, step = (_score(self._best()), self._best().step) if validated else (self._judge("at the end"), self.step)
        trained = sum(parameter.numel() for parameter in self.trained.values())
        seconds, history = self._seconds(), tuple(self.history)
        return HealReport(self.step, seconds, self.loss_before, loss, step, stopped, trained, validated, history)

    # Interruption ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Return the student's parameters and buffers, the very objects; a state dict may hold other things too."""
        items = self.student.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}

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
                for name, tensor in self._tensors().items()
            },
        }

    def _save(self, path: Path) -> None:
        content = {
            "about": self._about(),
            "loss_before": self.loss_before,
            "history": [tuple(row) for row in self.history],
            "position": self.stream.position(),
            "student": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "kept": self.kept if self._best().step != self.step else {},
            "optimizer": self.optimizer.state_dict(),
        }
        write_state(path, content)

    @torch.no_grad()
    def _resume(self, path: Path) -> None:
        content = read_state(path, self._about())
        first = self.stream.resume(content["position"], PROBE if self.validation is None else 0)
        self.judged = first if self.validation is None else self.validation
        self.optimizer.load_state_dict(content["optimizer"])
        # That has cast moments to the dtypes of their parameters; put back every bit.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, state in content["optimizer"]["state"].items():
            self.optimizer.state[parameters[key] if isinstance(key, int) else key] = state
        for name, tensor in self._tensors().items():
            tensor.copy_(content["student"][name])
        self._keep()
        self.kept |= content["kept"]
        self.loss_before, self.history = content["loss_before"], [HealStep(*row) for row in content["history"]]
        self.step = self.history[-1].step  # the file is written by measurements only
        self.start -= self.history[-1].seconds


def _score(row: HealStep) -> float:
    return row.loss if row.validation is None else row.validation
