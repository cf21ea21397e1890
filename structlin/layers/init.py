"""Initial factors for training from scratch, derived from the equation."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from structlin.equation.spec import Absorption, Equation, Factor, Modes, Spec
from structlin.runtime.contract import to_dense

# Weights of up to this many entries are scaled by their measured norm; in larger ones random deviations average out.
EXACT = 1 << 16
# If the summands of a tiny weight cancel by this factor, draw again instead of scaling both up.
CANCELLED, DRAWS = 3.0, 32


def initial_factors(spec: Spec, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Draw factors whose dense matrix has the standard deviation of `nn.Linear`'s, 1 / sqrt(3 in_features).

    Products of many Gaussian factors have heavy tails, so every factor is made of orthogonal blocks. A factor that maps
    part of the state (a butterfly stage) is orthogonal for each index of its other modes. In a network without such
    factors (TT, Kronecker, low rank), all but the last are orthonormal towards their new bonds, so the product has the
    norm of its last factor. All factors then get the same root mean square entry.

    Args:
        spec: the structured matrix.
        dtype: float32, float64 or a complex dtype.
    Returns:
        One tensor per factor; constants have their fixed entries.
    """
    std = 1 / math.sqrt(3 * spec.in_features * len(spec.equations))
    exact = spec.in_features * spec.out_features <= EXACT
    correction = 0.0
    for _ in range(DRAWS if exact and len(spec.equations) > 1 else 1):
        factors = [factor for eq in spec.equations for factor in _equation_factors(eq, std, dtype)]
        if exact:
            norm = torch.linalg.vector_norm(to_dense(spec, factors)).item()
            correction = math.sqrt(spec.out_features / 3) / norm if norm > 0 else math.inf
        if correction < CANCELLED:
            break
    if exact and correction < math.inf:
        # Scale each equation once, evenly over its learned factors.
        for eq, numbers in spec.split(range(len(factors))):
            learned = [k for k, factor in zip(numbers, eq.factors, strict=True) if factor.learned]
            for k in learned:
                factors[k] = factors[k] * correction ** (1 / len(learned))
    return factors


def factor_rms(eq: Equation, std: float) -> float:
    """Return the root mean square entry, the same for all learned factors, that gives the matrix this deviation."""
    bonds = set(eq.size) - {*eq.outputs, *eq.inputs}
    # E[W^2] = (number of summands) * product of the factors' mean squares.
    fixed = math.prod(statistics.fmean(x * x for x in factor.constant) for factor in eq.factors if factor.constant)
    fixed *= math.prod(f.tie.density(*eq.shape(f.modes[:2])) for f in eq.factors if f.tie is not None)
    learned = sum(factor.learned for factor in eq.factors)
    summands = math.log(eq.numel(sorted(bonds)))  # of a long chain more than a float can count
    return math.exp((2 * math.log(std) - summands - math.log(fixed)) / (2 * learned))


def _equation_factors(eq: Equation, std: float, dtype: torch.dtype) -> list[Tensor]:
    drawn = [
        _drawn(eq, factor, absorbed, dtype)
        for factor, absorbed in zip(eq.factors, eq.absorb(range(len(eq.factors))), strict=True)
    ]
    target = factor_rms(eq, std)
    return [
        tensor * (target * math.sqrt(tensor.numel()) / float(torch.linalg.vector_norm(tensor)))
        if factor.learned
        else tensor
        for tensor, factor in zip(drawn, eq.factors, strict=True)
    ]


def _drawn(eq: Equation, factor: Factor, absorbed: Absorption, dtype: torch.dtype) -> Tensor:
    if factor.constant:
        return torch.tensor(factor.constant, dtype=dtype).reshape(eq.shape(factor.modes))
    if factor.tie is not None:
        return torch.randn(eq.stored(factor), dtype=dtype)
    return _blocks(eq, factor, absorbed, dtype)


def _blocks(eq: Equation, factor: Factor, absorbed: Absorption, dtype: torch.dtype) -> Tensor:
    batch = absorbed.batch
    if batch:
        rows, columns = absorbed.new, absorbed.summed
    else:
        columns = tuple(mode for mode in absorbed.new if mode not in eq.outputs)
        rows = tuple(mode for mode in factor.modes if mode not in columns)
    blocks = _orthogonal(eq.numel(batch), eq.numel(rows), eq.numel(columns), dtype)
    order: Modes = (*batch, *rows, *columns)
    return blocks.reshape(eq.shape(order)).permute([order.index(mode) for mode in factor.modes])


def _orthogonal(count: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Draw Haar-distributed matrices (count, rows, columns) with orthonormal columns, or rows if those are fewer."""
    tall = torch.randn(count, max(rows, columns), min(rows, columns), dtype=dtype)
    q, r = torch.linalg.qr(tall)
    signs = torch.sgn(torch.diagonal(r, dim1=-2, dim2=-1))  # without them qr is not Haar-distributed (Mezzadri 2007)
    q = q * torch.where(signs == 0, torch.ones_like(signs), signs).unsqueeze(-2)
    return q if rows >= columns else q.mT
