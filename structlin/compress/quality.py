"""The record of how good a model is at one stage of its compression."""

from __future__ import annotations

from dataclasses import dataclass


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
