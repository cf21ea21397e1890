"""Plain text tables, as plans and reports print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns; the last cells of a row may be empty."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def shape(row: Any) -> str:
    """Write the sizes of a linear map, or of a stack of them, as tables show them."""
    return ("" if row.count == 1 else f"{row.count}x") + f"{row.out_features}x{row.in_features}"
