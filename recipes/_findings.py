"""What the sources say, settled by numbers: one sentence for each claim, with all that it rests on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Case = tuple[str, Sequence[float], Sequence[float]]  # where; values that shall be lower; values that shall be higher

EVEN = 0.01  # means that differ by less, as a share of the larger, count as equal


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
