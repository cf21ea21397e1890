"""How a layer runs: the predicted (or measured) fastest way for each number of rows, chosen once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from structlin.equation.spec import Spec
from structlin.runtime import contract, kernels, planner
from structlin.runtime.eager import TENSORS, constant, plain, suits, unobserved
from structlin.runtime.kernels import chain_of
from structlin.runtime.machines import machine_of
from structlin.runtime.planner import Order, Plan
from structlin.runtime.recompute import at_once
from structlin.runtime.ways import (
    EVAL,
    FROZEN,
    MODES,
    TRAINING,
    Autograd,
    Kernel,
    Key,
    Mode,
    Way,
    derived,
    fastest,
    predicted,
    ways,
)

COMPILED_ROWS = 256  # torch.compile gets one plan for all numbers of rows: a plan for each would recompile for each
MOST_CHOICES = 1024  # that a layer remembers

_MEASURED: dict[tuple[Spec, Key, int], Way] = {}  # the fastest ways, also by the number of threads


class Option(NamedTuple):
    """A way to run a layer, as `explain` shows it: mode, rows, way, predicted seconds, whether it is chosen."""

    mode: str
    rows: int
    way: str
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class Facts:
    """Facts about the parameters of the last call, valid as long as a layer has these very tensors.

    Values may change in place unseen, so nothing here depends on them, but for what a frozen layer keeps.
    """

    given: tuple[Any, ...]  # the factors, then the bias (or None)
    plain: bool  # no subclasses, and not on the meta device
    native: torch.dtype | None  # dtype in which the native kernel takes them, if it does
    frozen: bool  # these are the factors that were frozen
    # (rows, mode, native) -> the way, and what it keeps of the factors (None: nothing).
    choices: dict[tuple[int, Mode, bool], tuple[Way, Any]] = field(default_factory=dict)


class Execution:
    """Run a structured matrix by "auto" (the fastest way for the number of rows), another order, or a plan.

    With `autotune` the ways are timed on the first input of each number of rows, instead of predicted.
    """

    def __init__(self, spec: Spec, choice: Plan | Order = "auto", autotune: bool = False) -> None:
        self.spec, self.choice, self.autotune = spec, choice, autotune
        spec.tied  # noqa: B018  (kept from now on: torch.compile does not trace the lock of a cached property)
        self._chain = chain_of(spec)
        self._compiled: Plan  # for torch.compile, see `_prepare`
        self._natively: bool
        self.forget()

    def forget(self) -> None:
        """Clear everything derived from the parameters; the layer is not frozen any more."""
        self.freeze(None)

    def freeze(self, factors: tuple[Tensor, ...] | None, source: tuple[Tensor, ...] = ()) -> None:
        """Keep what is derived from these factors from now on; None: keep nothing.

        Source: what the factors were computed from, if they are not parameters.
        """
        self.frozen, self.source = factors, source
        self._facts: Facts | None = None
        self._known: kernels.Known | None = None
        self._dense: Tensor | None = None
        # Runs the layer without this class, given an input and the parameters; returns None if this class must decide.
        self.shortcut: Callable[[Tensor, dict[str, Any]], Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "choice": self.choice, "autotune": self.autotune}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def dense(self, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the dense matrix of factors; kept if they are frozen and no gradient is asked for."""
        frozen = self.frozen is not None and not is_compiling() and all(map(is_, factors, self.frozen))
        if not frozen or _learns(factors) or not unobserved():
            return contract.to_dense(self.spec, factors)
        if self._dense is None:
            with torch.inference_mode(False), torch.no_grad():
                self._dense = contract.to_dense(self.spec, factors)
        return self._dense

    # Running ---------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Compute x W^T + bias for x (..., in_features); given: the factors, then the bias or None. Never a view."""
        factors, bias = given[:-1], given[-1]
        if self.choice == "auto" and not is_compiling() and type(x) in TENSORS:
            facts = self._facts
            if facts is None or not all(map(is_, given, facts.given)):
                facts = self._look(given)
            if facts.plain and x.dtype is factors[0].dtype and unobserved():
                mode = TRAINING if _learns((x, *given)) else FROZEN if facts.frozen else EVAL
                native = x.dtype is facts.native and x.is_cpu and kernels.available()
                rows = x.numel() // self.spec.in_features
                way, kept = facts.choices.get((rows, mode, native)) or self._choose(facts, rows, mode, native, x)
                return way(x, factors if kept is None else kept, bias)
        tensors = (x, *factors) if bias is None else (x, *factors, bias)
        if is_compiling() and self._prepare(x.device, x.dtype) and self._natively and self._chain.traces(tensors):
            return self._chain.traced(x, factors, bias)
        plan = self._planned(x)
        return at_once(self.spec, contract.merge_factors(self.spec, factors, plan), x, bias, plan)

    def _look(self, given: tuple[Any, ...]) -> Facts:
        """Replace the facts about the old parameters by those about new ones."""
        tensors = given if given[-1] is not None else given[:-1]
        ours = plain(tensors) and not any(tensor.is_meta for tensor in tensors)
        native = given[0].dtype if ours and suits(tensors) else None
        # Identity, not values: functional_call and the like run a frozen layer with other tensors for a while.
        frozen = self.frozen is not None and all(map(is_, given, self.frozen))
        self._facts = facts = Facts(given, ours, native, frozen)
        self._known = self.shortcut = None
        return facts

    # Choosing --------------------------------------------------------------------------------------------------------

    def _choose(self, facts: Facts, rows: int, mode: Mode, native: bool, x: Tensor) -> tuple[Way, Any]:
        """Choose a way for a number of rows, and build what it keeps."""
        factors, bias = facts.given[:-1], facts.given[-1]
        key = Key(planner.bucket(rows), x.dtype, x.device, native, mode)
        way = self._measured(key, x, factors, bias) if self.autotune and rows else predicted(ways(self.spec, key))
        if len(facts.choices) >= MOST_CHOICES:
            facts.choices.clear()
        same = (kept for other, kept in facts.choices.values() if kept is not None and other.keeps == way.keeps)
        kept = derived(way, factors) if (found := next(same, None)) is None else found
        facts.choices[rows, mode, native] = way, kept
        # The shortcut does not ask whether x needs a gradient: while frozen it serves calls without any.
        if isinstance(way, Kernel) and not self.spec.tied and not (facts.frozen and mode == TRAINING):
            if self._known is None:
                self._known = way.chain.known(facts.given)
                self.shortcut = kernels.shortcut(self._known)
            (self._known.learned if _learns(factors) else self._known.constant).add(rows)
        return way, kept

    def _measured(self, key: Key, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Way:
        known = self.spec, key, torch.get_num_threads()
        if known not in _MEASURED:
            _MEASURED[known] = fastest(ways(self.spec, key, planner.ORDERS), x, factors, bias)
        return _MEASURED[known]

    def options(self, rows: int, factors: Sequence[Tensor]) -> list[Option]:
        """List the ways to run in each mode; the chosen one is measured where that has been done, else predicted."""
        factor = factors[0]
        native = plain(factors) and suits(factors) and kernels.available()
        found = []
        for mode in MODES:
            key = Key(planner.bucket(rows), factor.dtype, factor.device, native, mode)
            if self.choice == "auto":
                options = ways(self.spec, key)
                best = _MEASURED.get((self.spec, key, torch.get_num_threads())) if self.autotune else None
                best = best or predicted(options)
            else:
                plan = self._plan(rows, factor)
                options = [best := Autograd(self.spec, plan, plan.seconds)]
            options += [] if best in options else [best]
            found += [Option(mode, rows, str(way), way.seconds, way == best) for way in options]
        return found

    # Plans for tracers, transforms and tensors of other kinds ---------------------------------------------------------

    def _planned(self, x: Tensor) -> Plan:
        if is_compiling():
            return self._compiled
        # torch.jit.trace makes a tensor of numel(), but not of len().
        return self._plan(len(x.reshape(-1, self.spec.in_features)), x)

    def _plan(self, rows: int, like: Tensor) -> Plan:
        return self._plan_for(planner.bucket(rows), like.device, like.element_size())

    def _plan_for(self, rows: int, device: torch.device, itemsize: int) -> Plan:
        """Return the plan that was asked for, or make one."""
        if isinstance(self.choice, Plan):
            return self.choice
        machine = machine_of(device)
        return planner.find_plan(self.spec, rows, itemsize=itemsize, machine=machine, order=self.choice)

    @constant
    def _prepare(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Plan before tracing comes to it.

        The results are attributes, not return values: torch.compile guards attributes, so that a layer of the same
        shapes and another structure does not run by this one's graph.
        """
        self._compiled = self._plan_for(COMPILED_ROWS, device, dtype.itemsize)
        seconds = self._chain.seconds(COMPILED_ROWS, itemsize=dtype.itemsize, machine=machine_of(device))
        self._natively = self.choice == "auto" and kernels.available() and seconds < self._compiled.seconds
        return True


def _learns(tensors: Sequence[Any]) -> bool:
    """Return whether the gradient of any of these tensors is asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
