"""Structured linear layers for PyTorch."""

from structlin import structures
from structlin.compress import CompressionPlan, Report, compress_model, plan_compression, to_dense_
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
    "CompressionPlan",
    "KMatrix",
    "KroneckerLinear",
    "LowRankLinear",
    "MonarchLinear",
    "PHMLinear",
    "Report",
    "ShapeshifterLinear",
    "StructuredLinear",
    "TTLinear",
    "compress_model",
    "plan_compression",
    "structures",
    "to_dense_",
]
