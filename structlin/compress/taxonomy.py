"""The taxonomy's report: the geometry of each structured matrix, and what the model lost in the taxonomy's terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from structlin.compress.tables import table
from structlin.equation.geometry import composition, dimension
from structlin.equation.structure import show
from structlin.layers.factored import Factored


@dataclass(frozen=True)
class Geometry:
    """One structured matrix, or a stack of them.

    Args:
        name: of its module.
        structure: with its sizes.
        parameters: learned entries.
        dimension: of the set of its matrices (`structlin.equation.geometry.dimension`).
        ambient: entries of the dense matrices, the dimension of their space.
        composition: the maps that it is composed of, in the order of application.
    """

    name: str
    structure: str
    parameters: int
    dimension: int
    ambient: int
    composition: str


@dataclass(frozen=True)
class Taxonomy:
    """A compressed model in the terms of 'Geometry is all you need'; prints as a table.

    Args:
        layers: its structured matrices.
        size: eta, parameters of the model / parameters of the dense model.
        accuracy_lost: delta_1, the dense model's task - this one's; None where no task was measured.
        fidelity_lost: delta_2, the share of positions where the two prefer different classes, or 1 - their cosine; None
            where no batches were held back.
    """

    layers: tuple[Geometry, ...]
    size: float
    accuracy_lost: float | None = None
    fidelity_lost: float | None = None

    def __str__(self) -> str:
        head = ("layer", "structure", "parameters", "dimension", "of", "composition")
        rows = [
            (row.name or "(root)", row.structure, f"{row.parameters:,}", f"{row.dimension:,}", f"{row.ambient:,}",
             row.composition)
            for row in self.layers
        ]  # fmt: skip
        lost = ["not measured" if x is None else f"{x:.4f}" for x in (self.accuracy_lost, self.fidelity_lost)]
        dimensions, ambient = (sum(getattr(row, name) for row in self.layers) for name in ("dimension", "ambient"))
        return "\n".join(
            [
                *table([head, *rows]),
                f"the structured matrices lie in a set of {dimensions:,} dimensions, in a space of {ambient:,}",
                f"(delta_1, delta_2, eta) = ({', '.join(lost)}, {self.size:.4f}): accuracy lost, fidelity lost, size",
            ]
        )


def geometries(model: nn.Module) -> Iterator[Geometry]:
    """Describe the structured matrices of a model, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            count = module.num_parameters // module.spec.num_parameters
            sizes = module.in_features * module.out_features
            yield Geometry(
                name, _named(module), module.num_parameters, count * dimension(module.spec), count * sizes,
                composition(module.spec),
            )  # fmt: skip


def _named(module: Factored) -> str:
    formats = sorted({str(form) for form in module.formats.values()})
    return show(module.structure) + (f" in {' and '.join(formats)}" if formats else "")
