"""Every Python block of README.md and docs/ runs, and prints what the page says that it prints."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from structlin.equation import structure

ROOT = Path(__file__).resolve().parents[2]
# A ```python block and, where nothing but blank lines stands between, the ```text block that shows its output.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    code: str
    output: str
    line: int


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2] or "", text.count("\n", 0, m.start(1))) for m in BLOCK.finditer(text)]


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if blocks(path.read_text(encoding="utf-8"))]


def shape(output: str) -> list[str]:
    """Lines without their numbers and widths, which differ between machines."""
    lines = (re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", line) for line in output.strip().splitlines())
    return [" ".join(line.split()) for line in lines]


@pytest.fixture
def page_module(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """A module for a page's code, in an empty folder; structures that the page registers are forgotten afterwards."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # pickle and annotations look names up there
    monkeypatch.chdir(tmp_path)
    known = dict(structure._REGISTRY)
    yield module
    structure._REGISTRY.clear()
    structure._REGISTRY.update(known)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_runs(path, page_module, capsys):
    for block in blocks(path.read_text(encoding="utf-8")):
        if "kernels.build()" in block.code and shutil.which(os.environ.get("CXX", "c++")) is None:
            continue  # the page says that it needs a compiler
        code = compile("\n" * block.line + block.code, str(path), "exec")
        exec(code, vars(page_module))
        printed = capsys.readouterr().out
        if block.output:
            assert shape(printed) == shape(block.output), f"{path}:{block.line}: printed\n{printed}"


def test_blocks_are_found_with_their_output():
    text = "x\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\na\n```\nprose\n```text\nno output\n```\n"
    assert blocks(text) == [Block("print(1)\n", "1\n", 3), Block("a\n", "", 11)]


def test_shape_ignores_numbers_and_widths_only():
    assert shape("a  1,024  0.25") == shape("a 7 1e-3\n")
    assert shape("lowrank(rank=3)") != shape("monarch(rank=3)")
    assert shape("a\nb") != shape("a")
