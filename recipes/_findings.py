"""What the recipes of the sources' experiments share: their options, their claims settled by numbers, their end."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _figures import FIGURES
from _results import RESULTS, Columns, store

Case = tuple[str, Sequence[float], Sequence[float]]  # where; values that shall be lower; values that shall be higher

EVEN = 0.01  # means that differ by less, as a share of the larger, count as equal


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every experiment; recipes add their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny, in seconds, for a test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    return parser


def conclude(
    folder: Path, name: str, title: str, notes: str, verdict: str, about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]], columns: Columns,
) -> None:  # fmt: skip
    """Store a table with the findings under its notes, and print them."""
    store(folder, name, title, f"{notes}\n\n{verdict}", about, rows, columns)
    print(verdict)


def settle(claim: str, cases: Sequence[Case], form: str = ".2f") -> str:
    """Say whether the mean of the first values is below that of the second in every case, with the means.

    "(apart)" marks a case in which no value of one side reaches the other side.
    """
    lower = even = 0
    parts = []
    for where, ours, theirs in cases:
        a, b = statistics.mean(ours), statistics.mean(theirs)
        even += abs(a - b) < EVEN * max(a, b)
        lower += a <= (1 - EVEN) * b
        apart = len(ours) > 1 and (max(ours) < min(theirs) or max(theirs) < min(ours))
        parts.append(f"{where}: {a:{form}} against {b:{form}}{' (apart)' if apart else ''}")
    n = len(cases)
    verdict = (
        "even" if even == n else "confirmed" if lower + even == n else "refuted" if lower == 0 else "refuted as a rule"
    )
    held = f"holds in {lower} of {n} cases" + (f", even in {even}" if even else "")
    return f"- *{claim}*: **{verdict}**, {held}. {'; '.join(parts)}."
