"""The Triton kernels in Triton's interpreter, which needs no GPU: every structure, forward and backward.

    bash tests/environments/triton_kernels.sh

Not in the default run: Triton is a package of its own.
"""

from __future__ import annotations

import pytest
import torch
from cases import ONE
from torch import nn

import structlin
from structlin.layers.linear import build
from structlin.runtime.kernels import gpu, launches
from structlin.runtime.ways import EVAL, TRAINING, Key, Launches, ways

NAMES = sorted(name for name in ONE if not ONE[name].resolve(16, 20).spec(16, 20).tied)  # tied factors run otherwise
SIZES = ((16, 20), (24, 24), (35, 18))


def gradients(y, leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(y, leaves, torch.randn_like(y))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_plain_torch(name, sizes):
    torch.manual_seed(0)
    layer, x = build(ONE[name], *sizes), torch.randn(2, 5, sizes[0], requires_grad=True)
    leaves = [x, *layer.parameters()]
    y = gpu.chain(layer.spec, x, layer.factors, layer.bias)
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(y, leaves), gradients(layer(x), leaves), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (5, 16), (2, 3, 16)], ids=str)
def test_strides_and_leading_axes(shape):
    layer = build(ONE["lowrank"], 16, 20)
    x = torch.randn(*shape[:-1], 32)[..., ::2].requires_grad_()
    for bias in (torch.randn(40)[::2], torch.randn(1).expand(20)):
        y = gpu.chain(layer.spec, x, layer.factors, bias)
        assert y._base is None  # not a view
        torch.testing.assert_close(y, nn.functional.linear(x, layer.to_dense(), bias), atol=1e-5, rtol=1e-5)


# The interpreter of Triton 3.9 multiplies the bits of bfloat16 as if they were whole numbers.
@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("name", ["lowrank", "kmatrix", "blast", "sum"])
def test_half_precision_is_near_float32(name, dtype):
    torch.manual_seed(0)
    layer, x = build(ONE[name], 16, 20), torch.randn(7, 16)
    half = [factor.detach().to(dtype) for factor in layer.factors]
    y = gpu.chain(layer.spec, x.to(dtype), half, layer.bias.detach().to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x).detach(), atol=0.05, rtol=0.05)


def test_many_tokens_rows_and_columns_fill_several_tiles():
    torch.manual_seed(0)
    layer, x = structlin.MonarchLinear(150, 280, blocks=2, rank=70), torch.randn(130, 150, requires_grad=True)
    leaves = [x, *layer.parameters()]
    y = gpu.chain(layer.spec, x, layer.factors, layer.bias)
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(y, leaves), gradients(layer(x), leaves), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_switch_makes_it_one_of_the_ways(monkeypatch):
    layer = structlin.LowRankLinear(64, 64, rank=8)
    for mode in (EVAL, TRAINING):
        key = Key(4, torch.float32, torch.device("cpu"), False, mode)
        assert not any(isinstance(way, Launches) for way in ways(layer.spec, key))
        monkeypatch.setenv(launches.SWITCH, "on")
        assert sum(isinstance(way, Launches) for way in ways(layer.spec, key)) == 1
        monkeypatch.delenv(launches.SWITCH)


def test_a_model_trains_by_it(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(structlin.LowRankLinear(16, 16, rank=4), nn.GELU(), structlin.KMatrix(16, 16))
    x = torch.randn(3, 16)
    expected = gradients(model(x), [*model.parameters()])
    monkeypatch.setenv(launches.SWITCH, "on")
    monkeypatch.setattr(launches, "seconds", lambda *_: 0.0)  # predicted fastest
    for layer in (model[0], model[2]):
        layer._execution.forget()
    monkeypatch.setattr(gpu, "_run", spied := Spy(gpu._run))
    for found, wanted in zip(gradients(model(x), [*model.parameters()]), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert spied.calls


class Spy:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given):
        self.calls += 1
        return self.function(*given)


def test_second_derivatives_are_refused():
    layer, x = structlin.LowRankLinear(16, 16, rank=4), torch.randn(3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(
        gpu.chain(layer.spec, x, layer.factors, layer.bias).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
