"""Butterfly: one block-diagonal stage per digit of a mixed radix, each over all other digits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Equation, Spec, equation
from structlin.equation.structure import Structure, register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of

Digits = tuple[int, ...]

_SPLITS = 4  # candidates that the budget search passes on to the fit


def chain_equation(digits: Sequence[int], in_modes: Digits, inner_modes: Digits, out_modes: Digits) -> Equation:
    """Write a product of stages; stage s maps digits[s] (0: most significant), one block per value of the others.

    Factor `stage_s` has the other digits as leading modes, then the new and the old digit. A digit has its size of
    `inner_modes` between its first and its last stage.
    """
    count = len(in_modes)
    current = [f"i{d + 1}" for d in range(count)]  # the mode that stands for each digit: i1, then m0, .., then o1
    sizes = dict(zip(current, in_modes, strict=True))
    terms = []
    final = {digit: s for s, digit in enumerate(digits)}  # the last stage of each digit
    for s, digit in enumerate(digits):
        last = final[digit] == s
        new = f"o{digit + 1}" if last else f"m{s}"
        sizes[new] = out_modes[digit] if last else inner_modes[digit]
        others = [mode for d, mode in enumerate(current) if d != digit]
        terms.append(" ".join([*others, new, current[digit]]))
        current[digit] = new
    outer = " ".join([*current, *(f"i{d + 1}" for d in range(count))])
    return equation(f"{', '.join(terms)} -> {outer}", [f"stage_{s}" for s in range(len(digits))], sizes)


def digit_modes(
    size: int, other: int, radix: int | None, given: Digits | None, given_other: Digits | None
) -> Digits:  # fmt: skip
    """Return the digits of one side: those given, else as many as given for the other side, else those of the radix."""
    if given is not None:
        if not given or min(given) < 1 or math.prod(given) < size:
            raise ValueError(
                f"modes={given} cover {math.prod(given)}, less than the size {size}; use larger modes from 1"
            )
        return tuple(given)
    if given_other is not None:
        return modes.balanced_modes(size, len(given_other))
    if radix is None:
        return modes.balanced_modes(size, 2)
    return modes.same_length(modes.digits(size, radix), modes.digits(other, radix))[0]


def both_modes(
    in_features: int, out_features: int, radix: int | None, in_modes: Digits | None, out_modes: Digits | None
) -> tuple[Digits, Digits]:
    """Return the digits of input and output, equal in number."""
    found_in = digit_modes(in_features, out_features, radix, in_modes, out_modes)
    found_out = digit_modes(out_features, in_features, radix, out_modes, in_modes)
    if len(found_in) != len(found_out):
        raise ValueError(f"in_modes={found_in} and out_modes={found_out} differ in length; use as many for both")
    return found_in, found_out


class DigitStructure(Structure):
    """A structure whose stages map the digits of input and output."""

    in_modes: Digits | None
    out_modes: Digits | None

    def digits(self) -> tuple[Digits, Digits]:
        """Return output and input digits of a resolved structure."""
        assert self.out_modes
        assert self.in_modes
        return self.out_modes, self.in_modes


@register
@dataclass(frozen=True)
class Butterfly(DigitStructure):
    """Butterfly matrices of mixed radix; the decomposition is the hierarchical projection, exact on true butterflies.

    The last digit (stride 1) is mapped first, as in Dao et al. 2020. `radix=2` is the classic butterfly; None takes two
    digits near the square root, the fastest choice in plain torch.
    """

    name: ClassVar[str] = "butterfly"
    radix: int | None = None
    in_modes: Digits | None = None
    out_modes: Digits | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        in_modes, out_modes = both_modes(in_features, out_features, self.radix, self.in_modes, self.out_modes)
        return type(self)(radix=self.radix, in_modes=in_modes, out_modes=out_modes)

    def spec(self, in_features: int, out_features: int) -> Spec:
        out_modes, in_modes = self.digits()
        order = range(len(in_modes))[::-1]
        return Spec(in_features, out_features, (chain_equation(order, in_modes, (), out_modes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        out_modes, in_modes = self.digits()
        padded = linalg.pad_to(weight, math.prod(out_modes), math.prod(in_modes))
        return linalg.butterfly_projection(padded, out_modes, in_modes)

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        # Two digits: the splits of the (barely padded) sizes with the most parameters within the budget.
        out_size, in_size = modes.padded(out_features, 2), modes.padded(in_features, 2)
        options = [
            (i1 * o2 * i2 + i1 * o1 * o2, o1, i1)  # parameters: stages (i1, o2, i2) and (o2, o1, i1)
            for o1, o2 in modes.pairs(out_size)
            for i1, i2 in modes.pairs(in_size)
        ]
        fitting = sorted(option for option in options if option[0] <= budget)
        for _, o1, i1 in fitting[-_SPLITS:]:
            yield cls(in_modes=(i1, in_size // i1), out_modes=(o1, out_size // o1))


@layer_of(Butterfly)
class ButterflyLinear(StructuredLinear):
    """Apply a product of block-diagonal stages, one per digit: W = F_1 F_2 ... F_k, the last digit mapped first.

    Cost: n sum(radices) parameters and twice as many FLOPs per token for a square layer of size n.

    Args:
        radix: size of the digits (mixed where it does not divide); None takes two digits near the square root.
        in_modes: the digits of the input, most significant first, product in_features or more; overrides radix.
        out_modes: the digits of the output, as many.
    Raises:
        ValueError: if radix is below 2, or modes do not cover the layer.
    Source: Dao et al. 2020, Kaleidoscope; Dao et al. 2019, Learning fast algorithms for linear transforms.
    Example:
        >>> ButterflyLinear(64, 64, radix=2).num_parameters
        768
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        radix: int | None = None, in_modes: Digits | None = None, out_modes: Digits | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Butterfly(radix=radix, in_modes=in_modes, out_modes=out_modes)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
