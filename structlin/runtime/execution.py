"""How a layer runs: the way that is predicted (or measured) to be fastest, and what it keeps between calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from structlin.equation.spec import Spec
from structlin.runtime import contract, kernels, planner
from structlin.runtime.costs import DENSE_GAIN, DENSE_SECONDS, PLAN_SECONDS, PLAN_SLOWER, SMALL
from structlin.runtime.eager import TENSORS, plain, suits, unobserved
from structlin.runtime.kernels.chain import Chain, chain_of
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Order, Plan
from structlin.runtime.recompute import by_chunks, recomputed, with_bias

_in_a_group: Callable[[], bool] = getattr(torch.distributed, "is_initialized", lambda: False)  # absent in some builds

# torch.compile gets one plan for all numbers of tokens: a plan per number would recompile for each.
COMPILED_TOKENS = 256
MOST_TOKENS = 1024  # to plan for: more of them go by the same plan

_ROUNDS = 5  # of samples, when ways are measured
_SAMPLE = 5e-4  # s, of one


@dataclass(frozen=True)
class Dense:
    """The dense matrix, built once and kept."""


DENSE = Dense()
Way = Plan | Chain | Dense


@dataclass(frozen=True)
class Key:
    """What decides how a layer runs.

    Args:
        tokens: rows of the input, a power of two.
        dtype: of input and factors.
        device: where they are.
        native: the native kernel can run.
        frozen: the factors are constant: what is made of them can be kept.
    """

    tokens: int
    dtype: torch.dtype
    device: torch.device
    native: bool
    frozen: bool


_MEASURED: dict[tuple[Spec, Key, int], Way] = {}  # also by the number of threads


class Execution:
    """Runs a structured matrix on inputs; nothing of its state is more than a cache.

    Args:
        spec: the structured matrix.
        choice: "auto" (by the number of rows), another order, or a plan.
        autotune: measure the best few ways on the first input of each number of rows, instead of predicting.
    """

    def __init__(self, spec: Spec, choice: Plan | Order = "auto", autotune: bool = False) -> None:
        self.spec = spec
        self.choice = choice
        self.autotune = autotune
        machine = machine_of(torch.device("cpu"))
        self._compiled = (
            choice
            if isinstance(choice, Plan)
            else planner.find_plan(spec, COMPILED_TOKENS, machine=machine, order=choice)
        )
        self._chain = chain_of(spec)
        self._compiled_natively = self._chain.seconds(COMPILED_TOKENS, machine=machine) < self._compiled.seconds
        # What is known of the parameters at the last call: they are plain tensors, their changes leave traces, and they
        # are of a dtype that the native kernel takes.
        self._plain = self._traceable = False
        self._native: torch.dtype | None = None
        self._known: kernels.Known | None = None
        # Runs the layer without this class, given an input and the parameters; returns None where it has to be asked.
        self.shortcut: Callable[[Tensor, dict[str, Any]], Tensor | None] | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what is kept of the factors, and what is known of them."""
        self._see(((),) * (1 + len(self.spec.factors)))  # no parameters
        self._versions: list[tuple[int, int]] = []
        self._aliases: list[Tensor] = []
        self._kept: dict[int, tuple[Plan | Dense, Any]] = {}  # by the identity of the way

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "choice": self.choice, "autotune": self.autotune}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # Running ---------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, given: tuple[Any, ...], training: bool) -> Tensor:
        """Compute x W^T + bias for x of shape (..., in_features); the result is never a view.

        Args:
            x: input.
            given: the factors, then the bias (or None).
            training: the mode of the layer: what is made of the factors is kept in eval only.
        """
        factors = given[:-1]
        bias = given[-1]
        if self.choice == "auto" and not is_compiling() and type(x) in TENSORS:
            if not all(map(is_, given, self._seen)):
                self._look(given)
            if self._plain and x.dtype is factors[0].dtype and unobserved():
                native = x.dtype is self._native and x.is_cpu and kernels.available()
                frozen = not training and self._constant(factors)
                tokens = x.numel() // self.spec.in_features
                way = self._ways.get((tokens, native, frozen))
                if way is None:
                    way = self._find(tokens, native, frozen, x, factors, bias)
                return self._run(way, frozen, x, factors, bias)
        if self._traces(x, factors, bias):
            return self._chain.traced(x, factors, bias)
        rows = x.reshape(-1, self.spec.in_features)
        y = contract.apply(self.spec, factors, rows, self._chosen(rows))
        return with_bias(y.reshape(*x.shape[:-1], self.spec.out_features), bias)

    def _run(self, way: Way, frozen: bool, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if isinstance(way, Chain):
            return way(x, factors, bias)
        if isinstance(way, Dense):
            return F.linear(x, self._keep(way, factors), bias)
        learns = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad) or any(f.requires_grad for f in factors)
        )
        if learns and self._large(way, x):
            return recomputed(self.spec, factors, x, bias, way)
        operands = self._keep(way, factors) if frozen else contract.fold(self.spec, factors, way)
        if not learns:
            return by_chunks(self.spec, operands, x, bias, way)
        y = contract.run(self.spec, operands, x.reshape(-1, self.spec.in_features), way)
        return with_bias(y.reshape(*x.shape[:-1], self.spec.out_features), bias)

    def _large(self, plan: Plan, x: Tensor) -> bool:
        """Whether what autograd would keep for the backward pass would take more memory than the dense layer does."""
        tokens = x.numel() // self.spec.in_features
        dense = self.spec.in_features * self.spec.out_features
        # Kept, and in flight: a gradient and its copy. A dense matrix is made and differentiated by way of copies.
        most = tokens * (plan.inner + 2 * plan.widest) + 4 * dense * plan.materialises
        return most * x.element_size() >= SMALL and most > dense + tokens * self.spec.in_features

    def _traces(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether torch.compile shall call the native kernel."""
        return (
            is_compiling()
            and self.choice == "auto"
            and self._compiled_natively
            and kernels.available()
            and self._chain.traces((x, *factors) if bias is None else (x, *factors, bias))
        )

    def _chosen(self, rows: Tensor) -> Plan:
        """What was asked for, or one plan for all: for tracers, transforms, and tensors of other kinds."""
        if isinstance(self.choice, Plan) or is_compiling():
            return self._compiled
        machine = machine_of(rows.device)
        return planner.find_plan(
            self.spec, planner.bucket(len(rows)), machine=machine, itemsize=rows.element_size(), order=self.choice
        )

    # Choosing --------------------------------------------------------------------------------------------------------

    def options(self, key: Key) -> list[tuple[float, Way]]:
        """The ways there are, with the predicted time of each in s."""
        machine, itemsize = machine_of(key.device), key.dtype.itemsize
        options: list[tuple[float, Way]] = []
        tokens = min(key.tokens, MOST_TOKENS)
        plan = planner.find_plan(self.spec, tokens, itemsize=itemsize, machine=machine, folded=key.frozen)
        if key.frozen:
            sizes = self.spec.in_features, self.spec.out_features
            dense = planner.dense_seconds(*sizes, tokens, itemsize=itemsize, machine=machine) + DENSE_SECONDS
            options.append((dense if plan.materialises else dense / DENSE_GAIN, DENSE))
        options.append((plan.seconds * (PLAN_SLOWER if itemsize >= 4 else 1.0) + PLAN_SECONDS, plan))
        if key.native:
            options.append((self._chain.seconds(tokens, itemsize=itemsize, machine=machine), self._chain))
        return [(seconds * key.tokens / tokens, way) for seconds, way in options]

    def _find(
        self, tokens: int, native: bool, frozen: bool, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None
    ) -> Way:  # fmt: skip
        key = Key(planner.bucket(tokens), x.dtype, x.device, native, frozen)
        options = self.options(key)
        if self.autotune and tokens:
            way = self._measured(key, [way for _, way in options], x, factors, bias)
        else:
            way = min(options, key=lambda option: option[0])[1]
        if len(self._ways) >= 1024:
            self._look(self._seen)
        self._ways[tokens, native, frozen] = way
        if isinstance(way, Chain):
            if self._known is None:
                self._known = way.known(self._seen)
                self.shortcut = kernels.shortcut(self._known)
            learns = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
            (self._known.learned if learns else self._known.constant).add(tokens)
        return way

    def _measured(
        self, key: Key, ways: list[Way], x: Tensor, factors: Sequence[Tensor], bias: Tensor | None
    ) -> Way:  # fmt: skip
        """The fastest, by the median of a few samples on this very input, with gradients where they are asked for."""
        known = self.spec, key, torch.get_num_threads()
        if known in _MEASURED:
            return _MEASURED[known]
        machine = machine_of(key.device)
        for order in planner.ORDERS:
            ways.append(
                planner.find_plan(self.spec, key.tokens, itemsize=key.dtype.itemsize, machine=machine, order=order,
                                  folded=key.frozen)
            )  # fmt: skip
        ways = list(dict.fromkeys(ways))
        leaves = [t for t in (x, bias, *factors) if t is not None and t.requires_grad]

        def call(way: Way) -> None:
            y = self._run(way, key.frozen, x, factors, bias)
            if y.requires_grad:
                torch.autograd.grad(y, leaves, torch.ones_like(y))
            if x.is_cuda:
                torch.cuda.synchronize(x.device)

        times: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(_ROUNDS):
            for way in ways:
                times[way].append(_sample(call, way))
        _MEASURED[known] = best = min(ways, key=lambda way: statistics.median(times[way]))
        self._kept = {k: kept for k, kept in self._kept.items() if k == id(best)}
        return best

    # What is known and kept of the factors ---------------------------------------------------------------------------

    def _see(self, given: tuple[Any, ...]) -> None:
        """Remember the parameters of a call, and nothing of the calls before."""
        self._seen = given
        self._ways: dict[tuple[int, bool, bool], Way] = {}
        self._known = self.shortcut = None

    def _look(self, given: tuple[Any, ...]) -> None:
        """Note what kind of parameters these are."""
        tensors = given if given[-1] is not None else given[:-1]
        self._see(given)
        self._plain = plain(tensors) and not any(tensor.is_meta for tensor in tensors)
        self._native = given[0].dtype if self._plain and suits(tensors) else None
        self._traceable = not any(tensor.is_inference() for tensor in tensors)

    def _constant(self, factors: Sequence[Tensor]) -> bool:
        """Whether the factors are constant for now: no gradients are asked for, and their changes can be seen.

        FSDP writes into parameters without a trace: with a process group nothing is kept.
        """
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
            return False
        return self._traceable and not _in_a_group()

    def _keep(self, way: Plan | Dense, factors: Sequence[Tensor]) -> Any:
        """What is made of the factors, made anew when they have changed since the last time."""
        versions = [(factor.data_ptr(), factor._version) for factor in factors]
        if versions != self._versions:
            # The aliases keep the storages alive: no other tensor can come to stand at their addresses.
            self._versions, self._aliases, self._kept = versions, [factor.detach() for factor in factors], {}
        found = self._kept.get(id(way))
        if found is None:
            found = self._kept[id(way)] = way, self._made(way, factors)
        return found[1]

    @torch.no_grad()
    def _made(self, way: Plan | Dense, factors: Sequence[Tensor]) -> Any:
        if isinstance(way, Dense):
            return contract.to_dense(self.spec, factors)
        for other, made in self._kept.values():  # for another number of rows, perhaps the very same
            if isinstance(other, Plan) and other.folds == way.folds:
                return made
        return contract.keep(contract.fold(self.spec, factors, way), way)


def _sample(call: Callable[[Way], None], way: Way) -> float:
    """Seconds per call, over some calls in a row."""
    call(way)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SAMPLE or not calls:
        call(way)
        calls += 1
    return passed / max(1, calls)
