"""Keep dense what would not be faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structlin.compress.processes import shared
from structlin.compress.report import Outcome
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.expert_linear import ExpertLinear
from structlin.layers.factored import Factored
from structlin.layers.freeze import freeze_, unfreeze_
from structlin.layers.linear import StructuredLinear
from structlin.runtime import planner
from structlin.runtime.machines import machine_of

TOKENS = (16, 512)  # rows of the inputs that are timed: a sentence, and a batch of them
_SAMPLES, _SECONDS = 9, 2e-3  # samples of each layer, and the least length of one in s


def time_ratio(layer: nn.Module, dense: nn.Linear | ExpertLinear | StructuredEmbedding, tokens: int) -> float:
    """Measure the time of a frozen layer relative to the dense one, on `tokens` rows of random input, or random ids.

    Samples of both alternate, and the median of their ratios counts. Of the maps of experts one is timed.
    """
    new, old = (partial(m, expert=0) if isinstance(dense, ExpertLinear) else m for m in (layer, dense))
    if isinstance(dense, StructuredEmbedding):
        own = x = torch.randint(dense.num_embeddings, (tokens,), device=dense.linear.weight.device)
    else:
        x = torch.randn(tokens, dense.in_features).to(dense.weight)
        own = x[:, : getattr(layer, "in_features", dense.in_features)].contiguous()  # fewer where hidden units went
    modes = layer.training, dense.training
    try:
        freeze_(layer.eval())
        dense.eval()
        with torch.no_grad():
            calls = _calls(old, x)
            ratios = [_seconds(new, own, calls) / _seconds(old, x, calls) for _ in range(_SAMPLES)]
    finally:
        unfreeze_(layer).train(modes[0])
        dense.train(modes[1])
    return statistics.median(ratios)


def _calls(module: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the number of calls that fill a sample."""
    module(x)
    return max(1, round(_SECONDS / max(_seconds(module, x, 3), 1e-9)))


def _seconds(module: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    for _ in range(calls):
        module(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / calls


def only_faster(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Leave layers dense whose replacements are not faster, at any of the numbers of rows.

    Args:
        outcomes: of the fits.
    Returns:
        The outcomes, with the worst measured ratio in their rows' `speed`, and the reason where a layer stays dense.
    """
    found = []
    for outcome in outcomes:
        layer, linear, table = outcome.layer, outcome.target.linear, outcome.target.on_request
        if layer is None:
            found.append(outcome)
            continue
        # A table that no matrix product uses is looked up.
        pair: tuple[nn.Module, Any] = layer, linear
        if table and isinstance(layer, StructuredLinear):
            pair = StructuredEmbedding(layer).train(layer.training), StructuredEmbedding(linear).train(linear.training)
        ratios = shared(partial(_ratios, *pair))  # every rank is to leave the same layers dense
        slowest = max(ratios, key=lambda tokens: ratios[tokens])
        measured = replace(outcome, row=replace(outcome.row, speed=ratios[slowest]))
        found.append(measured if ratios[slowest] < 1 else measured.kept(_reason(measured, layer, slowest)))
    return found


def _ratios(layer: nn.Module, dense: nn.Linear | ExpertLinear | StructuredEmbedding) -> dict[int, float]:
    return {tokens: time_ratio(layer, dense, tokens) for tokens in TOKENS}


def _reason(outcome: Outcome, layer: Factored, tokens: int) -> str:
    row, weight, predicted = outcome.row, layer.factors[0], ""
    # No plan tells what lookups take, nor an expert's layer.
    if isinstance(layer, StructuredLinear) and not outcome.target.on_request:
        dense = planner.dense_seconds(
            row.in_features, row.out_features, tokens, itemsize=weight.element_size(), machine=machine_of(weight.device)
        )
        predicted = f" (predicted {layer.plan(tokens).seconds / dense:.2f})"
    return (
        f"{row.structure} takes {row.speed:.2f} of the dense time at {tokens} rows{predicted}, and require_speedup was "
        "asked for"
    )
