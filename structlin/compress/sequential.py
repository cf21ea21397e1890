"""Sequential compensation: each layer is fitted to the inputs that the compressed layers before it produce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from structlin.compress.calibrate import collect_shifted
from structlin.compress.evidence import Evidence
from structlin.compress.statistics import SHRINKAGE, Statistics
from structlin.compress.targets import Target
from structlin.fitting.objective import GramRoot


def groups(targets: Sequence[Target], statistics: Statistics) -> list[list[Target]]:
    """Bring layers that see the same inputs together, in the order of the model."""
    found: dict[int, list[Target]] = {}
    for target in targets:
        found.setdefault(id(statistics.grams[target.name]), []).append(target)
    return list(found.values())


def shifted(
    model: nn.Module, group: Sequence[Target], swaps: Mapping[nn.Module, nn.Module], evidence: Evidence
) -> dict[str, tuple[Tensor, GramRoot | None]]:
    """Find the weights and input Grams that stand for the layers of a group behind compressed layers.

    With original inputs x and those x' of the compressed model, sum ||W x - V x'||^2 + s ||W - V||^2 is
    tr((T - V) G (T - V)^H) and a constant, with G = sum x' x'^H + s I and T = W (sum x x'^H + s I) G^-1: T takes the
    place of W. The shrinkage s is that of `Statistics.root`.

    Args:
        model: the dense model.
        group: layers with the same inputs.
        swaps: the compressed layers so far.
        evidence: with batches.
    Returns:
        T and the root of G by name; T in float32 or wider.
    """
    statistics = collect_shifted(
        model, evidence.batches, swaps, [target.name for target in group], forward=evidence.forward
    )
    found: dict[str, tuple[Tensor, GramRoot | None]] = {}
    for target in group:
        weight = target.linear.weight.detach()
        gram = statistics.grams[target.name].to(torch.promote_types(statistics.grams[target.name].dtype, torch.float64))
        shrinkage = SHRINKAGE * gram.diagonal().real.mean() * torch.eye(len(gram)).to(gram)
        if not statistics.tokens[target.name] or shrinkage[0, 0].real <= 0:
            found[target.name] = weight, None
            continue
        cross = statistics.crosses[target.name].to(gram.dtype) + shrinkage
        # T G = W C, and G is Hermitian and positive definite.
        wanted = torch.linalg.solve(gram + shrinkage, cross.mH @ weight.to(gram.dtype).mH).mH
        wide = torch.promote_types(weight.dtype, torch.float32)
        found[target.name] = wanted.to(wide), statistics.root(target.name)
    return found
