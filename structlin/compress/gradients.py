"""Gradients at the outputs of linear maps, and the loss that they are of where there are no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from structlin.batches import pick, unmasked
from structlin.compress.sums import as_rows, not_finite, plainly


def through(watchers: Sequence[Callable[[Any, Tensor], Tensor]], name: Any, y: Tensor) -> Tensor:
    """Put an output through several functions that each may return another one."""
    for each in watchers:
        y = each(name, y)
    return y


def sampled_loss(output: Any, batch: Any) -> Tensor:
    """Draw the loss whose gradients make the metric of a model's outputs, without labels.

    Logits: the cross-entropy of classes drawn from the model's own distribution, whose gradients' second moment is the
    Fisher information. Other outputs y: sum y r with normal random numbers r, which gives the Gauss-Newton
    metric of the squared error. Source: Martens & Grosse 2015.
    """
    kind, y = pick(output)
    y = unmasked(y, batch)
    if kind == "logits" and y.shape[-1] > 1:
        rows = y.flatten(0, -2).float()
        return nn.functional.cross_entropy(rows, rows.detach().softmax(-1).multinomial(1)[:, 0], reduction="sum")
    drawn = (y * torch.randn_like(y.detach()).conj()).sum()
    return drawn.real if y.is_complex() else drawn


def watch(outputs: list[tuple[str, GradientEdge]], name: str, y: Tensor) -> Tensor:
    """Record the gradient edge of y and pass a clone on.

    y may be a view of what `addmm` returned: after a write into it (a ReLU in place) autograd would rebase its history,
    and the recorded edge would get no gradient.
    """
    with torch.enable_grad():
        y = (y if y.requires_grad else y.detach().requires_grad_()).clone()
    outputs.append((name, get_gradient_edge(y)))
    return y


def add_gradients(
    grams: dict[str, Tensor],
    outputs: Sequence[tuple[str, GradientEdge]],
    loss: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
    clip: float | None,
) -> None:
    """Add the second moments of a loss's gradients at the recorded outputs; products are of a dtype.

    Raises:
        ValueError: if the loss is no scalar, or gradients are not finite, naming the layer.
    """
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and not loss.is_complex()):
        raise ValueError("loss must return a real scalar tensor that depends on the model's output differentiably")
    edges = [edge for _, edge in outputs]
    gradients = torch.autograd.grad(loss, edges, allow_unused=True) if edges else ()
    for (name, _), gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            with plainly(gradient.device):
                rows = as_rows(gradient, keep, dtype)
                _add_gradient(name, grams[name], rows if clip is None else _clipped(rows, clip))


def _clipped(rows: Tensor, clip: float) -> Tensor:
    """Scale the rows to norms between 1 / clip and clip times their mean: a few tokens must not rule the metric."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    mean = norms.mean()
    return rows * (norms.clamp(mean / clip, mean * clip) / norms.clamp_min(torch.finfo(norms.dtype).tiny))


def _add_gradient(name: str, total: Tensor, rows: Tensor) -> None:
    total += rows.abs().square().sum(0) if total.ndim == 1 else rows.mT @ rows.conj()
    if not total.isfinite().all():
        raise ValueError(not_finite(name, "output gradients", rows.dtype))
