"""What each layer of a model becomes, as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structlin.compress.report import table
from structlin.compress.targets import Target
from structlin.equation.structure import Structure, from_record, show, to_record
from structlin.fitting.fit import Fit


def fingerprint(weight: Tensor) -> tuple[float, float]:
    """Sum and norm of a weight: two weights that agree in both to the last bit are the same."""
    entries = torch.view_as_real(weight.detach()) if weight.is_complex() else weight.detach()
    return entries.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(entries, dtype=torch.float64).item()


@dataclass(frozen=True)
class PlanEntry:
    """What one linear map becomes.

    Args:
        name: dotted name.
        aliases: other names of the module, and of layers that share its weight.
        in_features: size of the input.
        out_features: size of the output.
        structure: with all sizes fixed, or None to stay dense.
        reason: why it stays dense.
        refine: refinement steps, None for the structure's default.
        fitted: the fit that the choice was made by, with the fingerprint of its weight; not part of the JSON.
    """

    name: str
    aliases: tuple[str, ...]
    in_features: int
    out_features: int
    structure: Structure | None
    reason: str | None = None
    refine: int | None = None
    fitted: tuple[tuple[float, float], Fit] | None = field(default=None, repr=False, compare=False)

    def fit_of(self, weight: Tensor) -> Fit | None:
        """Return the fit if it was made for this weight as it is now."""
        if self.fitted is None or self.fitted[1].structure != self.structure:
            return None
        return self.fitted[1] if self.fitted[0] == fingerprint(weight) else None

    @property
    def parameters_before(self) -> int:
        """Entries of the dense weight."""
        return self.in_features * self.out_features

    @property
    def parameters_after(self) -> int:
        """Learned entries of the factors, or the dense count."""
        if self.structure is None:
            return self.parameters_before
        return self.structure.spec(self.in_features, self.out_features).num_parameters


@dataclass(frozen=True)
class CompressionPlan:
    """One entry per linear map of a model; prints as a table, goes through JSON unchanged, and may be edited there."""

    entries: tuple[PlanEntry, ...]
    tied: str = "skip"

    def to_json(self) -> str:
        """Write the plan as JSON: set a layer's `structure` to null, or change its fields, and read it back."""
        layers = [
            {
                "name": entry.name,
                "aliases": list(entry.aliases),
                "in_features": entry.in_features,
                "out_features": entry.out_features,
                "structure": to_record(entry.structure) if entry.structure else None,
                "reason": entry.reason,
                "refine": entry.refine,
            }
            for entry in self.entries
        ]
        return json.dumps({"version": 1, "tied": self.tied, "layers": layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan; structures are resolved and checked against their layers' sizes.

        Raises:
            ValueError: if the version, a key or a structure is not understood, naming the layer.
        """
        content = json.loads(text)
        if content.get("version") != 1:
            raise ValueError(f"plan version {content.get('version')} is unknown; this structlin reads version 1")
        return cls(tuple(_read_entry(layer) for layer in content["layers"]), content["tied"])

    def __str__(self) -> str:
        rows = [("layer", "shape", "becomes", "kept")]
        for entry in self.entries:
            becomes = show(entry.structure) if entry.structure else f"dense: {entry.reason}"
            kept = f"{entry.parameters_after / entry.parameters_before:.3f}"
            rows.append((entry.name or "(root)", f"{entry.out_features}x{entry.in_features}", becomes, kept))
        before = sum(entry.parameters_before for entry in self.entries)
        after = sum(entry.parameters_after for entry in self.entries)
        return "\n".join([*table(rows), f"linear weights: {before:,} -> {after:,} parameters"])


def _read_entry(layer: dict[str, Any]) -> PlanEntry:
    try:
        sizes = layer["in_features"], layer["out_features"]
        structure = from_record(layer["structure"]).resolve(*sizes) if layer["structure"] else None
        reason = layer["reason"] or (None if structure else "left dense in the plan")
        return PlanEntry(layer["name"], tuple(layer["aliases"]), *sizes, structure, reason, layer["refine"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"layer {layer.get('name')!r} of the plan: {error}") from error


def by_name(entries: Sequence[PlanEntry], targets: Sequence[Target]) -> Iterator[tuple[PlanEntry, Target]]:
    """Pair the entries of a plan with the targets of a model.

    Raises:
        ValueError: if the model lacks a layer of the plan, or it has another size or must stay dense.
    """
    found = {target.name: target for target in targets}
    for entry in entries:
        target = found.get(entry.name)
        if target is None:
            raise ValueError(
                f"the plan names layer {entry.name!r}, which this model has not; it has {list(found)[:20]}"
            )
        sizes = target.linear.in_features, target.linear.out_features
        if sizes != (entry.in_features, entry.out_features):
            raise ValueError(
                f"layer {entry.name!r} has (in, out) {sizes}, the plan says {entry.in_features, entry.out_features}"
            )
        if entry.structure and target.reason:
            raise ValueError(f"layer {entry.name!r} cannot be compressed: {target.reason}")
        yield entry, target
