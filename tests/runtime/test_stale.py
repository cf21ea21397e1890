"""Outputs are those of the factors as they are, however they were written to: nothing is kept between calls."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import ONE, naming
from test_kernels import switch_on
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from structlin.layers.linear import build
from structlin.testing import assert_close


def learned(layer):
    return [p for p in layer.parameters() if p is not layer.bias]


def first(layer):
    return learned(layer)[0]


def step(optimizer, **options):
    def write(layer):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(layer.parameters(), lr=0.1, **options).step()
        layer.zero_grad()

    return write


def there_and_back(layer):
    layer.double()
    first(layer).data.mul_(2)
    layer.float()


def ema(layer):
    for parameter in layer.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)


def in_inference_mode(layer):
    with torch.inference_mode():
        first(layer).mul_(2)


def exchanged(layer):
    torch.utils.swap_tensors(first(layer), nn.Parameter(torch.randn_like(first(layer))))


def drawn(layer):
    return {name: torch.randn_like(value) for name, value in layer.state_dict().items()}


def replaced(layer):
    name = next(iter(dict(layer.named_parameters())))
    layer.register_parameter(name, nn.Parameter(torch.randn_like(getattr(layer, name))))


def toggled(layer):
    layer.requires_grad_(False)
    first(layer).data.mul_(2)
    layer.requires_grad_(True)


def several_storages(layer):
    for _ in range(3):  # storages come and go, at the same addresses
        first(layer).data = torch.randn_like(first(layer))


def strided(layer):
    value = torch.randn_like(first(layer))
    first(layer).data = value.mT.contiguous().mT


WRITES = {
    "mul_": lambda layer: first(layer).mul_(2),
    "copy_": lambda layer: first(layer).copy_(torch.randn_like(first(layer))),
    "index": lambda layer: first(layer).__setitem__(0, 3.0),
    "out=": lambda layer: torch.mul(first(layer), 2, out=first(layer)),
    "bias": lambda layer: layer.bias.add_(1),
    "data.mul_": lambda layer: first(layer).data.mul_(2),
    "detach().mul_": lambda layer: first(layer).detach().mul_(2),
    "data =": several_storages,
    "data = strided": strided,
    "EMA": ema,
    "foreach": lambda layer: torch._foreach_mul_(learned(layer), 2.0),
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "numpy": lambda layer: first(layer).detach().numpy().__imul__(2),
    "dlpack": lambda layer: torch.from_dlpack(first(layer).detach()).mul_(2),
    "storage": lambda layer: first(layer).untyped_storage().copy_(torch.randn_like(first(layer)).untyped_storage()),
    "set_": lambda layer: first(layer).set_(torch.randn_like(first(layer))),
    "swap_tensors": exchanged,
    "load_state_dict": lambda layer: layer.load_state_dict(drawn(layer)),
    "load_state_dict assign": lambda layer: layer.load_state_dict(drawn(layer), assign=True),
    "vector_to_parameters": lambda layer: vector_to_parameters(
        torch.randn_like(parameters_to_vector(layer.parameters())), layer.parameters()
    ),
    "inference mode": in_inference_mode,
    "register_parameter": replaced,
    "requires_grad": toggled,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "double and back": there_and_back,
}


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
