"""Run a structured layer by the native kernel: all stages and the bias in one operator, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.runtime import costs, planner
from structlin.runtime.contract import expanded
from structlin.runtime.eager import constant, plain, suits, unobserved
from structlin.runtime.kernels import native
from structlin.runtime.kernels.layouts import cost
from structlin.runtime.kernels.operators import SPECS
from structlin.runtime.kernels.program import program
from structlin.runtime.planner import Machine


class Chain:
    """A structured matrix as the native kernel runs it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @cached_property
    def program(self) -> Tensor:
        """The kernel's program (int32), written on first use."""
        table = torch.tensor(program(self.spec.untied), dtype=torch.int32, device="cpu")
        SPECS[table] = self.spec.untied
        return table

    def seconds(self, tokens: int, *, itemsize: int = 4, machine: Machine) -> float:
        """Predict the time of a forward pass in s; inf where the program's offsets do not reach into a factor."""
        if max(map(math.prod, self.spec.untied.shapes)) > torch.iinfo(torch.int32).max:
            return math.inf
        if tokens <= costs.NATIVE_ROWS:
            # Each token takes the longer of its arithmetic and one pass over the factors.
            rates = planner.NATIVE_FEW
            read = itemsize * self.spec.num_parameters / rates.bandwidth
            return machine.native_few * (tokens * max(cost(self.spec, few=True).seconds, read) + rates.op)
        moved = itemsize * tokens * (self.spec.in_features + self.spec.out_features)
        if itemsize < 4:  # the kernel converts the factors to float32 first
            moved += itemsize * self.spec.num_parameters
        flops = tokens * cost(self.spec, few=False).flops
        rates = planner.NATIVE
        return machine.native * (flops / rates.flops + moved / rates.bandwidth + rates.op)

    def step_seconds(self, tokens: int, *, itemsize: int = 4, machine: Machine) -> float:
        """Predict the time of a forward pass and a backward pass, which recomputes activations, in s."""
        rates = planner.NATIVE
        padded = -(-tokens // costs.BACKWARD_ROWS) * costs.BACKWARD_ROWS
        flops = costs.BACKWARD_FLOPS * padded * cost(self.spec, few=False).flops
        moved = costs.BACKWARD_MOVED * padded * (self.spec.in_features + self.spec.out_features)
        moved += costs.BACKWARD_FACTORS * self.spec.num_parameters
        backward = flops / rates.flops + 4 * moved / rates.bandwidth + costs.BACKWARD_SECONDS
        return self.seconds(tokens, itemsize=itemsize, machine=machine) + machine.native * backward

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias for x of shape (..., in_features); the tensors must pass `suits`."""
        return native.chain(x, tuple(expanded(self.spec, factors)), bias, self.program, self.spec.out_features)

    def known(self, parameters: tuple[Tensor | None, ...]) -> native.Known:
        """Return the record by which calls.cpp recognises a layer with these parameters; it allows no rows yet."""
        names = (*(factor.name for factor in self.spec.factors), "bias")
        sizes = self.spec.in_features, self.spec.out_features
        return native.Known(names, parameters, set(), set(), self.program, *sizes)

    def traces(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether code under torch.compile may call `traced` with these tensors."""
        return self._prepare() and plain(tensors) and suits(tensors)

    def traced(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias as a node of torch.compile's graph; only if `traces` returned True."""
        result: Tensor = torch.ops.structlin.chain(
            x, expanded(self.spec, factors), bias, self.program, self.spec.out_features
        )
        return result

    @constant
    def _prepare(self) -> bool:
        """Write the program before it is traced, so that it becomes an input of the graph, not a computation in it."""
        exporting = getattr(
            torch.compiler, "is_exporting", bool
        )()  # torch 2.7 or later; exports must not need the kernel
        return not exporting and unobserved() and len(self.program) > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return chain_of, (self.spec,)  # copies share the program


@lru_cache(maxsize=1024)
def chain_of(spec: Spec) -> Chain:
    """Return the one chain of a spec."""
    return Chain(spec)
