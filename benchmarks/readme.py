"""Write the measured tables of README.md and docs/results/ from benchmarks/results/.

    python benchmarks/readme.py            # --check only compares

A table stands between `<!-- name -->` and `<!-- /name -->`. It is that of `benchmarks/results/name.md`, with the
command, date and machine of its run below it; `headline`, the table of README.md, is put together from two of them, and
`name_means` has the means over the seeds of `name`, with the lowest and the highest value.
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
SIZES = {  # of ladder_minilm and ladder_stories
    "cosine, docstrings": ("docstrings", ".3f"),
    "cosine, STS-B": ("stsb", ".3f"),
    "STS-B dev": ("task", ".4f"),
    "perplexity, on": ("on", ".2f"),
    "perplexity, off": ("off", ".0f"),
    "divergence, on": ("divergence_on", ".3f"),
    "divergence, off": ("divergence_off", ".3f"),
}


def rendered(page: str) -> str:
    """Return the text of a page with every marked table taken from its result."""
    return MARK.sub(lambda match: f"<!-- {match[1]} -->\n{block(match[1])}\n<!-- /{match[1]} -->", page)


def block(name: str) -> str:
    """Return one table with a line that says how it was made."""
    if name == "headline":
        return headline()
    if name.endswith("_means"):
        return means(stored(name.removesuffix("_means")))
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


def means(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a ladder, from the whitened SVD to the defaults, averaged over their seeds."""
    sizes = {title: size for title, size in SIZES.items() if size[0] in rows[0]}
    cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        stage = row["stage"]
        step = stage in ("dense", "whitened SVD", "auto") or (stage.startswith("+ ") and "heal" not in stage)
        if step and row["calibrated"] != "stsb":
            cells.setdefault((row["ratio"], stage), []).append(row)
    lines = [f"| ratio | stage | seeds | {' | '.join(sizes)} |", f"| --- | --- {'| ---: ' * (len(sizes) + 1)}|"]
    for (ratio, stage), seeds in cells.items():
        texts = [spread([row[key] for row in seeds if key in row], form) for key, form in sizes.values()]
        lines.append(f"| {ratio} | {stage} | {len(seeds)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Format a mean, and the lowest and the highest value where they differ."""
    if not values:
        return "-"
    mean, low, high = (format(value, form) for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


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
