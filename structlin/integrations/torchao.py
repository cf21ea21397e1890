"""torchao's weight-only configs for models with structured layers: they reach the factors, or an error says why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
)
from torchao.quantization import quantize_ as torchao_quantize_

from structlin.compress import Quantization, Statistics
from structlin.compress import quantize_ as structlin_quantize_
from structlin.compress.quantize import GROUP
from structlin.layers.factored import Factored


def quantize_(model: nn.Module, config: Any, *, statistics: Statistics | None = None) -> Quantization:
    """Apply a config of torchao to a model: to `nn.Linear`s by torchao, to factors in the same format by structlin.

    torchao's own `quantize_` looks for `nn.Linear` only and says nothing where it finds none. Its tensors cannot be
    stored by `structlin.save`; where the model is to be saved, `structlin.quantize_(model, "int8", dense=True)` makes
    plain tensors of all layers.

    Args:
        model: with structured layers, `nn.Linear`s, or both; changed in place.
        config: `Int8WeightOnlyConfig`, `Int4WeightOnlyConfig`, or `IntxWeightOnlyConfig` of int8 or int4.
        statistics: for the factors, as for `structlin.quantize_`.
    Returns:
        The report of the structured layers.
    Raises:
        ValueError: if the model has no layer that could match, or a factor is refused; an error leaves the model as it
            was.
        TypeError: if factors have no such format.
    """
    to, group = _format(config)
    structured = any(isinstance(module, Factored) for module in model.modules())
    dense = any(isinstance(module, nn.Linear) for module in model.modules())
    if not (structured or dense):
        raise ValueError(f"{type(config).__name__} matches nothing: the model has no nn.Linear and no structured layer")
    before = {
        module: {**vars(module), "_parameters": dict(module._parameters), "_modules": dict(module._modules)}
        for module in model.modules()
    }
    try:
        if dense:
            torchao_quantize_(model, config)
        if not structured:
            return Quantization(model, ())
        return structlin_quantize_(model, to, group=group, statistics=statistics)  # all layers or none
    except BaseException:  # torchao changes one linear layer after the other
        for module, state in before.items():
            vars(module).clear()
            vars(module).update(state)
        raise


def _format(config: Any) -> tuple[str, int]:
    """Return the name of the format and the entries of an int4 scale."""
    if isinstance(config, Int8WeightOnlyConfig):
        return "int8", GROUP
    if isinstance(config, Int4WeightOnlyConfig):
        return "int4", config.group_size
    if isinstance(config, IntxWeightOnlyConfig):
        if config.weight_dtype == torch.int8:
            return "int8", GROUP
        if str(config.weight_dtype) == "torch.int4" and isinstance(config.granularity, PerGroup):
            return "int4", config.granularity.group_size
        if str(config.weight_dtype) == "torch.int4" and isinstance(config.granularity, PerAxis):
            return "int4", 2**31 - 1  # one scale a row
    raise TypeError(
        f"factors have no format for {config}; use Int8WeightOnlyConfig, Int4WeightOnlyConfig or an "
        "IntxWeightOnlyConfig of int8 or int4, or quantise nn.Linears alone by torchao.quantization.quantize_"
    )
