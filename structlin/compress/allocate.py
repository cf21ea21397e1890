"""Divide a global budget among layers: several divisions are tried on held-back batches, and the best is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structlin.compress.data import Data
from structlin.compress.processes import shared, spread
from structlin.compress.targets import Target
from structlin.fitting.objective import Objective, make_objective

# How far the model's outputs move when modules answer in place of others (old -> new).
Distance = Callable[[Mapping[nn.Module, nn.Module]], float]

LEAST, CEILING = 0.1, 0.95  # ratios lie between these, or are 1: the layer stays dense
SLOPES = (-0.4, -0.2, 0.2, 0.4)  # of the ratio over depth: relative change from the middle to the end
# The same for the logarithm of what a layer's error counts: the metric of the loss knows only small errors. Only above
# WHOLE: below it, stand-ins take a tilt for better that leaves refined models worse (stories260k at .5 and .25).
TILTS = (-0.5, 0.5)
# Structures leave this times (1 - ratio) of the squared output error that low rank of the same size leaves: "auto" .08
# to .12 at .9, .16 to .23 at .75, .29 to .54 at .5 in five layers of MiniLM (benchmarks/results/gains_minilm.md) ...
GAIN = 0.85
# ... but where ratios are low enough for hidden units to go (`units.MOST`), models are the better for layers whose low
# rank falls quickly being given less: as if errors fell like that to a power (benchmarks/results/allocation.md) ...
WHOLE, EXPONENT = 0.7, 1.5
# ... and refinement leaves about this share of it: with all of it, models at .5 and below are so far off that what the
# outputs do in a trial says nothing about the refined model.
LEFT = 0.25


@dataclass(frozen=True)
class Share:
    """One layer's part of the budget.

    Args:
        target: the layer.
        ratio: that it gets when all get the same.
    """

    target: Target
    ratio: float

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.target.name

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return int(self.target.linear.weight.numel())


def allocate(shares: Sequence[Share], data: Data, distance: Distance) -> dict[str, float]:
    """Find a ratio for each layer, with the same number of parameters in all as the given ratios keep.

    Tried are the given ratios, slopes over depth, and (where the statistics hold output Grams) the division that has
    the least sum of the layers' errors in the metric of the loss, whole and half of the way, and at large ratios with
    the errors of late layers counting more or less. In each trial every layer answers by its best low-rank
    approximation of that size, whose error is scaled down to what its structure leaves after refinement.
    The first of the best trials wins, so that no division is taken that moves the outputs more than the given one.

    Time: a forward pass over the held-back batches for each of at most nine trials, and one eigenproblem for each
    layer's smaller side; ranks share the trials. Source: LEMS, for trials from end to end and for layers that stay
    dense.

    Args:
        shares: the layers and their ratios, in the order in which they run.
        data: with the Grams.
        distance: see `Distance`; the model keeps its modules.
    Returns:
        The ratios by name; 1 for a layer that stays dense.
    """
    # A module that is never called keeps its ratio: its weight is read by other code.
    known = data.statistics
    shares = [share for share in shares if known is None or known.tokens.get(share.name)]
    given = {share.name: share.ratio for share in shares}
    if len(given) < 2:
        return given
    curves = {share.name: _Curve.of(share, data) for share in shares}

    def moved(ratios: Mapping[str, float]) -> float:
        answers = [curves[share.name].answers(ratios[share.name]) for share in shares]
        return distance({old: new for each in answers for old, new in each.items()})

    divisions = shared(lambda: list(_divisions(shares, curves, data, given)))
    distances = spread(lambda mine: map(moved, mine), divisions, [1.0] * len(divisions))
    return divisions[min(range(len(divisions)), key=distances.__getitem__)]


def _divisions(
    shares: Sequence[Share], curves: Mapping[str, _Curve], data: Data, given: Mapping[str, float]
) -> Iterator[dict[str, float]]:
    # -1 at the start, 1 at the end
    depth = {share.name: 2 * k / (len(shares) - 1) - 1 for k, share in enumerate(shares)}
    yield dict(given)
    for slope in SLOPES:
        yield _scaled(shares, {name: ratio * (1 + slope * depth[name]) for name, ratio in given.items()})
    metrics = {} if data.statistics is None else data.statistics.output_grams
    weights = {share.name: _loss_energy(share.target, data) for share in shares if share.name in metrics}
    felt = [share for share in shares if weights.get(share.name, 0) > 0]
    if len(felt) > 1:
        found = dict(given) | _least_error(felt, curves, weights)
        yield _scaled(shares, found)
        yield _scaled(shares, {name: (min(ratio, CEILING) + given[name]) / 2 for name, ratio in found.items()})
        for tilt in TILTS if all(share.ratio > WHOLE for share in felt) else ():
            tilted = {name: weight * math.exp(tilt * depth[name]) for name, weight in weights.items()}
            yield _scaled(shares, dict(given) | _least_error(felt, curves, tilted))


# Divisions -----------------------------------------------------------------------------------------------------------


def _scaled(shares: Sequence[Share], ratios: Mapping[str, float]) -> dict[str, float]:
    """Multiply ratios by a common factor, within their limits, so that they spend the budget."""
    budget = sum(share.ratio * share.size for share in shares)

    def clipped(factor: float) -> dict[str, float]:
        return {n: 1.0 if r >= 1 else min(max(factor * r, LEAST), CEILING) for n, r in ratios.items()}

    return _bisected(clipped, shares, budget, 0.1, 10.0)


def _least_error(
    shares: Sequence[Share], curves: Mapping[str, _Curve], weights: Mapping[str, float]
) -> dict[str, float]:  # fmt: skip
    """Minimise the sum of weighted errors: at a price of a parameter, every layer takes what costs least in all."""
    steps = torch.cat([torch.arange(LEAST, CEILING + 1e-6, 0.025, dtype=torch.float64), torch.ones(1).double()])
    errors = {s.name: torch.tensor([weights[s.name] * curves[s.name].error(r) for r in steps.tolist()]) for s in shares}
    budget = sum(share.ratio * share.size for share in shares)

    def at(cheapness: float) -> dict[str, float]:
        price = 1 / cheapness
        return {s.name: steps[(errors[s.name] + price * s.size * steps).argmin()].item() for s in shares}

    scale = sum(s.size for s in shares) / max(sum(weights.values()), 1e-300)
    return _bisected(at, shares, budget, 1e-9 * scale, 1e9 * scale)


def _bisected(
    at: Callable[[float], dict[str, float]], shares: Sequence[Share], budget: float, low: float, high: float
) -> dict[str, float]:
    """Return `at(x)` for the largest x, between limits on a logarithmic scale, that stays within the budget."""
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = at(middle)
        spent = sum(found[share.name] * share.size for share in shares)
        low, high = (middle, high) if spent <= budget * (1 + 1e-9) else (low, middle)
    return at(low)


def _loss_energy(target: Target, data: Data) -> float:
    """Return tr(H W G W^H), the energy of the outputs in the metric of the loss, per token."""
    statistics = data.statistics
    assert statistics is not None
    gram, metric = statistics.grams[target.name], statistics.metric(target.name)
    assert metric is not None
    weight = target.linear.weight.detach().to(gram.dtype)
    outputs = weight @ gram @ weight.mH
    total = (torch.diagonal(outputs) * metric).sum() if metric.ndim == 1 else (outputs * metric.mT).sum()
    return total.real.item() / max(statistics.tokens[target.name], 1)


# Low rank in place of any structure ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """The errors of a layer's low-rank approximations of all ranks, from one decomposition of its outputs."""

    share: Share
    objective: Objective
    scale: float
    vectors: Tensor  # orthonormal columns in the coordinates of the outputs, by ascending energy
    tails: Tensor  # share of the squared error that rank 0, 1, 2, .. leaves

    @classmethod
    def of(cls, share: Share, data: Data) -> _Curve:
        objective, scale = make_objective(share.target.linear.weight, *data.grams(share.name))
        energy, vectors = objective.spectrum()
        energy = energy.clamp_min(0)
        tails = torch.cat([energy.cumsum(0).flip(0), energy.new_zeros(1)])
        return cls(share, objective, scale, vectors, (tails / tails[0].clamp_min(1e-300)).cpu())

    def error(self, ratio: float) -> float:
        """Return the squared relative error that the structure is expected to leave at a ratio."""
        return 0.0 if ratio >= 1 else self.tails[self._rank(ratio)].item() * self._gain(ratio)

    def answers(self, ratio: float) -> dict[nn.Module, nn.Module]:
        """Return what answers for each module that uses the weight; nothing where it stays dense."""
        if ratio >= 1:
            return {}
        rank, linear = self._rank(ratio), self.share.target.linear
        left, right = self.objective.low_rank(self.objective.weight, self.vectors[:, self.vectors.shape[1] - rank :])
        missing = (self.objective.weight - left @ right) * self.scale
        proxy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        weight = linear.weight.detach() - (LEFT * self._gain(ratio) ** 0.5 * missing).to(linear.weight)
        proxy.weight, proxy.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        return dict.fromkeys(self.share.target.leaves, proxy.eval())

    def _gain(self, ratio: float) -> float:
        """Return the squared error that the structure is expected to leave / that of low rank of the same size."""
        if self.share.ratio > WHOLE:
            return GAIN * (1 - ratio)
        return float(self.tails[self._rank(ratio)].item() ** (EXPONENT - 1))

    def _rank(self, ratio: float) -> int:
        linear = self.share.target.linear
        return max(
            1, min(len(self.tails) - 1, int(ratio * self.share.size / (linear.in_features + linear.out_features)))
        )
