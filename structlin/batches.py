"""Run models on batches of any kind, in evaluation mode, and compare the tensors that represent their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Forward = Callable[[nn.Module, Any], Any]

# Batches -------------------------------------------------------------------------------------------------------------


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call a model on a batch: a mapping by keyword, a tuple or list by position, a tensor as the only argument.

    With `forward`, a function of (model, batch), the batch may be of any kind and that function makes the call.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return model(*batch)
    if isinstance(batch, Tensor | PackedSequence):
        return model(batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}; use a mapping, a tuple, a list or a tensor, or pass "
        "forward=lambda model, batch: ..."
    )


def check_several(name: str, batches: Any, way_out: str = "") -> None:
    """Refuse one batch, whose rows or keys would be taken for batches, and what holds none, in place of several.

    Raises:
        TypeError: naming the argument.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} is a {type(batches).__name__}; give {way_out}an iterable of batches, for one batch [batch]"
        )


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move the tensors of nested mappings, tuples (named ones too) and lists, into new ones; None moves none."""
    if device is not None and isinstance(value, Tensor | PackedSequence):
        # A copy to the CPU that does not block may be read before it is complete.
        return value.to(device, non_blocking=device.type != "cpu")  # type: ignore[arg-type]  # stub of PackedSequence
    if isinstance(value, Mapping):
        return updated(value, {key: to_device(item, device) for key, item in value.items()})
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        items = [to_device(item, device) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return value


def held_apart(batches: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """Split off a number of batches, evenly spread, as batches are often sorted by length: the others, and these."""
    chosen = {round((k + 0.5) * len(batches) / count - 0.5) for k in range(count)}
    parts = [[batch for k, batch in enumerate(batches) if (k in chosen) == apart] for apart in (False, True)]
    return parts[0], parts[1]


def updated(mapping: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    """Copy a mapping with other values of some items: to its own type, which has attributes perhaps, or to a dict."""
    found: Any = copy(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)
    found.update(items)
    return found


def cast_to(value: Any, like: Tensor) -> Any:
    """Move tensors of nested mappings, tuples and lists to the device of another, floating ones to its dtype too."""
    if isinstance(value, Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, Mapping):
        return {key: cast_to(item, like) for key, item in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(cast_to(item, like) for item in value)
    return value


def copied(value: Any) -> Any:
    """Copy the tensors of nested mappings, tuples and lists, for a model that may write into its batch."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return updated(value, {key: copied(item) for key, item in value.items()})
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


# Models --------------------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer, None if there is neither."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Clear all training flags and disable the fast path of `nn.TransformerEncoder`; restore both at the end.

    `train()` and `eval()` are not called: models override them with side effects. The fast path reads weights without
    calling the layers, past their hooks.
    """
    flags = {module: module.training for model in models for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        torch.backends.mha.set_fastpath_enabled(fast)


# Outputs -------------------------------------------------------------------------------------------------------------


def pick(output: Any) -> tuple[str, Tensor]:
    """Find the tensor that represents an output: `logits`, else `last_hidden_state`, else the first float tensor.

    It comes with its kind: "logits", "last_hidden_state" or "output".
    """
    if isinstance(output, Tensor):
        return "output", output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return name, value
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {entry.name: getattr(output, entry.name) for entry in fields(output)}
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor) and value.ndim and (value.is_floating_point() or value.is_complex()):
            return "output", value
    raise TypeError(
        f"an output is a {type(output).__name__} without a float tensor in it; pass "
        "loss=lambda student_output, teacher_output, batch: ..."
    )


def kept(mask: Tensor) -> Tensor:
    """Return a mask of ones for the positions that count and zeros for all others as booleans.

    Raises:
        ValueError: if it has other values (additive masks of 0 and -inf mean the reverse), or keeps no position.
    """
    chosen = mask.bool()
    if not (mask == chosen).all():
        raise ValueError(
            "the mask of a batch has other values than 0 and 1; give 1 for each position that counts and 0 for all "
            "others, as by attention_mask = (additive == 0)"
        )
    if mask.numel() and not chosen.any():
        raise ValueError("the mask of a batch is 0 everywhere; leave that batch out, or give 1 where a position counts")
    return chosen


def unmasked(tensor: Tensor, batch: Any) -> Tensor:
    """Return the positions (n, ...) that the batch's `attention_mask` keeps; all if it has another shape than they.

    Raises:
        ValueError: if the mask is additive, or 0 everywhere, see `kept`.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or tensor.ndim <= mask.ndim or tensor.shape[: mask.ndim] != mask.shape:
        return tensor
    return tensor[kept(mask).to(tensor.device)]


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


# Progress ------------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(label: str, unit: str, total: int | None, progress: bool | None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if tqdm is installed; yield advance(count=1, text=""), which moves it.

    `progress`: True shows the bar, False hides it, None shows it on a terminal only. `total` None: the number of items
    is unknown.
    """
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415  # optional, and `import structlin` must not import it
    except ImportError:
        yield lambda count=1, text="": None
        return
    disable = None if progress is None else not progress
    with tqdm(total=total, desc=label, unit=unit, disable=disable) as bar:

        def advance(count: int = 1, text: str = "") -> None:
            if text:
                bar.set_postfix_str(text, refresh=False)
            bar.update(count)

        yield advance
