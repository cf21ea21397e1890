"""Compile structlin's kernel for every level of this architecture, or say in the package why there is none."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = ROOT / "structlin" / "runtime" / "kernels"
VARIANTS: dict[str, Any] = runpy.run_path(str(SOURCES / "variants.py"))
PACKAGE = "structlin_kernels"
WINDOWS = os.name == "nt"  # its compilers lack the vectors that the sources use


def main() -> None:
    """Build as setuptools asks."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    setup(version=version[1], distclass=Binary, cmdclass={"build_py": Build, "bdist_wheel": Wheel})


class Binary(Distribution):
    """A distribution whose files belong to one architecture."""

    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """Tag the wheel for every Python: its libraries know torch only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Build(build_py):
    """Put the libraries, or the reason why there are none, beside the package's files."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / PACKAGE
        for left in (*target.glob("chain-*"), *target.glob("why-empty.txt")):
            left.unlink()
        try:
            for variant in self.variants():
                library = compiled(variant, target)
                print(f"structlin-kernels: built {library.name}", file=sys.stderr)
        except (OSError, LookupError, subprocess.CalledProcessError) as error:
            if os.environ.get("STRUCTLIN_KERNELS_REQUIRED"):
                raise
            print(f"structlin-kernels: NOTHING IS BUILT: {error}; structlin runs in plain torch", file=sys.stderr)
            (target / "why-empty.txt").write_text(f"{error}\n", encoding="utf-8")

    def variants(self) -> Any:
        machine = platform.machine()
        found = () if WINDOWS else VARIANTS["for_machine"](machine)
        if not found:
            raise LookupError(f"there is no build of the kernel for {platform.system()} on {machine}")
        return found


def compiled(variant: Any, folder: Path) -> Path:
    """Compile a variant into the folder."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if not command or shutil.which(command[0]) is None:
        raise LookupError(f"no C++ compiler was found when it was installed ({shlex.join(command)})")
    root = torch_root()
    made = folder / f"{variant.name}.so"
    flags = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-s", *variant.options]
    flags += [f"-D{name}" for name in VARIANTS["DEFINED"]]
    flags += [f"-isystem{root / include}" for include in ("include", "include/torch/csrc/api/include")]
    link = ["-shared", f"-L{root / 'lib'}", "-ltorch_cpu"]
    own = os.environ.get("CXXFLAGS", "").split()
    sources = [str(SOURCES / source) for source in VARIANTS["SOURCES"]]
    subprocess.run([*command, *flags, *own, *sources, "-o", str(made), *link], check=True)
    named = folder / VARIANTS["file_name"](variant.name, VARIANTS["stamp"](SOURCES), made.read_bytes())
    return made.replace(named)


def torch_root() -> Path:
    """Return the folder of torch: pip builds apart from the environment that it installs into, where torch is."""
    places = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = find_spec("torch")
    if spec and spec.origin:
        places.insert(0, Path(spec.origin).parent)
    for place in places:
        if (place / "include/torch/csrc/stable/ops.h").exists():
            return place
    raise LookupError("no torch >= 2.10 was found when it was installed; install torch first, then structlin-kernels")


if __name__ == "__main__":
    main()
