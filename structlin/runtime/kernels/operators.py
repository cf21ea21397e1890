"""What torch must know of the kernel's operators beyond what the kernel says: shapes, and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from structlin.equation.spec import Spec
from structlin.runtime import contract, planner
from structlin.runtime.machines import machine_of

# Program tensor -> spec. The operator's schema takes tensors, not a Spec, so that its double backward finds the spec by
# the identity of the program. In compiled code that tensor may be another one: hence the error below.
SPECS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register() -> torch.library.Library:
    """Tell torch, once the kernel is loaded; what is returned must be kept."""
    library = torch.library.Library("structlin", "FRAGMENT")
    library.impl("chain_differentiable_backward", _differentiable_backward, "CompositeImplicitAutograd")
    torch.library.register_fake("structlin::chain", _chain, lib=library)
    torch.library.register_fake("structlin::chain_backward", _chain_backward, lib=library)
    return library


def _chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _chain_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], program: Tensor, input_gradient: bool, wanted: Sequence[int]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (*[x] * input_gradient, *(factors[k] for k in wanted))]


def _differentiable_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], program: Tensor, input_gradient: bool, wanted: Sequence[int]
) -> list[Tensor]:
    """The same gradients as `chain_backward` through `contract`, with their graph."""
    spec: Spec | None = SPECS.get(program)
    if spec is None:
        raise RuntimeError(
            "the native kernel has no second derivatives inside of compiled code; compile without it "
            "(STRUCTLIN_KERNELS=off), or do not compile what create_graph=True goes through"
        )
    rows, slopes = x.reshape(-1, spec.in_features), dy.reshape(-1, spec.out_features)
    machine = machine_of(x.device)
    plan = planner.find_plan(spec, planner.bucket(len(rows)), machine=machine, itemsize=x.element_size())
    found = contract.gradients(spec, rows, factors, slopes, input_gradient, wanted, plan)
    return [found[0].reshape(x.shape), *found[1:]] if input_gradient else list(found)
