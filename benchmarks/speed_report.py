"""Write a short table for each stored table of speeds: a row per case, a column per mode and number of tokens.

    python benchmarks/speed_report.py

Reads results/speed_NAME.jsonl, writes results/speed_NAME_ratios.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, table

FACTS = ("command", "date", "machine", "threads", "dtype", "torch", "commit", "native kernel")


def pivoted(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Bring the cells of a case into one row; the columns in the order in which they were measured."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    columns = {"out x in": ("case", ""), "library": ("library", ""), "threads": ("cell_threads", "")}
    columns |= {"dtype": ("cell_dtype", ""), "FLOPs": ("flop_ratio", ".2f"), "parameters": ("parameters_ratio", ".2f")}
    for row in rows:
        case = tuple(row[key] for key in ("case", "library", "cell_threads", "cell_dtype"))
        line = found.setdefault(case, {key: row.get(key) for key, _ in columns.values()})
        column = f"{row['mode']}, {row['tokens']}"
        line[column] = row["ratio"]
        columns[column] = (column, ".2f")
    one_of = {key for _, (key, _) in columns.items() if len({line.get(key) for line in found.values()}) == 1}
    constant = one_of & {"library", "cell_threads", "cell_dtype"}
    return list(found.values()), {title: c for title, c in columns.items() if c[0] not in constant}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args(argv)
    for path in sorted(args.results.glob("speed_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        facts = "\n".join(f"- {key}: {f'`{rows[0][key]}`' if key == 'command' else rows[0][key]}" for key in FACTS)
        notes = "Time / time of `nn.Linear` in the same run, by mode and number of tokens; below 1 is faster."
        text = f"# {path.stem}\n\n{notes}\n\n{table(*pivoted(rows))}\n\n{facts}\n"
        path.with_name(f"{path.stem}_ratios.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
