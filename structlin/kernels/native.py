"""Build and load the native kernel: C++, compiled once for each machine and version of torch."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from structlin.kernels import traced
from structlin.kernels.constant import constant
from structlin.machines import cache_folder, processor

SOURCE = Path(__file__).with_name("chain.cpp")
SWITCH = "STRUCTLIN_KERNELS"  # "off": not used; "build": built when first needed; else: used where it is built


def build() -> Path:
    """Compile the native kernel for this CPU and this torch, into the user's cache; 10 to 20 s, once.

    From then on structured layers in float32 and bfloat16 on a CPU run by it, in this process and later ones. Set the
    environment variable STRUCTLIN_KERNELS to `off` to do without, or to `build` to have this done when first needed;
    $CXXFLAGS is passed on.

    Returns:
        The library's path: under $STRUCTLIN_CACHE, else $XDG_CACHE_HOME/structlin, else ~/.cache/structlin.
    Raises:
        RuntimeError: if there is no C++ compiler ($CXX, else c++), or it fails, with what it says.
    """
    target = _path()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(made)
            made.replace(target)
    _State.usable = None
    return target


@constant
def available() -> bool:
    """Whether the native kernel is built, loads, and is not switched off."""
    if _State.usable is None:
        _State.usable = _load(os.environ.get(SWITCH, ""))
    return _State.usable


class _State:
    usable: bool | None = None  # not found out yet
    library: torch.library.Library | None = None  # what torch was told of the kernel, while this is kept


def _load(switch: str) -> bool:
    if switch == "off":
        return False
    if switch == "build":
        build()
    path = _path()
    if not path.exists():
        return False
    if not _loaded():
        try:
            torch.ops.load_library(path)
            _State.library = traced.register()
        except OSError as error:
            warnings.warn(f"the native kernel {path} does not load: {error}; layers run without it", stacklevel=2)
            return False
    return True


def _loaded() -> bool:
    return hasattr(torch.ops.structlin, "chain")


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise RuntimeError("the native kernel needs a C++ compiler; install one, or set $CXX; layers work without it")
    return found


def _flags() -> tuple[list[str], list[str]]:
    """Flags to compile by, and to link by."""
    root = Path(torch.__file__).parent
    mac = platform.system() == "Darwin"
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # at::parallel_for is compiled here. Linking goes without -fopenmp: the runtime must be torch's own, not a second.
    threads = [] if mac else ["-fopenmp"]
    own = os.environ.get("CXXFLAGS", "").split()
    link = ["-shared", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", *(["-undefined", "dynamic_lookup"] if mac else [])]
    return ["-O3", tune, "-std=c++20", "-fPIC", *threads, *own, abi, *include], link


def _path() -> Path:
    """Where the library of this source, torch and CPU is or would be."""
    flags, link = _flags()
    facts = [SOURCE.read_text(encoding="utf-8"), torch.__version__, processor(), *flags, *link]
    return cache_folder() / f"chain-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.so"


def _compile(target: Path) -> None:
    flags, link = _flags()
    part = target.with_suffix(".o")
    for command in (
        [_compiler(), *flags, "-c", str(SOURCE), "-o", str(part)],
        [_compiler(), str(part), "-o", str(target), *link],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
