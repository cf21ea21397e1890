"""Structured linear layers for PyTorch."""

from structlin import structures
from structlin.layer import StructuredLinear
from structlin.structures import (
    ButterflyLinear,
    KMatrix,
    KroneckerLinear,
    LowRankLinear,
    MonarchLinear,
    PHMLinear,
    ShapeshifterLinear,
    TTLinear,
)

__all__ = [
    "ButterflyLinear",
    "KMatrix",
    "KroneckerLinear",
    "LowRankLinear",
    "MonarchLinear",
    "PHMLinear",
    "ShapeshifterLinear",
    "StructuredLinear",
    "TTLinear",
    "structures",
]
