"""Round factors to integers: balance them over their bonds, then factor by factor with the errors made up for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from structlin.equation.spec import Absorption, Equation, Modes, Spec
from structlin.equation.unfolding import application, unfoldings
from structlin.fitting.objective import InputGram, norm
from structlin.runtime.quantized import Format, blocks, dequantize, pack, spread, unfold

RIDGE = 1e-3  # of the mean eigenvalue, towards the factor before rounding: its own Gram may be singular
DAMPING = 1e-2  # of the mean eigenvalue, in the order of compensation, as GPTQ has it
BLOCK = 128  # columns that are rounded before the later ones are corrected by one matrix product
SHARES = [1 - 0.05 * k for k in range(9)]  # of the largest entry, that an int4 scale may reach: the rest is clipped


@dataclass(frozen=True)
class Rounded:
    """A factor as integers and scales.

    Args:
        codes: stored integers, see `runtime.quantized.pack`.
        scale: (scales of the rows, scales of a row), in the factor's dtype.
        form: their format.
    """

    codes: Tensor
    scale: Tensor
    form: Format


@dataclass(frozen=True)
class Rounding:
    """All factors of a matrix, rounded; None stands for a factor that stays as it is.

    Args:
        factors: in the order of the spec.
        error: relative error of the outputs, ||X (W - What)^T|| / ||X W^T|| with X^T X the Gram; Frobenius without.
        compensated: whether compensation was better than plain rounding.
    """

    factors: tuple[Rounded | None, ...]
    error: float
    compensated: bool


@torch.no_grad()
def round_factors(
    spec: Spec, factors: Sequence[Tensor], forms: Sequence[Format | None], gram: InputGram | None = None
) -> Rounding:
    """Round the factors of a structured matrix to integers, so that its outputs change least.

    Each bond is balanced first, in two ways (`balanced`). Then each factor in the order of application is
    fitted to the activations that the factors before it, rounded already, really give (least squares), and rounded
    column by column, later columns making up for the errors of earlier ones (GPTQ). The last factor of an equation is
    fitted to the outputs themselves, less what the other equations give: so it makes up for all that is left.
    Plain rounding of the balanced factors is one more candidate; the best in the norm of the Gram is returned.

    Cost: a few forward passes over in_features rows, and for each factor an inverse of its Gram, columns^3.

    Args:
        spec: the structured matrix.
        factors: real tensors, one for each factor of the spec.
        forms: a format for each learned factor that is to be rounded, None for others.
        gram: of the inputs; None counts all inputs alike.
    Source: Frantar, Ashkboos, Hoefler & Alistarh 2023 (GPTQ), for one matrix; the chain of factors is ours.
    """
    exact = [factor.detach().to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors]
    like = exact[0]
    rows = torch.eye(spec.in_features).to(like) if gram is None else gram.root.to(like)
    dtypes = [factor.dtype for factor in factors]
    chained = any(len(eq.factors) > 1 for eq in spec.equations)  # else there is nothing to balance
    ways = ((True, False), (True, True), (False, True)) if chained else ((True, True), (False, True))
    found = [_Pass(spec, exact, forms, dtypes, *way).run(rows) for way in ways]
    return min(found, key=lambda rounding: rounding.error if math.isfinite(rounding.error) else math.inf)


def balanced(eq: Equation, factors: Sequence[Tensor], *, even: bool) -> list[Tensor]:
    """Scale factors against each other over the modes that neighbours in the order of application share.

    With `even`, slices of both get the same largest entry. Otherwise the largest entries of the one applied later
    become 1, and the one before, with scales of its own for them, takes the sizes. Slices of zeros stay.
    """
    result = list(factors)
    order = [step.factor for step in application(eq)]
    for k, before in zip(order[:0:-1], order[-2::-1], strict=True):
        modes, others = eq.factors[k].modes, eq.factors[before].modes
        shared = [mode for mode in modes if mode in others]
        if not (shared and eq.factors[k].learned and eq.factors[before].learned):
            continue
        here, there = (" ".join(mode if mode in shared else "1" for mode in each) for each in (modes, others))
        size = _largest(result[k], modes, shared)
        if even:
            size = (size / rearrange(_largest(result[before], others, shared), f"{there} -> {here}")).sqrt()
        result[k] = result[k] / size
        result[before] = result[before] * rearrange(size, f"{here} -> {there}")
    return result


def _largest(factor: Tensor, modes: Modes, kept: Sequence[str]) -> Tensor:
    """Return the largest entry of each slice, 1 for zeros; the other axes have size 1."""
    axes = [axis for axis, mode in enumerate(modes) if mode not in kept]
    size = factor.abs().amax(axes, keepdim=True) if axes else factor.abs()
    return torch.where(size > 0, size, 1.0)


@dataclass(frozen=True)
class _Pass:
    """One way to round all factors of a matrix."""

    spec: Spec
    factors: list[Tensor]
    forms: Sequence[Format | None]
    dtypes: list[torch.dtype]
    compensates: bool
    even: bool

    def run(self, rows: Tensor) -> Rounding:
        """Round for these inputs (n, in_features)."""
        parts = [
            (eq, balanced(eq, values, even=self.even), numbers)
            for (eq, values), (_, numbers) in zip(
                self.spec.split(self.factors), self.spec.split(range(len(self.factors))), strict=True
            )
        ]
        images = [_image(eq, _states(eq, values, rows)[-1])[:, : self.spec.out_features] for eq, values, _ in parts]
        wanted = torch.stack(images).sum(0)
        found: dict[int, Rounded | None] = {}
        # The largest equation first: what it loses, the others can make up for.
        for e in sorted(range(len(parts)), key=lambda e: -sum(value.numel() for value in parts[e][1])):
            eq, values, numbers = parts[e]
            others = sum(image for k, image in enumerate(images) if k != e)
            images[e] = self._equation(eq, values, numbers, rows, wanted - others, found)
        total = norm(wanted)
        error = norm(wanted - torch.stack(images).sum(0)) / (total or 1.0)
        return Rounding(tuple(found[k] for k in range(len(self.factors))), error, self.compensates)

    def _equation(
        self, eq: Equation, values: list[Tensor], numbers: Sequence[int], rows: Tensor, wanted: Tensor,
        found: dict[int, Rounded | None],
    ) -> Tensor:  # fmt: skip
        """Round the factors of one equation and return its outputs (n, out_features)."""
        exact = _states(eq, values, rows)
        # Of outputs that are cut nothing is asked but to stay.
        last = torch.cat([wanted, _image(eq, exact[-1])[:, wanted.shape[1] :]], 1)
        exact[-1] = _State(_split(last, eq.outputs, eq), eq.outputs)
        state = _start(eq, rows)
        for step, target in zip(application(eq), exact[1:], strict=True):
            number = numbers[step.factor]
            value, form = values[step.factor], self.forms[number]
            found[number] = None
            if form is not None:
                unfolding = unfoldings(self.spec)[number]
                matrix = unfold(value, unfolding)
                rounded = self._factor(matrix, step, eq, state, target, form, self.dtypes[number])
                found[number] = rounded
                value = dequantize(rounded.codes, rounded.scale.to(value.dtype), form, unfolding)
            state = _absorbed(eq, step, value, state)
        return _image(eq, state)[:, : wanted.shape[1]]

    def _factor(
        self, matrix: Tensor, step: Absorption, eq: Equation, state: _State, target: _State, form: Format,
        dtype: torch.dtype,
    ) -> Rounded:  # fmt: skip
        """Round one factor, (rows, columns), given the activations before it and those wanted after it."""
        if not self.compensates:
            return plainly_rounded(matrix, form, dtype)
        inputs = state.arranged(step.batch, step.summed)  # (batch, n free, columns)
        outputs = target.arranged(step.batch, step.new)  # (batch, n free, new)
        gram = (inputs.mT @ inputs).double()
        cross = (outputs.mT @ inputs).double()
        start = matrix.reshape(cross.shape).double()
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        ridge = RIDGE * torch.where(mean > 0, mean, 1.0)
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        fitted = torch.linalg.solve(gram + ridge * unit, cross + ridge * start, left=False)
        weights = gram.diagonal(dim1=-2, dim2=-1)[:, None, :].expand_as(fitted).reshape(matrix.shape)
        scale = _scales(fitted.reshape(matrix.shape), form, weights).to(dtype)
        each = spread(scale.double(), form, *matrix.shape).expand(matrix.shape).reshape(fitted.shape)
        damped = gram + DAMPING * torch.where(mean > 0, mean, 1.0) * unit
        codes = compensated(fitted, damped, each, form.most)
        return Rounded(pack(codes.reshape(matrix.shape), form), scale, form)


def plainly_rounded(matrix: Tensor, form: Format, dtype: torch.dtype) -> Rounded:
    """Round a matrix (rows, columns) to the nearest codes, its largest entries to the largest."""
    scale = _scales(matrix, form, None).to(dtype)
    codes = (matrix / spread(scale.to(matrix.dtype), form, *matrix.shape)).round().clamp(-form.most, form.most)
    return Rounded(pack(codes, form), scale, form)


def _scales(matrix: Tensor, form: Format, weights: Tensor | None) -> Tensor:
    """Choose the scales of a matrix; for int4, with weights of the squared errors, large entries may be clipped."""
    parts = blocks(matrix, form)
    largest = parts.abs().amax(-1) / form.most
    largest = torch.where(largest > 0, largest, 1.0)
    if weights is None or form.bits == 8:
        return largest
    counted = blocks(weights, form)
    losses = []
    for share in SHARES:
        scale = (share * largest).unsqueeze(-1)
        codes = (parts / scale).round().clamp(-form.most, form.most)
        losses.append(((parts - codes * scale) ** 2 * counted).sum(-1))
    best = torch.stack(losses).argmin(0)
    return largest * torch.tensor(SHARES, dtype=largest.dtype, device=largest.device)[best]


def compensated(weight: Tensor, gram: Tensor, scale: Tensor, most: int) -> Tensor:
    """Round column by column; the columns still to come take over what each error means for the outputs.

    Columns of large energy come first. Without interactions (a diagonal Gram) this is plain rounding.

    Args:
        weight: (batch, rows, columns), float64.
        gram: of the columns, (batch, columns, columns), invertible.
        scale: of each entry, of the weight's shape.
        most: the largest code.
    Returns:
        Codes of the weight's shape, as floats.
    Source: Frantar, Ashkboos, Hoefler & Alistarh 2023.
    """
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)  # (batch, columns)
    down = order.unsqueeze(-1)
    gram = gram.gather(-2, down.expand_as(gram)).gather(-1, order.unsqueeze(-2).expand_as(gram))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    take = down.expand_as(weight.mT)
    rest, scale = weight.mT.gather(-2, take), scale.mT.gather(-2, take)  # (batch, columns, rows)
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    columns = rest.shape[-2]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        for k in range(start, stop):
            codes[:, k] = (rest[:, k] / scale[:, k]).round().clamp(-most, most)
            errors[:, k] = (rest[:, k] - codes[:, k] * scale[:, k]) / upper[:, k, k].unsqueeze(-1)
            rest[:, k + 1 : stop] -= upper[:, k, k + 1 : stop].unsqueeze(-1) * errors[:, k].unsqueeze(-2)
        rest[:, stop:] -= upper[:, start:stop, stop:].mT @ errors[:, start:stop]
    return torch.empty_like(codes).scatter_(-2, take, codes).mT


# Activations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """Activations (n, *modes) between two factors."""

    values: Tensor
    modes: Modes

    def arranged(self, batch: Modes, last: Modes) -> Tensor:
        """Return (batch, n and all other modes, last)."""
        free = [mode for mode in self.modes if mode not in batch + last]
        pattern = f"({' '.join(batch)}) (n {' '.join(free)}) ({' '.join(last)})"
        found: Tensor = rearrange(self.values, f"n {' '.join(self.modes)} -> {pattern}")
        return found


def _start(eq: Equation, rows: Tensor) -> _State:
    return _State(_split(F.pad(rows, (0, eq.padded_in - rows.shape[1])), eq.inputs, eq), eq.inputs)


def _split(rows: Tensor, modes: Modes, eq: Equation) -> Tensor:
    found: Tensor = rearrange(rows, f"n ({' '.join(modes)}) -> n {' '.join(modes)}", **{m: eq.size[m] for m in modes})
    return found


def _absorbed(eq: Equation, step: Absorption, factor: Tensor, state: _State) -> _State:
    number: dict[str, int] = {}
    for mode in (*state.modes, *eq.factors[step.factor].modes):
        number.setdefault(mode, len(number) + 1)
    here = [number[mode] for mode in state.modes]
    there = [number[mode] for mode in eq.factors[step.factor].modes]
    values = torch.einsum(state.values, [0, *here], factor, there, [0, *(number[mode] for mode in step.kept)])
    return _State(values, step.kept)


def _states(eq: Equation, factors: Sequence[Tensor], rows: Tensor) -> list[_State]:
    """Return the inputs and the activations after each factor, in the order of application."""
    return list(_running(eq, factors, rows))


def _running(eq: Equation, factors: Sequence[Tensor], rows: Tensor) -> Iterator[_State]:
    state = _start(eq, rows)
    yield state
    for step in application(eq):
        state = _absorbed(eq, step, factors[step.factor], state)
        yield state


def _image(eq: Equation, state: _State) -> Tensor:
    """Return the outputs (n, padded_out) of the last activations."""
    found: Tensor = rearrange(state.values, f"n {' '.join(state.modes)} -> n ({' '.join(eq.outputs)})")
    return found
