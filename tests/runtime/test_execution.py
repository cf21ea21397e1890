"""How layers run in plain torch: folded factors, chunks of tokens, recomputed activations, measured choices."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import CASES

from structlin.layers.linear import build
from structlin.runtime import contract, execution, machines, planner, recompute
from structlin.runtime.contract.blocks import blocks
from structlin.runtime.execution import Execution, Key
from structlin.runtime.measure import measure_machine
from structlin.runtime.recompute import by_chunks, recomputed
from structlin.structures import PHM, Kaleidoscope, Kronecker, LowRank, Sum, TensorTrain
from structlin.testing import assert_close

SIZES = [(16, 20), (33, 48), (64, 64), (17, 5), (1, 7), (96, 130)]


def layers(name):
    for in_features, out_features in SIZES:
        for structure in CASES[name].at(in_features, out_features):
            yield build(structure, in_features, out_features, dtype=torch.float64)


def small_chunks(spec, tokens, order="auto"):
    machine = planner.Machine("small", flops=1e9, bandwidth=1e9, op=1e-9, core_cache=1)
    return planner.find_plan(spec, tokens, itemsize=8, machine=machine, order=order)


def gradients(y, x, layer, slope):
    return torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], slope)


@pytest.fixture
def as_planned(monkeypatch):
    """Differentiate by the very plan that is given."""
    monkeypatch.setattr(recompute, "_again", lambda _, plan: plan)


# Chunks and recomputation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 16, 33, 70])
@pytest.mark.parametrize("order", ["auto", "forward", "backward"])
def test_chunks_give_the_same(name, tokens, order):
    for layer in layers(name):
        plan = small_chunks(layer.spec, 16, order)
        assert plan.chunk == 16
        x = torch.randn(tokens, layer.in_features, dtype=torch.float64)
        with torch.no_grad():
            y = by_chunks(layer.spec, contract.fold(layer.spec, layer.factors, plan), x, layer.bias, plan)
        assert_close(y, F.linear(x, layer.to_dense(), layer.bias), str(layer))


def test_buffers_are_used_again():
    layer, x = large(), torch.randn(900, 64)
    plan = planner.find_plan(layer.spec, 900, machine=planner.CPU)
    with torch.inference_mode():
        operands = contract.fold(layer.spec, layer.factors, plan)
        by_chunks(layer.spec, operands, x, None, plan)
        place = recompute._KEPT.bytes.data_ptr()
    with torch.no_grad():
        y = by_chunks(layer.spec, contract.fold(layer.spec, layer.factors, plan), x, None, plan)
    assert recompute._KEPT.bytes.data_ptr() == place != 0
    kept = recompute._KEPT.bytes
    assert not kept.data_ptr() <= y.data_ptr() < kept.data_ptr() + len(kept)
    assert y.untyped_storage().nbytes() == y.nbytes


def test_what_is_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(recompute, "MOST_KEPT", 0)
    monkeypatch.setattr(recompute, "_KEPT", recompute._Kept())
    layer, x = large(), torch.randn(900, 64)
    plan = planner.find_plan(layer.spec, 900, machine=planner.CPU)
    with torch.no_grad():
        y = by_chunks(layer.spec, contract.fold(layer.spec, layer.factors, plan), x, layer.bias, plan)
    assert_close(y, F.linear(x, layer.to_dense(), layer.bias), "chunks", 1e-5)
    assert len(recompute._KEPT.bytes) == 0


def test_threads_have_buffers_of_their_own():
    layer = large()
    plan = planner.find_plan(layer.spec, 900, machine=planner.CPU)
    inputs = torch.randn(8, 900, 64)
    operands = [[operand.detach() for operand in part] for part in contract.fold(layer.spec, layer.factors, plan)]

    def run(x):
        with torch.no_grad():
            return [by_chunks(layer.spec, operands, x, None, plan) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for x, results in zip(inputs, pool.map(run, inputs), strict=True):
            assert all(torch.equal(y, results[0]) for y in results)
            assert_close(results[0], x @ layer.to_dense().T, "threads", 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 5, 50])
@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients(name, tokens, order, as_planned):
    for layer in layers(name):
        x = torch.randn(tokens, layer.in_features, dtype=torch.float64, requires_grad=True)
        slope = torch.randn(tokens, layer.out_features, dtype=torch.float64)
        y = recomputed(layer.spec, layer.factors, x, layer.bias, small_chunks(layer.spec, 16, order))
        expected = F.linear(x, layer.to_dense(), layer.bias)
        assert_close(y, expected, "forward")
        assert not y._is_view()
        pairs = zip(gradients(y, x, layer, slope), gradients(expected, x, layer, slope), strict=True)
        for ours, theirs in pairs:
            assert_close(ours, theirs, str(layer))


@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients_of_some(order, as_planned):
    layer = build(Kaleidoscope(width=2), 33, 48, dtype=torch.float64)
    plan = small_chunks(layer.spec, 16, order)
    for learned in ((), (0,), (1, 3), (4,)):
        for of_input in (True, False):
            for k, factor in enumerate(layer.factors):
                factor.requires_grad_(k in learned)
            x = torch.randn(50, 33, dtype=torch.float64, requires_grad=of_input)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            slope = torch.randn(50, 48, dtype=torch.float64)
            found, expected = (
                torch.autograd.grad(y, leaves, slope)
                for y in (recomputed(layer.spec, layer.factors, x, layer.bias, plan),
                          F.linear(x, layer.to_dense(), layer.bias))
            )  # fmt: skip
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs, str(learned))


@pytest.mark.parametrize("structure", [Kaleidoscope(width=2), TensorTrain(rank=3), Kronecker(terms=2)])
@pytest.mark.parametrize("order", planner.ORDERS)
def test_recomputed_gradients_of_complex_numbers(structure, order, as_planned):
    layer = build(structure, 33, 48, dtype=torch.complex128)
    x = torch.randn(50, 33, dtype=torch.complex128, requires_grad=True)
    slope = torch.randn(50, 48, dtype=torch.complex128)
    y = recomputed(layer.spec, layer.factors, x, layer.bias, small_chunks(layer.spec, 16, order))
    expected = F.linear(x, layer.to_dense(), layer.bias)
    pairs = zip(gradients(y, x, layer, slope), gradients(expected, x, layer, slope), strict=True)
    for ours, theirs in pairs:
        assert_close(ours, theirs, "complex")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_gradients_by_blocks_of_rows(name, most):
    for layer in layers(name):
        for eq in layer.spec.equations:
            rows = [row for block in blocks(layer.spec, eq, most) for row in range(layer.out_features)[block.rows]]
            assert rows == [*range(layer.out_features)]
            assert all(block.spec.out_features <= most for block in blocks(layer.spec, eq, most))
        x = torch.randn(9, layer.in_features, dtype=torch.float64, requires_grad=True)
        slope = torch.randn(9, layer.out_features, dtype=torch.float64)
        found = contract.pulled_back(
            layer.spec, x.detach(), layer.factors, slope, True, range(len(layer.factors)), most
        )  # fmt: skip
        expected = torch.autograd.grad(F.linear(x, layer.to_dense()), [x, *layer.factors], slope)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, str(layer))


def test_differentiated_by_what_is_faster():
    """A chain three times, or the dense matrix twice."""
    for structure, order in ((PHM(n=2), "materialise"), (Kaleidoscope(width=2), "auto")):
        found = build(structure, 768, 768).spec
        plan = planner.find_plan(found, 512, machine=planner.CPU)
        assert recompute._again(found, plan) == planner.find_plan(found, 512, machine=planner.CPU, order=order)
    assert not planner.find_plan(build(PHM(n=2), 768, 768).spec, 512, machine=planner.CPU).materialises


def test_gradients_are_added_up_in_place():
    layer = large(Kaleidoscope(width=2), (64, 64))
    plan = planner.find_plan(layer.spec, 512, machine=planner.CPU, order="forward")
    sums = contract.Pullback(layer.spec, layer.factors, range(5), plan)
    x, slope = torch.randn(512, 64), torch.randn(512, 64)
    sums(x[:256], slope[:256], False)
    places = [gradient.data_ptr() for gradient in sums.gradients()]
    sums(x[256:], slope[256:], False)
    assert places == [gradient.data_ptr() for gradient in sums.gradients()]
    expected = torch.autograd.grad(F.linear(x, layer.to_dense()), layer.factors, slope)
    for ours, theirs in zip(sums.gradients(), expected, strict=True):
        assert_close(ours, theirs, "sum", 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", [Kaleidoscope(width=2), TensorTrain(rank=4), LowRank(rank=4)])
def test_sums_over_many_tokens_in_half_precision(structure, dtype, as_planned):
    """Added up in half precision, equal gradients would stop to count once the sum is some hundred times as large."""
    layer = build(structure, 64, 64, dtype=dtype, bias=False)
    x, slope = torch.full((9000, 64), 0.5, dtype=dtype, requires_grad=True), torch.full((9000, 64), 0.01, dtype=dtype)
    y = recomputed(layer.spec, layer.factors, x, None, small_chunks(layer.spec, 16, "forward"))
    found = gradients(y, x, layer, slope)
    wide, x = layer.double(), x.detach().double().requires_grad_()
    for ours, theirs in zip(found, gradients(F.linear(x, wide.to_dense()), x, wide, slope.double()), strict=True):
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


# What is kept of the factors -----------------------------------------------------------------------------------------


def made(layer):
    return [made for _, made in layer._execution._kept.values()]


def test_folded_factors_are_kept_shared_and_dropped():
    layer = build(Kronecker(terms=4), 512, 512).eval()
    x = torch.randn(512, 512)
    with torch.no_grad():
        for tokens in (512, 60):
            assert_close(layer(x[:tokens]), F.linear(x[:tokens], layer.to_dense(), layer.bias), "forward", 1e-5)
        operands = made(layer)
        assert not any(isinstance(kept, torch.Tensor) for kept in operands)  # not the dense matrix
        first, second = operands
        assert first is second
        layer.left.mul_(2)
        assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "after a change", 1e-5)
        assert not any(kept is before for kept in made(layer) for before in operands)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not made(twin)
            assert_close(twin(x), layer(x), "copy", 1e-6)
        layer.train()
        assert not made(layer)


def test_gradients_of_the_input_through_kept_factors():
    layer = build(Kronecker(terms=4), 512, 512).eval().requires_grad_(False)
    x = torch.randn(40, 512, requires_grad=True)
    layer(x).sum().backward()
    assert made(layer)
    assert_close(x.grad, layer.to_dense().sum(0).expand(40, -1), "gradient of the input", 1e-5)


def test_bytes_of_another_kind_inside_the_same_parameter():
    layer = build(LowRank(rank=3), 16, 20).eval()
    with torch.no_grad():
        layer(torch.randn(3, 16))
        for parameter in layer.parameters():
            parameter.data = parameter.data.double()
        x = torch.randn(3, 16, dtype=torch.float64)
        assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "double")


# Measured choices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(execution, "_MEASURED", {})


@pytest.mark.parametrize("training", [True, False])
def test_autotune_takes_the_fastest(monkeypatch, unmeasured, training):
    layer = build(Kaleidoscope(), 64, 64).train(training)
    asked = []

    def slow_but_one(call, way):
        call(way)
        asked.append(way)
        return 0.0 if isinstance(way, planner.Plan) and way.materialises else 1.0

    monkeypatch.setattr(execution, "_sample", slow_but_one)
    layer.use_plan("auto", autotune=True)
    x = torch.randn(40, 64, requires_grad=training)
    with torch.set_grad_enabled(training):
        y = layer(x)
        assert_close(y, F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-5)
        assert len(set(asked)) >= 3
        (way,) = layer._execution._ways.values()
        assert way.materialises
        count = len(asked)
        layer(x)
        twin = build(Kaleidoscope(), 64, 64).train(training)
        twin.use_plan("auto", autotune=True)
        twin(x)  # measured for all layers of this structure
        assert len(asked) == count
        twin(torch.randn(3, 64))
        assert len(asked) > count
    assert copy.deepcopy(layer)._execution.autotune


def test_autotune_measures(unmeasured):
    layer = build(Kaleidoscope(width=2), 64, 64).eval()
    layer.use_plan("auto", autotune=True)
    with torch.no_grad():
        x = torch.randn(8, 64)
        assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-5)
    assert len(execution._MEASURED) == 1


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
    options = Execution(LowRank(rank=64).spec(4096, 4096)).options
    key = Key(512, torch.bfloat16, torch.device("cuda"), native=False, frozen=True)
    seconds = [seconds for seconds, _ in options(key)]
    assert max(seconds) < 1e-3  # a CPU takes a hundred times as long
