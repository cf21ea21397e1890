"""The README's Python runs, and its tables are those that were measured."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        if "kernels.build" in block and shutil.which(os.environ.get("CXX", "c++")) is None:
            continue  # it says that it needs a compiler
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "out" / "model" / "structlin.json").is_file()


def test_tables_are_the_measured_ones():
    subprocess.run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], check=True)


def test_commands_are_those_of_ci():
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -c constraints.txt -e ".[test]"' in run
