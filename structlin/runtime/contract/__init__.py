"""Run plans on tensors, forward and backward, or build the dense matrix."""

from structlin.runtime.contract.backward import Pullback, gradients
from structlin.runtime.contract.blocks import pulled_back
from structlin.runtime.contract.forward import Operands, Spare, apply, fold, keep, run, run_into, to_dense

__all__ = [
    "Operands",
    "Pullback",
    "Spare",
    "apply",
    "fold",
    "gradients",
    "keep",
    "pulled_back",
    "run",
    "run_into",
    "to_dense",
]
