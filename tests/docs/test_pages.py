"""Pictures are what the library draws, every structure and public name has its place, and links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from test_layout import WINGS

import structlin
from structlin.equation.structure import registered

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def test_pictures_are_drawn_by_the_library():
    done = subprocess.run(
        [sys.executable, DOCS / "patterns.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_structure_has_a_page():
    index = (DOCS / "structures" / "index.md").read_text(encoding="utf-8")
    for name in registered():
        page = "sums" if name == "sum" or "+" in name else name
        assert f"({page}.md)" in index, name
        assert (DOCS / "structures" / f"{page}.svg").exists(), name


def test_reference_has_every_public_name():
    reference = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    modules = {"exact", "kernels", "structures", "tensor_train"}
    missing = [
        n for n in structlin.__all__ if n not in modules and not re.search(rf":: structlin\.{n}$", reference, re.M)
    ]
    assert missing == []


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_reference_has_every_setting():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8"), re.M)
    assert rows == [field.name for field in dataclasses.fields(structlin.Compression)]


def test_the_drawing_of_the_house_is_that_of_the_imports():
    drawing = (DOCS / "design" / "house.md").read_text(encoding="utf-8").split("```text")[1].split("```")[0]
    floors = [line[:34].split() for line in drawing.strip().splitlines()]
    height = {wing: len(floors) - k for k, floor in enumerate(floors) for wing in floor}
    assert height.keys() == WINGS.keys() - {""}
    order = sorted(height, key=lambda wing: WINGS[wing])
    assert [height[wing] for wing in order] == sorted(height.values())
    assert all((height[a] == height[b]) == (WINGS[a] == WINGS[b]) for a in height for b in height)
