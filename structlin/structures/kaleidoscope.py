"""Kaleidoscope matrices: (B B*)^width, a butterfly times its mirror image, within an expanded corner."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec
from structlin.equation.structure import register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of
from structlin.structures.butterfly import Digits, DigitStructure, both_modes, chain_equation

_SKEW = 8  # the largest ratio of two digits that the budget search tries
_WIDTH = 3  # longer chains are hard to fit (benchmarks/results/optimisers.md)


@register
@dataclass(frozen=True)
class Kaleidoscope(DigitStructure):
    """K-matrices (B B*)^w_e with merged stages: digits are mapped in the order 1 .. k .. 1 .. k .. 1.

    B*'s last stage and B's first map the same digit, so they merge into one, as do neighbours across the powers: width
    w over two digits has 2 w + 1 stages. A half width is one more butterfly, on the larger side: the stages of the
    adjoint are the adjoint stages. The inner size of a digit is the larger of input and output. `expansion` multiplies
    that of the first digit, which gives the paper's S E S^T without the rows and columns that S drops.

    There is no closed form: refinement starts from the butterfly projection with identity stages before it.
    """

    name: ClassVar[str] = "kmatrix"
    aliases: ClassVar[tuple[str, ...]] = ("kaleidoscope",)
    refine_steps: ClassVar[int] = 500
    repeats: ClassVar[tuple[str, ...]] = ("width",)
    width: float = 1  # in steps of a half
    expansion: int = 1
    radix: int | None = None
    in_modes: Digits | None = None
    out_modes: Digits | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        if not self.width >= 1 or 2 * self.width % 1 or self.expansion < 1:
            text = f"width={self.width}, expansion={self.expansion}; both are whole numbers from 1, a width may add .5"
            raise ValueError(text)
        width = self.width if self.width % 1 else int(self.width)
        in_modes, out_modes = both_modes(in_features, out_features, self.radix, self.in_modes, self.out_modes)
        return type(self)(width, self.expansion, self.radix, in_modes, out_modes)

    def stages(self) -> list[int]:
        """Return the digit that each stage maps, in order of application."""
        last = len(self.digits()[0]) - 1
        whole = [0] + [*range(1, last + 1), *range(last - 1, -1, -1)] * int(self.width)
        half = [*range(1, last + 1)] if self.width % 1 else []
        return whole + half if self._grows() else half[::-1] + whole

    def _grows(self) -> bool:
        out_modes, in_modes = self.digits()
        return math.prod(out_modes) > math.prod(in_modes)

    def inner_modes(self) -> Digits:
        """Return the sizes of the digits between the stages."""
        first, *rest = (max(pair) for pair in zip(*self.digits(), strict=True))
        return (self.expansion * first, *rest)

    def spec(self, in_features: int, out_features: int) -> Spec:
        out_modes, in_modes = self.digits()
        eq = chain_equation(self.stages(), in_modes, self.inner_modes(), out_modes)
        return Spec(in_features, out_features, (eq,))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        out_modes, in_modes = self.digits()
        if self._grows():
            # Widening identities would give the projection zero columns, a saddle point that refinement cannot leave.
            mirror = replace(self, in_modes=out_modes, out_modes=in_modes)
            return [stage.mT for stage in reversed(mirror.decompose(weight.mT))]
        dtype = linalg.working_dtype(weight)
        eq = self.spec(weight.shape[1], weight.shape[0]).equations[0]
        shapes = [eq.shape(factor.modes) for factor in eq.factors]  # (other digits, new, old)
        before, last = shapes[: -len(in_modes)], shapes[-len(in_modes) :]  # the last stages, k .. 1, are a butterfly's
        identities = [_repeated(*shape[-2:]).to(dtype).to(weight.device).expand(shape) for shape in before]
        # The identities put each input digit first in its inner size: project the weight embedded in the same way. What
        # stands behind it are copies that nothing reads yet; zeros there, at both ends, would be a saddle point.
        inner = tuple(shape[-1] for shape in reversed(last))
        padded = linalg.pad_to(weight.to(dtype), math.prod(out_modes), math.prod(in_modes)).reshape(-1, *in_modes)
        embedded = padded.new_zeros(math.prod(out_modes), *inner)  # (out, inner digits)
        embedded[(slice(None), *map(slice, in_modes))] = padded
        return linalg.balance([*identities, *linalg.butterfly_projection(embedded.flatten(1), out_modes, inner)])

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        """Yield members over two digits: the most even digits and the largest size, for widths to 3, then for any."""
        out_splits, in_splits = _splits(out_features), _splits(in_features)
        pairs = [cls(in_modes=in_modes, out_modes=out_modes) for out_modes in out_splits for in_modes in in_splits]
        smallest = min(math.prod(pair.inner_modes()) for pair in pairs)  # no wider inside than needed
        options = []  # (parameters, width, out_modes, in_modes)
        for pair in pairs:
            one, half, two = (
                replace(pair, width=w).spec(in_features, out_features).num_parameters for w in (1, 1.5, 2)
            )
            if one <= budget and math.prod(pair.inner_modes()) == smallest:
                step = two - one  # parameters of a further power of B B*
                more = (budget - one) // step
                widest = 1.5 + more if half + more * step <= budget else 1 + more
                for width in {widest, min(widest, _WIDTH)}:
                    size = (half if width % 1 else one) + (int(width) - 1) * step
                    options.append((size, width, *pair.digits()))
        options.sort(reverse=True)
        chosen = []
        for some in ([option for option in options if option[1] <= _WIDTH], options):
            if some:
                chosen += [min(some, key=lambda option: max(option[2]) + max(option[3])), some[0]]
        for _, width, out_modes, in_modes in dict.fromkeys(chosen):
            yield cls(width=width, in_modes=in_modes, out_modes=out_modes)


def _repeated(rows: int, columns: int) -> Tensor:
    """Return an identity whose rows begin again after the last column."""
    return torch.eye(columns, dtype=torch.float64)[torch.arange(rows) % columns]


def _splits(features: int) -> list[Digits]:
    """Return the digit pairs of the padded size in which neither digit is much larger than the other."""
    size = modes.padded(features, 2)
    return [pair for pair in modes.pairs(size) if max(pair) <= _SKEW * min(pair)] or [(1, size)]


@layer_of(Kaleidoscope)
class KaleidoscopeLinear(StructuredLinear):
    """Apply a kaleidoscope matrix (B B*)^width_expansion with merged stages.

    Cost: 2 width + 1 stages over two digits (a, b), alternately n a and n b parameters for a square layer of size
    n = a b, and twice as many FLOPs per token.

    Args:
        width: the power of B B*, in steps of a half: 1.5 is B* B B* or B B* B.
        expansion: the factor by which the inner size exceeds the outer.
        radix, in_modes, out_modes: as for `ButterflyLinear`.
    Raises:
        ValueError: if width or expansion is below 1, width no multiple of a half, radix below 2, or modes do not
            cover the layer.
    Source: Dao et al. 2020, Kaleidoscope: an efficient, learnable representation for all structured linear maps.
        Blocks of any radix and merged stages are ours (a superset with more parameters).
    Example:
        >>> KaleidoscopeLinear(64, 64, width=2).num_parameters
        2560

    `KMatrix`, the paper's word, is another name of this class.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        width: float = 1, expansion: int = 1, radix: int | None = None, in_modes: Digits | None = None,
        out_modes: Digits | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = Kaleidoscope(width, expansion, radix, in_modes, out_modes)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)


KMatrix = KaleidoscopeLinear
