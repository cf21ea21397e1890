"""Spend on larger ranks what the sizes of the structures leave of a model's budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from structlin.compress.evidence import Evidence
from structlin.compress.plan import PlanEntry, fingerprint
from structlin.compress.targets import Target
from structlin.equation.structure import Structure
from structlin.fitting.fit import extend
from structlin.structures import LowRank, Sum


def grown(structure: Structure) -> Structure | None:
    """Return the structure with one more rank in its first low-rank part, None if it has none."""
    if isinstance(structure, LowRank):
        return replace(structure, rank=structure.rank + 1)
    if isinstance(structure, Sum):
        for k, part in enumerate(structure.parts):
            if isinstance(part, LowRank):
                return Sum(parts=(*structure.parts[:k], replace(part, rank=part.rank + 1), *structure.parts[k + 1 :]))
    return None


def spend(
    entries: Sequence[PlanEntry], ratios: Mapping[str, float], targets: Sequence[Target], evidence: Evidence
) -> list[PlanEntry]:
    """Round sizes up instead of down where the layers together have parameters to spare.

    Rank after rank goes to the layer that lacks the fewest parameters for it, until the next one would exceed the
    budget. Known fits are extended, their other factors as they are.

    Args:
        entries: one for each target, in the same order.
        ratios: what each layer was to keep, by name; layers without one, and layers that stay dense, do not take part.
        targets: the layers.
        evidence: the Grams of the fits.
    Returns:
        The entries, some of them larger.
    """
    limits = {e.name: ratios[e.name] * e.parameters_before for e in entries if e.structure and e.name in ratios}
    current = {entry.name: entry for entry in entries if entry.name in limits}
    rest = sum(limits.values()) - sum(entry.parameters_after for entry in current.values())

    def larger(entry: PlanEntry) -> PlanEntry | None:
        assert entry.structure is not None
        if (structure := grown(entry.structure)) is None:
            return None
        try:
            structure.resolve(entry.in_features, entry.out_features)
        except ValueError:  # the rank is full
            return None
        found = replace(entry, structure=structure)
        return found if found.parameters_after < found.parameters_before else None

    while True:
        steps = {
            name: (after, after.parameters_after - entry.parameters_after)
            for name, entry in current.items()
            if (after := larger(entry)) is not None
        }
        fitting = [name for name, (_, cost) in steps.items() if cost <= rest]
        if not fitting:
            break
        first = min(fitting, key=lambda name: steps[name][0].parameters_after - limits[name])
        current[first] = steps[first][0]
        rest -= steps[first][1]
    return [
        _refitted(entry, current.get(entry.name, entry), target, evidence)
        for entry, target in zip(entries, targets, strict=True)
    ]


def _refitted(before: PlanEntry, after: PlanEntry, target: Target, evidence: Evidence) -> PlanEntry:
    if before.structure == after.structure or before.fitted is None:
        return after
    assert after.structure is not None
    weight = target.linear.weight
    gram, output_gram = evidence.grams(after.name)
    found = extend(before.fitted[1], after.structure, weight, gram=gram, output_gram=output_gram)
    return replace(after, fitted=(fingerprint(weight), found))
