"""The README is short, its commands are those of CI, and its tables are those that were measured."""

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_is_one_screen_or_two():
    assert len(README.splitlines()) <= 120


def test_has_one_table_of_four_rows():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4


def test_tables_are_the_measured_ones():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_means_are_those_of_the_steps_over_their_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    means = importlib.import_module("readme").means
    rows = [
        {"ratio": 0.5, "stage": stage, "seed": seed, "calibrated": "docstrings", "stsb": value}
        for stage, values in {"auto": (0.5, 0.5), "+ allocation": (0.7, 0.8), "+ heal, 2 min": (0.9,)}.items()
        for seed, value in enumerate(values)
    ]
    assert means(rows).splitlines()[2:] == [
        "| 0.5 | auto | 2 | 0.500 |",
        "| 0.5 | + allocation | 2 | 0.750 (0.700 to 0.800) |",
    ]


def test_commands_are_those_of_ci():
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README
    assert 'pip install -c constraints.txt -e ".[recipes]" && python recipes/compress_minilm.py' in README
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -c constraints.txt -e ".[test]"' in run
