"""Run a structured layer by the native kernel: all stages and the bias in one operator, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from structlin import contract, planner
from structlin.kernels.constant import constant
from structlin.kernels.program import cost, program
from structlin.spec import Spec

TENSORS = (Tensor, torch.nn.Parameter)  # no subclasses
DTYPES = (torch.float32, torch.bfloat16)


class Program(NamedTuple):
    """What the kernel reads, the size of its output, the matrix it is for (unknown while traced), and the kernel."""

    table: Tensor
    out_features: int
    spec: Spec | None
    kernel: Callable[..., Tensor]  # torch.ops.structlin.chain.default, whose look-up takes longer than its arguments

    @classmethod
    def of(cls, table: Tensor, out_features: int, spec: Spec | None) -> Program:
        return cls(table, out_features, spec, torch.ops.structlin.chain.default)


class Chain:
    """The program of a structured matrix for the native kernel.

    Args:
        spec: the structured matrix.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @cached_property
    def program(self) -> Program:
        """The program, written when first needed."""
        table = torch.tensor(program(self.spec), dtype=torch.int32, device="cpu")
        return Program.of(table, self.spec.out_features, self.spec)

    def seconds(self, tokens: int, itemsize: int = 4) -> float:
        """Predict the time of a forward pass in s, for elements of so many bytes."""
        flops, turned = cost(self.spec)
        if tokens <= planner.NATIVE_ROWS:
            machine = planner.NATIVE_FEW
            read = itemsize * tokens * (self.spec.num_parameters + planner.TURNED * turned)
            return max(flops * tokens / machine.flops, read / machine.bandwidth) + machine.op
        moved = itemsize * tokens * (self.spec.in_features + self.spec.out_features)
        if itemsize < 4:  # the factors are converted first
            moved += itemsize * self.spec.num_parameters
        return flops * tokens / planner.NATIVE.flops + moved / planner.NATIVE.bandwidth + planner.NATIVE.op

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias for x of shape (..., in_features), all tensors such as `suits` says."""
        return run(self.program, x, factors, bias)

    def traces(self, tensors: Sequence[Tensor]) -> bool:
        """Whether code that torch.compile is tracing may call `traced` for these."""
        return self._prepare() and plain(tensors) and suits(tensors)

    def traced(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Compute the same in code that torch.compile is tracing, after `traces` has said yes."""
        written = self.program
        result: Tensor = torch.ops.structlin.traced_chain(x, factors, bias, written.table, written.out_features)
        return result

    @constant
    def _prepare(self) -> bool:
        """Write the program before tracing comes to it: it shall be an input of the graph, not computed there."""
        exporting = getattr(torch.compiler, "is_exporting", bool)()  # from torch 2.7 on; what is exported has no kernel
        return not exporting and unobserved() and len(self.program.table) > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return chain_of, (self.spec,)  # copies have the same program


@lru_cache(maxsize=1024)
def chain_of(spec: Spec) -> Chain:
    """Return the program of a spec, written once."""
    return Chain(spec)


def run(program: Program, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Call the kernel, noting what a backward pass will need where there will be one."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or any(f.requires_grad for f in factors)
    ):
        return _Function.apply(program, x, bias, *factors)
    return program.kernel(x, factors, bias, program.table, program.out_features)


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors or parameters, none of a subclass."""
    return all(type(tensor) in TENSORS for tensor in tensors)


def unobserved() -> bool:
    """Whether nothing watches or transforms what is done to tensors: no mode, transform, tracer or autocast."""
    return (
        not _is_any_autocast_enabled()
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
    )


def suits(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel can take these (plain) tensors, where it is available: all of one of DTYPES, on the CPU."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(tensor.dtype is dtype and tensor.is_cpu for tensor in tensors)


class _Function(torch.autograd.Function):
    """Saves the input and the factors only; the backward pass computes the activations of a tile of tokens anew."""

    @staticmethod
    def forward(ctx: Any, program: Program, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.program = program
        ctx.save_for_backward(x, *factors)
        return program.kernel(x, factors, bias, program.table, program.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        _, of_input, of_bias, *of_factors = ctx.needs_input_grad
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None
        wanted = [k for k, needed in enumerate(of_factors) if needed]
        if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
            found = _differentiable(ctx.program.spec, x, factors, gradient, of_input, wanted)
        else:
            found = torch.ops.structlin.chain_backward(gradient, x, factors, ctx.program.table, of_input, wanted)
        each = iter(found)
        of_x = next(each) if of_input else None
        return None, of_x, bias, *(next(each) if needed else None for needed in of_factors)


def _differentiable(
    spec: Spec | None, x: Tensor, factors: Sequence[Tensor], gradient: Tensor, of_input: bool, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """The same gradients through `contract`, with their graph."""
    if spec is None:
        raise RuntimeError(
            "the native kernel under torch.compile has no second derivatives; compile without it "
            "(STRUCTLIN_KERNELS=off), or do not compile what create_graph=True goes through"
        )
    rows, slopes = x.reshape(-1, spec.in_features), gradient.reshape(-1, spec.out_features)
    plan = planner.find_plan(spec, planner.bucket(len(rows)))
    found = contract.gradients(spec, rows, factors, slopes, of_input, wanted, plan)
    return (found[0].reshape(x.shape), *found[1:]) if of_input else found
