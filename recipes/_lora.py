"""What recipes that fine-tune compressed models by LoRA share: train adapters, store and load them, merge them."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import structlin
import structlin.peft
from structlin.structures import families

NAMES = ("dense", *sorted(families()))
MERGED = 1e-5  # largest relative difference of outputs that rounding may leave

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks by the old name


def compressed(dense: nn.Module, name: str, ratio: float, calibration: Any, refine: int | None = None) -> nn.Module:
    """Compress a copy by one structure at one ratio for all layers, with no other stage."""
    model = copy.deepcopy(dense)
    if name != "dense":
        structlin.compress_model(
            model, name, ratio=ratio, calibration=calibration, refine=refine, allocation="uniform", block_epochs=0,
            sequential=False, output_metric=False, progress=False,
        )  # fmt: skip
    return model


def adapt(
    base: nn.Module,
    config: peft.LoraConfig,
    train: Callable[[nn.Module], None],
    outputs: Callable[[nn.Module], Tensor],
    quality: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """Train adapters, store and load them, merge them, and return what was measured.

    The loaded adapters must give the same outputs bit by bit, the merged model the same but for rounding.
    """
    total = size(base)
    row: dict[str, Any] = {"before": quality(base)}
    start = time.perf_counter()
    plain, model = copy.deepcopy(base), peft.get_peft_model(base, config)
    row["adapters"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    train(model)
    model.eval()
    row |= {"seconds": time.perf_counter() - start, "adapted": quality(model)}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = outputs(model)
        model.save_pretrained(folder)
        assert torch.equal(outputs(peft.PeftModel.from_pretrained(plain, folder).eval()), expected)
        merged = model.merge_and_unload()
        row["difference"] = ((outputs(merged) - expected).abs().max() / expected.abs().max()).item()
    assert row["difference"] <= MERGED
    return row | {"merged": quality(merged), "growth": size(merged) / total}


def size(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
