"""Build and load the native kernel: C++, compiled once for each machine and version of torch."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structlin.runtime.eager import constant
from structlin.runtime.kernels import operators
from structlin.runtime.machines import cache_folder, processor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("chain.cpp", "calls.cpp"))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
MODULE = "structlin_chain"  # what the library is to Python, where it was built with Python's headers
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


def chain(x: Tensor, factors: tuple[Tensor, ...], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    """Call the operator `structlin::chain`, the quickest way."""
    result: Tensor = _State.calls.chain(x, factors, bias, program, out_features)
    return result


class Known(NamedTuple):
    """Everything that `recall` in calls.cpp checks before it runs a layer without a return to Python.

    Args:
        names: of the parameters: the factors, then the bias.
        seen: the parameters, all such as `suits` says.
        constant: numbers of rows for which the kernel is the fastest way where no factor's gradient is asked for.
        learned: the same where one is.
        program: of the kernel.
        in_features: size of each input row.
        out_features: size of each output row.
    """

    names: tuple[str, ...]
    seen: tuple[Tensor | None, ...]
    constant: set[int]
    learned: set[int]
    program: Tensor
    in_features: int
    out_features: int


def shortcut(known: Known) -> Callable[[Tensor, dict[str, Any]], Tensor | None] | None:
    """Return a function of (input, parameters) that runs a layer in one call, or gives None if `Execution` must decide.

    None if the library was built without Python's headers.
    """
    recall = getattr(_State.calls, "recall", None)
    return partial(recall, known) if recall else None


class _State:
    usable: bool | None = None  # not found out yet
    library: torch.library.Library | None = None  # what torch was told of the kernel, while this is kept
    calls: Any = None  # what Python may call of it


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
            _State.calls = _open(path)
        except (OSError, ImportError) as error:
            warnings.warn(f"the native kernel {path} does not load: {error}; layers run without it", stacklevel=2)
            return False
        _State.library = operators.register()
    return True


def _open(path: Path) -> Any:
    """Load the library and return the module that exposes its functions."""
    if not _headers():
        torch.ops.load_library(path)
        return torch.ops.structlin
    loader = ExtensionFileLoader(MODULE, str(path))
    spec = spec_from_file_location(MODULE, path, loader=loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _headers() -> Path | None:
    """Where Python's headers are, if they are installed."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


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
    folders = [root / "include", root / "include/torch/csrc/api/include", _headers()]
    include = [f"-isystem{folder}" for folder in folders if folder]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # at::parallel_for is compiled here. Linking goes without -fopenmp: the runtime must be torch's own, not a second.
    threads = [] if mac else ["-fopenmp"]
    own = os.environ.get("CXXFLAGS", "").split()
    libraries = ["-lc10", "-ltorch_cpu", *(["-ltorch_python"] if _headers() else [])]
    link = ["-shared", f"-L{root / 'lib'}", *libraries, *(["-undefined", "dynamic_lookup"] if mac else [])]
    return ["-O3", tune, "-std=c++20", "-fPIC", *threads, *own, abi, *include], link


def _path() -> Path:
    """Where the library of this source, torch and CPU is or would be."""
    flags, link = _flags()
    sources = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    facts = [*sources, torch.__version__, platform.python_version(), processor(), *flags, *link]
    return cache_folder() / f"chain-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.so"


def _compile(target: Path) -> None:
    flags, link = _flags()
    parts = [target.with_name(f"{source.stem}.o") for source in SOURCES]
    _run(*([*flags, "-c", str(source), "-o", str(part)] for source, part in zip(SOURCES, parts, strict=True)))
    _run([*map(str, parts), "-o", str(target), *link])


def _run(*arguments: list[str]) -> None:
    """Call the compiler several times at once."""
    commands = [[_compiler(), *given] for given in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, command, errors in zip(running, commands, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')[-4000:]}")
