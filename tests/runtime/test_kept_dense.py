"""Where no contraction beats it, eval keeps the dense matrix; it is never stale, and never stored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structlin.layers.linear import build
from structlin.runtime import planner
from structlin.structures import Kaleidoscope, Kronecker
from structlin.testing import assert_close


@pytest.fixture
def layer():
    """Many thin products at one token: dense is faster (the native kernel is off in the tests)."""
    return build(Kaleidoscope(width=4), 64, 48).eval()


def kept(layer):
    """What the layer keeps of its factors."""
    return [made for _, made in layer._execution._kept.values()]


def right(layer, x):
    assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-5)


def test_it_is_kept_in_eval_without_gradients_only(layer):
    x = torch.randn(1, 64)
    right(layer, x)
    assert not kept(layer)  # the factors need gradients
    with torch.no_grad():
        right(layer, x)
        (dense,) = kept(layer)
        assert torch.equal(dense, layer.to_dense())
        layer(x)
        assert kept(layer)[0] is dense
        layer.train()
        assert not kept(layer)
        right(layer, x)
        assert not kept(layer)
    layer.eval().requires_grad_(False)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.to_dense().sum(0, keepdim=True), "gradient of the input", 1e-5)


def changes():
    def in_place(layer):
        layer.stage_1.mul_(2)

    def state_dict(layer):
        layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})

    def assigned(layer):
        values = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        layer.load_state_dict(values, assign=True)

    def parameter(layer):
        layer.stage_2 = nn.Parameter(torch.randn_like(layer.stage_2))

    def data(layer):
        for _ in range(3):  # storages come and go, at the same addresses
            layer.stage_0.data = torch.randn_like(layer.stage_0)

    def bias(layer):
        layer.bias.add_(1)

    def there_and_back(layer):
        layer.double()
        layer.stage_0.mul_(3)
        layer.float()

    return [in_place, state_dict, assigned, parameter, data, bias, there_and_back]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_it_is_never_stale(layer, change):
    x = torch.randn(1, 64)
    with torch.no_grad():
        right(layer, x)
        assert kept(layer)
        change(layer)
        right(layer, x)


def test_an_optimizer_step_is_seen(layer):
    x = torch.randn(1, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            right(layer, x)
        layer(x).sum().backward()
        optimizer.step()


def test_it_is_not_stored(layer):
    with torch.no_grad():
        layer(torch.randn(1, 64))
    assert kept(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not kept(twin)
    assert set(layer.state_dict()) == {"bias", *(factor.name for factor in layer.spec.factors)}


def test_inference_mode(layer):
    with torch.inference_mode():
        right(layer, torch.randn(1, 64))
        right(build(Kaleidoscope(width=4), 64, 48).eval(), torch.randn(1, 64))  # factors without versions


def test_an_order_that_was_asked_for_keeps_nothing(layer):
    layer.use_plan("forward")
    with torch.no_grad():
        right(layer, torch.randn(1, 64))
    assert not kept(layer)


def test_explain_says_how_it_runs(layer):
    text = layer.explain(1)
    assert "training: 9 products" in text
    assert "eval: the dense matrix, kept" in text
    fast = build(Kronecker(), 4096, 4096, device="meta")
    assert "eval: 2 products" in fast.explain(1)


def test_predicted_dense_times_grow():
    times = [[planner.dense_seconds(n, n, t, machine=planner.CPU) for n in (64, 1024, 4096)] for t in (1, 32, 512)]
    for some in (*times, *zip(*times, strict=True)):
        assert list(some) == sorted(some)
    half, whole = (planner.dense_seconds(1024, 1024, 512, itemsize=n, machine=planner.CPU) for n in (2, 4))
    assert half < whole
