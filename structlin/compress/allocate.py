"""Divide a global budget among layers: ranks go where a parameter lowers the error of the model's outputs most."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structlin.compress.data import Data
from structlin.compress.targets import Target
from structlin.fitting.fit import fit
from structlin.fitting.objective import make_objective
from structlin.layers.linear import from_fit
from structlin.structures import LowRank

# How far the model's outputs move when modules answer in place of others (old -> new).
Distance = Callable[[Mapping[nn.Module, nn.Module]], float]

# A layer's ratio stays between these multiples of the given one, and below 1: the model of the errors is local.
LEAST, MOST, CEILING = 0.4, 1.8, 0.95
# The squared output error of the sums in "auto" falls like that of low rank to this power
# (benchmarks/results/structures_tried.md); with low rank itself the exponent hardly changes the allocation.
EXPONENT = 1.5


@dataclass(frozen=True)
class Share:
    """One layer's part of the budget: the ratio that it gets when all get the same."""

    target: Target
    ratio: float


def allocate(shares: Sequence[Share], data: Data, distance: Distance) -> dict[str, float]:
    """Find a ratio for each layer, with the same number of parameters in all as the given ratios keep.

    Each layer alone is replaced by its whitened low-rank approximation: how much the model's outputs change per unit of
    relative error is the layer's sensitivity s. Where the statistics hold output Grams (of a loss gradient), those
    take its place. Then rank after rank goes to the layer where a parameter lowers sum_layers s (1 - energy kept)^1.5
    most. Both allocations are tried from end to end on held-back batches with low rank everywhere; the given ratios
    win unless the new ones are better. A layer without any effect on the outputs keeps its given ratio: its module may
    never be called, its weight read by other code.

    Time: a forward pass over the held-back batches for each layer, and an eigenproblem of its smaller side.

    Args:
        shares: the layers and their ratios.
        data: with the Grams.
        distance: see `Distance`; the model keeps its modules.
    Returns:
        The ratios by name.
    """
    given = {share.target.name: share.ratio for share in shares}
    if len(given) < 2:
        return given
    curves = {share.target.name: _curve(share.target, data) for share in shares}
    uniform = {share.target.name: _answers(share.target, share.ratio, data) for share in shares}
    weights: dict[str, float] = {}
    for share in shares:
        name = share.target.name
        if data.statistics is not None and name in data.statistics.output_grams:
            weights[name] = _loss_energy(share.target, data)
        else:
            lost = curves[name][min(_rank(share.target, share.ratio), len(curves[name]) - 1)].item()
            weights[name] = distance(uniform[name]) / max(lost, 1e-12)
    felt = [share for share in shares if weights[share.target.name] > 0]
    if len(felt) < 2:
        return given
    found = given | _filled(felt, curves, weights)
    other = [_answers(share.target, found[share.target.name], data) for share in felt]
    before, after = (
        distance({old: new for answers in each for old, new in answers.items()}) for each in (uniform.values(), other)
    )
    return found if after < before else given


def _answers(target: Target, ratio: float, data: Data) -> dict[nn.Module, nn.Module]:
    """Return the whitened low-rank approximation of a layer for each module that uses its weight."""
    gram, output_gram = data.grams(target.name)
    weight = target.linear.weight
    found = fit(weight, LowRank(_rank(target, ratio)), gram=gram, output_gram=output_gram, refine=0)
    proxy = from_fit(found, target.linear)
    return dict.fromkeys(target.leaves, proxy)


def _rank(target: Target, ratio: float) -> int:
    linear = target.linear
    most = min(linear.in_features, linear.out_features)
    return max(1, min(most, int(ratio * linear.weight.numel() / (linear.in_features + linear.out_features))))


def _curve(target: Target, data: Data) -> Tensor:
    """Return the share of the output energy that a low-rank approximation of rank 0, 1, 2, .. loses."""
    objective, _ = make_objective(target.linear.weight, *data.grams(target.name))
    rows = objective.targets
    smaller = rows.mH @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.mH
    energy = torch.linalg.eigvalsh(smaller).clamp_min(0)  # ascending
    tails = torch.cat([energy.cumsum(0).flip(0), energy.new_zeros(1)])
    return (tails / tails[0].clamp_min(1e-300)).cpu()


def _loss_energy(target: Target, data: Data) -> float:
    """Return tr(H W G W^H), the energy of the outputs in the metric of the loss, per token."""
    statistics = data.statistics
    assert statistics is not None
    gram, metric = statistics.grams[target.name], statistics.output_grams[target.name]
    weight = target.linear.weight.detach().to(gram.dtype)
    outputs = weight @ gram @ weight.mH
    total = (torch.diagonal(outputs) * metric).sum() if metric.ndim == 1 else (outputs * metric.mT).sum()
    return total.real.item() / max(statistics.tokens[target.name], 1)


def _filled(shares: Sequence[Share], curves: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Hand out ranks greedily until the budget is spent, which is optimal for convex curves."""
    sizes = {share.target.name: share.target.linear.weight.numel() for share in shares}
    steps = {s.target.name: s.target.linear.in_features + s.target.linear.out_features for s in shares}
    budget = sum(share.ratio * sizes[share.target.name] for share in shares)
    ranks = {share.target.name: _rank(share.target, LEAST * share.ratio) for share in shares}
    most = {s.target.name: min(CEILING, MOST * s.ratio) * sizes[s.target.name] / steps[s.target.name] for s in shares}
    costs = {name: weights[name] * (curves[name] ** EXPONENT) for name in ranks}

    def gain(name: str) -> float:
        rank = ranks[name]
        last = len(costs[name]) - 1
        return (costs[name][min(rank, last)] - costs[name][min(rank + 1, last)]).item() / steps[name]

    spent = sum(ranks[name] * steps[name] for name in ranks)
    queue = [(-gain(name), name) for name in ranks]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if ranks[name] + 1 <= most[name] and spent + steps[name] <= budget:
            ranks[name] += 1
            spent += steps[name]
            heapq.heappush(queue, (-gain(name), name))
    spare = (budget - spent) / len(ranks)
    return {n: min(CEILING, (ranks[n] * steps[n] + spare) / sizes[n]) for n in ranks}
