"""Convolve through an equation: each factor over the kernel's modes is a small convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from structlin.equation.spec import Equation, Modes, Spec, contraction
from structlin.runtime.eager import constant

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Stage:
    """A convolution with one factor.

    Args:
        factor: its index in the equation.
        split: its shape once an input mode of all channels and taps is divided.
        order: of its axes: those shared with the channels so far and kept, new ones, summed ones, taps.
        shape: of the convolution's weight, (out channels, in channels per group, *taps).
        groups: of the convolution.
        axes: axes of space whose stride, padding and dilation the stage takes: those that it convolves along, and for
            the first stage those without taps.
    """

    factor: int
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    groups: int
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Steps:
    """Stride, padding and dilation of a convolution, per axis of space."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def along(self, axes: tuple[int, ...]) -> Steps:
        """Return the steps of a stage that convolves along these axes only."""

        def chosen(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else other for axis, value in enumerate(values))

        return Steps(chosen(self.stride, 1), chosen(self.padding, 0), chosen(self.dilation, 1))


@constant
def small_convolutions(spec: Spec, kernel: tuple[int, ...]) -> tuple[tuple[Stage, ...], ...] | None:
    """Read each equation as a chain of convolutions.

    The chain is worth it if its weights have fewer entries than the kernel: each is used once at every position.

    Args:
        spec: of a matrix (out, in * taps), whose columns are the channels, then the taps along each axis.
        kernel: the taps along each axis of space.
    Returns:
        The stages of each equation in the order in which they run, or None where an equation has no such chain, or
        one that costs as much as the convolution with the dense kernel.
    """
    return _planned(spec, kernel)


@lru_cache(1024)
def _planned(spec: Spec, kernel: tuple[int, ...]) -> tuple[tuple[Stage, ...], ...] | None:
    found = tuple(_stages(eq, spec, kernel) for eq in spec.equations)
    cost = sum(math.prod(stage.shape) for stages in found for stage in stages or ())
    return None if None in found or cost >= spec.in_features * spec.out_features else found  # type: ignore[return-value]


def _stages(eq: Equation, spec: Spec, kernel: tuple[int, ...]) -> tuple[Stage, ...] | None:
    axes = [axis for axis, size in enumerate(kernel) if size > 1]
    taps = dict(zip((f"tap{axis}" for axis in axes), axes, strict=True))
    sizes = dict(eq.sizes) | {tap: kernel[axis] for tap, axis in taps.items()}
    channels = spec.in_features // math.prod(kernel)
    if (eq.padded_in, eq.padded_out) != (spec.in_features, spec.out_features):
        return None
    if len(eq.inputs) == 1:  # one mode of all channels and taps
        renamed = {eq.inputs[0]: ("channel", *taps)}
    elif eq.shape(eq.inputs) == (channels, *(kernel[axis] for axis in axes)):
        renamed = {mode: (name,) for mode, name in zip(eq.inputs, ("channel", *taps), strict=True)}
    else:
        return None
    sizes["channel"] = channels
    modes = [tuple(name for mode in factor.modes for name in renamed.get(mode, (mode,))) for factor in eq.factors]
    return _chain(modes, eq.outputs, taps, sizes, len(kernel))


def _chain(
    modes: list[Modes], outputs: Modes, taps: dict[str, int], sizes: dict[str, int], dims: int
) -> tuple[Stage, ...] | None:
    left, stages = list(range(len(modes))), list[Stage]()
    idle = tuple(axis for axis in range(dims) if axis not in taps.values())
    state: Modes = ("channel",)
    while left:
        near = [k for k in left if set(modes[k]) & set(state)]
        if not near:
            return None
        # Taps come before outputs: the bonds have fewer channels.
        k = min(near, key=lambda k: (bool(set(modes[k]) & set(outputs)), not set(modes[k]) & set(taps)))
        left.remove(k)
        mine = [tap for tap in taps if tap in modes[k]]
        needed = {*outputs, *(mode for other in left for mode in modes[other])}
        batch, new, free, summed = contraction([m for m in modes[k] if m not in taps], state, needed)
        if free or state != batch + summed or any(tap in needed for tap in mine):
            return None
        groups = math.prod(sizes[mode] for mode in batch)
        kernel = [1] * dims
        for tap in mine:
            kernel[taps[tap]] = sizes[tap]
        shape = (groups * math.prod(sizes[m] for m in new), math.prod(sizes[m] for m in summed), *kernel)
        order = tuple(modes[k].index(mode) for mode in (*batch, *new, *summed, *mine))
        split = tuple(sizes[mode] for mode in modes[k])
        stages.append(
            Stage(k, split, order, shape, groups, tuple(taps[tap] for tap in mine) + (() if stages else idle))
        )
        state = batch + new
    return tuple(stages) if state == outputs else None


def convolve(
    spec: Spec,
    factors: Sequence[Tensor],
    chains: Sequence[Sequence[Stage]],
    x: Tensor,
    bias: Tensor | None,
    steps: Steps,
) -> Tensor:
    """Convolve (..., in, *space) with the kernel that factors stand for, as `small_convolutions` planned it."""
    dims = len(steps.stride)
    total = None
    for (_, part), stages in zip(spec.split(factors), chains, strict=True):
        y = x
        for number, stage in enumerate(stages):
            weight = part[stage.factor].reshape(stage.split).permute(stage.order).reshape(stage.shape)
            here = steps.along(stage.axes)
            last = bias if total is None and number == len(stages) - 1 else None
            y = _CONVOLUTIONS[dims](y, weight, last, here.stride, here.padding, here.dilation, stage.groups)
        total = y if total is None else total + y
    assert total is not None
    return total


def convolve_dense(x: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps) -> Tensor:
    """Convolve (..., in, *space) with a kernel (out, in, *taps)."""
    convolution = _CONVOLUTIONS[len(steps.stride)]
    return convolution(x, weight, bias, steps.stride, steps.padding, steps.dilation)
