"""The projection on matrices whose entries share numbers in a pattern: the mean of the entries that share one."""

from __future__ import annotations

import torch
from torch import Tensor

from structlin.equation.spec import Spec
from structlin.fitting import linalg
from structlin.runtime.contract import to_dense


def mean(spec: Spec, weight: Tensor) -> list[Tensor]:
    """Return the values of a spec of one tied factor that are the nearest to a weight, in the Frobenius norm.

    Each is the mean of the entries of the weight that read it, padding aside; 0 where none does.
    """
    weight = weight.to(linalg.working_dtype(weight))
    values = weight.new_zeros(spec.shapes[0], requires_grad=True)
    with torch.enable_grad():
        dense = to_dense(spec, [values])  # linear in the values: its gradients collect the entries of each
        (total,) = torch.autograd.grad(dense, values, weight, retain_graph=True)
        (count,) = torch.autograd.grad(dense, values, torch.ones_like(weight))
    return [total / count.real.clamp_min(1)]
