"""The equation of matrices whose entries share numbers in a pattern, and the projection on them: means of entries."""

from __future__ import annotations

import torch
from torch import Tensor

from structlin.equation.spec import Spec, equation
from structlin.equation.ties import Tie
from structlin.fitting import linalg
from structlin.runtime.contract import to_dense


def blocked(
    in_features: int, out_features: int, tie: Tie, *, grid: tuple[int, int], side: tuple[int, int], across: bool = False
) -> Spec:
    """Write the equation of a grid of blocks whose one factor has a tie.

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        tie: of the places within a block, or, with `across`, of the blocks of the grid.
        grid: blocks along the outputs and the inputs.
        side: of a block, likewise.
        across: see `tie`.
    """
    sizes = dict(zip(("o1", "i1", "o2", "i2"), (*grid, *side), strict=True))
    tied, others = (("o1", "i1"), ("o2", "i2")) if across else (("o2", "i2"), ("o1", "i1"))
    if all(sizes[mode] == 1 for mode in others):  # one block, or blocks of one entry
        sizes = {"o": sizes[tied[0]], "i": sizes[tied[1]]}
        text = "o i -> o i"
    else:
        text = f"{' '.join((*tied, *others))} -> o1 o2 i1 i2"
    return Spec(in_features, out_features, (equation(text, ("values",), sizes, ties={"values": tie}),))


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
