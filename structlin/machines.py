"""The machine that runs: its record, measured once and kept in the user's cache, or a shipped one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from structlin.planner import CPU, H200, Machine


def cache_folder() -> Path:
    """Where what is measured or built is kept: $STRUCTLIN_CACHE, else the folder structlin in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STRUCTLIN_CACHE") or Path(base) / "structlin")


def processor() -> str:
    """What tells this CPU from others: architecture and features."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}\n{features}\n"


def measure_machine(device: torch.device | str = "cpu") -> Machine:
    """Measure this machine, with as many threads as torch has now, and plan by what was found from then on; 2 s.

    Layers plan anew with the next number of rows that they have not seen. The record is kept in the cache (see
    `structlin.kernels.build`) and read again by later processes. Without it, layers plan by records that are shipped:
    `structlin.planner.CPU`, measured on one AVX-512 core, and `H200`, from its data sheet.

    Args:
        device: what to measure, a CPU or a CUDA device.
    Returns:
        The record.
    """
    device = torch.device(device)
    shipped = H200 if device.type == "cuda" else CPU
    found = _measured(device, replace(shipped, name=_name(device)))
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(asdict(found)), encoding="utf-8")
    aside.replace(path)
    _machine.cache_clear()
    return found


def machine_of(device: torch.device) -> Machine:
    """The record by which to plan on a device: what `measure_machine` found, or a shipped one."""
    return _machine(device.type, torch.get_num_threads())


@cache
def _machine(device_type: str, threads: int) -> Machine:
    path = _path(torch.device(device_type))
    if device_type in ("cpu", "cuda") and path.exists():
        return Machine(**json.loads(path.read_text(encoding="utf-8")))
    return H200 if device_type == "cuda" else CPU


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} cpu, {threads} thread{'s' * (threads > 1)}"


def _path(device: torch.device) -> Path:
    kind = _name(device) if device.type == "cuda" else f"{processor()}{torch.get_num_threads()}"
    facts = (repr(Machine.__annotations__), torch.__version__, kind)  # other fields are another version's
    return cache_folder() / f"machine-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.json"


def _measured(device: torch.device, machine: Machine) -> Machine:
    def seconds(call: Callable[[], Tensor]) -> float:
        call()
        samples = []
        for _ in range(7):
            calls = 0
            _wait(device)
            start = time.perf_counter()
            while calls < 3 or time.perf_counter() - start < 5e-3:
                call()
                calls += 1
            _wait(device)
            samples.append((time.perf_counter() - start) / calls)
        return statistics.median(samples)

    def rate(dtype: torch.dtype) -> float:
        a = torch.ones(1024, 1024, device=device, dtype=dtype)
        return 2 * 1024**3 / seconds(lambda: torch.mm(a, a))

    small, near, far = (torch.ones(n, n, device=device) for n in (16, 1024, 8192 if device.type == "cuda" else 4096))
    stack = torch.ones(128, 32, 32, device=device)
    op = seconds(lambda: torch.mm(small, small))
    half = small.bfloat16()
    return replace(
        machine,
        flops=rate(torch.float32),
        half_flops=rate(torch.bfloat16),
        op=2 * op,  # with the view before it
        half_op=max(0.0, seconds(lambda: torch.mm(half, half)) - op),
        bandwidth=4 * near.numel() / seconds(lambda: torch.mv(near, near[0])),
        far_bandwidth=4 * far.numel() / seconds(lambda: torch.mv(far, far[0])),
        copies=8 * stack.numel() / seconds(lambda: stack.permute(2, 1, 0).contiguous()),
        turns=8 * stack.numel() / seconds(stack.flatten(0, 1).T.contiguous),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
