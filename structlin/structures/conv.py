"""The kernel of a convolution, (out, in * taps) as a matrix, by tensor train, CP or Tucker over its modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Family, Structure, check_range, register
from structlin.fitting import linalg, tensors, trains
from structlin.structures.cp import CP
from structlin.structures.lowrank import LowRank
from structlin.structures.tt import TensorTrain
from structlin.structures.tucker import Tucker

Form = Literal["tt", "cp", "tucker"]
_SKEW = (1.0, 0.5, 2.0)  # rank of the output's side relative to that of the input's, each as a share of its channels
_STEPS = 4096  # of a search over shares


@register
@dataclass(frozen=True)
class ConvKernel(Structure):
    """W[o, (i k1 k2 ..)], the columns ordered as a convolution's weight flattened: channel first, then taps.

    Each form runs as a chain of small convolutions (`StructuredConv`). Axes with a single tap have no mode.

    | form | W[o, i, k1, k2] | chain |
    |---|---|---|
    | "tt" | A[o, r1] B[r1, k1, r2] C[r2, k2, r3] D[r3, i] | 1 x 1, one axis after another, 1 x 1 |
    | "cp" | sum_r a[o, r] b[k1, r] c[k2, r] d[i, r] | 1 x 1, each axis for each channel alone, 1 x 1 |
    | "tucker" | A[o, p] K[p, q, k1, k2] B[q, i] | 1 x 1, p x q channels with all taps, 1 x 1 |
    """

    name: ClassVar[str] = "conv"
    aliases: ClassVar[tuple[str, ...]] = ("convolution",)
    sized: ClassVar[bool] = False  # a ratio needs the kernel: see `over_kernel`
    form: str
    kernel: tuple[int, ...]
    rank: int | tuple[int, ...]

    @property
    def refine_steps(self) -> int:  # type: ignore[override]
        """CP has no closed form."""
        return 300 if self.form == "cp" else 0

    @property
    def taps(self) -> tuple[int, ...]:
        """The modes of the kernel."""
        return tuple(size for size in self.kernel if size > 1)

    def channels(self, in_features: int) -> int:
        """Return the input channels; features that are no multiple of the taps are padded."""
        return -(-in_features // math.prod(self.kernel))

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r} is unknown; use one of {get_args(Form)}")
        if not self.kernel or min(self.kernel) < 1:
            raise ValueError(f"kernel={self.kernel} must hold one size of 1 or more for each axis")
        channels = self.channels(in_features)
        if self.form == "cp":
            sizes = (out_features, channels, *self.taps)
            if not isinstance(self.rank, int):
                raise ValueError(f"rank={self.rank}; a sum of rank-1 terms has one rank")
            largest = math.prod(sizes) // max(sizes)
            check_range("rank", self.rank, largest, f", which any tensor with modes {sizes} has; use a smaller rank")
            return self
        limits = self.limits(channels, out_features)
        if isinstance(self.rank, int):
            check_range("rank", self.rank, max(limits), ", the most of any bond; use a smaller rank")
        ranks = (self.rank,) * len(limits) if isinstance(self.rank, int) else self.rank
        if len(ranks) != len(limits) or min(ranks) < 1:
            raise ValueError(f"rank={self.rank} must give each of {len(limits)} bonds a rank from 1")
        lowered = self.lowered([min(pair) for pair in zip(ranks, limits, strict=True)])
        if not isinstance(self.rank, int) and lowered != ranks:
            raise ValueError(f"rank={self.rank} has a rank above what its kernel can have, {lowered}")
        return type(self)(self.form, self.kernel, lowered)

    def spec(self, in_features: int, out_features: int) -> Spec:
        taps = [f"i{k + 2}" for k in range(len(self.taps))]
        sizes = {"o": out_features, "i1": self.channels(in_features), **dict(zip(taps, self.taps, strict=True))}
        bonds = [f"r{k}" for k in range(1 if isinstance(self.rank, int) else len(self.rank))]
        sizes |= dict(zip(bonds, [self.rank] if isinstance(self.rank, int) else self.rank, strict=True))
        if self.form == "cp":
            terms = ["o r0", *(f"{tap} r0" for tap in taps), "i1 r0"]
        elif self.form == "tt":
            terms = ["o r0", *(f"r{k} {tap} r{k + 1}" for k, tap in enumerate(taps)), f"{bonds[-1]} i1"]
        else:
            terms = ["o r0", " ".join(["r0 r1", *taps]), "r1 i1"]
        middle = [f"kernel_{k}" for k in range(len(terms) - 2)] if self.form != "tucker" else ["kernel"]
        text = f"{', '.join(terms)} -> {' '.join(['o', 'i1', *taps])}"
        return Spec(in_features, out_features, (equation(text, ["out_0", *middle, "in_0"], sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        out_features, in_features = weight.shape
        channels = self.channels(in_features)
        padded = linalg.pad_to(weight, out_features, channels * math.prod(self.kernel))
        tensor = padded.reshape(out_features, channels, *self.taps).to(linalg.working_dtype(weight))
        if self.form == "cp":
            assert isinstance(self.rank, int)
            pairs = tensor.unsqueeze(-1) if tensor.ndim % 2 else tensor  # its modes are taken in pairs
            o, i, *taps = tensors.orthogonal_terms(pairs, self.rank)
            if tensor.ndim % 2:
                o = o * taps.pop()  # (1, rank)
            return linalg.balance([o, *taps, i])
        assert isinstance(self.rank, tuple)
        if self.form == "tt":
            first, *middle, last = trains.tt_svd(tensor.movedim(1, -1), ranks=self.rank)
            return linalg.balance([first.squeeze(0), *middle, last.squeeze(-1)])
        p, q = self.rank
        core, (left, right, *others) = tensors.hosvd(tensor.flatten(2), ranks=(p, q, math.prod(self.kernel)))
        for basis in others:  # of the taps, which keep their full rank
            core = core @ basis.mT
        return linalg.balance([left, core.reshape(p, q, *self.taps), right.mT])

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        return iter(())

    def limits(self, channels: int, out_features: int) -> list[int]:
        """Return the most that each bond may have, whatever the others."""
        if self.form == "tucker":
            return [
                min(out_features, channels * math.prod(self.taps)),
                min(channels, out_features * math.prod(self.taps)),
            ]
        sizes = (out_features, *self.taps, channels)
        return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]

    def lowered(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Lower each rank to what its neighbours can reach: no tensor has more."""
        steps = self.taps if self.form == "tt" else (math.prod(self.taps),)
        found = list(ranks)
        for order in (range(len(steps)), reversed(range(len(steps)))):
            for k in order:
                found[k + 1] = min(found[k + 1], found[k] * steps[k])
                found[k] = min(found[k], found[k + 1] * steps[k])
        return tuple(found)


@dataclass(frozen=True)
class KernelFamily:
    """Forms of one kernel, as a family whose sizes a ratio finds."""

    form: Form
    kernel: tuple[int, ...]

    @property
    def name(self) -> str:
        """The form, as in a rule."""
        return self.form

    @property
    def refine_steps(self) -> int:
        """Default number of refinement steps of the members."""
        return ConvKernel(self.form, self.kernel, 1).refine_steps

    def candidates(self, in_features: int, out_features: int, budget: int) -> Iterator[Structure]:
        """Yield the largest members of at most `budget` parameters, for several shares of the two sides."""
        plain = ConvKernel(self.form, self.kernel, 1)
        sizes = (out_features, plain.channels(in_features), *plain.taps)
        if self.form == "cp":
            rank = min(budget // sum(sizes), math.prod(sizes) // max(sizes))
            if rank >= 1:
                yield ConvKernel(self.form, self.kernel, rank)
            return
        seen = set[ConvKernel]()
        for skew in _SKEW:
            for inner in (1.0, 2.0) if self.form == "tt" and len(plain.taps) > 1 else (1.0,):
                low, high = 0, 3 * _STEPS  # sizes grow with the step
                while high - low > 1:
                    step = (low + high) // 2
                    size = self._member(step, skew, inner, sizes).spec(in_features, out_features).num_parameters
                    low, high = (step, high) if size <= budget else (low, step)
                found = self._member(low, skew, inner, sizes)
                if found not in seen and found.spec(in_features, out_features).num_parameters <= budget:
                    seen.add(found)
                    yield found

    def _member(self, step: int, skew: float, inner: float, sizes: Sequence[int]) -> ConvKernel:
        """Return ranks that are a share of the channels; those inside are a multiple of the outer ones' mean."""
        plain = ConvKernel(self.form, self.kernel, 1)
        limits = plain.limits(sizes[1], sizes[0])
        p, q = (step / _STEPS * size * root for size, root in zip(sizes, (skew**0.5, skew**-0.5), strict=False))
        ranks = [p, *[inner * math.sqrt(p * q)] * (len(limits) - 2), q]
        lowered = plain.lowered([max(1, min(round(r), most)) for r, most in zip(ranks, limits, strict=True)])
        return ConvKernel(self.form, self.kernel, lowered)


def over_kernel(family: Family, kernel: tuple[int, ...]) -> Family:
    """Return what a family is for the kernel of a convolution: the modes of TT, CP and Tucker are those of the kernel.

    Any other family treats the weight as a matrix (out, in * taps).
    """
    forms: dict[Family, Form] = {TensorTrain: "tt", CP: "cp", Tucker: "tucker"}
    return KernelFamily(forms[family], kernel) if family in forms else family


def of_kernel(kernel: tuple[int, ...]) -> tuple[Family, ...]:
    """Return what "auto" chooses from for a kernel of more than one tap: structures that run as small convolutions."""
    return LowRank, KernelFamily("tucker", kernel), KernelFamily("tt", kernel)
