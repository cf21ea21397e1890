"""Run a structured layer whose factors are integers with scales, by the native kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from structlin.equation.spec import Equation, Spec
from structlin.equation.unfolding import application, unfoldings
from structlin.runtime import contract, planner
from structlin.runtime.eager import DTYPES, constant, plain, unobserved
from structlin.runtime.kernels import native
from structlin.runtime.kernels.layouts import links_of
from structlin.runtime.kernels.program import program_of
from structlin.runtime.machines import machine_of
from structlin.runtime.quantized import Format, dequantize, unfold

FLOATS = 32  # in place of bits: a factor that is not rounded

_NONE = torch.empty(0, device="cpu")  # the scales of a factor that is not rounded

Forms = tuple[Format | None, ...]


class QuantizedChain:
    """A structured matrix whose factors are codes, as the native kernel runs it.

    The factors are the matrices (rows, columns) of `unfoldings(spec)`, in the formats of `runtime.quantized`.

    Args:
        spec: the structured matrix.
        forms: the format of each factor; None for one that is not rounded.
    """

    def __init__(self, spec: Spec, forms: Forms) -> None:
        self.spec = spec
        self.forms = forms
        self.unfoldings = unfoldings(spec)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The program, and for each factor its bits, columns, and the columns and rows that share a scale (int32)."""
        spec = replace(self.spec, equations=self._equations())
        chains = [application(eq) for eq in spec.equations]
        table = [
            (FLOATS, unfolding.columns, unfolding.columns, 1)
            if form is None
            else (form.bits, unfolding.columns, form.columns, form.rows)
            for form, unfolding in zip(self.forms, self.unfoldings, strict=True)
        ]
        return _integers(program_of(spec, links_of(spec, chains))), _integers(table)

    def _equations(self) -> tuple[Equation, ...]:
        """Store each factor as its matrix: the modes of the rows first."""
        return tuple(
            replace(
                eq,
                factors=tuple(replace(f, modes=u.modes) for f, u in zip(eq.factors, part, strict=True)),
            )
            for eq, part in self.spec.split(self.unfoldings)
        )

    def suits(self, x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor | None], bias: Tensor | None) -> bool:
        """Return whether the kernel runs this: plain tensors on the CPU, no gradient asked for, the kernel built.

        x and bias are float32 or bfloat16, of one dtype.
        """
        tensors = [x, *codes, *(scale for scale in scales if scale is not None), *([] if bias is None else [bias])]
        return (
            x.dtype in DTYPES
            and (bias is None or bias.dtype is x.dtype)
            and plain(tensors)
            and all(tensor.is_cpu for tensor in tensors)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and self._prepare()
        )

    @constant
    def _prepare(self) -> bool:
        """Write the tables before they are traced, so that they become inputs of the graph."""
        reached = max(map(math.prod, self.spec.shapes)) <= torch.iinfo(torch.int32).max  # by the program's offsets
        return reached and native.available() and not _exporting() and unobserved() and len(self.tables) > 0

    def __call__(
        self, x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor | None], bias: Tensor | None
    ) -> Tensor:
        """Compute x W^T + bias for x (..., in_features) from the codes as they are; only if `suits` returned True.

        Args:
            x: float32 or bfloat16; all that is computed in between is float32.
            codes: of each factor, as `pack` writes them; a factor that is not rounded, in its own shape.
            scales: of each factor, (scales of the rows, scales of a row), None for one that is not rounded.
            bias: (out_features,) in the dtype of x, or None.
        """
        program, table = self.tables
        stored = [
            unfold(code, unfolding).float() if scale is None else code
            for code, scale, unfolding in zip(codes, scales, self.unfoldings, strict=True)
        ]
        steps = [_NONE if scale is None else scale for scale in scales]
        operator = torch.ops.structlin.quantized_chain
        result: Tensor = operator(x, stored, steps, bias, program, table, self.spec.out_features)
        return result

    def plainly(
        self, x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor | None], bias: Tensor | None
    ) -> Tensor:
        """Compute the same in plain torch, by factors decoded into floats; differentiable in x, scales and bias."""
        factors = [
            code if form is None or scale is None else dequantize(code, scale, form, unfolding)
            for code, scale, form, unfolding in zip(codes, scales, self.forms, self.unfoldings, strict=True)
        ]
        rows = x.reshape(-1, self.spec.in_features)
        machine = machine_of(x.device)
        plan = planner.find_plan(self.spec, planner.bucket(len(rows)), machine=machine, itemsize=x.element_size())
        y = contract.apply(self.spec, [factor.to(x.dtype) for factor in factors], rows, plan)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], self.spec.out_features)

    def __reduce__(self) -> tuple[Any, ...]:
        return quantized_chain_of, (self.spec, self.forms)  # copies share the tables


@lru_cache(maxsize=1024)
def quantized_chain_of(spec: Spec, forms: Forms) -> QuantizedChain:
    """Return the one chain of a spec and the formats of its factors."""
    return QuantizedChain(spec, forms)


def _integers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", bool)()  # torch 2.7 or later; exports must not need the kernel
    return bool(exporting)
