"""Builds of the kernel for wheels: for which CPUs, with which options, under which names.

kernels/setup.py runs this file alone, so it imports neither torch nor structlin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_X86, _ARM = ("x86_64", "amd64"), ("arm64", "aarch64")

SOURCES = ("chain.cpp", "quantized.cpp")  # with all headers beside them
# STRUCTLIN_STABLE: see tensors.h. The second says which torch the library asks for at least: 2.10.
DEFINED = ("STRUCTLIN_STABLE", "TORCH_TARGET_VERSION=0x020a000000000000ULL")


class Variant(NamedTuple):
    """A build of the kernel."""

    name: str
    machines: tuple[str, ...]  # architectures, as platform.machine() names them in lower case
    features: tuple[str, ...]  # that a CPU must have, by Linux's names
    options: tuple[str, ...]  # of the compiler


VARIANTS = (  # the fastest first
    Variant("x86-64-v4", _X86, _V4, ("-march=x86-64-v4",)),
    Variant("x86-64-v3", _X86, _V3, ("-march=x86-64-v3",)),
    Variant("x86-64-v2", _X86, _V2, ("-march=x86-64-v2",)),
    Variant("arm64", _ARM, (), ()),
)


def for_machine(machine: str) -> tuple[Variant, ...]:
    """List the builds for an architecture, the fastest first."""
    return tuple(variant for variant in VARIANTS if machine.lower() in variant.machines)


def fastest_for(machine: str, features: Collection[str]) -> Variant | None:
    """Return the fastest build that a CPU with these features runs, None if there is none."""
    return next((variant for variant in for_machine(machine) if set(features).issuperset(variant.features)), None)


def stamp(folder: Path) -> str:
    """Return a hash of the sources in a folder: programs of other sources would be misread."""
    sources = [*(folder / source for source in SOURCES), *sorted(folder.glob("*.h"))]
    return digest(b"\n".join(source.read_bytes().replace(b"\r\n", b"\n") for source in sources))


def file_name(variant: str, sources: str, content: bytes) -> str:
    """Name a library; the hash of its content tells a damaged one, which would kill the process."""
    return f"chain-{variant}-{sources}-{digest(content)}.so"


def digest(content: bytes) -> str:
    """Return 16 digits of the content's sha256."""
    return hashlib.sha256(content).hexdigest()[:16]
