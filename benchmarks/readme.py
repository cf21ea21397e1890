"""Write the measured tables of README.md and docs/results/ from benchmarks/results/.

    python benchmarks/readme.py            # --check only compares

A table stands between `<!-- name -->` and `<!-- /name -->`. It is that of `benchmarks/results/name.md`, with the
command, date and machine of its run below it; `headline`, the table of README.md, is put together from two of them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md")))
MARK = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
RATIO = 0.5  # of the headline
# Row of the headline: the stage in ladder_minilm, the structure in minilm_speed (None: the dense model).
HEADLINE = {
    "dense": ("dense", None),
    "SVD": ("SVD", "lowrank"),
    "whitened SVD": ("whitened SVD", "lowrank"),
    "structlin, `auto`": ("+ end to end (defaults)", "auto"),
}


def rendered(page: str) -> str:
    """Return the text of a page with every marked table taken from its result."""
    return MARK.sub(lambda match: f"<!-- {match[1]} -->\n{block(match[1])}\n<!-- /{match[1]} -->", page)


def block(name: str) -> str:
    """Return one table with a line that says how it was made."""
    if name == "headline":
        return headline()
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("- ") and ": " in line)
    today = f" (today the same run is {facts['command today']})" if "command today" in facts else ""
    threads = f"{facts['threads']} thread{'' if facts['threads'] == '1' else 's'}"
    source = f"{facts['command']}{today} on {facts['machine']}, {threads}, {facts['dtype']}, {facts['date']}."
    return "\n".join([*table, "", source])


def headline() -> str:
    """Return the four rows of the README: quality from ladder_minilm, speed from minilm_speed."""
    ours = (row for row in stored("ladder_minilm") if (row["calibrated"], row["seed"]) == ("docstrings", 0))
    quality = {row["stage"]: row for row in ours if row["ratio"] in (1, RATIO)}
    timed = (row for row in stored("minilm_speed") if (row["cell_threads"], row["batch"]) == (2, 32))
    speeds = {None: 1.0, **{row["structure"]: row["speed"] for row in timed}}
    weights = max(row["parameters_linears"] for row in stored("minilm_compression"))
    lines = ["| | encoder weights | STS-B dev | cosine to dense | speed |", "| --- | ---: | ---: | ---: | ---: |"]
    for title, (stage, structure) in HEADLINE.items():
        row = quality[stage]
        size = weights * row["kept"] / 1e6
        cells = (f"{size:.1f} M", f"{row['task']:.3f}", f"{row['docstrings']:.3f}", f"{speeds[structure]:.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored(name: str) -> list[dict[str, Any]]:
    """Read the rows of a result."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> int:
    stale = []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if before != after:
            stale.append(path)
            if "--check" not in sys.argv[1:]:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs' if '--check' in sys.argv[1:] else 'written'}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
