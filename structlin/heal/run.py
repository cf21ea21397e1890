"""The training loop: batches, steps, measurements, the best weights, and the file from which a run resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin.heal.file import FORMAT, damaged, probe, read, write
from structlin.heal.options import HealOptions, HealReport, HealStep

PROBE = 4  # number of training batches that are judged if there is no validation
WARM_UP = 0.05  # share of the schedule
LEAST = 0.02  # share of the peak learning rate at the start, where time as the schedule would give 0


def learning_rate(progress: float) -> float:
    """Return the share of the peak learning rate at a progress of 0 to 1: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, LEAST)
    return (1 + math.cos(math.pi * (min(progress, 1) - WARM_UP) / (1 - WARM_UP))) / 2


class Stream:
    """Batches one by one, pass after pass, which a later run can continue; an iterator gives one pass."""

    def __init__(self, batches: Iterable[Any], epochs: int | None, device: torch.device) -> None:
        self.batches, self.limit = batches, 1 if isinstance(batches, Iterator) else epochs
        # A DataLoader and its sampler may have generators of their own, which decide the order.
        own = [getattr(owner, "generator", None) for owner in (batches, getattr(batches, "sampler", None))]
        cuda = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
        known = dict.fromkeys((torch.default_generator, *cuda, *own))
        self.generators = [generator for generator in known if isinstance(generator, torch.Generator)]
        self.first_opened = self.opened = self._states()  # before the first pass, and before the current one
        self.epoch = self.taken = 0
        self.left: Iterator[Any] | None = None  # of the current pass

    def start(self) -> list[Any]:
        """Open the first pass and return its first batches, which are yielded again."""
        self.left = iter(self.batches)
        first = list(islice(self.left, PROBE))
        if not first:
            raise ValueError("batches is empty; give at least one batch")
        self.left = chain(first, self.left)
        return first

    def __iter__(self) -> Iterator[Any]:
        while self.limit is None or self.epoch < self.limit:
            if self.left is None:
                self.opened, self.left = self._states(), iter(self.batches)
            for batch in self.left:
                self.taken += 1
                yield batch
            if not self.taken:
                return
            self.left, self.epoch, self.taken = None, self.epoch + 1, 0

    def position(self) -> tuple[Any, ...]:
        """Return what `resume` needs."""
        return self.epoch, self.taken, self.first_opened, self.opened, self._states()

    def check(self, position: tuple[Any, ...]) -> None:
        """Refuse what `position` cannot have returned for these generators, before anything is changed."""
        epoch, taken, *states = position
        if len(states) != 3 or min(epoch, taken) < 0:
            raise ValueError(f"position {position}")
        for state in states:
            for generator, value in zip(self.generators, state, strict=True):
                torch.Generator(generator.device).set_state(value)

    def resume(self, position: tuple[Any, ...]) -> list[Any]:
        """Read the current pass again up to a position, and return the first batches of the first pass."""
        after = self._states()  # if this fails
        try:
            self.epoch, self.taken, self.first_opened, self.opened, now = position
            self._restore(self.first_opened)
            first = self.start()
            if self.epoch:
                self._restore(self.opened)
                self.left = iter(self.batches) if self.taken else None
            found = sum(1 for _ in islice(self.left or (), self.taken))
            if found < self.taken:
                raise ValueError(
                    f"batches ends after {found} batches; the checkpoint has read {self.taken} of a pass, give the "
                    "batches that it was written with"
                )
            after = now
            return first
        finally:
            self._restore(after)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def requiring_gradients(student: nn.Module, chosen: Container[nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters require gradients, and restore flags and gradients at the end."""
    with ExitStack() as restoring:
        for parameter in student.parameters():
            restoring.callback(setattr, parameter, "grad", parameter.grad)
            restoring.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in chosen)
            parameter.grad = None
        yield


@dataclass(eq=False)
class Run:
    """A healing under way; which weights are best, and for how long, follows from its history."""

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
        """Resume or start, train until a limit is reached, and keep the best weights: also after an interruption."""
        self.start = time.perf_counter()
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.path = None if self.options.checkpoint is None else Path(self.options.checkpoint)
        if self.path is not None:
            probe(self.path)
        content = read(self.path, self._about()) if self.path is not None and self.path.exists() else None
        first = self.stream.start() if content is None else self._resume(content)
        self.judged = first if self.validation is None else self.validation
        if content is None:
            self._keep()
            self.loss_before = self._judge("before the first step")
        advance(self.step)
        try:
            stopped = self._steps(advance)
        except BaseException:  # Ctrl-C too
            if self.validation is not None:
                self._restore_best()
            raise
        validated, trained = self.validation is not None, sum(p.numel() for p in self.trained.values())
        if validated:
            self._restore_best()
        loss, step = self._best() if validated else (self._judge("at the end"), self.step)
        seconds, history = self._seconds(), tuple(self.history)
        return HealReport(self.step, seconds, self.loss_before, loss, step, stopped, trained, validated, history)

    def _steps(self, advance: Callable[..., None]) -> str:
        """Train and measure until a limit is reached; return its name."""
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
        return stopped

    def _limit(self) -> str | None:
        since_best = sum(row.step > self._best()[1] for row in self.history)
        for name, done in (("steps", self.step), ("patience", since_best), ("seconds", self._seconds())):
            most = getattr(self.options, name)
            if most is not None and done >= most:
                return name
        return None

    def _seconds(self) -> float:
        return time.perf_counter() - self.start  # a resumed run starts as early as it has run before

    def _best(self) -> tuple[float, int]:
        """Return the lowest loss measured and its first step; the start counts if there is a validation."""
        scores = [(row.loss if row.validation is None else row.validation, row.step) for row in self.history]
        return min([(math.inf if self.validation is None else self.loss_before, 0), *scores])

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
        kind = "first training" if self.validation is None else "validation"
        losses = [self.objective(batch).item() for batch in self.judged]
        if not losses:
            raise ValueError("validation is empty; give at least one batch")
        return self._finite(sum(losses) / len(losses), f"the loss on the {kind} batches", when)

    def _finite(self, value: float, what: str, when: str) -> float:
        """Return a finite number; otherwise restore the best weights and raise."""
        if math.isfinite(value):
            return value
        self._restore_best()
        raise RuntimeError(
            f"{what} is {value} {when}; the student has the weights of step {self._best()[1]} again, the best so far. "
            "Lower the learning rate, clip the gradients, or use a wider dtype"
        )

    def _measure(self) -> None:
        loss = sum(self.window) / len(self.window)
        validation = None if self.validation is None else self._judge(f"at step {self.step}")
        self.window.clear()
        self.history.append(HealStep(self.step, self._seconds(), loss, validation))
        if self._best()[1] == self.step:
            self._keep()
        if self.path is not None:
            self._save(self.path)

    def _keep(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self.kept.items():
            self.trained[name].copy_(value)

    # Interruption ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        items = self.student.state_dict(keep_vars=True).items()  # the very objects; a module may add other kinds
        return {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}

    def _about(self) -> dict[str, str]:
        """Describe what must be the same when the run is resumed."""
        about = {
            "the format": FORMAT,
            "mode": self.options.mode,
            "blocks": self.options.blocks,
            "validated": self.validation is not None,
            "device": next(iter(self.trained.values())).device,
            "the optimizer": type(self.optimizer).__name__,
        }
        groups = [group["params"] for group in self.optimizer.param_groups]
        places = {
            p: f"trained as number {n} of group {k}" for k, group in enumerate(groups) for n, p in enumerate(group)
        }
        for name, tensor in self._tensors().items():
            about[name] = f"{tuple(tensor.shape)} {tensor.dtype} {places.get(tensor, 'not trained')}"
        return {name: str(value) for name, value in about.items()}

    def _save(self, path: Path) -> None:
        content = {
            "about": self._about(),
            "loss_before": self.loss_before,
            "history": [tuple(row) for row in self.history],
            "position": self.stream.position(),
            "student": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "kept": self.kept if self._best()[1] != self.step else {},
            "optimizer": self.optimizer.state_dict(),
        }
        write(path, content)

    @torch.no_grad()
    def _resume(self, content: Mapping[str, Any]) -> list[Any]:
        """Go on where the file ends, and return the first batches: all or nothing is changed."""
        tensors, before = self._tensors(), (self.optimizer.state, self.optimizer.param_groups)
        assert self.path is not None
        try:
            history = [HealStep(*row) for row in content["history"]]
            start, loss_before = self.start - history[-1].seconds, float(content["loss_before"])
            values = {name: _like(content["student"][name], tensor) for name, tensor in tensors.items()}
            kept = {name: _like(value, self.trained[name]) for name, value in content["kept"].items()}
            if kept and kept.keys() != self.trained.keys():
                raise ValueError(f"kept are {list(kept)}")
            self.stream.check(content["position"])
            self._load_optimizer(content["optimizer"])
        except Exception as error:  # of a forged file: damage shows in its checksum
            self.optimizer.state, self.optimizer.param_groups = before
            raise damaged(self.path) from error
        try:
            first = self.stream.resume(content["position"])
        except BaseException:
            self.optimizer.state, self.optimizer.param_groups = before
            raise
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
        self._keep()  # the file has no second copy if its weights are the best
        self.kept |= kept
        self.loss_before, self.history, self.start = loss_before, history, start
        self.step = history[-1].step  # only measurements write the file
        return first

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        # It has cast moments to the dtypes of their parameters: put every bit back.
        parameters = list(chain(*(group["params"] for group in self.optimizer.param_groups)))
        for key, moments in state["state"].items():
            self.optimizer.state[parameters[key] if isinstance(key, int) else key] = moments


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"{tuple(value.shape)} {value.dtype} in place of {tuple(tensor.shape)} {tensor.dtype}")
    return value
