"""Results of a recipe or benchmark: one JSON line per row with all that produced it, and a Markdown table to read."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STARTED = time.monotonic()

Columns = Mapping[str, tuple[str, str]]  # title: (key of a row, format)


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Describe the run: command (without this machine's folders), date, machine, threads, versions, commit."""
    script = Path(sys.argv[0]).resolve()
    return {
        "command": " ".join(["python", f"{script.parent.name}/{script.name}", *map(_portable, argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "structlin": importlib.metadata.version("structlin"),
        "commit": _commit(),
    }


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """Format rows as an aligned Markdown table; a missing value is a dash, an empty column is left out."""
    shown = {
        title: (key, form) for title, (key, form) in columns.items() if any(row.get(key) is not None for row in rows)
    }
    lines = [
        list(shown),
        *([_cell(row.get(key), form) for key, form in shown.values()] for row in rows),
    ]
    widths = [max(len(line[k]) for line in lines) for k in range(len(shown))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def store(
    directory: Path, name: str, title: str, notes: str, about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]], columns: Columns,
) -> None:  # fmt: skip
    """Write name.jsonl (each row with the environment) and name.md into a directory, and print the table.

    The environment gets `run_seconds`, the time since the script began.
    """
    about = {**about, "run_seconds": round(time.monotonic() - STARTED)}
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({**row, **about}) + "\n" for row in rows)
    (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    facts = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in about.items())
    text = table(rows, columns)
    (directory / f"{name}.md").write_text(f"# {title}\n\n{notes}\n\n{text}\n\n{facts}\n", encoding="utf-8")
    print(text)
    say(f"stored in {directory / name}.jsonl and .md")


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _portable(argument: str) -> str:
    """Cut the folders off a path of this machine."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name if os.path.isabs(value) else value}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
