"""Which structure a layer gets: patterns on dotted names, first match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from structlin.equation.structure import Structure
from structlin.fitting.budget import check_ratio
from structlin.fitting.fit import Families
from structlin.structures import Blast, Kaleidoscope, LowRank, family, sum_of

# What "auto" chooses from: low rank is always solved exactly, so that the choice is never worse; the two sums were best
# in benchmarks/results/structures_tried.md.
AUTO: Families = (LowRank, sum_of(LowRank, Kaleidoscope), sum_of(LowRank, Blast))

Pattern = str | Callable[[str, nn.Module], bool]
Value = Structure | str | None | Mapping[str, Any]
Rules = Mapping[Pattern, Value]


@dataclass(frozen=True)
class Choice:
    """What a rule says: a structure with its sizes, or one or more classes and a ratio."""

    structure: Structure | Families
    ratio: float | None = None
    refine: int | None = None


def choice(value: Value, default: Choice | None, ratio: float | None, refine: int | None) -> Choice | None:
    """Read a rule's value: an instance, a registered name, None (stay dense), or a mapping.

    A mapping may hold `structure` (a name, "auto" or an instance; the default's where absent), `ratio`, `refine`, and
    hyperparameters for the named structure.

    Raises:
        ValueError: if a name has neither ratio nor hyperparameters, or a key does not apply.
    """
    if ratio is not None:
        check_ratio(ratio)
    if value is None:
        return None
    if isinstance(value, Mapping):
        fields = dict(value)
        named = fields.pop("structure", default.structure if default else None)
        ratio, refine = fields.pop("ratio", None if fields else ratio), fields.pop("refine", refine)
        if ratio is not None:
            check_ratio(ratio)
        if named is None:
            raise ValueError(f"rule {dict(value)} names no structure and there is no default; add structure=")
        structure = _family(named) if isinstance(named, str) else named
        if fields or (not isinstance(structure, Structure) and ratio is None):
            if ratio is not None or isinstance(structure, Structure):
                raise ValueError(f"rule {dict(value)} gives hyperparameters besides a ratio or an instance; give one")
            if not isinstance(structure, type):
                raise ValueError(f"rule {dict(value)}: 'auto' finds its sizes from a ratio; add ratio=")
            return Choice(_instance(structure, fields), None, refine)
        if isinstance(structure, Structure) and "ratio" in value:
            structure = type(structure)
        return Choice(structure, None if isinstance(structure, Structure) else ratio, refine)
    if isinstance(value, str):
        if ratio is None:
            raise ValueError(
                f"structure {value!r} needs a ratio (or an instance such as LowRank(rank=8) with its sizes)"
            )
        return Choice(_family(value), ratio, refine)
    if isinstance(value, Structure):
        return Choice(value, None, refine)
    raise TypeError(f"a rule holds {type(value).__name__}; use a structure, its name, a mapping, or None to stay dense")


def _family(name: str) -> Families:
    return AUTO if name == "auto" else family(name)


def _instance(cls: type[Structure], fields: Mapping[str, Any]) -> Structure:
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{cls.name} does not take {dict(fields)}: {error}") from error


def matches(pattern: Pattern, names: Sequence[str], module: nn.Module) -> bool:
    """Whether a glob, a regular expression after `re:`, or a predicate(name, module) matches any of the names."""
    if callable(pattern):
        return any(pattern(name, module) for name in names)
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def describe(pattern: Pattern) -> str:
    """A pattern as it reads in a report."""
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", "predicate")
