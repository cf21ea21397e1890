"""The house: imports go down the levels only, and importing structlin is quick and brings in nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import structlin

ROOT = Path(structlin.__file__).parent
# The wings from the ground up: a wing imports those below it.
WINGS = {
    "equation": 1,
    "runtime": 2,
    "init": 3.1,
    "fitting": 3,
    "layer": 4,
    "layers": 4,
    "structures": 5,
    "embedding": 5,
    "testing": 6,
    "checkpoint": 7,
    "heal": 7,
    "compress": 8,
    "": 10,
}
NO_TORCH = ("equation.spec", "equation.modes", "runtime.planner")
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def unit(module: str) -> str:
    """The module or package directly below structlin."""
    return module.split(".", maxsplit=1)[0]


def imports(file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            assert all(alias.name != "*" for alias in node.names), f"{file}: import *"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if is_module(submodule) else node.module)
    return found


def is_module(name: str) -> bool:
    if not name.startswith("structlin."):
        return False
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def violations(module: str, imported: set[str], levels: dict[str, float]) -> list[str]:
    own = unit(module)
    inside = {name.removeprefix("structlin").lstrip(".") for name in imported if name.split(".")[0] == "structlin"}
    return [
        f"{module} imports {other}" for other in inside if unit(other) != own and levels[unit(other)] >= levels[own]
    ]


def test_every_module_is_in_a_wing():
    assert {unit(name_of(file)) for file in FILES} <= WINGS.keys()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file):
    assert violations(name_of(file), imports(file), WINGS) == []


def test_the_check_sees_an_import_upwards():
    assert violations("fitting.fit", {"structlin.layer", "torch"}, WINGS) == ["fitting.fit imports layer"]
    assert violations("checkpoint.api", {"structlin.heal"}, WINGS) == ["checkpoint.api imports heal"]
    assert violations("structures.tt", {"structlin.structures.butterfly", "structlin.equation.modes"}, WINGS) == []
    assert violations("fitting.fit", {"structlin"}, WINGS) == ["fitting.fit imports "]


@pytest.mark.parametrize("part", NO_TORCH)
def test_integer_code_imports_the_standard_library_and_itself_only(part):
    files = [file for file in FILES if f"{name_of(file)}.".startswith(f"{part}.")]
    assert files
    foreign = {name for name in set().union(*map(imports, files)) if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(f"{name}.".startswith(tuple(f"structlin.{other}." for other in NO_TORCH)) for name in foreign)


def test_imports_inside_functions_are_optional_dependencies():
    for file in FILES:
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        late = {
            alias.name if isinstance(node, ast.Import) else node.module
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert late <= {"tqdm", "tqdm.auto"} or unit(name_of(file)) == "integrations", f"{file.name} imports {late}"


# A fresh process -----------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout


def test_import_brings_in_nothing_else():
    code = """
import sys, torch, einops, safetensors.torch
before = {name.split(".")[0] for name in sys.modules}
import structlin
after = {name.split(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
"""
    assert run(code).split() == ["structlin"]


def test_core_of_integers_runs_without_torch():
    """A stand-in for the package keeps `structlin/__init__.py`, and with it torch, away."""
    code = f"""
import sys, types
package = types.ModuleType("structlin")
package.__path__ = [{str(ROOT)!r}]
sys.modules["structlin"] = package
from structlin.runtime import planner
from structlin.equation import modes, spec
eq = spec.equation("o r, r i -> o i", ("left", "right"), dict(o=64, r=4, i=64))
print(planner.find_plan(spec.Spec(64, 64, (eq,)), 32).flops, "torch" in sys.modules)
"""
    assert run(code).split() == [str(2 * 32 * 4 * (64 + 64)), "False"]


def test_wheels_have_all_files():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    packed = {
        file for pattern in project["tool"]["setuptools"]["package-data"]["structlin"] for file in ROOT.glob(pattern)
    }
    others = {file for file in ROOT.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert packed == others
