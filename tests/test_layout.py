"""The house: wings import downward only, and importing structlin brings in nothing else."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import structlin

ROOT = Path(structlin.__file__).parent
# The wings from the ground up. A wing imports lower ones; within a wing, and between wings of one number, no circles.
WINGS = {
    "equation": 1,
    "runtime": 2,
    "fitting": 3,
    "layers": 4,
    "structures": 5,
    "exact": 6,
    "batches": 6,
    "testing": 6,
    "adapters": 6,
    "checkpoint": 7,
    "heal": 7,
    "tensor_train": 7,
    "compress": 8,
    "integrations": 9,
    "hf": 9,
    "peft": 9,
    "vllm": 9,
    "cli": 10,
    "": 10,
}
NO_TORCH = ("equation.spec", "equation.ties", "equation.modes", "runtime.costs", "runtime.planner")
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def wing_of(module: str) -> str:
    """The wing (or module) directly below structlin."""
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


def inside(imported: set[str]) -> set[str]:
    """The modules of structlin among absolute names, without its prefix."""
    return {name.removeprefix("structlin").lstrip(".") for name in imported if name.split(".")[0] == "structlin"}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up, from each module to those that it imports."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if WINGS[wing_of(other)] > WINGS[wing_of(module)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, none if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


GRAPH = {name_of(file): inside(imports(file)) - {name_of(file)} for file in FILES}


def test_every_module_is_in_a_wing():
    assert {wing_of(module) for module in GRAPH} == WINGS.keys()


def test_every_wing_says_what_it_is_for_in_a_sentence():
    for wing in WINGS:
        file = ROOT / wing / "__init__.py"
        if file.exists():
            sentence = ast.get_docstring(ast.parse(file.read_text())) or ""
            assert sentence.endswith("."), wing
            assert 3 <= len(sentence.split()) <= 30, wing


def test_wings_import_downward_only():
    assert violations(GRAPH) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


def test_wings_of_one_number_import_each_other_in_one_direction():
    pairs = {(wing_of(module), wing_of(other)) for module, others in GRAPH.items() for other in others}
    assert [pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs] == []


def test_the_checks_see_what_they_look_for():
    assert violations({"fitting.fit": {"layers.linear", "runtime"}}) == ["fitting.fit imports layers.linear"]
    assert violations({"fitting.fit": {""}}) == ["fitting.fit imports "]
    assert violations({"checkpoint.api": {"layers.linear", "checkpoint.tensors"}}) == []
    assert circle({"heal.run": {"heal.state"}, "heal.state": {"heal.run"}}) == ["heal.run", "heal.state", "heal.run"]


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
        assert late <= {"tqdm", "tqdm.auto"} or wing_of(name_of(file)) == "integrations", f"{file.name} imports {late}"


# The process of compression ------------------------------------------------------------------------------------------

# Files of compress/ that hold data.
DATA = {"config", "data", "plan", "quality", "report", "statistics", "tables", "targets", "taxonomy"}


def longest_chain(graph: dict[str, set[str]], module: str) -> list[str]:
    """The longest chain of imports that begins with a module."""
    return [module, *max((longest_chain(graph, other) for other in graph[module]), key=len, default=[])]


def test_import_chains_of_compress_are_at_most_six_deep():
    modules = {module for module in GRAPH if module.startswith("compress.")}
    inner = {module: GRAPH[module] & modules for module in modules}
    longest = max((longest_chain(inner, module) for module in sorted(modules)), key=len)
    assert len(longest) <= 6, longest


def test_data_files_of_compress_import_no_running_file():
    files = {f"compress.{name}" for name in DATA}
    assert files <= GRAPH.keys()
    imported = {other for file in files for other in GRAPH[file] if other.startswith("compress.")}
    assert imported <= files


def test_the_process_stands_on_one_page():
    assert len((ROOT / "compress" / "pipeline.py").read_text().splitlines()) <= 150


# Signatures ----------------------------------------------------------------------------------------------------------


def public_functions() -> dict[str, Callable]:
    """Public functions, and the methods that public classes define; constructors mirror the fields of a structure."""
    found = {}
    for name in structlin.__all__:
        value = getattr(structlin, name)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value):
            methods = {key: member for key, member in vars(value).items() if not key.startswith("_")}
            plain = {key: inspect.unwrap(getattr(m, "__func__", m)) for key, m in methods.items()}
            found |= {f"{name}.{key}": method for key, method in plain.items() if inspect.isfunction(method)}
    return found


def test_public_functions_take_at_most_eight_parameters():
    def count(function: Callable) -> int:
        named = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        return len([p for p in named if p.name not in ("self", "cls")])

    functions = public_functions()
    assert len(functions) > 30
    assert {name: count(function) for name, function in functions.items() if count(function) > 8} == {}


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
print(planner.find_plan(spec.Spec(64, 64, (eq,)), 32, machine=planner.CPU).flops, "torch" in sys.modules)
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
