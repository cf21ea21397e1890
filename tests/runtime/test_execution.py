"""How layers run in plain torch: chunks of tokens, recomputed activations, measured choices, the right machine."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ONE

from structlin.layers.linear import build
from structlin.runtime import contract, execution, machines, planner
from structlin.runtime.contract import forward
from structlin.runtime.contract.blocks import blocks
from structlin.runtime.measure import measure_machine
from structlin.runtime.recompute import backward_plan, by_chunks, recomputed
from structlin.runtime.ways import Key, fastest, ways
from structlin.structures import PHM, Butterfly, Kaleidoscope, Kronecker, LowRank, Sum, TensorTrain
from structlin.testing import LARGEST_PLAN, assert_close

SIZES = [(16, 20), (33, 48), (64, 64), (17, 5), (1, 7), (96, 130)]


def layers(name):
    for in_features, out_features in SIZES:
        for structure in CASES[name].at(in_features, out_features):
            yield build(structure, in_features, out_features, dtype=torch.float64)


def small_chunks(spec, tokens, order="auto"):
    machine = planner.Machine("small", flops=1e9, bandwidth=1e9, op=1e-9, core_cache=1)
    return planner.find_plan(spec, tokens, itemsize=8, machine=machine, order=order)


def planned_layers(name, order):
    """Layers with a plan of small chunks; the wrong end first may mean outer products too large to be worth running."""
    for layer in layers(name):
        plan = small_chunks(layer.spec, 16, order)
        if plan.nbytes <= LARGEST_PLAN or order == "auto":
            yield layer, plan


def gradients(y, x, layer, grad_output):
    return torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], grad_output)


# Chunks and recomputation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["auto", "forward", "backward"])
@torch.no_grad()
def test_chunks_give_the_same(name, order):
    for layer, plan in planned_layers(name, order):
        assert plan.chunk == 16
        dense, operands = layer.to_dense(), contract.merge_factors(layer.spec, layer.factors, plan)
        for tokens in (0, 1, 16, 33, 70):
            x = torch.randn(tokens, layer.in_features, dtype=torch.float64)
            y = by_chunks(layer.spec, operands, x, layer.bias, plan)
            assert_close(y, F.linear(x, dense, layer.bias), f"{layer}, {tokens} tokens")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 5, 50])
@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients(name, tokens, order):
    for layer, plan in planned_layers(name, order):
        x = torch.randn(tokens, layer.in_features, dtype=torch.float64, requires_grad=True)
        grad_output = torch.randn(tokens, layer.out_features, dtype=torch.float64)
        y = recomputed(layer.spec, layer.factors, x, layer.bias, plan, plan)
        expected = F.linear(x, layer.to_dense(), layer.bias)
        assert_close(y, expected, "forward")
        assert not y._is_view()
        pairs = zip(gradients(y, x, layer, grad_output), gradients(expected, x, layer, grad_output), strict=True)
        for ours, theirs in pairs:
            assert_close(ours, theirs, str(layer))


@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients_of_some(order):
    layer = build(Kaleidoscope(width=2), 33, 48, dtype=torch.float64)
    plan = small_chunks(layer.spec, 16, order)
    for learned in ((), (0,), (1, 3), (4,)):
        for needs_input_grad in (True, False):
            for k, factor in enumerate(layer.factors):
                factor.requires_grad_(k in learned)
            x = torch.randn(50, 33, dtype=torch.float64, requires_grad=needs_input_grad)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            grad_output = torch.randn(50, 48, dtype=torch.float64)
            found, expected = (
                torch.autograd.grad(y, leaves, grad_output)
                for y in (recomputed(layer.spec, layer.factors, x, layer.bias, plan, plan),
                          F.linear(x, layer.to_dense(), layer.bias))
            )  # fmt: skip
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs, str(learned))


@pytest.mark.parametrize("structure", [Kaleidoscope(width=2), TensorTrain(rank=3), Kronecker(terms=2)])
@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients_of_complex_numbers(structure, order):
    layer = build(structure, 33, 48, dtype=torch.complex128)
    x = torch.randn(50, 33, dtype=torch.complex128, requires_grad=True)
    grad_output = torch.randn(50, 48, dtype=torch.complex128)
    plan = small_chunks(layer.spec, 16, order)
    y = recomputed(layer.spec, layer.factors, x, layer.bias, plan, plan)
    expected = F.linear(x, layer.to_dense(), layer.bias)
    pairs = zip(gradients(y, x, layer, grad_output), gradients(expected, x, layer, grad_output), strict=True)
    for ours, theirs in pairs:
        assert_close(ours, theirs, "complex")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_gradients_by_blocks_of_rows(name, most):
    for layer in layers(name):
        spec = layer.spec.untied  # ties are outside of the function
        factors = [factor.detach().requires_grad_() for factor in contract.expanded(layer.spec, layer.factors)]
        for eq in spec.equations:
            rows = [row for block in blocks(spec, eq, most) for row in range(layer.out_features)[block.rows]]
            assert rows == [*range(layer.out_features)]
            assert all(block.spec.out_features <= most for block in blocks(spec, eq, most))
        x = torch.randn(9, layer.in_features, dtype=torch.float64, requires_grad=True)
        grad_output = torch.randn(9, layer.out_features, dtype=torch.float64)
        found = contract.gradients_by_rows(spec, x.detach(), factors, grad_output, True, range(len(factors)), most)
        expected = torch.autograd.grad(F.linear(x, contract.to_dense(spec, factors)), [x, *factors], grad_output)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, str(layer))


def test_differentiated_by_what_is_faster():
    """A chain three times, or the dense matrix twice."""
    for structure, order in ((PHM(n=2), "materialise"), (Kaleidoscope(width=2), "auto")):
        found = build(structure, 768, 768).spec
        plan = planner.find_plan(found, 512, machine=planner.CPU)
        assert backward_plan(found, plan) == planner.find_plan(found, 512, machine=planner.CPU, order=order)
    assert not planner.find_plan(build(PHM(n=2), 768, 768).spec, 512, machine=planner.CPU).materialises


def test_gradients_are_added_up_in_place():
    layer = large(Kaleidoscope(width=2), (64, 64))
    plan = planner.find_plan(layer.spec, 512, machine=planner.CPU, order="forward")
    sums = contract.Pullback(layer.spec, layer.factors, range(5), plan)
    x, grad_output = torch.randn(512, 64), torch.randn(512, 64)
    sums(x[:256], grad_output[:256], False)
    places = [gradient.data_ptr() for gradient in sums.gradients()]
    sums(x[256:], grad_output[256:], False)
    assert places == [gradient.data_ptr() for gradient in sums.gradients()]
    expected = torch.autograd.grad(F.linear(x, layer.to_dense()), layer.factors, grad_output)
    for ours, theirs in zip(sums.gradients(), expected, strict=True):
        assert_close(ours, theirs, "sum", 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", [Kaleidoscope(width=2), TensorTrain(rank=4), LowRank(rank=4)])
def test_sums_over_many_tokens_in_half_precision(structure, dtype):
    """Added up in half precision, equal gradients would stop to count once the sum is some hundred times as large."""
    layer = build(structure, 64, 64, dtype=dtype, bias=False)
    x, grad_output = (
        torch.full((5000, 64), 0.5, dtype=dtype, requires_grad=True),
        torch.full((5000, 64), 0.01, dtype=dtype),
    )
    plan = small_chunks(layer.spec, 16, "forward")
    y = recomputed(layer.spec, layer.factors, x, None, plan, plan)
    found = gradients(y, x, layer, grad_output)
    wide, x = layer.double(), x.detach().double().requires_grad_()
    for ours, theirs in zip(found, gradients(F.linear(x, wide.to_dense()), x, wide, grad_output.double()), strict=True):
        assert ours.dtype is dtype
        assert_close(ours.double(), theirs, str(structure), 0.03)


def large(structure=None, sizes=(64, 64)):
    """A layer whose activations are worth computing anew at 9000 tokens."""
    return build(structure or TensorTrain(rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4)), *sizes)


def saved(layer, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    return kept


def test_only_the_input_is_saved_where_more_would_be_large():
    layer = large()
    x = torch.randn(9000, 64, requires_grad=True)
    own = {x.data_ptr(), *(factor.data_ptr() for factor in layer.factors)}
    assert {t.data_ptr() for t in saved(layer, x)} == own
    assert not {t.data_ptr() for t in saved(layer, x[:30])} <= own
    assert x.shape == gradients(layer(x), x, layer, torch.ones(9000, 64))[0].shape


def test_recomputation_of_some_gradients_any_shape_and_twice():
    layer = large(Sum(parts=(LowRank(rank=2), Kaleidoscope(width=2)))).double()
    x = torch.randn(90, 100, 64, dtype=torch.float64, requires_grad=True)
    dense = F.linear(x, layer.to_dense(), layer.bias)
    layer.factors[1].requires_grad_(False)
    learned = [layer.factors[0], *layer.factors[2:], x]
    norms = []
    for y in (layer(x), dense):
        assert y.shape == (90, 100, 64)
        first = torch.autograd.grad(y.square().sum(), learned, create_graph=True)
        norms.append([*first, *torch.autograd.grad(first[-1].square().sum(), learned)])
    for ours, theirs in zip(*norms, strict=True):
        assert_close(ours, theirs, "derivatives")
    layer.requires_grad_(False)
    (only,) = torch.autograd.grad(layer(x).sum(), x)
    assert_close(only, layer.to_dense().sum(0).expand_as(x), "of the input only")


# Measured choices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(execution, "_MEASURED", {})


def chosen(layer, tokens, mode):
    (found,) = [option.way for option in layer.options(tokens) if option.mode == mode and option.chosen]
    return found


class Clock:
    now = 0.0


@dataclass(frozen=True)
class Fake:
    """A way that takes so many seconds of a clock."""

    takes: float
    clock: Clock
    seconds: float = 1.0  # predicted
    keeps = None

    def __call__(self, x, factors, bias):
        self.clock.now += self.takes
        return x


def test_the_fastest_is_taken_whatever_is_predicted(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("structlin.runtime.ways.time.perf_counter", lambda: clock.now)
    slow, quick, slower = (Fake(takes, clock) for takes in (0.01, 0.001, 0.02))
    assert fastest([slow, quick, slower, quick], torch.ones(1), [], None) is quick


def test_a_hopeless_order_is_not_timed():
    spec = build(Kaleidoscope(width=2), 1024, 1024).spec
    found = ways(spec, Key(16, torch.float32, torch.device("cpu"), native=False, mode="eval"), planner.ORDERS)
    wrong = max(found, key=lambda way: way.seconds)
    assert wrong.plan.nbytes > 1e11  # the last stage first: outer products, of minutes and of more than all memory
    fine = min(found, key=lambda way: way.seconds)
    fake, never = Fake(1.0, Clock(), fine.seconds), Fake(0.0, Clock(), wrong.seconds)
    assert fastest([never, fake], torch.ones(1), [], None) is fake


@pytest.mark.parametrize("mode", ["training", "eval", "frozen"])
def test_autotune_measures_once_for_all_layers_of_a_structure(unmeasured, mode):
    layer, twin = (build(Kaleidoscope(), 64, 64).train(mode == "training") for _ in range(2))
    for some in (layer, twin):
        some.use_plan("auto", autotune=True)
        some.frozen = mode == "frozen"
    x = torch.randn(40, 64)
    with torch.set_grad_enabled(mode == "training"):
        assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-5)
        measured = dict(execution._MEASURED)
        assert len(measured) == 1
        assert str(*measured.values()) == chosen(twin, 40, mode)
        twin(x)
        layer(x[:33])
        assert measured == execution._MEASURED
        layer(x[:3])
        assert len(execution._MEASURED) == 2
    assert copy.deepcopy(layer)._execution.autotune


# The machine ---------------------------------------------------------------------------------------------------------


def test_measure_machine_keeps_what_it_finds():
    assert machines.machine_of(torch.device("cpu")) is planner.CPU
    found = measure_machine()
    assert machines.machine_of(torch.device("cpu")) == found
    assert "1 thread" in found.name
    assert 1e9 < found.flops < 1e13
    assert found.far_bandwidth > 1e8
    assert 1e8 < found.bandwidth < 1e13
    assert 1e-7 < found.op < 1e-2
    machines._machine.cache_clear()
    assert machines.machine_of(torch.device("cpu")) == found  # read again
    layer = build(LowRank(rank=4), 64, 64)
    assert found.name in str(layer.plan(8))


def test_each_device_has_its_record():
    assert machines.machine_of(torch.device("cuda")) is planner.H200
    assert machines.machine_of(torch.device("meta")) is planner.CPU
    spec = LowRank(rank=64).spec(4096, 4096)
    for mode in ("training", "eval", "frozen"):
        found = ways(spec, Key(512, torch.bfloat16, torch.device("cuda"), native=False, mode=mode))
        assert max(way.seconds for way in found) < 1e-3  # a CPU takes a hundred times as long


def test_every_plan_is_made_by_the_record_of_the_machine(monkeypatch):
    """In eager mode, under autocast, in transforms, and under torch.compile."""
    torch._dynamo.reset()
    machine = replace(planner.CPU, name="measured")
    machines.remember(torch.device("cpu"), machine)
    layer = build(PHM(n=4), 64, 64).eval().requires_grad_(False)
    ran = []
    run = forward.contracted
    monkeypatch.setattr(forward, "contracted", lambda plan, *args: ran.append(plan) or run(plan, *args))
    x = torch.randn(256, 64)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.func.vmap(layer)(x[None])
    torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert len(ran) >= 4
    assert {plan.machine for plan in ran} == {machine}


def test_compiled_layers_of_the_same_shapes_keep_their_plans():
    torch._dynamo.reset()
    x = torch.randn(5, 16)
    for structure in (Butterfly(radix=4), PHM(n=4)):
        layer = build(structure, 16, 16, bias=False)
        assert {tuple(factor.shape) for factor in layer.factors} == {(4, 4, 4)}
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(x), x @ layer.to_dense().T, str(structure), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_contiguous(name, monkeypatch):
    """As those of nn.Linear are: callers view() them."""
    monkeypatch.setenv("STRUCTLIN_KERNELS", "off")
    monkeypatch.setattr(execution.kernels, "available", lambda: False)
    for structure in (ONE[name], *CASES[name].at(16, 20)):
        for bias in (True, False):
            layer = build(structure, 16, 20, bias)
            for shape in ((1, 16), (2, 5, 16), (40, 16), (600, 16)):
                for learns in (True, False):
                    with torch.set_grad_enabled(learns):
                        assert layer(torch.randn(shape)).is_contiguous()
