"""The native kernel gives what `contract` gives, forward and backward, and stays out of the way where it cannot run."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, switch_on
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

from structlin.fitting.fit import fit
from structlin.layers.linear import build
from structlin.runtime import measure, planner
from structlin.runtime.contract import forward
from structlin.runtime.eager import suits
from structlin.runtime.kernels import native, wheel
from structlin.runtime.kernels.chain import chain_of
from structlin.runtime.kernels.layouts import cost
from structlin.runtime.kernels.program import program, stages
from structlin.runtime.measure import measure_machine
from structlin.runtime.ways import MODES, Kernel, Key, predicted, ways
from structlin.structures import PHM, Blast, Kaleidoscope, Kronecker, LowRank, Sum, TensorTrain, sum_of
from structlin.testing import assert_close

SIZES = [(16, 20), (33, 48), (64, 64), (17, 5), (1, 7), (96, 130)]
ROUNDED = 2.0**-8  # bfloat16 has 8 bits: one rounding, at the very end, changes a number by up to 2^-8 of it
AGAIN = 5e-4  # rounded alike: the few numbers that float32 puts on two sides of a tie differ


@pytest.fixture(autouse=True)
def built(monkeypatch):
    switch_on(monkeypatch)


def layers(name, sizes=SIZES):
    for in_features, out_features in sizes:
        for structure in CASES[name].at(in_features, out_features):
            yield build(structure, in_features, out_features)


def gradients(layer, y, x, slope):
    learned = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(y, [x, *learned], slope, allow_unused=True)


def dense(layer, x):
    return F.linear(x, layer.to_dense(), layer.bias)


# Results -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 7, 9, 17, 32, 33, 70])
def test_forward(name, tokens):
    for layer in layers(name):
        x = torch.randn(tokens, layer.in_features)
        with torch.no_grad():
            y = chain_of(layer.spec)(x, layer.factors, layer.bias)
        assert_close(y, dense(layer, x).detach(), str(layer), 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 33, 150])
def test_backward(name, tokens):
    for layer in layers(name):
        x = torch.randn(tokens, layer.in_features, requires_grad=True)
        slope = torch.randn(tokens, layer.out_features)
        found = gradients(layer, chain_of(layer.spec)(x, layer.factors, layer.bias), x, slope)
        expected = gradients(layer, dense(layer, x), x, slope)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, str(layer), 1e-4)  # sums of 150 terms that may cancel


def test_backward_by_long_tiles():
    layer = build(LowRank(rank=1100), 2048, 2048)  # more entries than LARGE in chain.cpp
    x, slope = torch.randn(150, 2048, requires_grad=True), torch.randn(150, 2048)
    found = gradients(layer, chain_of(layer.spec)(x, layer.factors, layer.bias), x, slope)
    expected = gradients(layer, dense(layer, x), x, slope)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, str(layer), 1e-5)


def low(layer, *shape):
    """A copy of the layer in bfloat16, the same numbers in float32, and an input for each."""
    half = copy.deepcopy(layer).bfloat16()
    x = torch.randn(*shape).bfloat16()
    return half, copy.deepcopy(half).float(), x.requires_grad_(), x.detach().float().requires_grad_()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 33, 70])
def test_bfloat16(name, tokens):
    for layer in layers(name):
        half, wide, x, same = low(layer, tokens, layer.in_features)
        y = chain_of(layer.spec)(x, half.factors, half.bias)
        expected = dense(wide, same)
        assert y.dtype is torch.bfloat16
        assert_close(y, expected, str(layer), ROUNDED)
        slope = torch.randn_like(y)
        for ours, theirs in zip(
            gradients(half, y, x, slope), gradients(wide, expected, same, slope.float()), strict=True
        ):
            assert ours.dtype is torch.bfloat16
            assert_close(ours, theirs, str(layer), ROUNDED)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [2, 70])
def test_bfloat16_is_rounded_only_at_the_end(name, tokens):
    for layer in layers(name, [(96, 130)]):
        half, wide, x, same = low(layer, tokens, 96)
        slope = torch.randn(tokens, 130).bfloat16()
        y, expected = (chain_of(layer.spec)(i, of.factors, of.bias) for i, of in ((x, half), (same, wide)))
        found = [y, *gradients(half, y, x, slope)]
        for ours, theirs in zip(found, [expected, *gradients(wide, expected, same, slope.float())], strict=True):
            # The gradient of a factor that is written out is rounded before the entries of each value are summed.
            assert_close(ours, theirs.bfloat16(), str(layer), 5e-3 if layer.spec.tied else AGAIN)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16_is_rounded_as_torch_does(tokens):
    layer = build(LowRank(rank=37), 37, 37, dtype=torch.bfloat16)
    for factor in layer.factors:
        torch.nn.init.eye_(factor)
    x = torch.randn(tokens, 37).bfloat16()
    special = torch.tensor([0x7F80, -128, 0x7FFF, -1, 0x7F81, 0x7FC0], dtype=torch.int16).view(torch.bfloat16)
    largest = torch.tensor(torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.bias[:6], layer.bias[6], x[:, 6] = special, largest, largest  # infinite, not numbers, and an overflow
        y = chain_of(layer.spec)(x, layer.factors, layer.bias)
    assert torch.equal(y.isnan(), (x + layer.bias).isnan())
    assert torch.equal(y.nan_to_num(), (x + layer.bias).nan_to_num())


def test_dtypes_are_not_mixed():
    layer = build(LowRank(rank=3), 16, 20)
    half, _, x, same = low(layer, 40, 16)
    call = chain_of(layer.spec)
    with pytest.raises(RuntimeError, match="x is Float, factor 0 is BFloat16; all must be of one dtype"):
        call(same, half.factors, half.bias)
    with pytest.raises(RuntimeError, match="x is BFloat16, factor 1 is Float;"):
        call(x, (half.factors[0], layer.factors[1]), half.bias)
    with pytest.raises(RuntimeError, match="x is BFloat16, bias is Float;"):
        call(x, half.factors, layer.bias)
    with pytest.raises(RuntimeError, match="x is Double; the kernel takes Float or BFloat16"):
        call(x.double(), half.factors, half.bias)
    with pytest.raises(RuntimeError, match="x is BFloat16, dy is Float;"):
        torch.ops.structlin.chain_backward(torch.randn(40, 20), x, half.factors, call.program, True, [])
    with pytest.raises(RuntimeError, match="do not fit the program"):
        torch.ops.structlin.chain_backward(torch.randn(39, 20), same, layer.factors, call.program, True, [])


def test_what_suits():
    single, half, double = (torch.empty(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    assert suits((single, single))
    assert suits((half, half))
    assert not suits((single, half))
    assert not suits((double, double))
    assert not suits((half, half.to("meta")))


@pytest.mark.parametrize(
    ("structure", "in_features", "out_features", "tokens"),
    [(Kaleidoscope(width=2), 48, 64, 300), (LowRank(rank=300), 512, 700, 25)],  # tiles for all, and smaller ones
)
def test_threads_give_the_same(structure, in_features, out_features, tokens):
    layer = build(structure, in_features, out_features)
    x = torch.randn(tokens, in_features, requires_grad=True)
    slope = torch.randn(tokens, out_features)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            y = chain_of(layer.spec)(x, layer.factors, layer.bias)
            results.append([y, *gradients(layer, y, x, slope)])
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*results, strict=True):
        assert_close(two, one, "two threads", 1e-6)
        assert torch.equal(two, again)


LARGE = [
    (LowRank(rank=1024), 2048),  # shared out by rows
    (Blast(blocks=4, rank=1024), 2048),  # by outer indices
    (TensorTrain(rank=16, in_modes=(16,) * 3, out_modes=(16,) * 3), 4096),  # by runs that share their block
    (Kronecker(terms=64), 1024),
    (Sum(parts=(LowRank(rank=1024), Blast(blocks=4, rank=1024))), 2048),  # added to what is there
]


@pytest.mark.parametrize(("structure", "size"), LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_few_tokens_of_a_large_layer_by_threads(structure, size, dtype, tokens):
    layer = build(structure, size, size, dtype=dtype)
    x = torch.randn(tokens, size).to(dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(chain_of(layer.spec)(x, layer.factors, layer.bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_leading_dimensions_and_strides():
    layer = build(LowRank(rank=3), 16, 20)
    with torch.no_grad():
        for x in (torch.randn(16), torch.randn(2, 3, 16), torch.randn(16, 5).T, torch.randn(4, 32)[:, ::2]):
            y = layer(x)
            assert y.shape == (*x.shape[:-1], 20)
            assert y._base is None
            assert_close(y, dense(layer, x), "forward", 1e-5)


def test_only_what_needs_a_gradient_gets_one():
    layer = build(Kronecker(terms=2), 16, 20)
    first, second = layer.factors
    first.requires_grad_(False)
    layer(torch.randn(40, 16)).sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert layer.bias.grad is not None


def test_double_backward():
    layer = build(Sum(parts=(LowRank(rank=2), Kaleidoscope())), 16, 20)
    x = torch.randn(40, 16, requires_grad=True)
    norms = []
    for y in (layer(x), dense(layer, x)):
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        norms.append(torch.autograd.grad(slope.square().sum(), [x, *layer.factors]))
    for ours, theirs in zip(*norms, strict=True):
        assert_close(ours, theirs, "second derivative", 1e-4)


def test_only_the_input_is_saved():
    layer = build(Kaleidoscope(width=2), 64, 64)
    x = torch.randn(100, 64, requires_grad=True)
    own = {x.data_ptr(), *(factor.data_ptr() for factor in layer.factors)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        layer(x)
    assert set(saved) == own


def test_not_a_number_stays():
    layer = build(LowRank(rank=3), 16, 20)
    for tokens in (1, 40):
        x = torch.zeros(tokens, 16)
        x[0, 3] = torch.nan
        y = layer(x)
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()


@pytest.mark.parametrize("size", [5, 21, 37])
def test_an_infinite_weight_gives_infinite_outputs(size):
    layer = build(LowRank(rank=size), size, size).requires_grad_(False)
    left, right = layer.factors
    left.fill_(1.0)
    for tokens in (1, 40):
        for k in range(size):
            right.fill_(1.0)
            right[0, k] = torch.inf  # also where the last vector of a row reads entries again
            y = chain_of(layer.spec)(torch.ones(tokens, size), layer.factors, None)
            assert torch.equal(y, torch.full_like(y, torch.inf))


def test_fits_refine_by_it(monkeypatch):
    weight, inputs = torch.randn(64, 48), torch.randn(100, 48) * torch.logspace(0, -1, 48)
    gram = inputs.T @ inputs
    with monkeypatch.context() as patch:
        patch.setattr("structlin.fitting.refine.apply", lambda *_: pytest.fail("torch ran"))
        fast = fit(weight, sum_of(LowRank, Kaleidoscope), ratio=0.5, gram=gram, refine=30)
    monkeypatch.setattr(native._State, "usable", False)
    slow = fit(weight, sum_of(LowRank, Kaleidoscope), ratio=0.5, gram=gram, refine=30)
    assert fast.structure == slow.structure
    assert fast.output_error == pytest.approx(slow.output_error, rel=1e-3)


# Programs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_cheaper_order(name):
    for layer in layers(name):
        flops = cost(layer.spec, few=False).flops
        assert flops == sum(stage.flops for stage in stages(layer.spec, few=False))
        assert layer.flops_per_token <= flops <= layer.flops_per_token + 0.1 * layer.num_parameters


def test_of_two_equal_directions_the_one_in_order_is_taken():
    for sizes in ((64, 64), (192, 768)):
        layer = build(PHM(n=2), *sizes)
        assert cost(layer.spec, few=False).turned <= 8  # the small left factors only


def test_a_long_chain_has_a_small_program():
    layer = build(Kaleidoscope(width=2, radix=2), 1024, 1024)
    assert len(program(layer.spec)) < 200_000  # the other direction would have 2^30 offsets


@pytest.mark.parametrize("mode", MODES)
def test_factors_beyond_int32_run_otherwise(mode):
    for rank, runs in ((8191, True), (8192, False)):  # 2^31 entries have no offsets
        found = ways(LowRank(rank=rank).spec(8192, 1 << 18), Key(4, torch.bfloat16, torch.device("cpu"), True, mode))
        (kernel,) = (way for way in found if isinstance(way, Kernel))
        assert (kernel.seconds < torch.inf) == runs
        assert predicted(found) is not kernel or runs


# When it runs --------------------------------------------------------------------------------------------------------


def counting(monkeypatch, owner, name):
    """A list that grows by one with each call of a function."""
    calls = []
    run = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.fixture
def counted(monkeypatch):
    """Counts the contractions by torch, which the kernel makes unnecessary."""
    return counting(monkeypatch, forward, "contracted")


def test_layers_use_it_by_themselves(counted):
    layer = build(Kaleidoscope(width=2), 64, 64)
    layer(torch.randn(40, 64)).sum().backward()
    assert not counted


def test_it_does_not_run_where_dense_is_faster(counted):
    layer = build(Kronecker(terms=60), 64, 64)  # more FLOPs than the dense matrix
    assert cost(layer.spec, few=False).flops > 2 * 64 * 64
    layer(torch.randn(4096, 64))
    assert counted


@pytest.mark.parametrize("order", ["forward", "backward", "materialise"])
def test_a_plan_that_was_asked_for_is_used(counted, order):
    layer = build(Kaleidoscope(width=2), 64, 64)
    layer.use_plan(order)
    layer(torch.randn(40, 64))
    assert counted


def test_switched_off(counted, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "off")
    monkeypatch.setattr(native._State, "usable", None)
    build(Kaleidoscope(width=2), 64, 64)(torch.randn(40, 64))
    assert counted


def test_elsewhere_torch_runs(counted):
    layer = build(LowRank(rank=3), 16, 20)
    x = torch.randn(40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert len(counted) == 1
    copy.deepcopy(layer).double()(x.double())
    copy.deepcopy(layer).half()(x.half())
    assert len(counted) == 3
    batched = vmap(lambda row: functional_call(layer, dict(layer.named_parameters()), row))(x)
    assert_close(batched, layer(x), "vmap", 1e-5)
    assert len(counted) == 4
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 40 * layer.flops_per_token
    with torch.device("meta"):
        assert layer.to("meta")(torch.empty(3, 16)).is_meta


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_derivatives():
    layer = build(LowRank(rank=3), 16, 20)
    x, direction = torch.randn(40, 16), torch.randn(40, 16)
    _, found = torch.func.jvp(layer, (x,), (direction,))
    assert_close(found, F.linear(direction, layer.to_dense()), "jvp", 1e-5)


def test_copies_and_pickles_leave_the_plans_behind():
    layer = build(Kaleidoscope(), 64, 64)
    x = torch.randn(40, 64)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)


@pytest.mark.parametrize("choice", ["auto", "forward"])
def test_layers_call_it_under_compile(choice):
    layer = build(LowRank(rank=3), 16, 20)
    layer.use_plan(choice)
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)
    for tokens in (40, 50, 60):
        x = torch.randn(tokens, 16)
        assert_close(compiled(x), layer(x), "compiled", 1e-5)
    assert len(graphs) <= 2
    assert all(("structlin.chain" in code) == (choice == "auto") for code in graphs)


# Building ------------------------------------------------------------------------------------------------------------


NARROW = """
import copy
import torch
import torch.nn.functional as F
from structlin import BlastLinear, KMatrix
from structlin.runtime import kernels
from structlin.runtime.kernels import chain_of
kernels.build()
assert kernels.available()
for layer in (KMatrix(48, 64, width=2), BlastLinear(33, 20, blocks=3, rank=7)):
    for tokens in (1, 3, 6, 50):
        x = torch.randn(tokens, layer.in_features, requires_grad=True)
        pull = torch.randn(tokens, layer.out_features)
        leaves = [x, *layer.parameters()]
        ours = torch.autograd.grad(layer(x), leaves, pull)
        theirs = torch.autograd.grad(F.linear(x, layer.to_dense(), layer.bias), leaves, pull)
        assert torch.allclose(layer(x), F.linear(x, layer.to_dense(), layer.bias), atol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs))
        half = copy.deepcopy(layer).bfloat16()
        wide = copy.deepcopy(half).float()
        with torch.no_grad():
            low = chain_of(layer.spec)(x.bfloat16(), half.factors, half.bias)
            assert torch.allclose(low.float(), wide(x.bfloat16().float()), rtol=2.0**-8, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 vectors")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(level, tmp_path):
    """What runs on machines with SSE or AVX2 only; NEON takes the same path as SSE."""
    if level == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("what all other tests of the kernel run here")
    options = {"CXXFLAGS": f"-march={level} -O1", "STRUCTLIN_CACHE": str(tmp_path), native.SWITCH: ""}
    subprocess.run([sys.executable, "-c", NARROW], env={**os.environ, **options}, check=True)


def test_build_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        native.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="failed"):
        native.build()
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path))
    tmp_path.joinpath(native._name(native._stem(), b"not a library")).write_bytes(b"not a library")
    monkeypatch.setattr(native, "_loaded", lambda: False)
    monkeypatch.setattr(native._State, "usable", None)
    monkeypatch.setattr(wheel, "find", lambda: (None, []))
    with pytest.warns(UserWarning, match="does not load"):
        assert not native.available()


def test_predictions_follow_the_machine():
    found = measure_machine()
    assert 0.05 < found.native < 50
    assert 0.05 < found.native_few < 50
    assert found.native != 1.0
    chain = chain_of(build(LowRank(rank=8), 512, 512).spec)
    slower = replace(planner.CPU, native=2.0, native_few=3.0)
    assert chain.seconds(64, machine=slower) == 2 * chain.seconds(64, machine=planner.CPU)
    assert chain.seconds(1, machine=slower) == 3 * chain.seconds(1, machine=planner.CPU)
    assert chain.step_seconds(64, machine=slower) == pytest.approx(2 * chain.step_seconds(64, machine=planner.CPU))
    assert chain.step_seconds(9, machine=slower) > 0.8 * chain.step_seconds(16, machine=slower)  # whole vectors
    options = build(LowRank(rank=8), 512, 512).options(64)
    predicted = {option.mode: option.seconds for option in options if option.way == "native kernel"}
    assert predicted["eval"] == predicted["frozen"] == chain.seconds(64, machine=found)
    assert predicted["training"] == chain.step_seconds(64, machine=found) / 3


def test_a_machine_is_measured_in_float32_whatever_is_the_default(monkeypatch):
    ran = []

    def run(device, call):
        ran.append((call().dtype, call().device))
        return 1.0

    monkeypatch.setattr(measure, "_seconds", run)
    measure_machine()
    expected, ran = ran, []
    assert {dtype for dtype, _ in expected} == {torch.float32, torch.bfloat16}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.float16):
            measure_machine()
    finally:
        torch.set_default_dtype(before)
    assert ran == expected


def test_predictions_order_the_sizes():
    chains = (chain_of(build(LowRank(rank=r), 512, 512).spec) for r in (8, 128))
    small, large = (partial(chain.seconds, machine=planner.CPU) for chain in chains)
    assert small(64) < large(64) < large(512)
    assert planner.NATIVE.flops > planner.CPU.flops
    assert large(1, itemsize=2) < large(1)
