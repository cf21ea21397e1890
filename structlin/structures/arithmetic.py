"""Exact changes of structured layers: add a matrix of low rank, scale rows or columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from structlin.equation.spec import Equation, Modes
from structlin.equation.structure import Structure
from structlin.layers.linear import StructuredLinear, build
from structlin.structures.dense import Dense
from structlin.structures.lowrank import LowRank
from structlin.structures.sum import Sum


def add_low_rank(layer: StructuredLinear, left: Tensor, right: Tensor) -> StructuredLinear:
    """Return a layer with the weight W + left @ right, exact up to rounding; the bias is copied.

    A low-rank part takes the columns up, a dense part the product; any other structure becomes a sum with a low-rank
    part of its own.

    Args:
        layer: structured, not changed.
        left: (out_features, rank).
        right: (rank, in_features).
    """
    dtype = layer.factors[0].dtype
    left, right = left.detach().to(dtype), right.detach().to(dtype)
    parts, factors = _parts(layer)
    for k, part in enumerate(parts):
        if isinstance(part, Dense):
            factors[k] = [factors[k][0] + left @ right]
            break
        if isinstance(part, LowRank):
            factors[k] = _joined(factors[k], left, right)
            parts[k] = LowRank(rank=len(factors[k][1]))
            break
    else:
        factors.append(_joined([left[:, :0], right[:0]], left, right))
        parts.append(LowRank(rank=len(factors[-1][1])))
    return _with(layer, parts, factors)


def scaled(layer: StructuredLinear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> StructuredLinear:
    """Return a layer with the weight diag(rows) W diag(columns), exact up to rounding; the bias is scaled by the rows.

    Args:
        layer: structured, not changed.
        rows: (out_features,), None for ones.
        columns: (in_features,), None for ones.
    Raises:
        ValueError: if some summand has no factor that holds all modes of that side, as in a Kronecker product.
    """
    found: list[Tensor] = []
    for eq, factors in layer.spec.split(layer.factors):
        values = list(factors)
        for scale, modes in ((rows, eq.outputs), (columns, eq.inputs)):
            if scale is not None:
                k = _holder(eq, modes, layer.structure)
                values[k] = values[k] * _along(eq, k, modes, scale.detach().to(values[k]))
        found += values
    twin = _built(layer, layer.structure, found)
    if rows is not None and twin.bias is not None:
        with torch.no_grad():
            twin.bias.mul_(rows.to(twin.bias))
    return twin


def _parts(layer: StructuredLinear) -> tuple[list[Structure], list[list[Tensor]]]:
    """Take a layer apart into summands and the factors of each."""
    parts = list(layer.structure.parts) if isinstance(layer.structure, Sum) else [layer.structure]
    left = list(layer.factors)
    factors = []
    for part in parts:
        count = len(part.spec(layer.in_features, layer.out_features).factors)
        factors.append([factor.detach() for factor in left[:count]])
        left = left[count:]
    return parts, factors


def _joined(factors: Sequence[Tensor], left: Tensor, right: Tensor) -> list[Tensor]:
    """Add a product to a low-rank part; a sum of more columns than the smaller side is a plain matrix of that side."""
    left, right = torch.cat([factors[0], left], 1), torch.cat([factors[1], right])
    if len(right) <= min(len(left), right.shape[1]):
        return [left, right]
    dense = left @ right
    identity = torch.eye(min(dense.shape), dtype=dense.dtype, device=dense.device)
    return [identity, dense] if len(dense) <= dense.shape[1] else [dense, identity]


def _with(layer: StructuredLinear, parts: Sequence[Structure], factors: Sequence[Sequence[Tensor]]) -> StructuredLinear:
    structure = parts[0] if len(parts) == 1 else Sum(parts=tuple(parts))
    return _built(layer, structure, [factor for part in factors for factor in part])


def _built(layer: StructuredLinear, structure: Structure, factors: Sequence[Tensor]) -> StructuredLinear:
    twin = build(
        structure, layer.in_features, layer.out_features, layer.bias is not None,
        device="meta", dtype=layer.factors[0].dtype,
    )  # fmt: skip
    trained = any(factor.requires_grad for factor in layer.factors)
    twin.fill([factor.detach().clone() for factor in factors], layer.bias, trained)
    return twin.train(layer.training)


def _holder(eq: Equation, modes: Modes, structure: Structure) -> int:
    """Find the factor that holds all modes of one side."""
    for k, factor in enumerate(eq.factors):
        if factor.learned and factor.tie is None and set(modes) <= set(factor.modes):
            return k
    raise ValueError(
        f"{structure} has no factor with all modes {' '.join(modes)}, so that scaled rows or columns leave the "
        "structure; keep the scale apart, or call to_linear() first"
    )


def _along(eq: Equation, k: int, modes: Modes, scale: Tensor) -> Tensor:
    """Lay a vector over the axes of a factor, with ones where the modes are longer than the vector."""
    padded = torch.cat([scale, scale.new_ones(eq.numel(modes) - len(scale))])
    axes = " ".join(mode if mode in modes else "1" for mode in eq.factors[k].modes)
    return rearrange(padded, f"({' '.join(modes)}) -> {axes}", **{mode: eq.size[mode] for mode in modes})
