"""The report of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from structlin.compress.tables import table


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer of the report.

    Args:
        name: its first dotted name.
        structure: with its sizes.
        format: "int8", "int4", or why it stays as it is.
        bytes_before: of its factors, or its dense weight.
        bytes_after: with scales.
        error: relative error of the outputs in the norm of the Gram, against the layer before; Frobenius without one.
        compensated: whether rounding with compensation was better than plain rounding.
    """

    name: str
    structure: str
    format: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    compensated: bool | None = None


@dataclass(frozen=True)
class Quantization:
    """A quantised model and a row for each of its layers; prints as a table.

    Args:
        model: the model; another object only where the root itself was dense.
        layers: the structured layers and the dense ones that were asked for.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all rows before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all rows after."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            (layer.name or "(root)", layer.structure, layer.format, f"{layer.bytes_before:,}", f"{layer.bytes_after:,}",
             "" if layer.error is None else f"{layer.error:.2g}")
            for layer in self.layers
        ]  # fmt: skip
        head = ("layer", "structure", "format", "bytes", "now", "error")
        total = f"{self.bytes_before:,} B of {len(rows)} layers are now {self.bytes_after:,} B"
        return "\n".join([*table([head, *rows]), total])
