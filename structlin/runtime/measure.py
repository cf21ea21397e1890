"""Measure the rates of this machine, from which layers predict their plans."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from structlin.equation.spec import Spec, equation
from structlin.runtime import kernels
from structlin.runtime.machines import name_of, remember, shipped
from structlin.runtime.planner import CPU, Machine

TOKENS = 256  # enough for the native kernel to work in tiles
ROWS = 32  # of a thin product
SLOW = 1e10  # FLOP/s; a large bfloat16 product takes seconds on CPUs without units for it


def measure_machine(device: torch.device | str = "cpu") -> Machine:
    """Benchmark this machine at torch's current thread count (2 s) and use the record for all later plans.

    The native kernel is measured too, if it is built. A layer plans with the record for every number of rows that it
    has not run yet; later processes read it from the cache (see `structlin.kernels.build`). Without a record, layers
    use the shipped ones: `planner.CPU` and `planner.CPU_AMX`, measured on one core each, and `planner.H200`, from its
    data sheet.

    Args:
        device: a CPU or CUDA device.
    Returns:
        The record.
    """
    device = torch.device(device)
    with torch.autocast(device.type, enabled=False):
        found = _measured(device, replace(shipped(device), name=name_of(device)))
        if device.type == "cpu" and kernels.available():
            found = replace(found, native=_native(TOKENS), native_few=_native(1))
    remember(device, found)
    return found


def _measured(device: torch.device, machine: Machine) -> Machine:
    seconds = partial(_seconds, device)
    ones = partial(torch.ones, device=device, dtype=torch.float32)

    def rate(dtype: torch.dtype, size: int = 1024) -> float:
        a = ones(size, size, dtype=dtype)
        return 2 * size**3 / seconds(lambda: torch.mm(a, a))

    half_flops = rate(torch.bfloat16, 128)
    if half_flops > SLOW:
        half_flops = rate(torch.bfloat16)

    small, near, far = (ones(n, n) for n in (16, 1024, 8192 if device.type == "cuda" else 4096))
    stack = ones(128, 32, 32)
    op = seconds(lambda: torch.mm(small, small))  # too small to take time beyond the call
    half = small.bfloat16()
    found = replace(
        machine,
        flops=rate(torch.float32),
        half_flops=half_flops,
        op=2 * op,  # with the view before it
        half_op=max(0.0, seconds(lambda: torch.mm(half, half)) - op),
        # Matrix times vector reads 4 B per entry; a layout copy reads and writes: 8 B.
        bandwidth=4 * near.numel() / seconds(lambda: torch.mv(near, near[0])),
        far_bandwidth=4 * far.numel() / seconds(lambda: torch.mv(far, far[0])),
        copy_bandwidth=8 * stack.numel() / seconds(lambda: stack.permute(2, 1, 0).contiguous()),
        transpose_bandwidth=8 * stack.numel() / seconds(stack.flatten(0, 1).T.contiguous),
    )
    if device.type == "cpu":  # with thin products
        weight, few = ones(512, 512), ones(ROWS, 512)
        slower = seconds(lambda: torch.mm(few, weight.T)) * found.flops / (2 * ROWS * weight.numel())
        found = replace(found, per_row=max(1.0, ROWS * (slower - 1)))
    return found


def _native(tokens: int) -> float:
    """Return the time of the native kernel on this machine / the time predicted for the shipped CPU record."""
    size, rank = 768, 96
    eq = equation("o r, r i -> o i", ("left", "right"), {"o": size, "r": rank, "i": size})
    chain = kernels.chain_of(Spec(size, size, (eq,)))
    ones = partial(torch.ones, device="cpu", dtype=torch.float32)
    x, factors = ones(tokens, size), (ones(size, rank), ones(rank, size))
    with torch.no_grad():
        return _seconds(torch.device("cpu"), lambda: chain(x, factors, None)) / chain.seconds(tokens, machine=CPU)


def _seconds(device: torch.device, call: Callable[[], Tensor]) -> float:
    """Return the median time per call over 7 samples of at least 3 calls and 5 ms."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    call()
    samples = []
    for _ in range(7):
        calls = 0
        wait()
        start = time.perf_counter()
        while calls < 3 or time.perf_counter() - start < 5e-3:
            call()
            calls += 1
        wait()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)
