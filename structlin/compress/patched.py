"""Run a model whose compressed layers answer in place of the dense ones, on one calibration batch after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from structlin.batches import Forward, copied, device_of, divergence, evaluating, pick, run, squared_error, to_device
from structlin.compress.observe import replaced

Run = Callable[[], Any]


@dataclass
class Patched:
    """A model whose compressed layers answer, while it keeps its modules and parameters.

    Args:
        model: the dense model.
        opened: module of the model -> what it is opened to.
        swaps: leaf -> the structured layer that answers in its place; grows part by part.
        values: parameter of the model -> its refined copy.
    """

    model: nn.Module
    opened: Mapping[nn.Module, nn.Module]
    swaps: dict[nn.Module, nn.Module] = field(default_factory=dict)
    values: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    answering: bool = False  # within `changed`, which may be entered again at no cost

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let opened modules answer, so that leaves are called, in evaluation mode."""
        assert not self.answering
        with evaluating(self.model, *self.opened.values()), replaced(self.opened):
            yield

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Let all compressed layers and refined parameters answer."""
        if self.answering:
            yield
            return
        with self.dense(), evaluating(*self.swaps.values()), replaced(self.swaps), self._substituted():
            self.answering = True
            try:
                yield
            finally:
                self.answering = False

    @contextmanager
    def _substituted(self) -> Iterator[None]:
        places = [
            (module._parameters, name, parameter)
            for root in (self.model, *self.swaps.values())
            for module in (root.modules() if self.values else ())
            for name, parameter in module._parameters.items()
            if parameter in self.values
        ]
        try:
            for parameters, name, parameter in places:
                parameters[name] = self.values[parameter]
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter


@dataclass(frozen=True)
class Pass:
    """One calibration batch at the part of the model that is being compressed.

    Args:
        dense: runs the part on the inputs that the dense model gives it.
        drifted: runs it on the inputs that the compressed layers before it give it.
        keep: mask of the tokens that count, None for all.
    """

    dense: Callable[[], Any]
    drifted: Callable[[], Any]
    keep: Tensor | None


def moves(each: Pass) -> Tensor:
    """Return how far the compressed part's output in a pass is from the dense one's."""
    kind, wanted = pick(each.dense())
    return distance(pick(each.drifted())[1], wanted, kind, each)


def distance(found: Tensor, wanted: Tensor, kind: str, each: Pass) -> Tensor:
    """Compare outputs of a part where they count: by the divergence of logits, else the relative squared error."""
    keep = each.keep
    if keep is not None and keep.shape == wanted.shape[:-1]:
        found, wanted = found[keep.to(found.device)], wanted[keep.to(wanted.device)]
    return divergence(found, wanted) if kind == "logits" and wanted.shape[-1] > 1 else squared_error(found, wanted)


def model_runs(model: nn.Module, batches: Sequence[Any], forward: Forward | None) -> list[Run]:
    """Return a call of the model for each batch.

    It gives what `forward` makes of the batch, or the model's own output where that has more entries: all hidden states
    of a text say more of the model than the embedding that they are pooled to.
    """

    def go(given: Any) -> Any:
        batch = given if forward else to_device(given, device_of(model))
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            seen.insert(0, run(model, copied(batch), forward))
        finally:
            handle.remove()
        return max(seen[:2] if len(seen) == 2 else seen[:1], key=_entries)

    return [partial(go, batch) for batch in batches]


def _entries(output: Any) -> int:
    try:
        return pick(output)[1].numel()
    except TypeError:  # it holds no float tensor
        return 0


def model_passes(
    patched: Patched, runs: Sequence[Run], masks: Sequence[Tensor | None], behind: Sequence[Run] | None = None
) -> tuple[Pass, ...]:
    """Return the passes of a whole model; `behind` runs it where the compressed model runs otherwise."""

    def dense(go: Run) -> Any:
        with patched.dense():
            return go()

    def drifted(go: Run) -> Any:
        with patched.changed():
            return go()

    pairs = zip(runs, behind or runs, masks, strict=True)
    return tuple(Pass(partial(dense, go), partial(drifted, moved), keep) for go, moved, keep in pairs)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers keep no keys and values: a block that runs twice would add them twice."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", False) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
