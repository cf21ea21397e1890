"""Time a layer beside `nn.Linear`: check the outputs, then alternate short samples of both in one process."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from structlin.layers.freeze import freeze_
from structlin.layers.linear import StructuredLinear

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes two lines for each use otherwise

Row = dict[str, Any]

INFERENCE, EVAL, FORWARD, TRAINING = MODES = ("inference", "eval", "forward", "training")
# Relative error against F.linear with the dense matrix that is allowed in each dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
WARM_UP = 3  # calls
MOST_CALLS = 10_000  # in a sample
CLOSE = 1.5  # candidates whose first calls take at most so many times the least are compared in turn


@dataclass(frozen=True, eq=False)
class Subject:
    """What is timed beside `nn.Linear`.

    Args:
        name: for messages.
        module: maps (tokens, in) to (tokens, out).
        weight: the dense matrix that it applies, (out, in).
        bias: (out,) or None.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, name: str, layer: StructuredLinear, module: nn.Module | None = None) -> Subject:
        """A layer of this library, or another module that applies the same matrix and bias."""
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(name, layer if module is None else module, layer.to_dense().detach(), bias)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        rounds: samples of each of the two.
        seconds: least time of a sample.
        clock: `time.process_time` counts CPU time: other processes on the machine take turns, not time.
    """

    rounds: int
    seconds: float = 2e-3
    clock: Callable[[], float] = time.perf_counter


# One call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Call:
    """A module at work in one mode, on one input.

    Args:
        module: maps (tokens, in) to (tokens, out).
        mode: of MODES.
        x: (tokens, in).
        pull: gradient of the output, (tokens, out).
    """

    module: nn.Module
    mode: str
    x: Tensor
    pull: Tensor

    @classmethod
    def new(cls, module: nn.Module, weight: Tensor, mode: str, tokens: int) -> Call:
        """Draw an input and an output gradient for a module with this dense matrix (out, in), and set its mode."""
        kind = {"dtype": weight.dtype, "device": weight.device}
        x = torch.randn(tokens, weight.shape[1], requires_grad=mode not in (INFERENCE, EVAL), **kind)
        module.train(x.requires_grad)
        if mode == INFERENCE:
            freeze_(module)
        return cls(module, mode, x, torch.randn(tokens, weight.shape[0], **kind))

    def grad_mode(self) -> torch.set_grad_enabled:
        """The context in which the work is done: no gradients in inference and eval."""
        return torch.set_grad_enabled(self.x.requires_grad)

    def work(self) -> Callable[[], Any]:
        """What is timed: a forward pass that returns the output, or in training also a backward pass: all gradients."""
        if self.mode != TRAINING:
            return partial(self.module, self.x)
        leaves = (self.x, *(p for p in self.module.parameters() if p.requires_grad))
        return lambda: torch.autograd.grad(self.module(self.x), leaves, self.pull)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference / norm of `expected`."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return difference.item()


def check(subject: Subject, call: Call) -> dict[str, float]:
    """Compare the output, and in training the input gradient, with those of `F.linear` and the dense matrix.

    Returns:
        The relative errors.
    Raises:
        ValueError: if one is not within the tolerance of the dtype.
    """
    x, weight = call.x.detach(), subject.weight
    with call.grad_mode():
        output = call.module(call.x)
    errors = {"error": relative_error(output.detach(), F.linear(x, weight, subject.bias))}
    if call.mode == TRAINING:
        (gradient,) = torch.autograd.grad(output, call.x, call.pull)
        errors["gradient_error"] = relative_error(gradient, call.pull @ weight)
    for what, error in errors.items():
        if not error <= TOLERANCE[x.dtype]:  # NaN included
            raise ValueError(
                f"{subject.name}, {call.mode}, {len(x)} tokens: {what}={error:.2g} exceeds {TOLERANCE[x.dtype]} "
                "of F.linear with its dense matrix; nothing was timed"
            )
    return errors


# Time ------------------------------------------------------------------------------------------------------------


def sample(call: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call, over so many calls in a row."""
    wait()
    start = clock()
    for _ in range(calls):
        call()
    wait()
    return (clock() - start) / calls


def wait() -> None:
    """Let a GPU, where one is used, finish what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def calls_per_sample(call: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> int:
    """Warm up, and find how many calls take so long."""
    estimate = max(1e-9, min(sample(call, 1, clock) for _ in range(WARM_UP)))
    return max(1, min(MOST_CALLS, round(seconds / estimate + 0.5)))


def median_seconds(
    calls: Sequence[Callable[[], object]], seconds: float, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the median seconds of each call, sampled in turn."""
    counts = [calls_per_sample(call, seconds, clock) for call in calls]
    rows = [[sample(call, count, clock) for call, count in zip(calls, counts, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def interleaved(dense: Callable[[], object], layer: Callable[[], object], effort: Effort) -> Row:
    """Sample both in turn, the first of a round last in the next: medians in us, and the ratio layer / dense.

    The quartiles are those of the ratio within each round.
    """
    counts = {call: calls_per_sample(call, effort.seconds, effort.clock) for call in (dense, layer)}
    times: dict[Callable[[], object], list[float]] = {dense: [], layer: []}
    for k in range(effort.rounds):
        for call in (dense, layer) if k % 2 == 0 else (layer, dense):
            times[call].append(sample(call, counts[call], effort.clock))
    medians = {call: statistics.median(values) for call, values in times.items()}
    ratios = [b / a for a, b in zip(times[dense], times[layer], strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4)
    return {
        "dense_us": 1e6 * medians[dense], "layer_us": 1e6 * medians[layer], "ratio": medians[layer] / medians[dense],
        "lower_quartile": lower, "upper_quartile": upper, "samples": effort.rounds,
        "dense_calls": counts[dense], "layer_calls": counts[layer],
    }  # fmt: skip


# Memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(call: Call) -> int | None:
    """Bytes that the graph keeps for the backward pass beyond the input, parameters and buffers; None without one."""
    if not call.x.requires_grad:
        return None
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call.module(call.x)  # keeps the graph, so that no storage is freed and counted twice
    known = {t.untyped_storage().data_ptr() for t in (call.x, *call.module.parameters(), *call.module.buffers())}
    del y
    return sum(nbytes for pointer, nbytes in kept.items() if pointer not in known)


def peak_bytes(call: Call) -> int | None:
    """Most bytes that torch's allocator held during a step beyond those before it, gradients included; training only.

    Workspaces of the BLAS are not seen.
    """
    if call.mode != TRAINING:
        return None
    gc.collect()
    if call.x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.work()()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call.work()()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    if results is None:
        return None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# A cell ----------------------------------------------------------------------------------------------------------


def plan_text(layer: StructuredLinear, tokens: int, mode: str) -> str:
    """Name the way that runs this many tokens: inference is that of frozen layers."""
    asked = {INFERENCE: "frozen", EVAL: "eval"}.get(mode, "training")
    return next(option.way for option in layer.options(tokens) if option.mode == asked and option.chosen)


def fastest(subjects: Sequence[Subject], mode: str, tokens: int, effort: Effort) -> Subject:
    """Return the subject that takes the least time; few of them are timed more than twice."""
    calls = [Call.new(subject.module, subject.weight, mode, tokens) for subject in subjects]
    with calls[0].grad_mode():
        first = [min(sample(call.work(), 1, effort.clock) for _ in range(2)) for call in calls]
        close = [k for k, seconds in enumerate(first) if seconds <= CLOSE * min(first)]
        medians = median_seconds([calls[k].work() for k in close], effort.seconds, min(effort.rounds, 5), effort.clock)
    return subjects[min(zip(medians, close, strict=True))[1]]


def measure(subject: Subject, dense: nn.Linear, mode: str, tokens: int, effort: Effort) -> Row:
    """Check a subject, then time it beside the dense layer; memory of both in training."""
    torch.manual_seed(0)
    call = Call.new(subject.module, subject.weight, mode, tokens)
    other = Call.new(dense, dense.weight, mode, tokens)
    row: Row = {**check(subject, call)}
    with call.grad_mode():
        row |= interleaved(other.work(), call.work(), effort)
    for name, one in (("dense", other), ("layer", call)):
        row |= {f"{name}_saved_bytes": saved_bytes(one), f"{name}_peak_bytes": peak_bytes(one)}
    learned = sum(p.numel() for name, p in subject.module.named_parameters() if name.rpartition(".")[2] != "bias")
    row["parameters_ratio"] = learned / dense.weight.numel()
    if not isinstance(subject.module, StructuredLinear):
        row["plan"] = subject.name
    else:
        row["flop_ratio"] = subject.module.flops_per_token / (2 * dense.weight.numel())
        row["break_even"] = row["flop_ratio"] / row["ratio"]
        row["plan"] = plan_text(subject.module, tokens, mode)
    return row
