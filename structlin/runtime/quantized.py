"""Integers in place of the entries of a factor: formats, packing, scales, and back to floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structlin.equation.unfolding import Unfolding

BITS = (8, 4)
LEAST = 64  # entries that share a scale at least, by sharing it over rows: a scale takes 2 to 4 bytes
# int8 rows that leave more than OUTLIERS times the squared error of groups have groups too, and these FINER parts, of
# FINEST entries or more. Long rows of normal entries leave 2.0.
OUTLIERS, FINER, FINEST = 2.2, 4, 16


@dataclass(frozen=True)
class Format:
    """How the matrix (rows, columns) of a factor becomes integers: entry = code * scale, codes within +-`most`.

    Args:
        bits: 8, or 4 (two codes in a byte).
        columns: neighbouring entries of a row that share a scale.
        rows: neighbouring rows that share it too: rows may be short.
    """

    bits: int
    columns: int
    rows: int = 1

    @property
    def most(self) -> int:
        """The largest code: 127 or 7. The range is symmetric, so that -w becomes the negative of w."""
        return 2 ** (self.bits - 1) - 1

    def codes_shape(self, unfolding: Unfolding) -> tuple[int, int]:
        """Shape of the stored integers."""
        return unfolding.rows, unfolding.columns if self.bits == 8 else -(-unfolding.columns // 2)

    def scale_shape(self, unfolding: Unfolding) -> tuple[int, int]:
        """Shape of the scales."""
        return -(-unfolding.rows // self.rows), -(-unfolding.columns // self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored integers."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def __str__(self) -> str:
        return f"int{self.bits}"


def format_for(bits: int, unfolding: Unfolding, group: int, matrices: Sequence[Tensor] = ()) -> Format:
    """Choose a format: int8 has a scale for each row, int4 for each group of a row; short rows share one.

    int8 has groups too, of `group` or a quarter of it, where one entry, far larger than the others of its row, would
    cost these their digits.

    Args:
        bits: 8 or 4.
        unfolding: of the factor.
        group: entries of a row that share a scale.
        matrices: values of the factor, (rows, columns), that will have this format.
    Example:
        >>> from structlin.equation.spec import Spec, equation
        >>> from structlin.equation.unfolding import unfoldings
        >>> eq = equation("o r, r i -> o i", ("left", "right"), {"o": 64, "r": 16, "i": 512})
        >>> left, right = unfoldings(Spec(512, 64, (eq,)))
        >>> format_for(8, right, 128), format_for(4, right, 128), format_for(4, left, 128)
        (Format(bits=8, columns=512, rows=1), Format(bits=4, columns=128, rows=1), Format(bits=4, columns=16, rows=4))
    """
    if bits != 8:
        return _format(bits, unfolding, group, min(group, LEAST))
    found = _format(bits, unfolding, unfolding.columns, LEAST)
    for columns in (group, max(group // FINER, min(group, FINEST))):
        fine = _format(bits, unfolding, columns, min(columns, LEAST))
        coarse, finer = (sum(_rounding_error(matrix, form) for matrix in matrices) for form in (found, fine))
        if coarse <= OUTLIERS * finer:
            break
        found = fine
    return found


def _format(bits: int, unfolding: Unfolding, columns: int, entries: int) -> Format:
    columns = min(columns, unfolding.columns)
    return Format(bits, columns, min(max(entries // columns, 1), unfolding.rows))


def _rounding_error(matrix: Tensor, form: Format) -> float:
    """Return 12 * most^2 times the squared error that rounding is expected to leave: each step is a largest entry."""
    found = blocks(matrix, form)
    return float(found.abs().amax(-1).double().square().sum()) * found.shape[-1]


def unfold(factor: Tensor, unfolding: Unfolding) -> Tensor:
    """Read a factor (*stack, *axes) as matrices (*stack, rows, columns)."""
    lead = factor.ndim - len(unfolding.axes)
    order = [unfolding.axes.index(place) for place in range(len(unfolding.axes))]
    matrix = factor.permute(*range(lead), *(lead + axis for axis in order))
    return matrix.reshape(*factor.shape[:lead], unfolding.rows, unfolding.columns)


def fold(matrix: Tensor, unfolding: Unfolding) -> Tensor:
    """Undo `unfold`; the result is contiguous."""
    lead = matrix.ndim - 2
    factor = matrix.reshape(*matrix.shape[:lead], *unfolding.shape)
    return factor.permute(*range(lead), *(lead + place for place in unfolding.axes)).contiguous()


def spread(scale: Tensor, form: Format, rows: int, columns: int) -> Tensor:
    """Return the scale of each entry, (*stack, rows, columns) or what broadcasts to it."""
    if form.rows > 1:
        scale = scale.unsqueeze(-2).expand(*scale.shape[:-1], form.rows, scale.shape[-1]).flatten(-3, -2)
        scale = scale[..., :rows, :]
    if scale.shape[-1] > 1:
        scale = scale.unsqueeze(-1).expand(*scale.shape, form.columns).flatten(-2)[..., :columns]
    return scale


def blocks(matrix: Tensor, form: Format) -> Tensor:
    """Gather the entries that share a scale, zeros where the matrix ends: (*stack, scales of rows, of columns, n)."""
    rows, columns = matrix.shape[-2:]
    padded = torch.nn.functional.pad(matrix, (0, -columns % form.columns, 0, -rows % form.rows))
    return padded.unflatten(-1, (-1, form.columns)).unflatten(-3, (-1, form.rows)).transpose(-3, -2).flatten(-2)


def pack(codes: Tensor, form: Format) -> Tensor:
    """Store codes (*stack, rows, columns) as int8, or two in a byte, code + 8, the even column in the low half."""
    if form.bits == 8:
        return codes.to(torch.int8)
    nibbles = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[-1] % 2), value=8)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack(stored: Tensor, form: Format, columns: int) -> Tensor:
    """Undo `pack`: int8 codes (*stack, rows, columns)."""
    if form.bits == 8:
        return stored
    pairs = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)[..., :columns]
    return pairs.to(torch.int8) - 8


def dequantize(stored: Tensor, scale: Tensor, form: Format, unfolding: Unfolding) -> Tensor:
    """Return the factor, in the dtype of the scale: codes times scales. Cost: one pass over the factor."""
    codes = unpack(stored, form, unfolding.columns).to(scale.dtype)
    return fold(codes * spread(scale, form, unfolding.rows, unfolding.columns), unfolding)


def check_format(form: Format, unfolding: Unfolding) -> None:
    """Refuse a format that does not fit a factor.

    Raises:
        ValueError: saying what is allowed.
    """
    limits = {"columns": unfolding.columns, "rows": unfolding.rows}
    if form.bits not in BITS:
        raise ValueError(f"bits={form.bits}; expected one of {BITS}")
    for name, limit in limits.items():
        if not 1 <= getattr(form, name) <= limit:
            raise ValueError(
                f"{name}={getattr(form, name)} of a scale; expected 1 to {limit}, the {name} of the factor"
            )


def stored_bytes(form: Format, unfolding: Unfolding, itemsize: int) -> int:
    """Bytes of the integers and the scales of one matrix."""
    return math.prod(form.codes_shape(unfolding)) + itemsize * math.prod(form.scale_shape(unfolding))
