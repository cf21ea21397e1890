"""Sequential compensation: the weight that a layer should have behind compressed layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from structlin.compress.calibrate import Collecting, collect_behind
from structlin.compress.config import Mask
from structlin.compress.data import Data
from structlin.compress.targets import Target
from structlin.fitting.objective import GramRoot


def shifted(
    model: nn.Module,
    group: Sequence[Target],
    swaps: Mapping[nn.Module, nn.Module],
    data: Data,
    mask: Mask = "auto",
    opened: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> dict[str, tuple[Tensor, GramRoot | None]]:
    """Find the weights and input Grams that stand for the layers of a group behind compressed layers.

    With original inputs x and those x' of the compressed model, sum ||W x - V x'||^2 + s ||W - V||^2 is
    tr((T - V) G (T - V)^H) and a constant, with G = sum x' x'^H + s I and T = W (sum x x'^H + s I) G^-1: T takes the
    place of W. The shrinkage s is that of `Statistics.root`.

    Args:
        model: the dense model.
        group: layers with the same inputs.
        swaps: the compressed layers so far, by the leaves that they replace.
        data: with batches.
        mask: which tokens count.
        opened: the modules that hold leaves, see `openings`.
    Returns:
        T and the square root of G by name; T in float32 or wider.
    """
    statistics = collect_behind(model, group, data.batches, swaps, data.forward, Collecting(mask=mask), opened)
    found: dict[str, tuple[Tensor, GramRoot | None]] = {}
    for target in group:
        weight = target.linear.weight.detach()
        gram = statistics.grams[target.name].to(torch.promote_types(statistics.grams[target.name].dtype, torch.float64))
        shrinkage = data.shrinkage * gram.diagonal().real.mean() * torch.eye(len(gram)).to(gram)
        if not statistics.tokens[target.name] or shrinkage[0, 0].real <= 0:
            found[target.name] = weight, None
            continue
        cross = statistics.cross_grams[target.name].to(gram.dtype) + shrinkage
        # T G = W C, and G is Hermitian and positive definite.
        wanted = torch.linalg.solve(gram + shrinkage, cross.mH @ weight.to(gram.dtype).mH).mH
        wide = torch.promote_types(weight.dtype, torch.float32)
        found[target.name] = wanted.to(wide), statistics.root(target.name, data.shrinkage)
    return found
