"""The ways to run a layer, by name: each states its predicted time and computes x W^T + bias."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime import contract, planner
from structlin.runtime.costs import (
    DENSE_GAIN,
    DENSE_SECONDS,
    GRAPH_SECONDS,
    HOPELESS,
    PATTERN_FLOPS,
    PATTERN_SECONDS,
    PLAN_SECONDS,
    PLAN_SLOWER,
    SMALL,
    WRITING,
)
from structlin.runtime.kernels import Chain, chain_of, launches
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Order, Plan
from structlin.runtime.recompute import (
    allowance,
    at_once,
    backward_plan,
    backward_rows,
    by_chunks,
    recomputed,
    with_bias,
)

Mode = Literal["training", "eval", "frozen"]
# With gradients of anything; without; without, and what is derived from the factors is kept (`structlin.freeze_`).
TRAINING: Mode = "training"
EVAL: Mode = "eval"
FROZEN: Mode = "frozen"
MODES = (TRAINING, EVAL, FROZEN)

MOST_ROWS = 1024  # to plan for: more rows run by the same plan
_ROUNDS = 5  # of samples, when ways are measured
_SAMPLE = 5e-4  # s, of one


@dataclass(frozen=True)
class Key:
    """Everything that decides how a layer runs."""

    rows: int  # of the input, rounded up to a power of two
    dtype: torch.dtype  # of input and factors
    device: torch.device  # of input and factors
    native: bool  # whether the native kernel can run
    mode: Mode


@dataclass(frozen=True)
class Kernel:
    """All stages and the bias in one native operator, forward and backward."""

    name: ClassVar[str] = "native kernel"
    keeps: ClassVar[None] = None
    chain: Chain
    seconds: float

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return self.chain(x, factors, bias)


@dataclass(frozen=True)
class Launches:
    """One launch of Triton for each factor, forward and backward; on request only, since never timed on a GPU."""

    name: ClassVar[str] = "Triton kernels"
    keeps: ClassVar[None] = None
    spec: Spec
    seconds: float

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        gpu = importlib.import_module("structlin.runtime.kernels.gpu")  # imports Triton, which takes a second
        result: Tensor = gpu.chain(self.spec, x, factors, bias)
        return result


@dataclass(frozen=True)
class KeptDense:
    """`F.linear` with the dense matrix, built once; for frozen layers."""

    name: ClassVar[str] = "kept dense matrix"
    keeps: ClassVar[str] = "dense matrix"
    spec: Spec
    seconds: float

    def __str__(self) -> str:
        return self.name

    def derive(self, factors: Sequence[Tensor]) -> Tensor:
        return contract.to_dense(self.spec, factors)

    def __call__(self, x: Tensor, matrix: Any, bias: Tensor | None) -> Tensor:
        return F.linear(x, matrix, bias)


@dataclass(frozen=True)
class _Planned:
    """A way that follows a plan."""

    name: ClassVar[str]
    spec: Spec
    plan: Plan
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.plan.summary}"


@dataclass(frozen=True)
class KeptOperands(_Planned):
    """A plan by chunks of rows, its factors merged and laid out once; for frozen layers."""

    name: ClassVar[str] = "kept operands"

    @property
    def keeps(self) -> object:
        """What is derived from the factors; plans for different numbers of rows may share it."""
        return self.plan.folds

    def derive(self, factors: Sequence[Tensor]) -> contract.Operands:
        return contract.lay_out(contract.merge_factors(self.spec, factors, self.plan), self.plan)

    def __call__(self, x: Tensor, operands: Any, bias: Tensor | None) -> Tensor:
        return by_chunks(self.spec, operands, x, bias, self.plan)


@dataclass(frozen=True)
class Chunked(_Planned):
    """A plan by chunks of rows; without gradients."""

    name: ClassVar[str] = "chunks of rows"
    keeps: ClassVar[None] = None

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return by_chunks(self.spec, contract.merge_factors(self.spec, factors, self.plan), x, bias, self.plan)


@dataclass(frozen=True)
class Autograd(_Planned):
    """A plan on all rows at once; autograd saves the activations. It runs everywhere: traced, transformed, compiled."""

    name: ClassVar[str] = "autograd"
    keeps: ClassVar[None] = None

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return at_once(self.spec, contract.merge_factors(self.spec, factors, self.plan), x, bias, self.plan)


@dataclass(frozen=True)
class Recomputed(_Planned):
    """A plan by chunks of rows that saves the input only; the backward pass recomputes the activations.

    It goes by chunks of tokens, or by blocks of rows of the dense matrix if that is predicted to be faster.
    """

    keeps: ClassVar[None] = None
    backward: Plan

    @property
    def name(self) -> str:  # type: ignore[override]
        """Which of the two."""
        return "recomputed by rows" if self.backward.materialises else "recomputed by tokens"

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return recomputed(self.spec, factors, x, bias, self.plan, self.backward)


@dataclass(frozen=True)
class Direct:
    """A product that knows the pattern of its one factor, FFT or blocks: see `contract.direct`."""

    name: ClassVar[str] = "by its pattern"
    keeps: ClassVar[None] = None
    spec: Spec
    seconds: float

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return with_bias(contract.by_pattern(self.spec, factors[0], x), bias)


Way = Kernel | Launches | KeptDense | KeptOperands | Chunked | Autograd | Recomputed | Direct


def ways(spec: Spec, key: Key, orders: Sequence[Order] = ("auto",)) -> list[Way]:
    """List the ways that a layer may run, one per order of its plan, with the predicted seconds of a forward pass.

    In training it is a third of a step's. What is fast for all rows at once may be slow by chunks, and what is fast
    forward may be slow backward: so the dense matrix is one more where it gains a tenth; predictions are no finer.
    """
    machine, itemsize = machine_of(key.device), key.dtype.itemsize
    rows = min(key.rows, MOST_ROWS)
    scale = key.rows / rows
    writing = WRITING * spec.written  # of tied factors, in each call
    around = GRAPH_SECONDS / 3 if key.mode == TRAINING else PLAN_SECONDS
    found: list[Way] = []
    extra: tuple[Order, ...] = () if key.mode == FROZEN or "materialise" in orders else ("materialise",)
    for order in (*orders, *extra):
        folded = key.mode == FROZEN
        plan = planner.find_plan(spec, rows, itemsize=itemsize, machine=machine, order=order, folded=folded)
        seconds = _seconds(spec, plan, key) * (PLAN_SLOWER if itemsize >= 4 else 1.0)
        seconds += around * sum(len(part.counted) for part in plan.parts)
        gains = order not in extra or scale * seconds < DENSE_GAIN * min(way.seconds for way in found)
        if gains and not (folded and plan.materialises):  # that is the dense matrix, kept
            found.append(_planned(spec, plan, scale * seconds + (0.0 if folded else writing), key))
    if key.mode == FROZEN:
        sizes = spec.in_features, spec.out_features
        dense = planner.dense_seconds(*sizes, rows, itemsize=itemsize, machine=machine) + DENSE_SECONDS
        found.append(KeptDense(spec, scale * dense))
    flops = contract.flops_by_pattern(spec)
    if flops is not None:
        of_row, once = flops
        found.append(Direct(spec, scale * ((rows * of_row + once) / PATTERN_FLOPS + PATTERN_SECONDS)))
    if key.native:
        chain = chain_of(spec)
        training = key.mode == TRAINING
        predict = chain.step_seconds if training else chain.seconds
        seconds = predict(rows, itemsize=itemsize, machine=machine) / (3 if training else 1)
        found.append(Kernel(chain, scale * seconds + writing))
    if launches.chosen(key.device, key.dtype) and not spec.tied and launches.countable(spec, key.rows):
        found.append(Launches(spec, scale * launches.seconds(spec, rows, itemsize, machine)))
    return found


def _planned(spec: Spec, plan: Plan, seconds: float, key: Key) -> Way:
    """Wrap a plan in the way that the mode, and in training the memory, asks for."""
    if key.mode == FROZEN:
        return KeptOperands(spec, plan, seconds)
    if key.mode == EVAL:
        return Chunked(spec, plan, seconds)
    if _saves_much(spec, plan, key):
        return Recomputed(spec, plan, seconds, backward_plan(spec, plan))
    return Autograd(spec, plan, seconds)


def _seconds(spec: Spec, plan: Plan, key: Key) -> float:
    """Predict the time of the plan's products in s; in training a third of a step's."""
    if key.mode == TRAINING and not _saves_much(spec, plan, key):
        return plan.training / 3
    if key.mode != TRAINING:
        return plan.seconds * _slower(spec, plan, plan.chunk)
    # The backward pass computes again what autograd would have saved, in chunks that hold little.
    return (plan.training + plan.seconds) / 3 * _slower(spec, plan, backward_rows(spec, plan, plan.parts[0].tokens))


def _slower(spec: Spec, plan: Plan, chunk: int) -> float:
    """Predict the time of a plan that goes by chunks of rows / its time for all at once: few rows run slowly."""
    part = plan.parts[0]
    if plan.materialises or chunk >= part.tokens:
        return 1.0
    found = planner.find_plan(spec, chunk, itemsize=part.itemsize, machine=part.machine, folded=part.folded)
    return max(1.0, part.tokens / chunk * found.seconds / plan.seconds)


def _saves_much(spec: Spec, plan: Plan, key: Key) -> bool:
    """Return whether autograd would hold more for the backward pass than a step may take."""
    dense = spec.in_features * spec.out_features
    most = plan.held(key.rows) + 4 * dense * plan.materialises  # that is differentiated through copies
    room = allowance(spec, key.rows) + spec.num_parameters + key.rows * spec.in_features  # gradients are counted
    return most * key.dtype.itemsize >= SMALL and most > room


def predicted(found: Sequence[Way]) -> Way:
    """Return the way that is predicted to be the fastest."""
    return min(found, key=lambda way: way.seconds / (DENSE_GAIN if isinstance(way, KeptDense) else 1.0))


@torch.no_grad()
def derived(way: Way, factors: Sequence[Tensor]) -> Any:
    """Build what a way keeps of the factors; None if it keeps nothing."""
    return way.derive(factors) if isinstance(way, KeptDense | KeptOperands) else None


def fastest(found: Sequence[Way], x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Way:
    """Time the ways in turn on this input, gradients included where asked for; return that of the least median.

    Those predicted to be HOPELESS are left out: a chain from its wrong end may take minutes, or all memory.
    """
    leaves = [t for t in (x, bias, *factors) if t is not None and t.requires_grad]

    def call(way: Way, operands: Any) -> None:
        y = way(x, operands, bias)
        if y.requires_grad:
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    most = HOPELESS * min(way.seconds for way in found)
    candidates = [way for way in dict.fromkeys(found) if way.seconds <= most]
    operands = [factors if (kept := derived(way, factors)) is None else kept for way in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(_ROUNDS):
        for way, given, samples in zip(candidates, operands, times, strict=True):
            samples.append(_sample(partial(call, way, given)))
    return min(zip(candidates, times, strict=True), key=lambda pair: statistics.median(pair[1]))[0]


def _sample(call: Callable[[], None]) -> float:
    """Return the seconds per call, over some calls in a row."""
    call()
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SAMPLE or not calls:
        call()
        calls += 1
    return passed / calls
