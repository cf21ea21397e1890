"""Distances between what a student and its teacher compute: of outputs, of blocks, and their sum for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from structlin.batches import Forward, device_of, divergence, pick, run, squared_error, to_device, unmasked

Loss = Callable[[Any, Any, Any], Tensor]
Calls = dict[str, tuple[list[Tensor], list[Tensor]]]  # block -> the output of each call, in the student and the teacher


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


# Blocks --------------------------------------------------------------------------------------------------------------


def find_blocks(student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Return the names of the modules that match globs; of nested matches of one glob only the outermost counts."""
    names, theirs = ([name for name, _ in model.named_modules() if name] for model in (student, teacher))
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"blocks: {pattern!r} matches no module of the student; names are like {names[:3]}")
        inside = tuple(f"{name}." for name in matches)
        found |= dict.fromkeys(name for name in matches if not name.startswith(inside))
    if missing := [name for name in found if name not in theirs]:
        raise ValueError(f"blocks: the teacher has no module {missing[0]!r}; name modules that both models have")
    return list(found)


@contextmanager
def objective(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], loss: Loss | None, forward: Forward | None
) -> Iterator[Callable[[Any], Tensor]]:
    """Yield the function that computes the loss of a batch: `loss` of the outputs plus the distance of the blocks."""
    calls: Calls = {name: ([], []) for name in names}

    def evaluate(batch: Any) -> Tensor:
        batch = to_device(batch, device_of(student))
        try:
            with torch.no_grad():
                theirs = run(teacher, batch, forward)
            ours = run(student, batch, forward)
            parts = [loss(ours, theirs, batch)] if loss is not None else []
            parts += [_block_distance(calls, batch)] if names else []
        finally:
            for outputs in chain(*calls.values()):
                outputs.clear()  # they hold the graph of the batch
        for part in parts:
            if not isinstance(part, Tensor) or part.numel() != 1:
                what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"loss returned {what}; it returns a tensor with one number")
        return torch.stack([part.reshape(()) for part in parts]).sum()

    def keep(outputs: list[Tensor], _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(pick(output)[1])

    with ExitStack() as hooks:  # in place for the whole run: a compiled model need not notice new ones
        for name, both in calls.items():
            for model, outputs in zip((student, teacher), both, strict=True):
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(keep, outputs)))
        yield evaluate


def _block_distance(calls: Calls, batch: Any) -> Tensor:
    """Average the relative squared errors of outputs over all blocks and their calls; the batch gives the mask.

    Source: the hidden-state loss of TinyBERT (Jiao et al. 2020), but relative, and without a learned map.
    """
    errors: list[Tensor] = []
    for name, both in calls.items():
        ours, theirs = (" ".join(str(tuple(output.shape)) for output in outputs) or "nothing" for outputs in both)
        if ours != theirs or not both[0]:
            raise ValueError(
                f"block {name!r} gives {ours} in the student and {theirs} in the teacher; name modules that run "
                "equally often in both, with outputs of equal shapes (a ModuleList never runs, its items do)"
            )
        errors += [squared_error(unmasked(a, batch), unmasked(b.detach(), batch)) for a, b in zip(*both, strict=True)]
    return torch.stack([error.to(errors[0].device) for error in errors]).mean()
