"""Build and load the native kernel: C++, compiled once per CPU, Python and torch version; or that of a wheel."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structlin.runtime import cache
from structlin.runtime.eager import constant
from structlin.runtime.kernels import operators, wheel
from structlin.runtime.kernels.variants import digest
from structlin.runtime.machines import processor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("chain.cpp", "calls.cpp", "quantized.cpp"))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
MODULE = "structlin_chain"  # name of the extension module, if built with Python's headers
SWITCH = "STRUCTLIN_KERNELS"  # environment variable
WORDS = ("on", "off", "build")  # its values, in any letter case: use if built (as without the variable), never, build


def build() -> Path:
    """Compile the native kernel for this CPU and torch version into the user's cache: about half a minute, once.

    Structured layers in float32 and bfloat16 on a CPU then use it, in this process and later ones (in later ones only,
    if this one runs the kernel of structlin-kernels already). The environment variable STRUCTLIN_KERNELS=off disables
    the kernel, STRUCTLIN_KERNELS=build builds it on first use. The compiler is $CXX, which may have arguments, and gets
    $CXXFLAGS. A library that was damaged since it was built, or that other users own or may write to, is not loaded:
    layers warn and run without it, and `build` builds it again.

    Returns:
        The library's path: under $STRUCTLIN_CACHE, else $XDG_CACHE_HOME/structlin, else ~/.cache/structlin.
    Raises:
        RuntimeError: if no C++ compiler is found ($CXX, else c++) or it fails; the message quotes its output. Or if the
            folder cannot be written, or other users own it or may write to it.
    """
    stem = _stem()
    found, refused = _find(stem)
    if found is None or found == _State.broken:
        try:
            found = _make(stem)
            # A broken one, of another system's compiler perhaps, might be found first otherwise.
            for path in {*refused, *([_State.broken] if _State.broken else [])} - {found}:
                cache.remove(path)
        except OSError as error:
            raise RuntimeError(
                f"the native kernel cannot be made: {error}; set $STRUCTLIN_CACHE to a folder that you may write; "
                "layers work without it"
            ) from error
    _State.usable = None
    return found


def switch() -> str:
    """Return the word in $STRUCTLIN_KERNELS, one of WORDS."""
    given = os.environ.get(SWITCH) or "on"
    if given.lower() not in WORDS:
        raise ValueError(f"{SWITCH}={given!r} is none of {', '.join(WORDS)}; set one of them, or unset it for 'on'")
    return given.lower()


switch()  # a word that means nothing is refused at import, not in a forward pass


@constant
def available() -> bool:
    """Return whether there is a native kernel that loads, and that STRUCTLIN_KERNELS=off does not disable.

    The one that `build` built comes first, then that of the distribution structlin-kernels.
    """
    if _State.usable is None:
        with _State.lock:  # torch refuses a library that two threads register
            if _State.usable is None:
                _State.usable = _load(switch())
    return bool(_State.usable)


def origin() -> Path | None:
    """Return the library that runs: `build`'s, or that of structlin-kernels; None where layers run in plain torch."""
    return _State.origin if available() else None


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
    """Return a function of (input, parameters) that runs a layer in one call; None if the library has none.

    It returns None where `Execution` must decide. Local builds with Python's headers have it, wheels do not.
    """
    recall = getattr(_State.calls, "recall", None)
    return partial(recall, known) if recall else None


class _State:
    usable: bool | None = None  # None: not checked yet
    libraries: tuple[torch.library.Library, ...] = ()  # registrations in torch; they end when these objects are freed
    calls: Any = None  # module (or torch.ops namespace) with the compiled functions, or `wheel`
    origin: Path | None = None  # the library that is loaded
    lock = Lock()  # held while the library is loaded
    broken: Path | None = None  # a library that is as it was built, but did not load


def _load(word: str) -> bool:
    """Load a library if the switch's word allows; warn of each that cannot be used, and if none can be built."""
    if word == "off":
        return False
    refused: list[str] = []
    for find, load in ((partial(_built, word), _load_built), (wheel.find, _load_wheel)):
        path, reasons = find()
        refused += reasons
        if path is None:
            continue
        try:
            if not _loaded():
                load(path)
                _State.origin = path
            break
        except (OSError, ImportError, SystemError) as error:
            refused.append(f"{path} does not load: {error}")
    else:
        path = None
    instead = f"{path} runs" if path else "layers run in plain torch until structlin.kernels.build() succeeds"
    for reason in refused:
        warnings.warn(f"a build of the native kernel is not used: {reason}; {instead}", stacklevel=2)
    return path is not None


def _built(word: str) -> tuple[Path | None, list[str]]:
    """Return the library that `build` built, or builds now if the word says so; and why others may not be loaded."""
    if word == "build":
        try:
            build()
        except RuntimeError as error:
            warnings.warn(f"{SWITCH}=build, but {error}", stacklevel=2)
            return None, []
    path, refused = _find(_stem())
    return path, [] if path else list(refused.values())


def _load_built(path: Path) -> None:
    _State.broken = path  # until it has loaded
    _State.calls = _open(path)
    _State.broken = None
    _State.libraries = (operators.register(),)


def _load_wheel(path: Path) -> None:
    _State.libraries = (wheel.load(path), operators.register())
    _State.calls = wheel


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
    return folder if os.path.exists(folder / "Python.h") else None  # False too where it cannot be seen


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


def _stem() -> str:
    """Return how the library's name begins: with a hash of everything that the binary depends on."""
    flags, link = _flags()
    sources = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    facts = [*sources, torch.__version__, platform.python_version(), processor(), *flags, *link]
    return f"chain-{digest(chr(10).join(facts).encode())}-"


def _name(stem: str, content: bytes) -> str:
    """Return the library's name, which ends in a hash of its content: a damaged one would kill the process."""
    return f"{stem}{digest(content)}.so"


def _find(stem: str) -> tuple[Path | None, dict[Path, str]]:
    """Return the library, None if none may be loaded; and those that may not be, each with the reason."""
    refused: dict[Path, str] = {}
    for path in cache.listed(stem, ".so"):
        try:
            if _name(stem, cache.read(path)) == path.name:
                return path, refused
            refused[path] = f"{path} is damaged: its content has another hash than its name"
        except OSError as error:
            refused[path] = str(error)
    return None, refused


def _make(stem: str) -> Path:
    folder = cache.cache_folder()
    with cache.workplace(folder) as work:
        _compile(work / "chain.so")
        if not (work / "chain.so").exists():
            raise RuntimeError(
                f"the C++ compiler (CXX={os.environ.get('CXX')!r}) reports success, but wrote no library"
            )
        content = (work / "chain.so").read_bytes()
    target = folder / _name(stem, content)
    cache.write(target, content)
    return target


def _compile(target: Path) -> None:
    flags, link = _flags()
    parts = [target.with_name(f"{source.stem}.o") for source in SOURCES]
    _run(*([*flags, "-c", str(source), "-o", str(part)] for source, part in zip(SOURCES, parts, strict=True)))
    _run([*map(str, parts), "-o", str(target), *link])


def _run(*arguments: list[str]) -> None:
    """Run the compiler once per argument list, in parallel."""
    named = os.environ.get("CXX") or "c++"
    try:
        compiler = shlex.split(named)  # such as "ccache g++"
    except ValueError as error:
        raise RuntimeError(f"CXX={named!r} cannot be split into words: {error}") from error
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"the native kernel needs a C++ compiler, and there is no {named!r}; install one, or set $CXX; layers work "
            "without it"
        )
    commands = [[*compiler, *given] for given in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, command, errors in zip(running, commands, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')[-4000:]}")
