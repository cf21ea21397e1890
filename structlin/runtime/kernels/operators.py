"""Register for the kernel's operators what C++ leaves out: fake implementations (shapes) and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from structlin.equation.spec import Spec
from structlin.runtime import contract, planner
from structlin.runtime.machines import machine_of

# Program tensor -> spec. An operator takes tensors but no Spec, so the double backward looks the spec up by the
# identity of the program tensor. Compiled code may pass a copy of it: hence the error below.
SPECS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register() -> torch.library.Library:
    """Register with torch once the kernel is loaded; the registrations last as long as the returned object."""
    library = torch.library.Library("structlin", "FRAGMENT")
    library.impl("chain_differentiable_backward", _differentiable_backward, "CompositeImplicitAutograd")
    torch.library.register_fake("structlin::chain", _chain, lib=library)
    torch.library.register_fake("structlin::chain_backward", _chain_backward, lib=library)
    torch.library.register_fake("structlin::quantized_chain", _quantized_chain, lib=library)
    return library


def _chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _quantized_chain(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], bias: Tensor | None, program: Tensor, forms: Tensor,
    out_features: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _chain_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], program: Tensor, input_gradient: bool, wanted: Sequence[int]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (*[x] * input_gradient, *(factors[k] for k in wanted))]


def _differentiable_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], program: Tensor, input_gradient: bool, wanted: Sequence[int]
) -> list[Tensor]:
    """Compute the gradients of `chain_backward` by `contract`, with a graph."""
    spec: Spec | None = SPECS.get(program)
    if spec is None:
        raise RuntimeError(
            "the native kernel has no second derivatives in compiled code; set STRUCTLIN_KERNELS=off, or leave the "
            "code that create_graph=True differentiates uncompiled"
        )
    rows, slopes = x.reshape(-1, spec.in_features), dy.reshape(-1, spec.out_features)
    machine = machine_of(x.device)
    plan = planner.find_plan(spec, planner.bucket(len(rows)), machine=machine, itemsize=x.element_size())
    found = contract.gradients(spec, rows, factors, slopes, input_gradient, wanted, plan)
    return [found[0].reshape(x.shape), *found[1:]] if input_gradient else list(found)
