"""Records of machines on disk: rates that `measure_machine` found, in the user's cache, else the shipped ones."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from structlin.runtime.planner import CPU, H200, Machine


def cache_folder() -> Path:
    """Return the folder of records and built kernels: $STRUCTLIN_CACHE, else `structlin` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STRUCTLIN_CACHE") or Path(base) / "structlin")


def processor() -> str:
    """Describe this CPU by its architecture and features, which tell it from others."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}\n{features}\n"


def remember(device: torch.device, machine: Machine) -> None:
    """Store the record of a device for this process and later ones."""
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(asdict(machine)), encoding="utf-8")
    aside.replace(path)
    _machine.cache_clear()


def shipped(device: torch.device) -> Machine:
    """Return the shipped record, used until the device is measured."""
    return H200 if device.type == "cuda" else CPU


def machine_of(device: torch.device) -> Machine:
    """Return the record by which to plan on a device: what `measure_machine` found, or a shipped one."""
    return _machine(device.type, torch.get_num_threads())


@cache
def _machine(device_type: str, threads: int) -> Machine:
    path = _path(torch.device(device_type))
    if device_type in ("cpu", "cuda") and path.exists():
        return Machine(**json.loads(path.read_text(encoding="utf-8")))
    return shipped(torch.device(device_type))


def name_of(device: torch.device) -> str:
    """Name the device as its record does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} cpu, {threads} thread{'s' * (threads > 1)}"


def _path(device: torch.device) -> Path:
    kind = name_of(device) if device.type == "cuda" else f"{processor()}{torch.get_num_threads()}"
    facts = (repr(Machine.__annotations__), torch.__version__, kind)  # other fields are another version's
    return cache_folder() / f"machine-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.json"
