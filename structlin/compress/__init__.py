"""Compress whole models: find their linear maps, fit structured ones, swap all or none, and report."""

from structlin.compress.api import compress_model, plan_compression
from structlin.compress.calibrate import Collecting, collect_shifted, collect_statistics, statistics_by_layer
from structlin.compress.commit import to_dense_
from structlin.compress.config import Compression
from structlin.compress.evaluate import Evaluator
from structlin.compress.plan import CompressionPlan, PlanEntry
from structlin.compress.quality import Quality
from structlin.compress.quantization import Quantization
from structlin.compress.quantize import quantize_
from structlin.compress.report import Coverage, LayerReport, Report
from structlin.compress.scramble import scrambled
from structlin.compress.statistics import Statistics
from structlin.compress.taxonomy import Taxonomy

__all__ = [
    "Collecting",
    "Compression",
    "CompressionPlan",
    "Coverage",
    "Evaluator",
    "LayerReport",
    "PlanEntry",
    "Quality",
    "Quantization",
    "Report",
    "Statistics",
    "Taxonomy",
    "collect_shifted",
    "collect_statistics",
    "compress_model",
    "plan_compression",
    "quantize_",
    "scrambled",
    "statistics_by_layer",
    "to_dense_",
]
