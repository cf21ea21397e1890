"""Swap the linear layers of a model for structured ones: find, plan, apply, report."""

from structlin.compress.apply import compress_model, to_dense_
from structlin.compress.calibrate import collect_shifted, collect_statistics, statistics_by_layer
from structlin.compress.choose import plan_compression
from structlin.compress.plan import CompressionPlan, PlanEntry
from structlin.compress.quality import Quality
from structlin.compress.report import Coverage, LayerReport, Report
from structlin.compress.statistics import Statistics

__all__ = [
    "CompressionPlan",
    "Coverage",
    "LayerReport",
    "PlanEntry",
    "Quality",
    "Report",
    "Statistics",
    "collect_shifted",
    "collect_statistics",
    "compress_model",
    "plan_compression",
    "statistics_by_layer",
    "to_dense_",
]
