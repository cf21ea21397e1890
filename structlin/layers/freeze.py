"""Freeze a model for inference: structured layers then keep what they derive from their factors."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from structlin.layers.linear import StructuredLinear

M = TypeVar("M", bound=nn.Module)


def freeze_(model: M) -> M:
    """Let every structured layer of a model keep what it derives from its factors: merged factors, the dense matrix.

    Without this nothing of the factors is kept between calls, so that outputs are always those of the factors as they
    are. The contract of a frozen layer: its factors are not written to. Outputs are those of the factors at the time
    of freezing; whether a later write is seen is not defined (the native kernel reads the factors, a kept matrix does
    not follow). Calls that ask for any gradient run as if the layer was not frozen, and so do calls with other tensors
    in place of the factors (`torch.func.functional_call`).

    Undone by `unfreeze_`, `train()`, `load_state_dict`, `structlin.load`, assigning a parameter, `use_plan`, and moves
    to another dtype or device. Nothing that is kept gets into a state_dict, a copy or a pickle, and copies are not
    frozen. Memory: a layer for which the dense matrix is predicted to be fastest keeps it beside its factors.

    Args:
        model: a module in eval mode, itself or its modules structured layers.
    Returns:
        The model.
    Raises:
        ValueError: if a structured layer is in training mode.
    Example:
        >>> from structlin import LowRankLinear
        >>> model = freeze_(nn.Sequential(LowRankLinear(64, 64, rank=8)).eval())
        >>> model[0].frozen
        True
    """
    layers = _layers(model)
    for name, layer in layers.items():
        if layer.training:
            raise ValueError(f"layer {name!r} is in training mode; call model.eval() before freeze_")
    for layer in layers.values():
        layer.frozen = True
    return model


def unfreeze_(model: M) -> M:
    """Undo `freeze_`: drop what is kept, and follow the factors again.

    Args:
        model: any module.
    Returns:
        The model.
    """
    for layer in _layers(model).values():
        layer.frozen = False
    return model


def _layers(model: nn.Module) -> dict[str, StructuredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
