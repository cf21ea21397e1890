"""Layers on each device and in each low dtype: the same results as the dense matrix there, eager and compiled.

The CPU runs always; a CUDA device where there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES

from structlin.layers.linear import build
from structlin.runtime.kernels import launches
from structlin.runtime.ways import EVAL, Key, Launches, ways
from structlin.structures import Kaleidoscope, Kronecker, LowRank, Sum, TensorTrain

CPU = torch.device("cpu")
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Relative errors: chains of rounded products, each to 8 or 11 bits; TF32 is off.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@DEVICES
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(device, dtype, name):
    for structure in CASES[name].at(96, 130):
        layer = build(structure, 96, 130, device=device, dtype=dtype)
        weight, bias = layer.to_dense().detach().float(), layer.bias.detach().float()
        for tokens in (1, 40, 600):
            x = torch.randn(2, tokens, 96, device=device, dtype=dtype, requires_grad=True)
            slope = torch.randn(2, tokens, 130, device=device, dtype=dtype)
            y = layer.train()(x)
            assert y.device.type == device
            assert y.dtype is dtype
            expected = F.linear(x.detach().float(), weight, bias)
            assert error(y, expected) < TOLERANCE[dtype]
            (gradient,) = torch.autograd.grad(y, x, slope)
            assert error(gradient, slope.float() @ weight) < TOLERANCE[dtype]
            with torch.no_grad():
                assert error(layer.eval()(x), expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_triton_kernels(dtype, name):
    gpu = pytest.importorskip("structlin.runtime.kernels.gpu")
    for structure in CASES[name].at(96, 130):
        layer = build(structure, 96, 130, device="cuda", dtype=dtype)
        if layer.spec.tied:
            continue  # runs by other ways
        x = torch.randn(600, 96, device="cuda", dtype=dtype, requires_grad=True)
        y = gpu.chain(layer.spec, x, layer.factors, layer.bias)
        leaves, slope = [x, *layer.parameters()], torch.randn_like(y)
        assert error(y, layer(x)) < TOLERANCE[dtype]
        found = torch.autograd.grad(y, leaves, slope)
        for ours, expected in zip(found, torch.autograd.grad(layer(x), leaves, slope), strict=True):
            assert error(ours, expected) < TOLERANCE[dtype]


def test_triton_kernels_are_no_way_for_more_than_they_count(monkeypatch):
    """Their pairs of (token, free entry), tables and factors are counted in int32."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(launches.SWITCH, "on")
    product = Kronecker(terms=1).resolve(1024, 1024).spec(1024, 1024)  # 32 free entries
    wide = LowRank(rank=2**15).spec(2**16, 2**16)  # 2^31 entries in a factor
    blocks = Kaleidoscope(width=1, in_modes=(64, 16), out_modes=(16, 64)).spec(1024, 1024)  # 16 and 64 blocks

    def counted(spec, rows=1):
        return any(isinstance(way, Launches) for way in ways(spec, Key(rows, torch.float32, CPU, False, EVAL)))

    assert counted(product, 2**25)
    assert not counted(product, 2**26)
    assert not counted(wide)
    assert counted(blocks)
    monkeypatch.setattr(launches, "MOST_BLOCKS", 63)
    assert not counted(blocks)


@DEVICES
@DTYPES
def test_large_activations(device, dtype):
    """By chunks, recomputed in the backward pass."""
    train = TensorTrain(rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4))
    for structure in (train, Kronecker(terms=8), Sum(parts=(LowRank(rank=4), Kaleidoscope(width=2)))):
        layer = build(structure, 64, 64, device=device, dtype=dtype)
        x = torch.randn(9000, 64, device=device, dtype=dtype, requires_grad=True)
        slope = torch.randn(9000, 64, device=device, dtype=dtype)
        leaves = [x, *layer.parameters()]
        found = torch.autograd.grad(layer(x), leaves, slope)
        wide = layer.float()
        expected = torch.autograd.grad(
            F.linear(x.float(), wide.to_dense(), wide.bias), [x, *wide.parameters()], slope.float()
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert error(ours, theirs) < TOLERANCE[dtype]


@DEVICES
def test_autocast(device):
    layer = build(Kaleidoscope(width=2), 64, 64, device=device)
    x = torch.randn(1000, 64, device=device)
    expected = F.linear(x, layer.to_dense(), layer.bias)
    with torch.autocast(device, torch.bfloat16):
        for mode in (True, False):
            y = layer.train(mode)(x)
            assert y.dtype is torch.bfloat16
            assert error(y, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(device, dtype):
    layer = build(Sum(parts=(LowRank(rank=4), Kaleidoscope(width=2))), 64, 64, device=device, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(40, 64, device=device, dtype=dtype, requires_grad=True)
    slope = torch.randn(40, 64, device=device, dtype=dtype)
    results = []
    for run in (layer, compiled):
        y = run(x)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], slope)])
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]
