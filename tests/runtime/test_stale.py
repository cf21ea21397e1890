"""Outputs are those of the factors as they are, however they were written to: nothing is kept between calls."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import ONE, naming, switch_on
from torch.func import functional_call
from writes import WRITES, ema

from structlin.layers.linear import build
from structlin.testing import assert_close


def assert_right(layer, x):
    assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-4)


@pytest.fixture(params=["off", "on"])
def kernel(request, monkeypatch):
    if request.param == "on":
        switch_on(monkeypatch)
    return request.param == "on"


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_seen(write, kernel):
    """Each structure sees each write at each number of tokens with the kernel and without, once training, once not.

    Which of the two trains alternates over writes, structures and tokens: any four of the five kinds meet.
    """
    shift = [*WRITES].index(write) + kernel
    for (k, name), (t, tokens) in itertools.product(enumerate(ONE), enumerate((1, 32, 300))):
        training = (k + t + shift) % 2 == 1
        with naming(name, f"{tokens} tokens", f"training={training}"):
            layer, x = build(ONE[name], 16, 20).train(training), torch.randn(tokens, 16)
            with torch.set_grad_enabled(training):
                for _ in range(2):
                    layer(x)
            with torch.no_grad():
                before = layer(x)
                WRITES[write](layer)
                assert not torch.equal(layer(x), before)
                assert_right(layer, x)
            assert_right(layer, x)


@pytest.mark.parametrize("name", ONE)
def test_copies_and_other_tensors_are_seen(name, kernel):
    layer, x = build(ONE[name], 16, 20).eval(), torch.randn(32, 16)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        ema(twin)
        assert_right(twin, x)
        assert torch.equal(layer(x), y)
        values = dict(twin.named_parameters())
        for _ in range(2):
            assert_close(functional_call(layer, values, x), twin(x), "functional_call", 1e-4)
            ema(twin)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_of_another_kind_inside_the_same_parameters(dtype, kernel):
    layer = build(ONE["lowrank"], 16, 20).eval()
    with torch.no_grad():
        layer(torch.randn(3, 16))
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype)
        x = torch.randn(3, 16, dtype=dtype)
        tolerance = 0.05 if dtype is torch.bfloat16 else 1e-10
        assert_close(layer(x).double(), F.linear(x, layer.to_dense(), layer.bias).double(), str(dtype), tolerance)


@pytest.mark.parametrize("name", ONE)
def test_gradients_after_inference_mode(name, kernel):
    """Nothing that inference mode made is kept for a call that needs gradients, be the factors frozen or not."""
    for trained in (True, False):
        layer, x = build(ONE[name], 16, 20).eval().requires_grad_(trained), torch.randn(3, 16)
        with torch.inference_mode():
            layer(x)
        layer(x.requires_grad_()).sum().backward()
        assert_close(x.grad, layer.to_dense().detach().sum(0).expand(3, 16), "gradient", 1e-4)


def test_compiled_layers_see_every_write():
    for write in WRITES:
        with naming(write):
            layer, x = build(ONE["kmatrix"], 16, 20).eval(), torch.randn(32, 16)
            torch._dynamo.reset()  # else it gives up on a method that it compiled for many layers
            compiled = torch.compile(layer, backend="aot_eager")
            with torch.no_grad():
                before = compiled(x)
                WRITES[write](layer)
                assert not torch.equal(compiled(x), before)
                assert_close(compiled(x), F.linear(x, layer.to_dense(), layer.bias), "compiled", 1e-4)
