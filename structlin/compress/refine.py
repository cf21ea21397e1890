"""Refine a block, or the whole model: all factors, norms and biases together, towards what the dense one computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from structlin.batches import pick
from structlin.compress.blocks import LIMIT, Part
from structlin.compress.config import Compression
from structlin.compress.patched import Pass, Patched, distance, without_cache
from structlin.compress.processes import follow, shared, together
from structlin.compress.report import BlockReport
from structlin.heal.options import HealOptions, HealReport
from structlin.heal.run import Run, Stream, requiring_gradients
from structlin.layers.factored import Factored

EPOCHS, ALONE = 3, 10  # passes over the batches and their scrambled copies, or over batches without copies
# Peak learning rate, relative to the root mean square entry of a parameter: RATE, but at most RATE * REACH times the
# relative error at the start. What is nearly right needs small steps.
RATE, REACH = 0.03, 2.0
# Few tokens a step, wide layers, or factors that nearly cancel need smaller steps yet: where the first measurement is
# APART times the start's error, or the start stays the best, the part starts again at 1 / SLOWER of the rate.
APART, SLOWER, TRIES = 1.1, 2.0, 5
# From end to end a step moves all blocks at once, and the rate is far smaller: END_RATE times the error at the start,
# at most END_RATE. MiniLM at .5 (error .064) gains at .0002 to .0004 and loses at .001, stories260k (.7) gains to .01.
END_EPOCHS, END_RATE = 6, 6e-3
END_PARAMETERS = 2**28  # most that the model may train by default: all gradients and moments are held at once
BETAS = (0.9, 0.95)
LEAST = 1e-3  # root mean square that a parameter of zeros counts as
HELD_BACK = 10  # one batch in so many tells when to stop


class _WideAdam(torch.optim.AdamW):
    """AdamW without weight decay on float32 copies of parameters, whose own dtype may be too coarse for its steps.

    The copies are divided by their root mean squares: one learning rate is relative to each parameter. Gradients need
    no such factor, as Adam's steps do not depend on their scale.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        self.narrow = list(parameters)
        wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in self.narrow]
        self.scales = [max(w.abs().square().mean().sqrt().item(), LEAST) for w in wide]
        self.wide = [w / scale for w, scale in zip(wide, self.scales, strict=True)]
        # Steps are many and small. Fused ones know no complex numbers.
        fused = not any(p.is_complex() for p in self.narrow)
        super().__init__(self.wide, rate, BETAS, weight_decay=0.0, fused=fused)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.narrow:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for wide, parameter in zip(self.wide, self.narrow, strict=True):
            wide.grad = None if parameter.grad is None else parameter.grad.to(wide.dtype)
        super().step()
        for parameter, wide, scale in zip(self.narrow, self.wide, self.scales, strict=True):
            torch.mul(wide, scale, out=parameter)


class _Race(Run):
    """A run that ends at its first measurement where that is far above the start: the steps are too large."""

    def _limit(self) -> str | None:
        first = [row.validation for row in self.history]
        apart = len(first) == 1 and first[0] is not None and first[0] > APART * self.loss_before
        return "apart" if apart else super()._limit()


def check_refinable(model: nn.Module, config: Compression, batches: Sequence[Any]) -> None:
    """Refuse to refine, where there are batches for it, the blocks of a model that can take no gradients."""
    refined = config.block_epochs != 0 or config.model_epochs
    if batches and refined and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode, and its blocks cannot be refined: make it outside, or pass "
            "block_epochs=0"
        )


def refine(
    part: Part,
    swaps: Mapping[nn.Module, nn.Module],
    patched: Patched,
    epochs: int | None,
    given: int,
    whole: bool = False,
) -> list[BlockReport]:
    """Train the factors of a part, and the norms and biases of its block, towards the dense part's outputs.

    The part runs on the inputs that the compressed layers before it give it. What belongs to the model stays as it is:
    its new values go to `patched`. The weights with the least error on the judging batches are kept; where these are
    those of the start, or training soon leads away from it, the part starts again with smaller steps. Source: the
    block refinement of AA-SVD, here for every structure.

    Args:
        part: with its passes.
        swaps: its leaves -> the structured layers, which are trained in place.
        patched: the model; gets the refined copies of its parameters.
        epochs: passes over the batches and their scrambled copies; None takes EPOCHS or ALONE.
        given: number of passes, the first ones, whose batches are as they were given: some of these judge.
        whole: whether the part is the model behind all of its blocks, which takes smaller steps.
    Returns:
        One report, none if there is nothing to train, or no gradient of the outputs reaches it.
    """
    new = _copies(part, swaps, patched)
    patched.values |= new
    layers, dense = dict.fromkeys(swaps.values()), {*patched.values, *_biases(swaps)}
    owned = dict.fromkeys(p for layer in layers for p in layer.parameters() if p not in dense)
    trained = {str(k): p for k, p in enumerate([*owned, *new.values()])}
    if not trained or not part.passes:
        return []
    if epochs is None:
        epochs = EPOCHS if len(part.passes) > given else ALONE
    wanted, kept = _wanted(part.passes)

    def loss(number: int) -> Tensor:
        each, (kind, output) = part.passes[number], wanted(number)
        return distance(pick(each.drifted())[1], output, kind, each)

    # With few batches the same ones judge: the best weights on them are kept.
    judges = range(given)[HELD_BACK // 2 :: HELD_BACK] or range(given)
    learning = [number for number in _in_turn(given, len(part.passes)) if number not in judges] or range(given)
    modules = nn.ModuleList([part.module, *layers])
    with (
        requiring_gradients(modules, set(trained.values())),
        torch.enable_grad(),
        patched.changed() if kept else nullcontext(),
    ):
        options = HealOptions(epochs=epochs, every=given, clip=None)
        first = loss(judges[0])
        if not first.requires_grad:
            return []
        first = first.detach()  # frees its graph
        with torch.no_grad():
            start = sum([first.item(), *(loss(number).item() for number in judges[1:])]) / len(judges)
        rate = END_RATE * min(1.0, start) if whole else RATE * min(1.0, REACH * math.sqrt(start))

        def trained_at(rate: float) -> HealReport:
            optimizer = _WideAdam(list(trained.values()), rate)
            stream = Stream(learning, epochs, next(iter(trained.values())).device)
            run = _Race(part.module, loss, optimizer, trained, stream, judges, options, epochs * len(learning))
            return together(lambda: run.run(lambda *_, **__: None))

        seconds = 0.0
        for slower in range(TRIES):
            found = trained_at(rate / SLOWER**slower)
            seconds += found.seconds
            if shared(lambda: found.best_step):  # noqa: B023
                break
    # Steps follow one another, so that batches cannot be dealt: every rank takes all steps, and rank 0's count.
    follow(list(trained.values()))
    return shared(lambda: [BlockReport(part.name, found.loss_before, found.loss_after, found.steps, seconds)])


def refine_model(
    patched: Patched, passes: Sequence[Pass], config: Compression, given: int, blocks: int
) -> list[BlockReport]:  # fmt: skip
    """Train all structured layers of a model, and the norms and biases that were refined, from end to end.

    Blocks were refined without a look at those behind them; here each learns what the model's outputs need.

    Args:
        patched: the model with all of its compressed layers and refined parameters.
        passes: of the whole model.
        config: with `model_epochs`; None takes END_EPOCHS, for up to END_PARAMETERS.
        given: as for `refine`.
        blocks: number of parts that were refined; the only one was the model.
    Returns:
        One report, or none; an error of a model that gradients do not pass is a warning.
    """
    parameters = {p for layer in patched.swaps.values() for p in layer.parameters()}
    large, epochs = sum(p.numel() for p in parameters) > END_PARAMETERS, config.model_epochs
    if epochs is None:
        epochs = 0 if large or blocks < 2 else END_EPOCHS
    if not epochs or not passes:
        return []
    part = Part("", patched.model, (), tuple(passes), frozenset(patched.values))
    try:
        with without_cache(patched.model):
            return refine(part, patched.swaps, patched, epochs, given, whole=True)
    except RuntimeError as error:
        warnings.warn(f"the model is not refined from end to end: {error}", stacklevel=4)
        return []


def _wanted(passes: Sequence[Pass]) -> tuple[Callable[[int], tuple[str, Tensor]], bool]:
    """Return what gives the kind and the dense output of each pass, and whether it is kept: LIMIT bytes are."""

    @torch.no_grad()
    def found(number: int) -> tuple[str, Tensor]:
        return pick(passes[number].dense())

    first = found(0)
    if first[1].nbytes * len(passes) > LIMIT:  # a language model's logits, say
        return found, False
    return [first, *map(found, range(1, len(passes)))].__getitem__, True


def _in_turn(given: int, count: int) -> list[int]:
    """Return all numbers below a count, those of scrambled batches in turn with the given ones."""
    return sorted(range(count), key=lambda number: (number % given, number))


def _biases(swaps: Mapping[nn.Module, nn.Module]) -> set[nn.Parameter]:
    """Return the biases of dense leaves, which the structured layers have too."""
    return {bias for leaf in swaps if (bias := leaf._parameters.get("bias")) is not None}


def _copies(part: Part, swaps: Mapping[nn.Module, nn.Module], patched: Patched) -> dict[nn.Parameter, nn.Parameter]:
    """Copy the norms and biases of a block that nothing outside of it uses: vectors, of modules that stay.

    A leaf of an opened module has a view of a packed bias, which is no parameter of the block.
    """
    answering = [m for layer in swaps.values() for m in layer.modules()]
    stay = [m for m in part.module.modules() if m not in swaps and not isinstance(m, Factored)]
    views = _biases(swaps) - set(part.module.parameters())
    return {
        p: patched.values[p] if p in patched.values else nn.Parameter(p.detach().clone())
        for module in (*stay, *answering)
        for p in module._parameters.values()
        if p is not None
        and (p in views or (p.ndim == 1 and (p.is_floating_point() or p.is_complex()) and p in part.own))
    }
