"""Swap the linear layers of a model for structured ones: find, plan, apply, report."""

from structlin.compress.apply import compress_model, to_dense_
from structlin.compress.plan import CompressionPlan, PlanEntry, plan_compression
from structlin.compress.report import Coverage, LayerReport, Report

__all__ = [
    "CompressionPlan",
    "Coverage",
    "LayerReport",
    "PlanEntry",
    "Report",
    "compress_model",
    "plan_compression",
    "to_dense_",
]
