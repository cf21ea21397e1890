"""The loss of a batch as a function of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from structlin.heal.data import Forward, device_of, pick, run, to_device
from structlin.heal.losses import block_distance

Loss = Callable[[Any, Any, Any], Tensor]


def find_blocks(student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Return the names of the modules that match globs; of nested matches of one glob only the outermost counts."""
    names = [name for name, _ in student.named_modules() if name]
    known = {name for name, _ in teacher.named_modules()}
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches: list[str] = []
        for name in names:  # a parent comes before its children
            if fnmatchcase(name, pattern) and not any(name.startswith(f"{outer}.") for outer in matches):
                matches.append(name)
        if not matches:
            raise ValueError(f"blocks: {pattern!r} matches no module of the student; names are like {names[:3]}")
        found |= dict.fromkeys(matches)
    for name in found:
        if name not in known:
            raise ValueError(f"blocks: the teacher has no module {name!r}; name modules that both models have")
    return list(found)


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a dict that forward hooks fill with the outputs of modules by name, one per call."""
    recorded: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(outputs: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: outputs.append(pick(output)[1])

    handles = [model.get_submodule(name).register_forward_hook(hook(recorded[name])) for name in names]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def objective(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], loss: Loss | None, forward: Forward | None
) -> Iterator[Callable[[Any], Tensor]]:
    """Yield the function that computes the loss of a batch: `loss` of the outputs plus the distance of the blocks."""
    with recording(student, names) as found, recording(teacher, names) as expected:

        def evaluate(batch: Any) -> Tensor:
            batch = to_device(batch, device_of(student))
            try:
                with torch.no_grad():
                    theirs = run(teacher, batch, forward)
                ours = run(student, batch, forward)
                parts = [loss(ours, theirs, batch)] if loss is not None else []
                parts += [block_distance(found, expected, batch)] if names else []
            finally:
                for outputs in (*found.values(), *expected.values()):
                    outputs.clear()
            for part in parts:
                if not isinstance(part, Tensor) or part.numel() != 1:
                    what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                    raise TypeError(f"loss returned {what}; it returns a tensor with one number")
            return torch.stack([part.reshape(()) for part in parts]).sum()

        yield evaluate
