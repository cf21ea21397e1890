"""Training from scratch: learning rates for factors, derived from the equation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from torch import nn

from structlin.equation.geometry import applied
from structlin.equation.spec import Spec
from structlin.layers.factored import Factored
from structlin.layers.init import factor_rms


def param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, base_width: int | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for Adam or AdamW, with a learning rate for each factor that suits its shape.

    A step of Adam moves each entry by about `lr`, and so the spectral norm of a dense weight by up to
    lr sqrt(in out), that of a factor by lr_f sqrt(in_f out_f). Each factor f of N gets the rate at which the product
    moves by one N-th of what a dense weight does:

        lr_f = lr sqrt(in out) / (N sqrt(in_f out_f) prod_{g not f} |g|),    |g| = rms_g sqrt(max(in_g, out_g))

    in_f, out_f: what a factor sums over and what it makes when the factors are applied to an input one by one; |g|: the
    spectral norm of its orthogonal blocks at initialisation, of entries rms_g. That counts one step of one factor at a
    time. All together move the product by up to (1 + s)^N - 1 of its norm, s = lr_f sqrt(in_f out_f) / |f|, which is
    N s only for small s: where a product has two or more learned factors, s is at most 1, so that no step outgrows the
    factor it changes. Weight decay is scaled so that the product decays as a dense weight does; vectors that are no
    factors (biases, norms) do not. All is read from the shapes, so that groups made again for a loaded optimizer state
    are the same.

    Args:
        model: any module; its structured layers are found, all other parameters get `lr`.
        lr: the rate for dense weights.
        weight_decay: of AdamW.
        base_width: the width for which `lr` was tuned: matrices and factors of layers with d inputs then get
            base_width / d of it.
    Returns:
        Groups of `params`, `lr` and `weight_decay`, without parameters that do not require gradients.
    Raises:
        ValueError: if a rate or width is not positive.
    Source: Qiu et al. 2024, Compute better spent: replacing dense layers with structured matrices. For factors drawn
        as there, the formula is theirs, lr (in / in_f) / N; this one holds for any initialisation.
    Example:
        >>> from structlin import LowRankLinear
        >>> groups = param_groups(LowRankLinear(64, 64, rank=4), 1e-3)
        >>> sorted(round(group["lr"], 5) for group in groups)
        [0.001, 0.00132]
    """
    if lr <= 0 or (base_width is not None and base_width < 1):
        raise ValueError(f"lr={lr}, base_width={base_width}; both must be positive")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        rates = dict(_factor_rates(module.spec)) if isinstance(module, Factored) else {}
        inputs = module.in_features if isinstance(module, (Factored, nn.Linear)) else None
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            vector = name not in rates and (name == "bias" or parameter.ndim < 2)
            scale, factors, most = rates.get(name, (1.0, 1, math.inf))
            width = 1.0 if base_width is None or inputs is None or vector else base_width / inputs
            rate = scale * min(lr * width, most)
            decay = 0.0 if vector else weight_decay * lr * width / (rate * factors)
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def _factor_rates(spec: Spec) -> Iterator[tuple[str, tuple[float, int, float]]]:
    """Yield each learned factor's name: its rate / the dense rate, the number of factors, the largest dense rate."""
    count = sum(factor.learned for factor in spec.factors)
    std = 1 / math.sqrt(3 * spec.in_features * len(spec.equations))
    for eq in spec.equations:
        rms = factor_rms(eq, std)
        steps = applied(eq)
        sizes = [(eq.numel(step.summed), eq.numel(step.new)) for step in steps]
        factors = [eq.factors[step.factor] for step in steps]
        norms = [
            math.sqrt(max(size))
            * (rms if f.constant is None else math.sqrt(statistics.fmean(x * x for x in f.constant)))
            for f, size in zip(factors, sizes, strict=True)
        ]
        dense = math.sqrt(spec.in_features * spec.out_features)
        several = sum(factor.learned for factor in factors) > 1
        most = count * math.prod(norms) / dense if several else math.inf  # there each s is 1
        for factor, size, norm in zip(factors, sizes, norms, strict=True):
            if factor.learned:
                others = math.prod(norms) / norm
                if factor.tie is not None:  # of a matrix that is mostly zero the norm is as much smaller
                    others *= factor.tie.density(*eq.shape(factor.modes[:2]))
                yield factor.name, (dense / (count * math.sqrt(math.prod(size)) * others), count, most)
