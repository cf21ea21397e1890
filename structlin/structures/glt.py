"""GLT: group linear transformations with feature shuffles, block-diagonal layers whose groups grow and shrink."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import Self

from structlin.equation import modes
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, register
from structlin.fitting import linalg
from structlin.layers.linear import StructuredLinear, layer_of

# Groups that the budget search tries, as in the paper: they grow, or grow and shrink.
_GROUPS = ((1, 2), (2, 4), (1, 2, 1), (1, 2, 4))


@register
@dataclass(frozen=True)
class GLT(Structure):
    """Block-diagonal layers; between two of them a shuffle deals each group's outputs to all groups of the next.

    For two layers every block of the weight has a rank of its own, and the decomposition is the SVD of every block,
    optimal. Before them, each group keeps the leading singular vectors of its part of the weight, and refinement
    follows.
    """

    name: ClassVar[str] = "glt"
    aliases: ClassVar[tuple[str, ...]] = ("group_linear",)
    refine_steps: ClassVar[int] = 300
    groups: tuple[int, ...]
    widths: tuple[int, ...] | None = None

    def resolve(self, in_features: int, out_features: int, weight: Tensor | None = None) -> Self:
        count = len(self.groups)
        if count < 2 or min(self.groups) < 1:
            raise ValueError(f"groups={self.groups}; give two or more whole numbers from 1, one for each layer")
        if self.groups[0] > in_features or self.groups[-1] > out_features:
            raise ValueError(
                f"groups={self.groups} has more groups than a {out_features} x {in_features} matrix has columns "
                "(first) or rows (last); use fewer"
            )
        widths = (min(in_features, out_features),) * (count - 1) if self.widths is None else self.widths
        if len(widths) != count - 1 or min(widths) < 1:
            raise ValueError(f"widths={widths}; give {count - 1} whole numbers from 1, what lies between the layers")
        steps = [first * second for first, second in pairwise(self.groups)]  # a shuffle deals whole shares
        found = type(self)(self.groups, tuple(-(-w // step) * step for w, step in zip(widths, steps, strict=True)))
        rows, columns = (found._blocks(in_features, out_features)[k] for k in (0, 1))
        if found.shares()[-1] > min(rows, columns):
            most = min(rows, columns) * steps[-1]
            raise ValueError(f"widths={widths} ends with more than {most}, the most that the last layer can use")
        return found

    def shares(self) -> list[int]:
        """Return how many outputs each group of a layer gives to each group of the next, by layer."""
        assert self.widths is not None
        return [w // (a * b) for w, (a, b) in zip(self.widths, pairwise(self.groups), strict=True)]

    def _blocks(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Return the rows and columns of the blocks that the last two layers give a rank."""
        assert self.widths is not None
        before = in_features if len(self.groups) == 2 else self.widths[-2]
        return -(-out_features // self.groups[-1]), -(-before // self.groups[-2])

    def spec(self, in_features: int, out_features: int) -> Spec:
        first, *_, last = self.groups
        names = ["i1", *(f"g{k}" for k in range(1, len(self.groups) - 1)), "o1"]  # the group of each layer
        sizes = dict(zip(names, self.groups, strict=True))
        sizes |= {"i2": modes.split(in_features, first)[1], "o2": modes.split(out_features, last)[1]}
        sizes |= {f"p{k}": share for k, share in enumerate(self.shares())}
        terms, read = [], "i2"
        for k, name in enumerate(names):
            given = "o2" if k + 1 == len(names) else f"{names[k + 1]} p{k}"
            terms.append(f"{name} {given} {read}")
            read = f"p{k} {name}"
        layers = [f"group_{k}" for k in range(len(names))]
        return Spec(in_features, out_features, (equation(f"{', '.join(terms)} -> o1 o2 i1 i2", layers, sizes),))

    def decompose(self, weight: Tensor) -> list[Tensor]:
        first, last = self.groups[0], self.groups[-1]
        rows, columns = modes.split(weight.shape[0], last)[1], modes.split(weight.shape[1], first)[1]
        exact = linalg.pad_to(weight, last * rows, first * columns).to(linalg.working_dtype(weight))
        rest, factors = rearrange(exact, "o (g i) -> g o i", g=first), []  # by group of the layer at hand
        trailing: tuple[int, ...] = (columns,)
        for (_, after), share in zip(pairwise(self.groups[:-1]), self.shares()[:-1], strict=True):
            basis = _basis(rest, after * share)  # (group, what it reads, what it gives)
            dealt = rearrange(basis, "g i (p b) -> g b p i", b=after)  # each of the next groups gets of the largest
            factors.append(dealt.conj().unflatten(-1, trailing))
            trailing = (share, len(rest))
            rest = rearrange(torch.einsum("goi,gbpi->gobp", rest, dealt), "g o b p -> b o (p g)")
        grid = rearrange(rest, "q (p o) i -> p q o i", p=last)
        left, right = linalg.truncated_svd(grid, self.shares()[-1])  # (p, q, o, r), (p, q, r, i)
        factors.append(rearrange(right, "p q r i -> q p r i").unflatten(-1, trailing))
        factors.append(rearrange(left, "p q o r -> p o r q"))
        return linalg.balance(factors) if len(factors) > 2 else factors

    @classmethod
    def candidates(cls, in_features: int, out_features: int, budget: int) -> Iterator[Self]:
        for groups in _GROUPS:
            if groups[0] <= in_features and groups[-1] <= out_features:
                found = _widest(groups, in_features, out_features, budget)
                if found is not None:
                    yield cls(groups, found)


def _basis(rest: Tensor, count: int) -> Tensor:
    """Return the leading right vectors (g, i, count) of matrices (g, o, i), orthonormal; a tight frame beyond i."""
    size = rest.shape[-1]
    vectors = linalg.leading_vectors(rest.mH @ rest, min(count, size))
    if count <= size:
        return vectors
    # Copies of some vectors would stay copies under refinement; a rotation into more dimensions makes all different.
    drawn = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return vectors @ torch.linalg.qr(drawn)[0].mT.to(vectors)


def _widest(groups: Sequence[int], in_features: int, out_features: int, budget: int) -> tuple[int, ...] | None:
    """Return the largest inner widths within a budget, equal but for what the shuffles round up."""
    low, high = 0, min(in_features, out_features)
    found = None
    while low < high:
        middle = (low + high + 1) // 2
        try:
            member = GLT(tuple(groups), (middle,) * (len(groups) - 1)).resolve(in_features, out_features)
        except ValueError:  # wider than the last layer can use
            high = middle - 1
            continue
        if member.spec(in_features, out_features).num_parameters <= budget:
            low, found = middle, member.widths
        else:
            high = middle - 1
    return found


@layer_of(GLT)
class GLTLinear(StructuredLinear):
    """Apply a chain of group linear transformations: layer l maps each of its groups alone, and a shuffle follows.

    Output p of group g of a layer, p = (group of the next layer, position), is read by that group of the next.
    Cost: sum_l width_l-1 width_l / groups_l parameters, and twice as many FLOPs per token.

    Args:
        groups: of each layer, two or more; (1, 2, 4) grow as in the paper's expansion, (4, 2, 1) shrink.
        widths: between the layers, rounded up so that each group gives all next groups the same number; None takes
            the smaller of in_features and out_features.
    Raises:
        ValueError: if a number is out of range, or the last width exceeds what the last layer can use.
    Source: Mehta et al. 2021, DeLighT: deep and light-weight transformer; Mehta et al. 2018 (pyramidal recurrent
        units). The activations between the layers of the paper are left out: this is a linear map.
    Example:
        >>> GLTLinear(64, 64, groups=(2, 4), widths=(32,)).num_parameters
        1536
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        groups: tuple[int, ...], widths: tuple[int, ...] | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        structure = GLT(groups, widths)
        super().__init__(in_features, out_features, bias, structure=structure, device=device, dtype=dtype)
