"""Distances between what a student and its teacher compute: of outputs, and of the outputs of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.heal.data import pick, unmasked


def distillation_loss(student_output: Any, teacher_output: Any, batch: Any = None) -> Tensor:
    """Compare the outputs of a student and its teacher on one batch.

    An output's `logits` are compared by KL(teacher || student), averaged over positions, with the classes in the last
    axis. Otherwise `last_hidden_state`, or the output's first float tensor, is compared by the relative squared error
    |student - teacher|^2 / |teacher|^2; so are logits of one class. No gradient flows to the teacher.

    Args:
        student_output: a tensor, or a mapping, dataclass, tuple or list that holds one.
        teacher_output: the same from the teacher.
        batch: what both models were run on. If it is a mapping with an `attention_mask`, masked positions do not count.
    Returns:
        The loss, a scalar in float32 or wider.
    Raises:
        TypeError: if an output holds no float tensor.
        ValueError: if the outputs are of different kinds or shapes.
    Source: Hinton, Vinyals & Dean 2015, at temperature 1.
    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> distillation_loss({"logits": logits + 3}, {"logits": logits}).item() < 1e-6
        True
    """
    (kind, ours), (other, theirs) = pick(student_output), pick(teacher_output)
    if kind != other or ours.shape != theirs.shape:
        raise ValueError(
            f"the student gives {kind} {tuple(ours.shape)}, the teacher {other} {tuple(theirs.shape)}; pass "
            "loss=lambda student_output, teacher_output, batch: ..."
        )
    ours, theirs = unmasked(ours, batch), unmasked(theirs.detach(), batch)
    return divergence(ours, theirs) if kind == "logits" and ours.shape[-1] > 1 else squared_error(ours, theirs)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Average KL(p || q) = sum_c p_c (log p_c - log q_c) over positions; logits of q and p (target): (..., classes)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    ours, theirs = logits.to(wide).log_softmax(-1), target.to(wide).log_softmax(-1)
    probability = theirs.exp()
    never = probability == 0  # 0 log 0 = 0, also for logits of minus infinity
    terms = probability * (theirs.masked_fill(never, 0) - ours.masked_fill(never, 0))
    return terms.sum() / max(logits[..., 0].numel(), 1)


def squared_error(found: Tensor, expected: Tensor) -> Tensor:
    """Compute |found - expected|^2 / |expected|^2 over all entries, in float32 or wider."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    size = expected.abs().square().sum()
    return (found - expected).abs().square().sum() / size.clamp_min(torch.finfo(size.dtype).tiny)


def block_distance(
    found: Mapping[str, Sequence[Tensor]], expected: Mapping[str, Sequence[Tensor]], batch: Any = None
) -> Tensor:
    """Average the relative squared errors of outputs over all blocks and their calls; `batch` gives the mask.

    Source: the hidden-state loss of TinyBERT (Jiao et al. 2020), but relative, and without a learned map.
    """
    errors: list[Tensor] = []
    for name, theirs in expected.items():
        ours = found[name]
        if not theirs or len(ours) != len(theirs):
            raise ValueError(
                f"block {name!r} ran {len(ours)} times in the student and {len(theirs)} times in the teacher; "
                "name modules that run equally often in both (a ModuleList never runs, its items do)"
            )
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise ValueError(
                    f"block {name!r} gives {tuple(a.shape)} in the student and {tuple(b.shape)} in the teacher; "
                    "name blocks whose outputs have equal shapes"
                )
            errors.append(squared_error(unmasked(a, batch), unmasked(b.detach(), batch)))
    return torch.stack([error.to(errors[0].device) for error in errors]).mean()
