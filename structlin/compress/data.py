"""Calibration data of a compression: batches, batches held back from them, and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.batches import Forward, check_several, held_apart
from structlin.compress.statistics import SHRINKAGE, Statistics
from structlin.fitting.objective import InputGram

MOST_HELD_BACK = 8  # batches

Aim = tuple[Tensor, InputGram | None]  # what a fit approximates, and the Gram of its inputs


@dataclass(frozen=True)
class Data:
    """Calibration data, as fits and checks need it.

    Args:
        statistics: Grams by name. None: fits are in the Frobenius norm, or the statistics are still to be collected.
        batches: what statistics are collected from, and what sequential fits run.
        held_back: batches that the statistics do not know, for checks from end to end.
        forward: calls the model on a batch.
        shrinkage: of the Grams, see `Statistics.shrunken`.
    """

    statistics: Statistics | None = None
    batches: tuple[Any, ...] = ()
    held_back: tuple[Any, ...] = ()
    forward: Forward | None = None
    shrinkage: float = SHRINKAGE

    @classmethod
    def gather(
        cls,
        calibration: Statistics | Iterable[Any] | None,
        validation: Iterable[Any] | None,
        forward: Forward | None,
        share: float,
    ) -> Self:
        """Sort what the caller gave, and hold a share of the batches back (at most 8) if there is no `validation`.

        Raises:
            TypeError: if calibration is neither statistics nor an iterable of batches, or validation is no iterable.
            ValueError: if it holds no batch.
        """
        given = () if validation is None else validation
        check_several("validation", given)
        held_back = tuple(given)
        if calibration is None or isinstance(calibration, Statistics):
            return cls(calibration, (), held_back, forward)
        check_several("calibration", calibration, "Statistics or ")
        batches = tuple(calibration)
        if not batches:
            raise ValueError("calibration holds no batch; give at least one")
        if validation is None and len(batches) > 1:
            count = min(MOST_HELD_BACK, max(1, round(share * len(batches))))
            batches, held_back = map(tuple, held_apart(batches, count))
        return cls(None, batches, held_back, forward)

    def checked(self, sizes: Mapping[str, tuple[int, int]], shrinkage: float) -> Self:
        """Return the data with a shrinkage, once the caller's statistics are known to be of layers of these sizes."""
        if self.statistics is not None:
            self.statistics.check(sizes)
        return replace(self, shrinkage=shrinkage)

    def expert_grams(self, names: Sequence[str]) -> list[tuple[InputGram | None, Tensor | None]]:
        """Return what `grams` does for each matrix of a stack, shrunk towards the pooled Gram where it saw few inputs.

        The pooled Gram counts as `in_features` further inputs of each matrix: an expert that saw none of its own is
        fitted to the inputs of all.
        """
        known = self.statistics
        tokens = 0 if known is None else sum(known.tokens.get(name, 0) for name in names)
        if known is None or not tokens:
            return [(None, None) for _ in names]
        pooled = torch.stack([known.grams[name] for name in names]).sum(0) / tokens
        mixed = {name: known.grams[name] + len(pooled) * pooled for name in names}
        pools = Statistics(mixed, known.tokens)
        return [(pools.shrunken(name, self.shrinkage), known.metric(name)) for name in names]

    def grams(self, name: str, inputs: bool = True) -> tuple[InputGram | None, Tensor | None]:
        """Return a layer's shrunken input Gram, if wanted, and its output Gram; None where unknown."""
        if self.statistics is None or not self.statistics.tokens.get(name):
            return None, None
        gram = self.statistics.shrunken(name, self.shrinkage) if inputs else None
        return gram, self.statistics.metric(name)
