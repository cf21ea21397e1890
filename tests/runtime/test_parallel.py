"""Layers train as `nn.Linear` does behind FSDP, DDP and activation checkpoints, by the kernel and in plain torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from cases import switch_on
from torch import nn
from torch.utils.checkpoint import checkpoint

from structlin.layers.linear import build
from structlin.runtime.kernels import native
from structlin.structures import Kaleidoscope, LowRank, Sum, TensorTrain

SCRIPT = """
import copy, gc, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from structlin import KMatrix, LowRankLinear, TTLinear
from structlin.runtime import kernels
rank, kernel = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)
assert kernels.available() == (kernel == "on")
torch.manual_seed(0)
train = TTLinear(64, 64, rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4))
model = nn.Sequential(KMatrix(64, 64, width=2), nn.GELU(), train, nn.GELU(), LowRankLinear(64, 8, rank=4))
x, y = torch.randn(2, 9000, 64), torch.randn(2, 9000, 8)

def steps(model, x, y, eval_x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.eval()
    with torch.no_grad():
        before = model(eval_x)  # nothing of the factors may be kept
    for _ in range(3):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model(eval_x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        return before, after, model(eval_x)

expected = steps(copy.deepcopy(model), x.flatten(0, 1), y.flatten(0, 1), x[0, :1])
sharded = copy.deepcopy(model)
for layer in sharded:
    if list(layer.parameters()):
        fully_shard(layer)
fully_shard(sharded)
assert all(isinstance(p, DTensor) for p in sharded.parameters())
for other in (sharded, DistributedDataParallel(copy.deepcopy(model))):
    found = steps(other, x[rank], y[rank], x[0, :1])
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
assert not torch.allclose(expected[0], expected[1], atol=1e-2)
del other, sharded, found  # the group's threads end with it, not with the interpreter: torch aborts otherwise
gc.collect()
dist.barrier()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["on", "off"])
def test_fsdp_and_ddp(kernel, monkeypatch):
    if kernel == "on":
        switch_on(monkeypatch)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    facts = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), native.SWITCH: "" if kernel == "on" else "off"}
    options = {"env": os.environ | facts, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-W", "error:FSDP", "-c", SCRIPT]
    processes = [subprocess.Popen([*command, str(rank), kernel], **options) for rank in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert out == "equal\n"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernel", ["on", "off"])
def test_activation_checkpoints(kernel, reentrant, monkeypatch):
    if kernel == "on":
        switch_on(monkeypatch)
    tt = TensorTrain(rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4))
    best = Sum(parts=(LowRank(rank=4), Kaleidoscope(width=2)))
    model = nn.Sequential(build(tt, 64, 64), nn.GELU(), build(best, 64, 64))
    x = torch.randn(9000, 64, requires_grad=True)
    found = []
    for y in (model(x), checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        y.square().sum().backward()
        found.append([x.grad.clone(), *(p.grad.clone() for p in model.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        if reentrant:  # runs forward without gradients first, where another plan may be faster
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
        else:
            assert torch.equal(plain, recomputed)
