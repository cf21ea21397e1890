"""Layers call the native kernel without any detour, and only while what they know still holds."""

from __future__ import annotations

import pytest
import torch
from test_kernels import built, counted, counting, dense, gradients  # noqa: F401
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structlin.layers.linear import build
from structlin.runtime.execution import Execution
from structlin.runtime.kernels import chain_of, native
from structlin.structures import Kaleidoscope, LowRank
from structlin.testing import assert_close


@pytest.fixture
def recalled(built):  # noqa: F811
    """For tests of `recall`, or of how it is avoided."""
    if not hasattr(native._State.calls, "recall"):
        pytest.skip("Python's headers are not installed, or the kernel is that of a wheel")


@pytest.fixture(params=[False, True], ids=["constant", "learned"])
def layer(request, recalled):
    return build(Kaleidoscope(width=2), 64, 48).requires_grad_(request.param).eval()


@pytest.fixture
def asked(recalled, monkeypatch):
    """Counts how often a layer asks how to run."""
    return counting(monkeypatch, Execution, "__call__")


def known(layer, tokens=1):
    """The layer, after it has run for so many rows."""
    layer(torch.randn(tokens, layer.in_features))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_layers_ask_once_for_each_number_of_rows(bias, asked):
    layer = build(LowRank(rank=3), 16, 20, bias)
    for tokens, times in ((1, 1), (1, 1), (2, 2), (1, 2)):
        x = torch.randn(tokens, 16, requires_grad=True)
        y, slope = layer(x), torch.randn(tokens, 20)
        assert len(asked) == times
        expected = dense(layer, x)
        assert_close(y, expected, "forward", 1e-6)
        for ours, theirs in zip(gradients(layer, y, x, slope), gradients(layer, expected, x, slope), strict=True):
            assert_close(ours, theirs, "backward", 1e-5)


def test_new_values_are_used(layer, asked):
    x = torch.randn(1, 64)
    known(layer)
    with torch.no_grad():
        layer.factors[0].mul_(2)
    y = layer(x)
    assert len(asked) == 1
    assert_close(y, dense(layer, x), "changed in place", 1e-5)
    layer.stage_1 = nn.Parameter(torch.randn_like(layer.stage_1))
    assert_close(layer(x), dense(layer, x), "another parameter", 1e-5)
    assert len(asked) == 2
    layer.bias = None
    assert_close(layer(x), dense(layer, x), "no bias", 1e-5)
    assert len(asked) == 3


def test_a_new_choice_is_taken(layer, asked):
    known(layer).use_plan("forward")
    layer(torch.randn(1, 64))
    assert len(asked) == 2


def test_what_is_asked_for_is_known_by_gradients(asked):
    layer = known(build(LowRank(rank=3), 16, 20).eval())
    with torch.no_grad():
        layer(torch.randn(1, 16))  # the dense matrix might be faster
        assert len(asked) == 2
    layer(torch.randn(1, 16))
    assert len(asked) == 2


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("context", [Functions, Operators, forward_ad.dual_level])
def test_whoever_watches_sees_torch_run(layer, asked, counted, context):  # noqa: F811
    x = torch.randn(1, 64)
    y = known(layer)(x)
    with context():
        assert_close(layer(x), y, "watched", 1e-5)
    assert len(asked) == 2
    assert counted
    assert torch.equal(layer(x), y)
    assert len(asked) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_tangents_are_carried(layer):
    known(layer)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(torch.randn(1, 64), torch.ones(1, 64)))
        found = forward_ad.unpack_dual(y).tangent
    assert_close(found, torch.ones(1, 64) @ layer.to_dense().T, "jvp", 1e-5)


def test_autocast_is_seen(layer):
    known(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 64)).dtype is torch.bfloat16


def test_transforms_are_seen(layer):
    known(layer)
    x = torch.randn(5, 1, 64)
    assert_close(torch.vmap(layer)(x), layer(x), "vmap", 1e-5)


def test_inference_mode(layer, asked):
    x = torch.randn(1, 64)
    y = known(layer)(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
        assert layer(torch.randn(1, 64)).is_inference()


def test_a_default_device_changes_nothing(layer, counted):  # noqa: F811
    known(layer)
    with torch.device("cpu"):
        layer(torch.randn(1, 64))
    assert not counted


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_tracer_is_seen(layer):
    known(layer)
    traced = torch.jit.trace(layer, torch.randn(1, 64))
    x = torch.randn(7, 64)
    assert_close(traced(x), layer(x), "traced", 1e-5)


class Special(torch.Tensor):
    pass


def test_inputs_of_another_kind(layer, asked):
    known(layer)
    x = torch.randn(1, 64)
    assert type(layer(x.as_subclass(Special))) is Special
    with pytest.raises(ValueError, match="in_features=64"):
        layer(torch.randn(1, 63))
    with pytest.raises(ValueError, match="in_features=64"):
        layer(torch.randn(()))
    with pytest.raises(ValueError, match="in_features=64"):
        layer(torch.randn(2, 32))
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        layer(x.double())
    assert layer(torch.randn(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("entries", [3, 513])
def test_a_factor_of_another_size_is_refused(layer, entries):
    known(layer).stage_1.data = torch.empty(entries)
    with pytest.raises(RuntimeError, match="factor 1 is missing, or has not 512 entries"):
        layer(torch.randn(1, 64))


def test_the_kernel_checks_what_it_reads():
    chain = chain_of(build(LowRank(rank=3), 16, 20).spec)
    x, left, right = torch.randn(2, 16), torch.randn(20, 3), torch.randn(3, 16)
    for call in (native.chain, torch.ops.structlin.chain):
        with pytest.raises(RuntimeError, match="factor 1 is missing"):
            call(x, (left,), None, chain.program, 20)
        with pytest.raises(RuntimeError, match="factor 0 is missing, or has not 60 entries"):
            call(x, (left[1:], right), None, chain.program, 20)
        with pytest.raises(RuntimeError, match="bias has 3 entries, not 20"):
            call(x, (left, right), left[0], chain.program, 20)
        with pytest.raises(RuntimeError, match="the input does not fit"):
            call(x[:, 1:], (left, right), None, chain.program, 20)
    with pytest.raises(RuntimeError, match="there is no factor 2"):
        torch.ops.structlin.chain_backward(torch.randn(2, 20), x, (left, right), chain.program, True, [2])


@pytest.mark.parametrize(
    "given",
    [(1, (), None, None, 3), (torch.ones(2), None, None, None, 3), (torch.ones(2), (1,), None, None, 3), ()],
)
def test_calls_with_other_things_than_tensors(recalled, given):
    with pytest.raises(TypeError, match="chain takes"):
        native._State.calls.chain(*given)


def test_without_the_headers_of_python(monkeypatch):
    layer = build(Kaleidoscope(width=2), 64, 48)
    x, slope = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48)
    y = known(layer, 5)(x)
    monkeypatch.setattr(native._State, "calls", torch.ops.structlin)
    layer.use_plan("auto")
    again = known(layer, 5)(x)
    assert layer._execution.shortcut is None
    assert torch.equal(y, again)
    for ours, theirs in zip(gradients(layer, y, x, slope), gradients(layer, again, x, slope), strict=True):
        assert torch.equal(ours, theirs)
