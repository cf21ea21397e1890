"""The kernel under torch.compile: what tracing must know of its operators, and an operator for its autograd function.

`structlin::traced_chain` is taken apart by tracing, so that what is compiled has the kernel's own operators, which are
called without any Python. They must not get their gradients by `torch.library.register_autograd`: each call of theirs
would go through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.kernels.chain import Program, run


def register() -> torch.library.Library:
    """Tell torch, once the kernel is loaded; what is returned must be kept."""
    library = torch.library.Library("structlin", "FRAGMENT")
    library.define("traced_chain(Tensor x, Tensor[] factors, Tensor? bias, Tensor program, int out_features) -> Tensor")
    library.impl("traced_chain", _traced_chain, "CompositeImplicitAutograd")
    torch.library.register_fake("structlin::chain", _chain, lib=library)
    torch.library.register_fake("structlin::chain_backward", _chain_backward, lib=library)
    return library


def _traced_chain(
    x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int
) -> Tensor:
    return run(Program.of(program, out_features, None), x, factors, bias)


def _chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _chain_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], program: Tensor, input_gradient: bool, wanted: Sequence[int]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (*[x] * input_gradient, *(factors[k] for k in wanted))]
