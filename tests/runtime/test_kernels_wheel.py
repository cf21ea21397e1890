"""The kernel of structlin-kernels: which library is chosen, when it is loaded, and what is said where it cannot be.

The libraries are fakes: that real ones compute what local builds compute is shown by tests/wheels.sh.
"""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from structlin.layers.linear import build
from structlin.runtime import kernels
from structlin.runtime.kernels import native, variants, wheel
from structlin.structures import LowRank

FIND_SPEC = wheel.find_spec
ROOT = Path(__file__).parents[2]
SOURCES = Path(variants.__file__).parent
V2 = "fpu sse sse2 cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


# Choice --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", V4, "x86-64-v4"),
        ("AMD64", f"{V4} avx512_bf16 amx_tile", "x86-64-v4"),
        ("x86_64", V4.replace("avx512dq", ""), "x86-64-v3"),  # as on a Xeon Phi
        ("x86_64", V3, "x86-64-v3"),
        ("x86_64", V3.replace("fma", "fma4"), "x86-64-v2"),
        ("x86_64", f"{V2} avx", "x86-64-v2"),
        ("x86_64", "fpu sse sse2", None),
        ("x86_64", "", None),
        ("aarch64", "fp asimd", "arm64"),
        ("arm64", "", "arm64"),
        ("ppc64le", V4, None),
    ],
)
def test_the_fastest_that_runs_is_chosen(machine, features, name):
    found = variants.fastest_for(machine, features.split())
    assert (found and found.name) == name


def test_every_level_needs_what_the_one_below_needs():
    levels = variants.for_machine("x86_64")
    assert [level.name for level in levels] == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    for above, below in pairwise(levels):
        assert set(above.features) > set(below.features)


def test_the_stamp_changes_with_every_source(tmp_path):
    copy = shutil.copytree(SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    assert variants.stamp(copy) == variants.stamp(SOURCES)
    seen = {variants.stamp(copy)}
    for name in ("chain.cpp", "tensors.h", "vectors.h"):
        with (copy / name).open("a") as file:
            file.write("//\n")
        seen.add(variants.stamp(copy))
    assert len(seen) == 4


def test_what_setup_runs_imports_nothing_of_ours():
    assert runpy.run_path(str(SOURCES / "variants.py"))["stamp"](SOURCES) == variants.stamp(SOURCES)
    assert not re.search(r"^(from|import) (torch|structlin)", (SOURCES / "variants.py").read_text(), re.MULTILINE)


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch, tmp_path):
    """A process that has looked for no kernel, on a CPU of level 3, with an empty cache and no compiler."""
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(native.SWITCH, "on")
    for name in ("usable", "broken", "origin", "calls"):
        monkeypatch.setattr(native._State, name, None)
    monkeypatch.setattr(native, "_loaded", lambda: False)
    monkeypatch.setattr(native, "_compile", lambda target: target.write_bytes(b"built here"))
    monkeypatch.setattr(wheel.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(wheel, "processor", lambda: f"x86_64\nflags : {V3}\n")
    monkeypatch.setattr(wheel, "find_spec", lambda name: None)


@pytest.fixture
def package(process, monkeypatch, tmp_path):
    """The folder of an installed structlin-kernels with libraries for levels 2 and 3."""
    monkeypatch.setattr(wheel, "find_spec", FIND_SPEC)
    folder = tmp_path / "site" / wheel.PACKAGE
    folder.mkdir(parents=True)
    folder.joinpath("__init__.py").touch()
    for level in ("x86-64-v2", "x86-64-v3"):
        content = level.encode()
        folder.joinpath(variants.file_name(level, variants.stamp(SOURCES), content)).write_bytes(content)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Which loader got which library, in order."""
    calls: list[tuple[str, Path]] = []
    monkeypatch.setattr(native, "_load_built", lambda path: calls.append(("built", path)))
    monkeypatch.setattr(native, "_load_wheel", lambda path: calls.append(("wheel", path)))
    return calls


def level(package, name="x86-64-v3"):
    (found,) = package.glob(f"chain-{name}-*")
    return found


def test_without_either_plain_torch_runs_and_nothing_is_said(process, loads):
    assert not kernels.available()
    assert kernels.origin() is None
    assert loads == []


def test_the_wheel_runs_where_nothing_was_built(package, loads):
    assert kernels.origin() == level(package)
    assert loads == [("wheel", level(package))]


def test_what_was_built_here_comes_first(package, loads):
    built = kernels.build()
    assert kernels.origin() == built
    assert loads == [("built", built)]


def test_a_build_that_is_damaged_is_named_and_the_wheel_runs(package, loads):
    built = kernels.build()
    built.write_bytes(b"cut")
    with pytest.warns(UserWarning, match=f"{built} is damaged.*; {level(package)} runs"):
        assert kernels.available()
    assert loads == [("wheel", level(package))]


def test_a_build_that_does_not_load_is_named_and_the_wheel_runs(package, loads, monkeypatch):
    def fails(path):
        raise ImportError("no such symbol")

    built = kernels.build()
    monkeypatch.setattr(native, "_load_built", fails)
    with pytest.warns(UserWarning, match=f"{built} does not load: no such symbol; {level(package)} runs"):
        assert kernels.origin() == level(package)


def test_a_failed_build_on_request_leaves_the_wheel(package, loads, monkeypatch):
    def fails(target):
        raise RuntimeError("there is no compiler")

    monkeypatch.setenv(native.SWITCH, "build")
    monkeypatch.setattr(native, "_compile", fails)
    with pytest.warns(UserWarning, match="STRUCTLIN_KERNELS=build, but there is no compiler"):
        assert kernels.origin() == level(package)


def test_a_wheel_that_is_loaded_stays_for_this_process(package, loads, monkeypatch):
    assert kernels.available()
    monkeypatch.setattr(native, "_loaded", lambda: True)
    kernels.build()
    assert kernels.origin() == level(package)
    assert loads == [("wheel", level(package))]


def test_switched_off(package, loads, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "off")
    assert kernels.origin() is None
    assert loads == []


def cut(package):
    level(package).write_bytes(b"x86")


def rebuilt(package):
    path = level(package)
    path.rename(path.with_name(path.name.replace(variants.stamp(SOURCES), "0123456789abcdef")))


def lost(package):
    level(package).unlink()


def emptied(package):
    shutil.rmtree(package)
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath(wheel.EMPTY).write_text("no C++ compiler was found when it was installed (c++)\n")


DAMAGE = {
    cut: r"chain-x86-64-v3-\S+ is damaged: its content has another hash than its name; install structlin and",
    rebuilt: "has no library for x86-64-v3 of this version's sources",
    lost: "has no library for x86-64-v3 of this version's sources",
    emptied: r"structlin-kernels is empty: no C\+\+ compiler was found when it was installed",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_wheel_is_named_once_and_plain_torch_runs(damage, package):
    damage(package)
    layer = build(LowRank(rank=3), 16, 20)
    x = torch.randn(5, 16)
    with pytest.warns(UserWarning, match=f"{DAMAGE[damage]}.*; layers run in plain torch") as said:
        y = layer(x)
    assert len(said) == 1
    assert torch.equal(layer(x), y)  # without a warning, which would be an error here
    assert kernels.origin() is None


def test_a_wheel_that_does_not_load_is_named(package):
    """The fake is no library."""
    with pytest.warns(UserWarning, match=f"{level(package)} does not load: .*; layers run in plain torch"):
        assert not kernels.available()


def test_another_processor_is_named(package, monkeypatch):
    monkeypatch.setattr(wheel.platform, "machine", lambda: "riscv64")
    with pytest.warns(UserWarning, match="structlin-kernels has no library for this riscv64 processor"):
        assert not kernels.available()


# The distribution ----------------------------------------------------------------------------------------------------


def test_nothing_is_built_without_a_compiler_and_the_package_says_so(monkeypatch, tmp_path):
    pytest.importorskip("setuptools.command.bdist_wheel")
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "build", "--build-base", str(tmp_path)])
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.chdir(ROOT / "kernels")
    runpy.run_path("setup.py", run_name="__main__")
    (said,) = tmp_path.rglob(wheel.EMPTY)
    assert said.parent.name == wheel.PACKAGE
    assert said.read_text() == "no C++ compiler was found when it was installed (no-such-compiler)\n"
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("STRUCTLIN_KERNELS_REQUIRED", "1")
    with pytest.raises(LookupError, match=r"no C\+\+ compiler"):
        runpy.run_path("setup.py", run_name="__main__")
