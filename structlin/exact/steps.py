"""Put steps, each of which maps one digit of an index, into the stages of a K-matrix in the fewest sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structlin.structures.butterfly import Digits
from structlin.structures.kaleidoscope import KaleidoscopeLinear


@dataclass(frozen=True)
class Step:
    """Map one digit of the index, for each value of the other digits by a matrix of its own.

    Args:
        digit: its number, 0 for the most significant.
        blocks: (other digits .., new, old), where an axis of size 1 stands for all values of its digit.
    """

    digit: int
    blocks: Tensor

    def reads(self, count: int) -> set[int]:
        """Return which of so many digits the blocks depend on, or map."""
        others = [d for d in range(count) if d != self.digit]
        sizes = self.blocks.shape[:-2]
        return {self.digit} | {d for d, size in zip(reversed(others), reversed(sizes), strict=False) if size > 1}

    def inverse(self) -> Step:
        """Return the step that undoes this one."""
        return Step(self.digit, torch.linalg.inv(self.blocks))

    def mirrored(self) -> Step:
        """Return the step of the transposed matrices."""
        return Step(self.digit, self.blocks.mT)


Program = list[Step]


def inverse(steps: Sequence[Step]) -> Program:
    """Undo steps, the last first."""
    return [step.inverse() for step in reversed(steps)]


def values(sizes: Digits, digit: int) -> list[Tensor]:
    """Return what each digit is, shaped to broadcast over (other digits .., this digit)."""
    order = [d for d in range(len(sizes)) if d != digit] + [digit]
    found: list[Tensor] = [torch.empty(0)] * len(sizes)
    for axis, d in enumerate(order):
        found[d] = torch.arange(sizes[d]).view([-1 if k == axis else 1 for k in range(len(sizes))])
    return found


def moved(sizes: Digits, digit: int, new: Tensor) -> Step:
    """Return the step that replaces a digit by a function of all digits, given as `values` and one to one."""
    return Step(digit, torch.nn.functional.one_hot(new % sizes[digit], sizes[digit]).mT.double())


def scaled(sizes: Digits, digit: int, scale: Tensor) -> Step:
    """Return the step that multiplies entry k of a vector by `scale[k]`, put into the stage of a digit."""
    return Step(digit, torch.diag_embed(scale.reshape(sizes).movedim(digit, -1)))


def to_layer(
    steps: Iterable[Step], sizes: Digits, expansion: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> KaleidoscopeLinear:
    """Write steps as a K-matrix: each goes into the next stage of its digit, times what stands there already.

    Args:
        steps: over the inner digits, in the order of application.
        sizes: the digits of input and output.
        expansion: factor of the first digit inside. The input takes its first values, and so does the output.
        dtype: of the layer.
        device: of the layer.
    Returns:
        A layer without bias, of the least width that holds the steps in their order.
    """
    inner, count = (expansion * sizes[0], *sizes[1:]), len(sizes)
    last = count - 1
    sweep = [*range(last), *range(last, 0, -1)] or [0]  # digits of one power of B B*, the 0 at its end left out
    stages: dict[int, Tensor] = {}
    latest = [0] * count  # the last stage that maps a digit, ...
    read = [0] * count  # ... and the last that reads it
    for step in steps:
        reads = step.reads(count)
        # Behind what maps a digit that it reads, and what reads the digit that it maps; all other steps commute.
        place = max(read[step.digit], *(latest[d] for d in reads))
        while sweep[place % len(sweep)] != step.digit:
            place += 1
        known = stages.get(place)
        stages[place] = step.blocks if known is None else _product(step.blocks, known)
        latest[step.digit] = place
        for d in reads:
            read[d] = max(read[d], place)
    width = max(1, -(-max(latest) // len(sweep)))
    layer = KaleidoscopeLinear(
        math.prod(sizes), math.prod(sizes), bias=False, width=width, expansion=expansion, in_modes=sizes,
        out_modes=sizes, dtype=dtype, device=device,
    )  # fmt: skip
    with torch.no_grad():
        for number, factor in enumerate(layer.factors):
            digit = sweep[number % len(sweep)]
            blocks = stages.get(number, torch.eye(inner[digit], dtype=torch.float64))
            factor.copy_(blocks[..., : factor.shape[-2], : factor.shape[-1]].expand(factor.shape))
    return layer


def _product(second: Tensor, first: Tensor) -> Tensor:
    dtype = torch.promote_types(second.dtype, first.dtype)
    return second.to(dtype) @ first.to(dtype)
