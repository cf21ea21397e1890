"""The native kernel under torch.compile, and under activation checkpointing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CASES
from test_kernels import built, gradients  # noqa: F401
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from structlin.layers.linear import build
from structlin.runtime.kernels.chain import chain_of
from structlin.structures import PHM, Butterfly, Kaleidoscope, Kronecker, LowRank, Sum
from structlin.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16]
# Inductor and forward-mode derivatives script some functions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def forgotten():
    """Each test compiles anew."""
    torch._dynamo.reset()


class Holder(nn.Module):
    """A layer whose forward is the kernel, whatever the layer itself would do."""

    def __init__(self, structure, in_features, out_features, dtype=torch.float32):
        super().__init__()
        self.layer = build(structure, in_features, out_features, dtype=dtype)
        self.chain = chain_of(self.layer.spec)

    def forward(self, x):
        factors, bias = self.layer.factors, self.layer.bias
        if torch.compiler.is_compiling():
            assert self.chain.traces((x, *factors, bias))
            return self.chain.traced(x, factors, bias)
        return self.chain(x, factors, bias)


def tensors(module, call, x, slope):
    """The output without gradients, the one with, and all gradients."""
    with torch.no_grad():
        alone = call(x)
    y = call(x)
    return [alone, y, *gradients(module, y, x, slope)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert_close(ours, theirs, "compiled", 1e-6 if ours.dtype is torch.float32 else 2.0**-8)  # sums for the bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gives_the_same(backend, dtype, dynamic):
    module = Holder(Sum(parts=(LowRank(rank=3), Kaleidoscope())), 33, 48, dtype)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    x = torch.randn(2, 20, 33, dtype=dtype, requires_grad=True)
    slope = torch.randn(2, 20, 48, dtype=dtype)
    assert_same(tensors(module, compiled, x, slope), tensors(module, module, x, slope))


@pytest.mark.parametrize("name", CASES)
def test_every_structure_compiles(name):
    for structure in CASES[name].at(16, 20):
        module = Holder(structure, 16, 20)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x, slope = torch.randn(5, 16, requires_grad=True), torch.randn(5, 20)
        assert_same(tensors(module, compiled, x, slope), tensors(module, module, x, slope))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_number_of_tokens_is_not_compiled_again(backend):
    module = Holder(Kaleidoscope(width=2), 48, 64)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    compiled(torch.randn(40, 48, requires_grad=True)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 3, 5, 33, 70):
            x, slope = torch.randn(tokens, 48, requires_grad=True), torch.randn(tokens, 64)
            y = compiled(x)
            assert_same([y, *gradients(module, y, x, slope)], tensors(module, module, x, slope)[1:])


def test_factors_of_the_same_shapes_keep_their_programs():
    def call(chain, x, *factors):
        return chain.traced(x, factors, None) if chain.traces((x, *factors)) else None

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, *factors = torch.randn(5, 16), torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    for structure in (Butterfly(radix=4), PHM(n=4)):
        chain = chain_of(build(structure, 16, 16).spec)
        assert_close(compiled(chain, x, *factors), chain(x, factors, None), str(structure), 1e-6)


def test_only_what_needs_a_gradient_gets_one():
    module = Holder(Kronecker(terms=2), 16, 20)
    first, second = module.layer.factors
    first.requires_grad_(False)
    torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(40, 16)).sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert module.layer.bias.grad is not None


def test_second_derivatives():
    module = Holder(Sum(parts=(LowRank(rank=3), Kaleidoscope())), 16, 20)
    x = torch.randn(40, 16, requires_grad=True)
    found = []
    for call in (torch.compile(module, fullgraph=True, backend="eager"), module):
        (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *module.layer.factors]))
    assert_same(*found)


def test_second_derivatives_are_refused():
    module = Holder(LowRank(rank=3), 16, 20)
    x = torch.randn(40, 16, requires_grad=True)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum(), x)
    traced = module.chain.program.clone()  # as tracing has another tensor in its place
    y = torch.ops.structlin.chain(x, module.layer.factors, None, traced, 20)
    with pytest.raises(RuntimeError, match="no second derivatives in compiled code"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


class Asked(Holder):
    """Says by its sign whether the kernel would run."""

    def forward(self, x):
        given = (x, *self.layer.factors, self.layer.bias)
        return x.new_ones(2) if self.chain.traces(given) else -x.new_ones(2)


def autocast(call):
    def wrapped(x):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    return wrapped


@pytest.mark.parametrize(
    ("wrap", "sign"),
    [
        (lambda call: call, 1),
        (lambda call: torch.vmap(call.forward), -1),
        (autocast, -1),
        (lambda call: lambda x: torch.func.jvp(call, (x,), (x,))[0], -1),
        (lambda call: lambda x: torch.func.vjp(call, x)[0], -1),
        (lambda call: lambda x: call(x.double()), -1),
    ],
    ids=["plain", "vmap", "autocast", "jvp", "vjp", "double"],
)
def test_what_is_traced(wrap, sign):
    compiled = torch.compile(wrap(Asked(LowRank(rank=3), 16, 20)), fullgraph=True, backend="eager")
    assert (compiled(torch.randn(5, 16)).sign() == sign).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_operators_are_what_they_say(dtype, bias):
    layer = build(Kaleidoscope(width=2), 48, 64, bias, dtype=dtype)
    program = chain_of(layer.spec).program
    x, slope = torch.randn(5, 48, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    learned = [factor.detach().requires_grad_() for factor in layer.factors]
    fixed = [factor.detach() for factor in layer.factors]
    shift = layer.bias.detach() if bias else None
    operators = torch.ops.structlin
    opcheck(operators.chain_backward, (slope, x, fixed, program, bias, [0, 2]))
    opcheck(operators.chain, (x, fixed, shift, program, 64))
    opcheck(operators.chain, (x.requires_grad_(), learned, shift, program, 64))


def test_gradients_share_no_memory():
    layer = build(Kaleidoscope(width=2), 48, 64)
    layer(torch.randn(40, 48)).sum().backward()
    assert len({factor.grad.untyped_storage().data_ptr() for factor in layer.factors}) == len(layer.factors)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_checkpointing(reentrant, dtype):
    model = nn.Sequential(Holder(Kaleidoscope(), 48, 64, dtype), nn.ReLU(), Holder(LowRank(rank=5), 64, 48, dtype))
    x = torch.randn(40, 48, dtype=dtype, requires_grad=True)
    slope = torch.randn(40, 48, dtype=dtype)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        y = call(x)
        y.backward(slope)
        results.append([y, x.grad, *(p.grad.clone() for p in model.parameters())])
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


def test_activation_checkpointing_compiled():
    module = Holder(Kaleidoscope(), 48, 64)
    call = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    x, slope = torch.randn(40, 48, requires_grad=True), torch.randn(40, 64)
    assert_same(tensors(module, call, x, slope), tensors(module, module, x, slope))


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_does_without(strict):
    module = Asked(LowRank(rank=3), 16, 20)
    exported = torch.export.export(module, (torch.randn(5, 16),), strict=strict)
    assert (exported.module()(torch.randn(5, 16)) == -1).all()


def test_copies_have_the_same_program():
    chain = chain_of(build(Kaleidoscope(), 64, 64).spec)
    assert copy.deepcopy(chain) is chain
    assert pickle.loads(pickle.dumps(chain)) is chain
