"""The recipes that repeat the sources' experiments on models run in seconds and store what they say they store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FIGURES = RECIPES.parent / "docs" / "figures"

for module in ("sklearn", "matplotlib", "transformers"):
    pytest.importorskip(module)


def run(name: str, results: Path, *arguments: str | Path) -> tuple[list[dict[str, Any]], str]:
    """Return the stored rows and what was printed, and see that the figures stay as they are."""
    before = {path: path.stat().st_mtime_ns for path in FIGURES.glob("*")}
    command = [sys.executable, "-W", "error", str(RECIPES / f"{name}.py"), "--quick", "--results", str(results)]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in FIGURES.glob("*")} == before
    lines = (results / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    text = (results / f"{name}.md").read_text(encoding="utf-8")
    assert "confirmed" in done.stdout or "refuted" in done.stdout
    assert "Where this differs" in text
    return [json.loads(line) for line in lines], done.stdout


def test_delight_and_transformers_of_one_size(tmp_path):
    rows, printed = run("train_delight", tmp_path)
    assert "Against a transformer of twice its parameters" in printed
    last = {(row["network"], row["size"]): row for row in rows}
    assert len(last) == 4
    assert len(rows) == 4 * 6
    for width in (16, 24):
        dense, light = last["transformer", width], last["DeLighT", width]
        assert light["parameters"] == pytest.approx(dense["parameters"], rel=0.02)
        assert light["steps"] == dense["steps"] == 12
    for row in rows:
        assert row["lowest"] <= row["perplexity"] <= row["highest"] < 110
    for network in ("transformer", "DeLighT"):
        mine = [row["perplexity"] for row in rows if (row["network"], row["size"]) == (network, 24)]
        assert mine == sorted(mine, reverse=True)
