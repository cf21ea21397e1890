"""Run plans on tensors, forward and backward, or build the dense matrix."""

from structlin.runtime.contract.backward import Pullback, gradients
from structlin.runtime.contract.blocks import gradients_by_rows
from structlin.runtime.contract.forward import Operands, apply, in_order, lay_out, merge_factors, run, to_dense
from structlin.runtime.contract.lookup import look_up
from structlin.runtime.contract.tied import by_pattern, expanded, flops_by_pattern

__all__ = [
    "Operands",
    "Pullback",
    "apply",
    "by_pattern",
    "expanded",
    "flops_by_pattern",
    "gradients",
    "gradients_by_rows",
    "in_order",
    "lay_out",
    "look_up",
    "merge_factors",
    "run",
    "to_dense",
]
