"""Fit a structure to a dense weight: closed form or projection, then refinement where asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structlin.budget import within
from structlin.contract import to_dense
from structlin.spec import Spec
from structlin.structure import Structure

LEARNING_RATE = 0.3  # of the refinement, relative to the root mean square entry of a factor


@dataclass(frozen=True)
class Fit:
    """The factors that approximate a weight.

    Args:
        structure: resolved.
        spec: its equation.
        factors: in the order of `spec`, in the dtype of the weight.
        error: relative Frobenius error ||W - What|| / ||W|| of the factors as they are stored.
    """

    structure: Structure
    spec: Spec
    factors: tuple[Tensor, ...]
    error: float


def fit(
    weight: Tensor, structure: Structure | type[Structure], *, ratio: float | None = None, refine: int | None = None
) -> Fit:  # fmt: skip
    """Approximate a dense weight.

    Decomposes in float64 where the structure has a closed form; with `refine`, Adam steps over all factors follow and
    the best iterate is kept, so that the result is never worse than the closed form. Deterministic.

    Args:
        weight: (out_features, in_features), any float or complex dtype, finite.
        structure: an instance (sizes given), or a class together with a ratio (sizes searched).
        ratio: parameters kept / dense parameters, in (0, 1].
        refine: number of refinement steps; None takes the structure's `refine_steps`.
    Returns:
        The Fit with the least error among the candidates.
    Raises:
        ValueError: if the weight is not a finite matrix, if the structure does not fit it, or if exactly one of
            instance and ratio is not given.
    """
    check_weight(weight)
    if isinstance(structure, Structure) == (ratio is not None):
        raise ValueError("give either hyperparameters or a ratio, not both and not neither")
    out_features, in_features = weight.shape
    if isinstance(structure, Structure):
        options: Sequence[Structure] = [structure]
    else:
        assert ratio is not None
        options = within(structure, in_features, out_features, ratio)
    values = weight.detach()
    resolved = [option.resolve(in_features, out_features, values) for option in options]
    fits = [_fit_one(values, member, member.refine_steps if refine is None else refine) for member in resolved]
    return min(fits, key=lambda fit: fit.error)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Compute ||weight - approximation|| / ||weight|| in the Frobenius norm; 0 for two zero matrices."""
    wide = torch.promote_types(weight.dtype, torch.float64)  # the squares of 1e30 overflow float32
    error = torch.linalg.vector_norm(weight - approximation, dtype=wide).item()
    norm = torch.linalg.vector_norm(weight, dtype=wide).item()
    return error / norm if norm > 0 else (0.0 if error == 0 else math.inf)


def check_weight(weight: Tensor) -> None:
    """Refuse what cannot be decomposed.

    Raises:
        ValueError: if the weight is not a matrix with finite values of a float or complex dtype.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; a dense matrix (out_features, in_features) is needed"
        )
    if not (weight.is_floating_point() or weight.is_complex()):
        raise ValueError(f"weight has dtype {weight.dtype}; a float or complex matrix is needed")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load the weights first")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values; repair it or leave the layer dense")


def _fit_one(weight: Tensor, structure: Structure, refine: int) -> Fit:
    out_features, in_features = weight.shape
    spec = structure.spec(in_features, out_features)
    exact = weight if weight.dtype in (torch.float64, torch.complex64, torch.complex128) else weight.float()
    # Scaled to a root mean square of 1, so that no Gram matrix over- or underflows.
    scale = torch.linalg.vector_norm(exact, dtype=torch.promote_types(exact.dtype, torch.float64)).item()
    scale = scale / math.sqrt(exact.numel()) or 1.0
    exact = exact / scale
    factors = [factor.to(exact.dtype) for factor in structure.decompose(exact)]
    shapes = tuple(tuple(factor.shape) for factor in factors)
    if shapes != spec.shapes:
        raise ValueError(f"{structure} decomposes into factors of shapes {shapes}; its equation says {spec.shapes}")
    if refine:
        factors = _refined(spec, factors, exact, refine)
    stored = _rescaled(spec, factors, scale, weight.dtype)
    return Fit(structure, spec, stored, _stored_error(weight, spec, stored))


def _rescaled(spec: Spec, factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Give the scale back to the learned factors, evenly, and cast."""
    result, start = [], 0
    for eq in spec.equations:
        share = scale ** (1 / sum(factor.learned for factor in eq.factors))
        for factor in eq.factors:
            value = factors[start] * share if factor.learned else factors[start]
            result.append(value.to(dtype).contiguous())
            start += 1
    return tuple(result)


def _stored_error(weight: Tensor, spec: Spec, factors: Sequence[Tensor]) -> float:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return relative_error(weight.to(wide), to_dense(spec, [factor.to(wide) for factor in factors]))


def _refined(spec: Spec, factors: list[Tensor], weight: Tensor, steps: int) -> list[Tensor]:
    """Adam with a cosine schedule on the squared Frobenius error; returns the best iterate, the start included."""
    learned = [factor.learned for factor in spec.factors]
    with torch.enable_grad():
        work = [f.detach().clone().requires_grad_(flag) for f, flag in zip(factors, learned, strict=True)]
        trained = [f for f in work if f.requires_grad]
        groups = [{"params": [f], "lr": LEARNING_RATE * max(_rms(f), 1e-8)} for f in trained]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, best_loss = factors, math.inf
        for step in range(steps + 1):
            difference = to_dense(spec, work) - weight
            loss = (difference * difference.conj()).real.sum()
            if loss.item() < best_loss:
                best, best_loss = [f.detach().clone() for f in work], loss.item()
            if step < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return best


def _rms(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach()).item() / math.sqrt(tensor.numel())
