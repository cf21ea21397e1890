"""Write factors whose entries share numbers in a pattern, and multiply by them without writing them."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from structlin.equation.spec import Equation, Spec
from structlin.equation.ties import Tie
from structlin.runtime.costs import TRANSFORM_FLOPS
from structlin.runtime.eager import constant, undispatched

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64 (Steele, Lea & Flood 2014)


def expanded(spec: Spec, factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the factors as the equations have them: tied ones written out, differentiable."""
    if not spec.tied:
        return factors
    return [
        values if factor.tie is None else _written(eq, factor.modes, factor.tie, values)
        for eq, part in spec.split(factors)
        for factor, values in zip(eq.factors, part, strict=True)
    ]


def _written(eq: Equation, modes: Sequence[str], tie: Tie, values: Tensor) -> Tensor:
    shape = eq.shape(modes)
    count, others = shape[0] * shape[1], shape[2:] if math.prod(shape[2:]) > 1 else ()  # vectors take a faster path
    flat, places = values.reshape(tie.numbers, *others), _places(tie, shape[0], shape[1], values.device)
    if tie.once:
        return flat.new_zeros(count, *others).index_copy(0, places, flat).reshape(shape)
    wide = flat.to(torch.promote_types(values.dtype, torch.float32))  # the gradient of a value is a long sum
    return wide.index_select(0, places).reshape(shape).to(values.dtype)


@constant
def _places(tie: Tie, rows: int, columns: int, device: torch.device) -> Tensor:
    if undispatched():
        return _found(tie, rows, columns, device)
    # An export keeps the places as a constant, not what computes them; FakeTensorMode learns their number.
    with _disable_current_modes():
        places = _found(tie, rows, columns, torch.device("cpu")).tolist()
    return torch.tensor(places, device=device)


@lru_cache(64)
def _found(tie: Tie, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the number that each place reads, or, where each number stands in one place, those places."""
    with torch.inference_mode(False):  # autograd saves it
        numbers = pattern(tie, rows, columns).flatten()
        return ((numbers < tie.numbers).nonzero().flatten() if tie.once else numbers).to(device)


def pattern(tie: Tie, rows: int, columns: int) -> Tensor:
    """Return the number that each place of a tied factor reads, (rows, columns); `tie.numbers` stands for none."""
    row, column = torch.arange(rows, device="cpu").unsqueeze(1), torch.arange(columns, device="cpu")
    if tie.kind == "circulant":
        return (row - column) % tie.numbers
    if tie.kind == "toeplitz":
        return row - column + columns - 1
    if tie.kind == "diagonal":
        return torch.where(row == column, row, tie.numbers)
    kept = bits(tie.bits, rows * columns) if tie.bits else spread(rows * columns, tie.numbers)
    return torch.where(kept, kept.cumsum(0) - 1, tie.numbers).view(rows, columns)


def bits(text: str, count: int) -> Tensor:
    """Read `count` bits (bool) from what `as_text` wrote.

    Raises:
        ValueError: if the text is not of that length, or not base64.
    """
    data = base64.b64decode(text, validate=True)
    if len(data) != -(-count // 8):
        raise ValueError(f"{len(data)} B of places; {count} places take {-(-count // 8)} B")
    powers = torch.arange(8, dtype=torch.uint8, device="cpu")
    found = torch.frombuffer(bytearray(data), dtype=torch.uint8).unsqueeze(1) >> powers
    return (found & 1).flatten()[:count].bool()


def as_text(kept: Tensor) -> str:
    """Write bits (bool, any shape) as base64, eight to a byte."""
    flat = kept.flatten().cpu()
    padded = F.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return base64.b64encode(
        bytes((padded << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1).tolist())
    ).decode()


def spread(count: int, kept: int) -> Tensor:
    """Return `count` bits of which `kept` are true, spread by a hash: the same on every machine, for ever."""
    start, *rest = (value - (1 << 64) if value >> 63 else value for value in _MIX)  # as int64, which wraps around
    mixed = (torch.arange(count, device="cpu") + 1) * start
    for shift, factor in zip((30, 27), rest, strict=True):
        mixed = (mixed ^ (mixed >> shift)) * factor
    found = torch.zeros(count, dtype=torch.bool, device="cpu")
    found[mixed.argsort(stable=True)[:kept]] = True
    return found


# Products that need no written factor --------------------------------------------------------------------------------


def flops_by_pattern(spec: Spec) -> tuple[float, float] | None:
    """Estimate the FLOPs of `by_pattern` per row, and once for all rows; None where it does not know the spec."""
    eq = spec.equations[0]
    tie = eq.factors[0].tie
    if len(spec.equations) > 1 or len(eq.factors) > 1 or tie is None or tie.kind == "places":
        return None
    numbers, others = _length(tie), _others(eq)
    if tie.kind == "diagonal":
        return 2 * numbers * math.prod(others), 0.0
    transform = 2.5 * numbers * math.log2(max(numbers, 2)) + TRANSFORM_FLOPS
    # Complex products of half as many frequencies; the values of each block are transformed once.
    return transform * sum(others) + 4 * numbers * math.prod(others), transform * math.prod(others)


def by_pattern(spec: Spec, values: Tensor, x: Tensor) -> Tensor:
    """Compute x W^T for x (..., in_features) without writing W: `flops_by_pattern` knows the spec.

    Circulant and Toeplitz blocks are convolutions (FFT), diagonal ones a stack of products.
    """
    eq = spec.equations[0]
    tie = eq.factors[0].tie
    assert tie is not None
    given = x.reshape(-1, spec.in_features)
    rows = F.pad(given, (0, eq.padded_in - spec.in_features, 0, not len(given)))  # FFTs of no rows fail in MKL
    blocks = values.reshape(tie.numbers, *_others(eq))
    y = (_blockwise if tie.kind == "diagonal" else _convolved)(eq, tie, blocks, rows)
    return y[: len(given), : spec.out_features].reshape(*x.shape[:-1], spec.out_features)


def _others(eq: Equation) -> tuple[int, ...]:
    """Return the sizes of the two modes of the factor that are not tied, outputs and inputs; 1 where it has none."""
    return eq.shape(eq.factors[0].modes[2:]) or (1, 1)


def _length(tie: Tie) -> int:
    """Return the number of values, or of a Toeplitz matrix's, that zeros may follow, the next power of two."""
    return 1 << (tie.numbers - 1).bit_length() if tie.kind == "toeplitz" else tie.numbers


def _convolved(eq: Equation, tie: Tie, values: Tensor, rows: Tensor) -> Tensor:
    """Multiply by blocks that are cyclic convolutions; values (numbers, o1, i1), rows (tokens, i1 * i2)."""
    height, width = eq.shape(eq.factors[0].modes[:2])
    length, inputs = _length(tie), values.shape[2]
    wide = torch.promote_types(rows.dtype, torch.float32)
    there, back = (torch.fft.fft, torch.fft.ifft) if wide.is_complex else (torch.fft.rfft, torch.fft.irfft)
    x = there(rows.to(wide).reshape(len(rows), inputs, width), length)  # (tokens, i1, frequencies)
    v = there(values.to(wide).permute(1, 2, 0), length)  # (o1, i1, frequencies)
    y = x * v[:, 0] if inputs == 1 else torch.einsum("tif,oif->tof", x, v)
    start = width - 1 if tie.kind == "toeplitz" else 0  # what is before has wrapped around
    return back(y, length)[..., start : start + height].reshape(len(rows), eq.padded_out).to(rows.dtype)


def _blockwise(eq: Equation, tie: Tie, values: Tensor, rows: Tensor) -> Tensor:
    """Multiply block k of the rows by values[k], (o2, i2); blocks beyond the last are dropped, their outputs zero."""
    count, height, width = values.shape
    x = rows[:, : count * width].reshape(len(rows), count, width)
    y = x * values.squeeze(2) if height == width == 1 else torch.einsum("tgi,goi->tgo", x, values)
    return F.pad(y.reshape(len(rows), count * height), (0, eq.padded_out - count * height))
