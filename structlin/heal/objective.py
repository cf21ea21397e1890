"""What healing minimises: the distance between what student and teacher make of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]
Recorded = dict[str, list[Tensor]]  # block -> its outputs, one per call


# Batches and outputs -------------------------------------------------------------------------------------------------


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping by keyword, a tuple or list by position, a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}; use a mapping, a tuple, a list or a tensor, or pass "
        "forward=lambda model, batch: ..."
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested mappings (which become dicts), tuples and lists."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def pick(output: Any) -> tuple[str, Tensor]:
    """Find the tensor that stands for an output: `logits`, else `last_hidden_state`, else the first of any size."""
    if isinstance(output, Tensor):
        return "output", output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return name, value
    if isinstance(output, Mapping):
        values = list(output.values())
    elif is_dataclass(output):
        values = [getattr(output, entry.name) for entry in fields(output)]
    else:
        values = list(output) if isinstance(output, tuple | list) else []
    for value in values:
        if isinstance(value, Tensor) and value.ndim and (value.is_floating_point() or value.is_complex()):
            return "output", value
    raise TypeError(
        f"an output is a {type(output).__name__} without a float tensor in it; pass "
        "loss=lambda student_output, teacher_output, batch: ..."
    )


# Distances -----------------------------------------------------------------------------------------------------------


def output_distance(found: Any, expected: Any, batch: Any) -> Tensor:
    """Compare the outputs of student and teacher: KL divergence of logits, else the relative squared error.

    Logits of one class are compared as numbers. Positions that the batch's `attention_mask` leaves out do not count.

    Args:
        found: output of the student.
        expected: output of the teacher.
        batch: the batch of both.
    Returns:
        A number.
    Raises:
        TypeError: if no tensor is found in an output.
        ValueError: if the outputs cannot be compared.
    """
    (kind, ours), (other, theirs) = pick(found), pick(expected)
    if kind != other or ours.shape != theirs.shape:
        raise ValueError(
            f"the student gives {kind} {tuple(ours.shape)}, the teacher {other} {tuple(theirs.shape)}; pass "
            "loss=lambda student_output, teacher_output, batch: ..."
        )
    ours, theirs = unmasked(ours, theirs, batch)
    return divergence(ours, theirs) if kind == "logits" and ours.shape[-1] > 1 else squared_error(ours, theirs)


def unmasked(found: Tensor, expected: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Keep the positions of a mapping's `attention_mask`, where its shape is that of the tensors' leading axes."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or found.ndim <= mask.ndim or found.shape[: mask.ndim] != mask.shape:
        return found, expected
    return found[mask.bool()], expected[mask.bool()]


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of KL(teacher || student) = sum_c p_c (log p_c - log q_c); classes are the last axis."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    ours, theirs = logits.to(wide).log_softmax(-1), target.to(wide).log_softmax(-1)
    probability = theirs.exp()
    never = probability == 0  # 0 log 0 = 0, also for logits of minus infinity
    terms = probability * (theirs.masked_fill(never, 0) - ours.masked_fill(never, 0))
    return terms.sum() / max(logits[..., 0].numel(), 1)


def squared_error(found: Tensor, expected: Tensor) -> Tensor:
    """Compute |found - expected|^2 / |expected|^2 over all entries, in float32 at least."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    size = expected.abs().square().sum()
    return (found - expected).abs().square().sum() / size.clamp_min(torch.finfo(size.dtype).tiny)


# Blocks --------------------------------------------------------------------------------------------------------------


def find_blocks(student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | str) -> tuple[str, ...]:
    """Name the modules that match globs; of a glob's matches within one another only the outermost counts.

    Raises:
        ValueError: if a glob matches nothing, or the teacher lacks a module.
    """
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
        missing = [name for name in matches if name not in known]
        if missing:
            raise ValueError(f"blocks: the teacher has no module {missing[0]!r}; name modules that both models have")
        found |= dict.fromkeys(matches)
    if not found:
        raise ValueError('blocks names no module; use globs such as "encoder.layer.*"')
    return tuple(found)


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[Recorded]:
    """Record the outputs of modules by forward hooks, which are removed at the end."""
    recorded: Recorded = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: recorded[name].append(pick(output)[1])

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def block_distance(found: Recorded, expected: Recorded, batch: Any) -> Tensor:
    """Average the relative squared errors of the blocks' outputs."""
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
            errors.append(squared_error(*unmasked(a, b, batch)))
    return torch.stack([error.to(errors[0].device) for error in errors]).mean()


# The objective -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, a function of the student's parameters.

    Args:
        student: the model that learns.
        teacher: the model that it learns from.
        device: where the batches go.
        loss: of the outputs, None to leave them out.
        forward: how a model is called.
        found: what the student's blocks give, filled by hooks.
        expected: what the teacher's blocks give.
    """

    student: nn.Module
    teacher: nn.Module
    device: torch.device
    loss: Loss | None
    forward: Forward
    found: Recorded
    expected: Recorded

    def __call__(self, batch: Any) -> Tensor:
        """Run both models and compare them."""
        batch = to_device(batch, self.device)
        try:
            with torch.no_grad():
                theirs = self.forward(self.teacher, batch)
            ours = self.forward(self.student, batch)
            parts = [self.loss(ours, theirs, batch)] if self.loss is not None else []
            if self.expected:
                parts.append(block_distance(self.found, self.expected, batch))
        finally:
            for outputs in (*self.found.values(), *self.expected.values()):
                outputs.clear()
        for part in parts:
            if not isinstance(part, Tensor) or part.numel() != 1:
                what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"loss returned {what}; it returns a tensor with one number")
        return torch.stack([part.reshape(()) for part in parts]).sum()
