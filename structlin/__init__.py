"""Structured linear layers for PyTorch."""

from structlin import structures
from structlin.checkpoint import CheckpointError, load, save, verify
from structlin.compress import CompressionPlan, Report, compress_model, plan_compression, to_dense_
from structlin.embedding import StructuredEmbedding
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
    "CheckpointError",
    "CompressionPlan",
    "KMatrix",
    "KroneckerLinear",
    "LowRankLinear",
    "MonarchLinear",
    "PHMLinear",
    "Report",
    "ShapeshifterLinear",
    "StructuredEmbedding",
    "StructuredLinear",
    "TTLinear",
    "compress_model",
    "load",
    "plan_compression",
    "save",
    "structures",
    "to_dense_",
    "verify",
]
