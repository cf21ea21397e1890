"""Choose how to contract an equation with a batch of tokens: integer code, tested without tensors."""

from structlin.runtime.planner.machine import (
    CPU,
    CPU_AMX,
    H200,
    NATIVE,
    NATIVE_FEW,
    Machine,
    bucket,
    dense_seconds,
    thinness,
)
from structlin.runtime.planner.plan import TOKENS, Cost, EquationPlan, Merge, Plan, Step, View
from structlin.runtime.planner.search import ORDERS, Order, find_plan, flops_per_token, merge_plan

__all__ = [
    "CPU",
    "CPU_AMX",
    "H200",
    "NATIVE",
    "NATIVE_FEW",
    "ORDERS",
    "TOKENS",
    "Cost",
    "EquationPlan",
    "Machine",
    "Merge",
    "Order",
    "Plan",
    "Step",
    "View",
    "bucket",
    "dense_seconds",
    "find_plan",
    "flops_per_token",
    "merge_plan",
    "thinness",
]
