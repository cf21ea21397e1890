"""Records of machines on disk: rates that `measure_machine` found, in the user's cache, else the shipped ones."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import warnings
from dataclasses import Field, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from structlin.runtime.cache import cache_folder, read, write
from structlin.runtime.planner import CPU, CPU_AMX, H200, Machine

LEAST, MOST = 1e-30, 1e30  # of a rate; predictions beyond would overflow


def processor() -> str:
    """Describe this CPU by its architecture and features, which tell it from others."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}\n{features}\n"


def remember(device: torch.device, machine: Machine) -> None:
    """Store the record of a device for this process and later ones."""
    write(_path(device), json.dumps(asdict(machine)).encode())
    _machine.cache_clear()


def shipped(device: torch.device) -> Machine:
    """Return the shipped record, used until the device is measured."""
    if device.type == "cuda":
        return H200
    return CPU_AMX if "amx_bf16" in processor().split() else CPU


def machine_of(device: torch.device) -> Machine:
    """Return the record by which to plan on a device: what `measure_machine` found, or a shipped one."""
    return _machine(device.type, torch.get_num_threads())


@cache
def _machine(device_type: str, threads: int) -> Machine:
    device = torch.device(device_type)
    if device_type in ("cpu", "cuda"):
        try:
            return _stored(_path(device))
        except FileNotFoundError:
            pass
        except OSError as error:
            warnings.warn(f"the record of this machine is not used: {error}; plans follow a shipped one", stacklevel=2)
    return shipped(device)


def _stored(path: Path) -> Machine:
    """Read a record; OSError names the file and says why it is not used."""
    content = read(path)
    try:
        found = json.loads(content)
        names = {field.name for field in fields(Machine)}
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError(f"it has not exactly the fields {', '.join(sorted(names))}")
        for field in fields(Machine):
            if not _fits(field, found[field.name]):
                raise ValueError(f"{field.name} is {found[field.name]!r:.80}")
    except (ValueError, RecursionError) as error:  # a RecursionError of nested lists
        raise OSError(f"{path} is damaged: {error}; call structlin.measure_machine() to replace it") from error
    return Machine(**found)


def _fits(field: Field[Any], value: object) -> bool:
    """Return whether a record may hold the value: a finite rate above 0; None, 0 or inf only where Machine has them."""
    if field.name == "name":
        return isinstance(value, str)
    if value is None:
        return "None" in str(field.type)
    if isinstance(value, bool) or not isinstance(value, int if field.type == "int" else (int, float)):
        return False
    return LEAST < value < MOST or (value == 0 == field.default) or (value == math.inf == field.default)


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
