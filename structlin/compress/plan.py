"""`CompressionPlan`: a Compression whose rules name every layer, with the sizes that each one gets."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from structlin.checkpoint import bounded
from structlin.compress.config import Choice, Compression
from structlin.compress.statistics import Statistics, StatisticsSummary
from structlin.compress.tables import shape, table
from structlin.compress.targets import Target
from structlin.equation.structure import Structure, show, to_record
from structlin.fitting.fit import Fit

VERSION = 2
# Fields of an entry in JSON, and what they may be.
KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "aliases": (list,), "in_features": (int,), "out_features": (int,), "structure": (dict, NoneType),
    "reason": (str, NoneType), "refine": (int, NoneType), "count": (int,), "sizes": (list, NoneType),
}  # fmt: skip
SMALL = 1024  # numbers of a structure up to this are fine, whatever the sizes of its layer
# Settings that the entries of a plan have answered already.
ANSWERED = ("structure", "ratio", "rules", "exclude", "budget", "allocation", "tied", "skip_last", "refine")


def fingerprint(weight: Tensor) -> tuple[float, float]:
    """Return the sum and the norm of a weight: weights that agree in both to the last bit are taken for the same."""
    entries = torch.view_as_real(weight.detach()) if weight.is_complex() else weight.detach()
    return entries.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(entries, dtype=torch.float64).item()


@dataclass(frozen=True)
class PlanEntry:
    """The structure that one linear map gets.

    Args:
        name: dotted name.
        aliases: other names of the module, and of layers that share its weight.
        in_features: size of the input.
        out_features: size of the output.
        structure: with all sizes fixed, or None to stay dense.
        reason: why it stays dense.
        refine: refinement steps, None for the structure's default.
        count: number of matrices of these sizes: 1, or the experts of a stack.
        sizes: (in, out) of what replaces it, where hidden units go that it reads or gives; None for its own.
        fitted: the fit by which the structure was chosen, with the fingerprint of its weight; not part of the JSON.
    """

    name: str
    aliases: tuple[str, ...]
    in_features: int
    out_features: int
    structure: Structure | None
    reason: str | None = None
    refine: int | None = None
    count: int = 1
    sizes: tuple[int, int] | None = None
    fitted: tuple[tuple[float, float], Fit] | None = field(default=None, repr=False, compare=False)

    def fit_of(self, weight: Tensor) -> Fit | None:
        """Return the fit if it was made for this weight as it is now."""
        if self.fitted is None or self.fitted[1].structure != self.structure:
            return None
        return self.fitted[1] if self.fitted[0] == fingerprint(weight) else None

    @property
    def becomes(self) -> str | None:
        """The structure with its sizes, as tables show it; None where the layer stays dense."""
        if self.structure is None:
            return None
        shown = show(self.structure)
        return shown if self.sizes is None else f"{shown.removesuffix('()')} {self.sizes[1]}x{self.sizes[0]}"

    @property
    def parameters_before(self) -> int:
        """Entries of the dense weight."""
        return self.count * self.in_features * self.out_features

    @property
    def parameters_after(self) -> int:
        """Learned entries of the factors, or the dense count."""
        if self.structure is None:
            return self.parameters_before
        return self.count * self.structure.spec(*(self.sizes or (self.in_features, self.out_features))).num_parameters


@dataclass(frozen=True)
class Fitted:
    """What was found for one layer. It goes from rank to rank: each builds modules of its own.

    Args:
        entry: of the plan.
        fits: one for each matrix; none where the layer stays dense or has no values.
        seconds: that they took.
        smaller: stands for the dense map where hidden units go.
    """

    entry: PlanEntry
    fits: Sequence[Fit] = ()
    seconds: float = 0.0
    smaller: nn.Linear | None = None

    @property
    def error(self) -> float | None:
        """Relative to the weights."""
        return _mean(found.error for found in self.fits)

    @property
    def output_error(self) -> float | None:
        """The same in the norm of the Grams, None without."""
        return _mean(found.output_error for found in self.fits)

    def to(self, device: torch.device) -> Fitted:
        """Move all factors."""

        def moved(found: Fit) -> Fit:
            return replace(found, factors=tuple(factor.to(device) for factor in found.factors))

        known = self.entry.fitted
        entry = self.entry if known is None else replace(self.entry, fitted=(known[0], moved(known[1])))
        return replace(self, entry=entry, fits=[moved(found) for found in self.fits])


# What a layer gets: to be sized, or why it stays dense, or the entry of a plan.
Wanted = Choice | str | PlanEntry


@dataclass(frozen=True)
class CompressionPlan(Compression):
    """A Compression whose rules name every linear map of a model; prints as a table, and may be edited as JSON.

    Args:
        entries: one for each linear map, in module order; `rules` follow from them.
        fitted_with: what the statistics were that the sizes (and perhaps fits) rest on, None without calibration. A
            plan is carried out with these statistics or refused.
        statistics: the same statistics, while the plan lives in memory; not part of the JSON.
    """

    entries: tuple[PlanEntry, ...] = field(kw_only=True, default=())
    fitted_with: StatisticsSummary | None = field(kw_only=True, default=None)
    statistics: Statistics | None = field(kw_only=True, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules = {entry.name: _rule(entry) for entry in self.entries}
        object.__setattr__(self, "rules", rules)
        super().__post_init__()

    @classmethod
    def of(cls, config: Compression, entries: Sequence[PlanEntry], statistics: Statistics | None) -> CompressionPlan:
        """Return the plan that settings came to; settings that are a plan already stay as they are."""
        if isinstance(config, CompressionPlan):
            return config
        settings = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rules"}
        made = None if statistics is None else statistics.summary
        return cls(**settings, entries=tuple(entries), fitted_with=made, statistics=statistics)

    def changed(self, **settings: Any) -> Self:
        """Return a copy with other values of settings that the entries have not answered.

        Raises:
            ValueError: naming the setting.
        """
        for name in settings:
            if name in ANSWERED:
                raise ValueError(
                    f"a plan holds its {name} layer by layer; edit the plan instead of passing {name}= again"
                )
        return replace(self, **settings)

    def settings(self) -> Self:
        """Return the plan without fits and statistics, as reports carry it."""
        entries = tuple(replace(entry, fitted=None) for entry in self.entries)
        return replace(self, entries=entries, statistics=None)

    def check_statistics(self, statistics: Statistics | None) -> None:
        """Refuse to be carried out with other statistics than those that the sizes rest on.

        Raises:
            ValueError: saying what the plan was made with.
        """
        if self.fitted_with is None:
            return
        way_out = "pass calibration= as it was, or replace(plan, fitted_with=None) to go on without"
        if statistics is None:
            raise ValueError(f"the plan was made with {self.fitted_with}, and there are no statistics; {way_out}")
        if not self.fitted_with.agrees(statistics.summary):
            raise ValueError(f"the plan was made with {self.fitted_with}, not with {statistics.summary}; {way_out}")

    # JSON ------------------------------------------------------------------------------------------------------------

    def to_record(self) -> dict[str, Any]:
        """Return the plan as plain JSON data: its settings, its statistics by name, and its layers."""
        settings = super().to_record()
        del settings["rules"]
        return {
            "version": VERSION,
            "settings": settings,
            "fitted_with": None if self.fitted_with is None else asdict(self.fitted_with),
            "layers": [_written(entry) for entry in self.entries],
        }

    def to_json(self) -> str:
        """Write the plan as JSON: set a layer's `structure` to null, or change its fields, and read it back."""
        return json.dumps(self.to_record(), indent=2)

    @classmethod
    @bounded.explained("a stored plan")
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_record` returned; structures are resolved and checked against their layers' sizes.

        Raises:
            ValueError: if the version, a key or a structure is not understood, naming the layer.
        """
        if record.get("version") not in (1, VERSION):
            raise ValueError(
                f"plan version {record.get('version')} is unknown; this structlin reads versions 1 and {VERSION}"
            )
        # Plans of version 1 did not keep their settings.
        settings = record.get("settings") or {"version": 1, "structure": None, "tied": record.get("tied", "skip")}
        made = Compression.from_record(settings)
        entries = tuple(_read(layer) for layer in record["layers"])
        if twice := [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]:
            raise ValueError(f"layers {twice[:5]} stand in the plan twice; name each once")
        return cls(
            **{name: getattr(made, name) for name in made.__dataclass_fields__},
            entries=entries,
            fitted_with=_summary(record.get("fitted_with")),
        )

    def __str__(self) -> str:
        rows = [("layer", "shape", "becomes", "kept")]
        for entry in self.entries:
            becomes = entry.becomes or f"dense: {entry.reason}"
            kept = f"{entry.parameters_after / entry.parameters_before:.3f}"
            rows.append((entry.name or "(root)", shape(entry), becomes, kept))
        before = sum(entry.parameters_before for entry in self.entries)
        after = sum(entry.parameters_after for entry in self.entries)
        made = [] if self.fitted_with is None else [f"fitted with {self.fitted_with}"]
        return "\n".join([*table(rows), f"linear weights: {before:,} -> {after:,} parameters", *made])


def dense_entry(target: Target, reason: str | None) -> PlanEntry:
    """Return the entry of a layer that stays dense, for a reason."""
    sizes = target.linear.in_features, target.linear.out_features
    return PlanEntry(target.name, target.names[1:], *sizes, None, reason, count=len(target.parts))


def _rule(entry: PlanEntry) -> Any:
    if entry.structure is None or entry.refine is None:
        return entry.structure
    return {"structure": entry.structure, "refine": entry.refine}


def _written(entry: PlanEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "in_features": entry.in_features,
        "out_features": entry.out_features,
        "structure": to_record(entry.structure) if entry.structure else None,
        "reason": entry.reason,
        "refine": entry.refine,
        "count": entry.count,
        "sizes": entry.sizes and list(entry.sizes),
    }


def _read(layer: Mapping[str, Any]) -> PlanEntry:
    with bounded.explained("the layers of the plan"):
        where = f"layer {layer.get('name')!r} of the plan"
    try:
        fields = {"count": 1, "sizes": None, **layer}
        for name, kinds in KINDS.items():
            if type(fields[name]) not in kinds:  # not isinstance: True is no size
                raise TypeError(f"{name}={fields[name]!r}; use {' or '.join(kind.__name__ for kind in kinds)}")
        sizes = fields["in_features"], fields["out_features"]
        if not 1 <= min(sizes) <= max(sizes) <= bounded.LARGEST_AXIS or fields["count"] < 1:
            raise ValueError(f"(in, out)={sizes}, count={fields['count']}; use 1 to {bounded.LARGEST_AXIS}")
        if not all(type(alias) is str for alias in fields["aliases"]):
            raise TypeError(f"aliases={fields['aliases']}; use names")
        structure, made = fields["structure"], fields["sizes"]
        made = None if made is None else _smaller(made, sizes, structure)
        if structure is not None:
            structure = bounded.read_structure(structure, max(*sizes, SMALL)).resolve(*(made or sizes))
        reason = fields["reason"] or (None if structure else "left dense in the plan")
        more = fields["refine"], fields["count"]
        return PlanEntry(fields["name"], tuple(fields["aliases"]), *sizes, structure, reason, *more, sizes=made)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _smaller(made: list[Any], sizes: tuple[int, int], structure: Any) -> tuple[int, int]:
    inside, outside = made
    fits = 1 <= inside <= sizes[0] and 1 <= outside <= sizes[1] and {type(inside), type(outside)} == {int}
    if structure is None or not fits:
        raise ValueError(f"sizes={made} of (in, out) {sizes}, structure {structure}; use smaller ones, of a structure")
    return inside, outside


def _summary(record: Any) -> StatisticsSummary | None:
    summary = None if record is None else StatisticsSummary(**record)
    if summary is not None and not all(type(value) in (int, float) for value in asdict(summary).values()):
        raise ValueError(f"fitted_with={record}; use numbers")
    return summary


def _mean(errors: Iterable[float | None]) -> float | None:
    """Return the root mean square of the errors of a stack, None if one is unknown."""
    found = list(errors)
    if len(found) < 2:
        return found[0] if found else None
    known = [error for error in found if error is not None]
    return math.sqrt(sum(error**2 for error in known) / len(known)) if len(known) == len(found) else None
