"""Each structure in two to five lines of einsum, bmm and reshape, as the repository of a paper would write it.

A structure may have several such forms; `simple_subjects` builds them all, and a table shows the fastest at each cell.
A form is a function of the input (tokens, padded inputs) and the factors, made for one equation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from _speed import Subject
from torch import Tensor, nn

from structlin.equation.spec import Equation, Modes
from structlin.equation.structure import Structure
from structlin.layers.linear import StructuredLinear
from structlin.structures import (
    CP,
    GLT,
    PHM,
    Blast,
    Butterfly,
    ConvKernel,
    Dense,
    Kaleidoscope,
    Kronecker,
    KroneckerChain,
    LowRank,
    Monarch,
    Shapeshifter,
    Sum,
    TensorTrain,
    Tucker,
)

Form = Callable[..., Tensor]  # (equation, x, *factors) -> (tokens, padded outputs)


# Forms for any equation ------------------------------------------------------------------------------------------


def dense_first(eq: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """Multiply the factors, then the input with the dense matrix."""
    weight = _einsum(eq, (*eq.outputs, *eq.inputs), [(f.modes, t) for f, t in zip(eq.factors, factors, strict=True)])
    return F.linear(x, weight.reshape(eq.padded_out, eq.padded_in))


def last_first(eq: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """One einsum per factor, the last factor first."""
    given = [(f.modes, t) for f, t in zip(eq.factors, factors, strict=True)]
    rows = (("n", *eq.inputs), x.reshape(-1, *eq.shape(eq.inputs)))
    return _einsum(eq, ("n", *eq.outputs), [rows, *given[::-1]]).reshape(len(x), -1)


def first_first(eq: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """One einsum per factor, the first factor first."""
    given = [(f.modes, t) for f, t in zip(eq.factors, factors, strict=True)]
    rows = (("n", *eq.inputs), x.reshape(-1, *eq.shape(eq.inputs)))
    return _einsum(eq, ("n", *eq.outputs), [rows, *given]).reshape(len(x), -1)


def _einsum(eq: Equation, result: Modes, operands: Sequence[tuple[Modes, Tensor]]) -> Tensor:
    """Contract the operands from left to right, two at a time."""
    letter = {mode: chr(97 + k) for k, mode in enumerate(("n", *eq.size))}
    (modes, value), *rest = operands
    for k, (others, operand) in enumerate(rest):
        needed = {*result, *(mode for later, _ in rest[k + 1 :] for mode in later)}
        kept = [mode for mode in dict.fromkeys((*modes, *others)) if mode in needed] if k < len(rest) - 1 else result
        a, b, c = ("".join(letter[mode] for mode in each) for each in (modes, others, kept))
        modes, value = tuple(kept), torch.einsum(f"{a},{b}->{c}", value, operand)
    return value if rest else value.permute([modes.index(mode) for mode in result])


# Sums of Kronecker products --------------------------------------------------------------------------------------


def left_folded(_: Equation, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One product per factor: right for all terms, then left with the sum over terms inside."""
    (terms, o1, i1), (_, o2, i2) = left.shape, right.shape
    y = x.reshape(-1, i2) @ right.reshape(-1, i2).T  # (n i1, t o2)
    y = y.reshape(-1, i1, terms, o2).transpose(1, 2).reshape(len(x), terms * i1, o2)
    return (left.transpose(0, 1).reshape(o1, -1) @ y).reshape(len(x), -1)


def right_folded(_: Equation, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One product per factor, left first: the sum over terms stands in the product with right."""
    (terms, o1, i1), (_, o2, i2) = left.shape, right.shape
    y = left.reshape(-1, i1) @ x.reshape(-1, i1, i2)  # (n, t o1, i2)
    y = y.reshape(-1, terms, o1, i2).transpose(1, 2).reshape(-1, terms * i2)
    return (y @ right.transpose(1, 2).reshape(-1, o2)).reshape(len(x), -1)


def by_terms(_: Equation, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Loop over the terms: Y += left[t] X right[t]^T."""
    rows = x.reshape(-1, left.shape[2], right.shape[2])
    return sum(a @ (rows @ b.T) for a, b in zip(left, right, strict=True)).reshape(len(x), -1)


def kron_sum(_: Equation, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum of `torch.kron` over the terms as the dense matrix, as PHM's repositories have it."""
    return F.linear(x, sum(torch.kron(a, b) for a, b in zip(left, right, strict=True)))


# Chains of block-diagonal stages ---------------------------------------------------------------------------------


def by_stages(eq: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """One bmm per stage with blocks (batch, new, old) on two digits, which change places in between."""
    value = x.reshape(len(x), *eq.shape(eq.inputs))  # (n, i1, i2)
    value = value.permute(1, 0, 2) if eq.factors[0].modes[0] == eq.inputs[0] else value.permute(2, 0, 1)
    for factor in factors[:-1]:
        value = torch.bmm(value, factor.transpose(1, 2)).permute(2, 1, 0)  # (batch, n, new) -> (new, n, batch)
    value = torch.bmm(value, factors[-1].transpose(1, 2))  # (o2, n, o1), or (o1, n, o2)
    order = (1, 0, 2) if eq.factors[-1].modes[0] == eq.outputs[0] else (1, 2, 0)
    return value.permute(order).reshape(len(x), -1)


def two_bmm(_: Equation, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Monarch: a bmm over the blocks of inputs, a permutation, a bmm over the blocks of outputs."""
    (i1, o1, rank, i2), (_, o2, _, _) = first.shape, second.shape
    y = torch.bmm(x.reshape(-1, i1, i2).transpose(0, 1), first.reshape(i1, -1, i2).transpose(1, 2))  # (i1, n, o1 r)
    y = y.reshape(i1, -1, o1, rank).permute(2, 1, 0, 3).reshape(o1, -1, i1 * rank)
    return torch.bmm(y, second.reshape(o1, o2, -1).transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)


# Products with bonds of their own --------------------------------------------------------------------------------


def khatri_rao(eq: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """CP: all outer products of the columns on either side, then two matrix products."""
    half = len(eq.inputs) if eq.factors[0].modes[0] in eq.inputs else len(eq.outputs)
    rows, columns = (_columns(some) for some in (factors[:half], factors[half:]))
    return x @ rows @ columns.T if eq.factors[0].modes[0] in eq.inputs else x @ columns @ rows.T


def _columns(factors: Sequence[Tensor]) -> Tensor:
    (first, *rest) = factors
    for factor in rest:
        first = torch.einsum("ar,br->abr", first, factor).reshape(-1, first.shape[1])
    return first


def by_levels(_: Equation, x: Tensor, *factors: Tensor) -> Tensor:
    """A chain of Kronecker sums: the dense matrix of each level in turn."""
    for left, right in zip(factors[::2], factors[1::2], strict=True):
        weight = torch.einsum("tai,tbj->abij", left, right)
        x = x @ weight.reshape(left.shape[1] * right.shape[1], -1).T
    return x


# By structure ----------------------------------------------------------------------------------------------------

SUMS = (left_folded, right_folded, by_terms, dense_first, kron_sum)
FORMS: Mapping[type[Structure], tuple[Form, ...]] = {
    LowRank: (last_first,),
    Kronecker: SUMS,
    PHM: SUMS,
    Shapeshifter: (*SUMS, last_first, first_first),  # with order="reshape" it is no sum of Kronecker products
    TensorTrain: (last_first, first_first, dense_first),
    Butterfly: (by_stages, first_first, dense_first),
    Kaleidoscope: (by_stages, first_first, dense_first),
    Monarch: (two_bmm, dense_first),
    Blast: (first_first, dense_first),
    CP: (first_first, khatri_rao),
    Tucker: (first_first, dense_first),
    ConvKernel: (first_first, dense_first),
    KroneckerChain: (first_first, by_levels),
    GLT: (first_first, dense_first),
    Dense: (last_first,),
}


def fits(form: Form, eq: Equation) -> bool:
    """Whether a form is written for equations of this kind."""
    modes = [factor.modes for factor in eq.factors]
    if form in (left_folded, right_folded, by_terms, kron_sum):
        return modes == [("t", "o1", "i1"), ("t", "o2", "i2")]
    return form is not by_stages or (len(eq.inputs) == 2 and all(len(each) == 3 for each in modes))


class Simple(nn.Module):
    """Parts of (form, number of factors), each for one equation of a layer, with copies of its factors and bias."""

    def __init__(self, layer: StructuredLinear, forms: Sequence[Form]) -> None:
        super().__init__()
        self.spec, self.forms = layer.spec, forms
        self.factors = nn.ParameterList(
            nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad) for value in layer.factors
        )
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.forms, self.spec.split(list(self.factors)), strict=True)
        y = sum(self.part(form, eq, x, factors) for form, (eq, factors) in parts)
        return y if self.bias is None else y + self.bias

    def part(self, form: Form, eq: Equation, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        rows = F.pad(x, (0, eq.padded_in - x.shape[1])) if eq.padded_in > x.shape[1] else x
        y = form(eq, rows, *factors)
        return y[:, : self.spec.out_features] if eq.padded_out > self.spec.out_features else y


def simple_subjects(layer: StructuredLinear) -> dict[str, Subject]:
    """All simple forms of a layer, by their names; parts of a sum take their k-th form each, or their last."""
    structure = layer.structure
    parts = structure.parts if isinstance(structure, Sum) else (structure,)
    lists = [
        [form for form in FORMS[type(part)] if fits(form, eq)]
        for part, eq in zip(parts, layer.spec.equations, strict=True)
    ]
    found = {}
    for k in range(max(map(len, lists))):
        forms = [forms[min(k, len(forms) - 1)] for forms in lists]
        name = " + ".join(form.__name__ for form in forms)
        found[name] = Subject.of(name, layer, module=Simple(layer, forms))
    return found
