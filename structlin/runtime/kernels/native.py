"""Build and load the native kernel: C++, compiled once per CPU, Python and torch version."""

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
MODULE = "structlin_chain"  # name of the extension module, if built with Python's headers
SWITCH = "STRUCTLIN_KERNELS"  # environment variable: "off" disables, "build" builds on first use, else use if built


def build() -> Path:
    """Compile the native kernel for this CPU and torch version into the user's cache: 10 to 20 s, once.

    Structured layers in float32 and bfloat16 on a CPU then use it, in this process and later ones. The environment
    variable STRUCTLIN_KERNELS=off disables the kernel, STRUCTLIN_KERNELS=build builds it on first use. The compiler
    gets $CXXFLAGS.

    Returns:
        The library's path: under $STRUCTLIN_CACHE, else $XDG_CACHE_HOME/structlin, else ~/.cache/structlin.
    Raises:
        RuntimeError: if no C++ compiler is found ($CXX, else c++) or it fails; the message quotes its output.
    """
    target = _path()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # same file system: `replace` is atomic
            made = Path(folder) / target.name
            _compile(made)
            made.replace(target)
    _State.usable = None
    return target


@constant
def available() -> bool:
    """Return whether the native kernel is built, loads, and is not disabled by STRUCTLIN_KERNELS=off."""
    if _State.usable is None:
        _State.usable = _load(os.environ.get(SWITCH, ""))
    return _State.usable


def chain(x: Tensor, factors: tuple[Tensor, ...], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    """Call the operator `structlin::chain`, through the extension module if built: it is faster than torch.ops."""
    result: Tensor = _State.calls.chain(x, factors, bias, program, out_features)
    return result


class Known(NamedTuple):
    """Everything that `recall` in calls.cpp checks before it runs a layer without returning to Python."""

    names: tuple[str, ...]  # of the parameters: the factors, then the bias
    seen: tuple[Tensor | None, ...]  # these parameters; they passed `suits`
    constant: set[int]  # numbers of rows for which the kernel is the fastest way if no factor needs a gradient
    learned: set[int]  # the same if a factor needs one
    program: Tensor
    in_features: int
    out_features: int


def shortcut(known: Known) -> Callable[[Tensor, dict[str, Any]], Tensor | None] | None:
    """Return a function of (input, parameters) that runs a layer in one call; None if built without Python's headers.

    The function returns None where `Execution` must decide.
    """
    recall = getattr(_State.calls, "recall", None)
    return partial(recall, known) if recall else None


class _State:
    usable: bool | None = None  # None: not checked yet
    library: torch.library.Library | None = None  # registrations in torch; they end when this object is freed
    calls: Any = None  # module (or torch.ops namespace) with the compiled functions


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
    """Return the folder of Python's headers, None if they are not installed."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


def _loaded() -> bool:
    """Return whether this process has loaded the library: a second load would register the operators twice."""
    return hasattr(torch.ops.structlin, "chain")


def _flags() -> tuple[list[str], list[str]]:
    """Return the compiler's and the linker's flags."""
    root = Path(torch.__file__).parent
    mac = platform.system() == "Darwin"
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    folders = [root / "include", root / "include/torch/csrc/api/include", _headers()]
    include = [f"-isystem{folder}" for folder in folders if folder]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # at::parallel_for is a template that needs -fopenmp when compiled; linked with it, a second OpenMP runtime would
    # load beside torch's own.
    threads = [] if mac else ["-fopenmp"]
    own = os.environ.get("CXXFLAGS", "").split()
    libraries = ["-lc10", "-ltorch_cpu", *(["-ltorch_python"] if _headers() else [])]
    link = ["-shared", f"-L{root / 'lib'}", *libraries, *(["-undefined", "dynamic_lookup"] if mac else [])]
    return ["-O3", tune, "-std=c++20", "-fPIC", *threads, *own, abi, *include], link


def _path() -> Path:
    """Return where the library belongs; its name hashes everything that the binary depends on."""
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
    """Run the compiler once per argument list, in parallel."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("the native kernel needs a C++ compiler; install one, or set $CXX; layers work without it")
    commands = [[compiler, *given] for given in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, command, errors in zip(running, commands, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')[-4000:]}")
