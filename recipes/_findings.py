"""What the sources say, settled by numbers: one sentence for each claim, with all that it rests on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Case = tuple[str, Sequence[float], Sequence[float]]  # where; values that shall be lower; values that shall be higher


def settle(claim: str, cases: Sequence[Case], form: str = ".2f") -> str:
    """Say whether the mean of the first values is below that of the second in every case, with the means.

    "(apart)" marks a case in which no value of one side reaches the other side.
    """
    held, parts = 0, []
    for where, low, high in cases:
        held += statistics.mean(low) < statistics.mean(high)
        apart = " (apart)" if max(low) < min(high) or max(high) < min(low) else ""
        parts.append(f"{where}: {statistics.mean(low):{form}} against {statistics.mean(high):{form}}{apart}")
    verdict = "confirmed" if held == len(cases) else "refuted" if held == 0 else "refuted as a rule"
    return f"- *{claim}*: **{verdict}**, holds in {held} of {len(cases)} cases. {'; '.join(parts)}."
