"""Write the measured tables of README.md from benchmarks/results/: `python benchmarks/readme.py` (`--check` only
compares).

A table stands between `<!-- name -->` and `<!-- /name -->` and comes from `results/name.md`, with the command, date
and machine of
the run below it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def rendered(readme: str) -> str:
    """Return the text of the README with every marked table taken from its result."""
    return MARK.sub(lambda match: block(match[1]), readme)


def block(name: str) -> str:
    """One table between its marks, with a line that says how it was made."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("- "))
    source = f"{facts['command']} on {facts['machine']}, {facts['threads']} threads, {facts['dtype']}, {facts['date']}."
    return "\n".join([f"<!-- {name} -->", *table, "", source, f"<!-- /{name} -->"])


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
