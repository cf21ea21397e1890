"""Sizes from a ratio: the largest members of a structure within a parameter budget."""

from __future__ import annotations

import math
from typing import Literal, get_args

from structlin.equation.structure import Family, Structure
from structlin.runtime.planner import flops_per_token

Budget = Literal["parameters", "bytes", "flops"]

# A structure that grows in coarse steps, so that more than COARSE of the budget stays unused, may exceed the budget by
# SLACK: PHM-2 has half of the dense parameters plus eight.
COARSE, SLACK = 0.05, 0.01
_BISECTIONS = 12  # the number of parameters is found to 1 / 4096 of the limit


class NoMemberError(ValueError):
    """No member of a structure is within the budget of a layer."""


def within(
    family: Family, in_features: int, out_features: int, ratio: float, budget: Budget = "parameters"
) -> list[Structure]:  # fmt: skip
    """Return the resolved candidates that keep at most `ratio` of the dense parameters, bytes or FLOPs (bias excluded).

    One candidate per choice of shape, each as large as fits; the fit decides between them. Bytes count constants too.
    FLOPs are those of one token, contracted factor by factor, against the 2 in out of the dense product.

    Raises:
        ValueError: if ratio or budget is out of range; NoMemberError if no member is small enough.
    """
    check_ratio(ratio)
    if budget not in get_args(Budget):
        raise ValueError(f"budget={budget!r} is unknown; use one of {get_args(Budget)}")
    dense = in_features * out_features
    if budget == "flops":
        found = _sized_by_flops(family, in_features, out_features, 2 * ratio * dense)
    else:
        found = _sized(family, in_features, out_features, int(ratio * dense + 1e-9))  # 0.29 * 100 is 28.999..
        if not found or max(found.values()) < (1 - COARSE) * ratio * dense:
            found |= _sized(family, in_features, out_features, int((1 + SLACK) * ratio * dense))
        if budget == "bytes":  # stored entries: factors have the dtype of the weight
            shapes = {structure: structure.spec(in_features, out_features).shapes for structure in found}
            found = {s: n for s, n in found.items() if sum(map(math.prod, shapes[s])) <= ratio * dense}
    if not found:
        raise NoMemberError(
            f"no {family.name} structure of a {out_features} x {in_features} layer keeps {ratio:.3g} of its {budget} "
            "or fewer; use a larger ratio or another structure"
        )
    return list(found)


def check_ratio(ratio: float) -> None:
    """Raise ValueError for a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is outside (0, 1]; it is parameters kept / dense parameters")


def _sized(family: Family, in_features: int, out_features: int, budget: int) -> dict[Structure, int]:
    """Return the resolved candidates, each with its number of parameters."""
    resolved = [c.resolve(in_features, out_features) for c in family.candidates(in_features, out_features, budget)]
    sizes = {structure: structure.spec(in_features, out_features).num_parameters for structure in resolved}
    return {structure: size for structure, size in sizes.items() if size <= budget}


def _sized_by_flops(family: Family, in_features: int, out_features: int, limit: float) -> dict[Structure, int]:
    """Bisect over the number of parameters for the largest candidates within a number of FLOPs."""
    low, high = 0.0, limit  # no structure does fewer than one FLOP per parameter
    best: dict[Structure, int] = {}
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _sized(family, in_features, out_features, int(middle))
        fitting = {s: size for s, size in found.items() if flops_per_token(s.spec(in_features, out_features)) <= limit}
        best = fitting or best
        low, high = (middle, high) if fitting or not found else (low, middle)
    return best
