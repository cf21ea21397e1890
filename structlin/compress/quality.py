"""The three numbers of the compression literature: what the task loses, how faithful the outputs are, and the size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structlin.compress.evidence import Evidence
from structlin.heal.data import pick, unmasked
from structlin.heal.losses import divergence

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Quality:
    """How good a model is at one stage of its compression.

    Args:
        stage: "dense", "compressed", "healed", or another name.
        size: parameters of the model / parameters of the dense model.
        task: what `evaluate` returned, None without it.
        cosine: mean cosine of outputs to the dense model's on held-back batches, for models without logits.
        kl: mean KL divergence (nats) of the dense model's classes from this one's, for models with logits.
        top1: share of positions where both prefer the same class, likewise.
    """

    stage: str
    size: float
    task: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1: float | None = None

    def __str__(self) -> str:
        values = {"task": self.task, "cosine": self.cosine, "KL": self.kl, "top-1 agreement": self.top1}
        given = "".join(f", {name} {value:.4f}" for name, value in values.items() if value is not None)
        return f"{self.stage}: size {self.size:.3f}{given}"


class Judge:
    """Compares models with the dense one; it keeps the dense model's outputs on the held-back batches.

    Args:
        model: the dense model.
        evidence: with held-back batches, or none: then only task and size are judged.
        evaluate: measures a task.
    """

    def __init__(self, model: nn.Module, evidence: Evidence, evaluate: Evaluate | None) -> None:
        self._evidence, self._evaluate = evidence, evaluate
        self._size = sum(parameter.numel() for parameter in model.parameters())
        self._reference = [_positions(pick(out), b) for out, b in self._run(model)]
        self.dense = self(model, "dense")

    def _run(self, model: nn.Module) -> list[tuple[Any, Any]]:
        return list(zip(self._evidence.outputs(model), self._evidence.held_back, strict=True))

    def __call__(self, model: nn.Module, stage: str) -> Quality:
        """Measure a model."""
        size = sum(parameter.numel() for parameter in model.parameters()) / max(self._size, 1)
        task = None if self._evaluate is None else float(self._evaluate(model))
        if not self._reference:
            return Quality(stage, size, task)
        pairs = [
            (_positions(pick(out), batch)[1], expected, kind)
            for (out, batch), (kind, expected) in zip(self._run(model), self._reference, strict=True)
        ]
        counts = torch.tensor([expected[..., 0].numel() for _, expected, _ in pairs], dtype=torch.float64)

        def mean(values: list[Tensor]) -> float:
            return ((torch.stack(values).cpu().double() * counts).sum() / counts.sum().clamp_min(1)).item()

        if pairs[0][2] == "logits" and pairs[0][1].shape[-1] > 1:
            kl = mean([divergence(found, expected) for found, expected, _ in pairs])
            same = [(found.argmax(-1) == expected.argmax(-1)).double().mean() for found, expected, _ in pairs]
            return Quality(stage, size, task, kl=kl, top1=mean(same))
        cosines = [torch.cosine_similarity(found, expected, dim=-1).mean() for found, expected, _ in pairs]
        return Quality(stage, size, task, cosine=mean(cosines))


def _positions(output: tuple[str, Tensor], batch: Any) -> tuple[str, Tensor]:
    """The tensor that stands for an output, without the positions that the attention mask leaves out."""
    kind, tensor = output
    kept = unmasked(tensor, batch)
    return kind, kept if kept.ndim > 1 else kept.unsqueeze(-1)
