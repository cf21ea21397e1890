"""All structures under all laws: at all pairs of sizes, in every dtype, under the transformations of torch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import CASES, CLOSED, ONE, SIZES, SMALL, SMALL_SIZES, largest, naming
from torch import nn

from structlin import StructuredLinear, testing
from structlin.equation.structure import registered
from structlin.fitting.budget import within
from structlin.fitting.fit import fit
from structlin.layers.linear import build
from structlin.runtime.planner import ORDERS
from structlin.structures import families
from structlin.testing import LAWS, assert_close, check_structure

# A Latin square over the sizes, each twice as input and as output, and the corners; float32 on every other pair.
PAIRS = [(SIZES[k], SIZES[(3 * k + shift) % len(SIZES)]) for shift in (1, 4) for k in range(len(SIZES))]
PAIRS += [pair for pair in itertools.product((SIZES[0], SIZES[-1]), repeat=2) if pair not in PAIRS]
AT_SIZES = [(*pair, torch.float64) for pair in PAIRS] + [(*pair, torch.float32) for pair in PAIRS[:16:2]]
AT_EVERY_SIZE = (
    testing.forward_matches_dense,
    testing.counts_agree,
    testing.start_has_the_scale_of_linear,
    testing.inputs_of_all_kinds_work,
    testing.prints_itself,
)
LARGER = [(1, 1), (1, 97), (384, 1), (7, 384), (384, 64), (97, 384)]
LOW = (torch.bfloat16, torch.float16)
# Every dtype at every size, but complex128, whose numerical derivatives are slow, at the two primes only.
AT_SMALL_SIZES = [(*sized, dtype) for sized in SMALL for dtype in (torch.float64, torch.float32, torch.complex64, *LOW)]
AT_SMALL_SIZES += [(*sized, torch.complex128) for sized in SMALL if sized[1:] == (97, 13)]


def each(instances):
    return pytest.mark.parametrize("structure", instances, ids=[f"{k}-{s.name}" for k, s in enumerate(instances)])


def test_every_registered_structure_has_a_row():
    assert CASES.keys() == registered().keys()


@pytest.mark.parametrize(("in_features", "out_features", "dtype"), AT_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_size(name, in_features, out_features, dtype):
    for structure in CASES[name].at(in_features, out_features):
        layer = build(structure, in_features, out_features, dtype=dtype)
        for law in AT_EVERY_SIZE:
            law(layer)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", [law for law in LAWS if law not in AT_EVERY_SIZE], ids=lambda law: law.__name__)
def test_further_laws_at_larger_sizes(name, law):
    held, reasons = False, set()
    for in_features, out_features in LARGER:
        for structure in CASES[name].at(in_features, out_features):
            with naming(structure, f"{in_features} -> {out_features}"):
                try:
                    law(build(structure, in_features, out_features, dtype=torch.float64))
                except testing.NotApplicable as reason:
                    reasons.add(str(reason))
                else:
                    held = True
    if not held:
        pytest.skip("; ".join(reasons))


def _covered(layer):
    """The sizes that all equations cover, which exceed the layer's where it is padded."""
    return max(eq.padded_in for eq in layer.spec.equations), max(eq.padded_out for eq in layer.spec.equations)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("in_features", "out_features"), [(1536, 384), (1000, 1021)])
def test_fits_at_full_size(name, in_features, out_features):
    for structure in CASES[name].at(in_features, out_features):
        layer = build(structure, in_features, out_features)
        testing.dense_matches_equation(layer)
        if not structure.refine_steps and (in_features, out_features) == _covered(layer):
            testing.own_fit_is_exact(layer)
        testing.any_fit_is_better_than_zero(layer)


@pytest.mark.parametrize(
    ("structure", "in_features", "out_features", "dtype"),
    AT_SMALL_SIZES,
    ids=[f"{k}-{s.name}-{i}-{o}-{dtype}" for k, (s, i, o, dtype) in enumerate(AT_SMALL_SIZES)],
)
def test_every_law(structure, in_features, out_features, dtype):
    check_structure(structure, in_features, out_features, dtype=dtype)


# The fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_features", "out_features"), [*SMALL_SIZES, (64, 97)])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.nested and case.families])
def test_error_never_grows_with_rank_or_terms(name, in_features, out_features):
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    for make in CASES[name].families:
        members = {largest(make, number, in_features, out_features): None for number in (1, 2, 3, 5, 8, 13, 1000)}
        errors = [fit(weight, member).error for member in members]
        assert len(errors) > 1
        # TT-SVD is quasi-optimal only: its errors may in principle wobble, but never for nested truncations by much.
        # Two exact fits differ by rounding, a few units of float64's last place (2.2e-16).
        assert all(later <= earlier * (1 + 1e-9) + 1e-14 for earlier, later in itertools.pairwise(errors)), errors


def test_error_never_grows_with_the_rank_of_monarch_blocks():
    weight = torch.randn(20, 12, dtype=torch.float64)
    errors = [fit(weight, ONE["monarch"].__class__(blocks=4, rank=rank)).error for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [*LOW, torch.complex64, torch.complex128, torch.float64], ids=str)
@each(list(ONE.values()))
def test_from_linear_keeps_the_dtype_and_decomposes_in_a_wider_one(structure, dtype):
    linear = nn.Linear(16, 16, dtype=dtype)
    layer = StructuredLinear.from_linear(linear, structure=structure, refine=2)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    x = torch.randn(3, 16).to(dtype)
    assert layer(x).dtype == dtype
    # The same decomposition of the same numbers, computed wide, is what was stored.
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = fit(linear.weight.detach().to(wide), structure, refine=2)
    stored = testing.einsum_dense(layer.spec, [factor.detach().to(wide) for factor in layer.factors])
    weight = linear.weight.detach().to(wide)
    error = (torch.linalg.vector_norm(stored - weight) / torch.linalg.vector_norm(weight)).item()
    assert error <= exact.error + 10 * testing.TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
@each(list(ONE.values()))
def test_error_does_not_depend_on_the_scale(structure, dtype):
    weight = torch.randn(16, 16).to(dtype)
    expected = fit(weight, structure, refine=2).error
    assert 0 <= expected <= 1.01
    for scale in (1e30, 1e-30, 1e6):
        with naming(f"scale={scale}"):
            found = fit(weight * scale, structure, refine=2).error
            assert found == pytest.approx(expected, rel=0.05, abs=testing.TOLERANCES[dtype])


@each(CLOSED)
def test_degenerate_weights(structure):
    ones = torch.ones(20, 12, dtype=torch.float64)
    zero = fit(0 * ones, structure)
    assert zero.error == 0
    assert all(torch.isfinite(factor).all() for factor in zero.factors)
    rank_one = torch.outer(torch.randn(20), torch.randn(12)).double()
    assert 0 <= fit(rank_one, structure).error <= 1
    assert 0 <= fit(torch.diag(torch.ones(20, dtype=torch.float64))[:, :12], structure).error <= 1


# Transformations of torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@each(list(ONE.values()))
def test_autocast_gives_low_precision_and_gradients_in_full(structure, order):
    layer = build(structure, 16, 16)
    layer.use_plan(order)
    for x in (torch.randn(5, 16), torch.randn(0, 16), torch.randn(16), torch.randn(5, 16).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), layer(x.float()).detach(), "autocast", 0.05)
        y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.slow
@each(list(ONE.values()))
def test_compile_without_graph_breaks(structure):
    torch._dynamo.reset()
    layer = build(structure, 16, 20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(5, 16), torch.randn(9, 16), torch.randn(2, 3, 16), torch.randn(16)):
        assert_close(compiled(x), layer(x), "compiled")
    compiled(torch.randn(5, 16)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.slow
def test_compile_recompiles_once_for_new_numbers_of_tokens():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer = build(ONE["tt"], 16, 20)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (2, 3, 5, 17, 300):
        compiled(torch.randn(tokens, 16))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
@pytest.mark.parametrize("name", ["kronecker", "kmatrix"])
def test_compile_with_inductor(name):
    torch._dynamo.reset()
    layer = build(ONE[name], 16, 20)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 16)
    assert_close(compiled(x), layer(x), "inductor")
    compiled(x).square().sum().backward()
    expected = copy.deepcopy(layer)
    expected.zero_grad()
    expected(x).square().sum().backward()
    for (key, actual), wanted in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert_close(actual.grad, wanted.grad, f"inductor gradient of {key}")


@each(list(ONE.values()))
def test_vmap_and_per_sample_gradients(structure):
    layer = build(structure, 16, 20, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert_close(torch.func.vmap(layer)(x), layer(x), "vmap")
    assert_close(torch.func.vmap(layer, in_dims=1, out_dims=1)(x.T), layer(x).T, "vmap over the last axis")
    values = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(values, row):
        return torch.func.functional_call(layer, values, (row,)).square().sum()

    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for key, gradients in batched.items():
        for row, gradient in zip(x, gradients, strict=True):
            assert_close(gradient, torch.func.grad(loss)(values, row)[key], f"gradient of {key}")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch's forward mode
@each(list(ONE.values()))
def test_forward_mode(structure):
    layer = build(structure, 16, 20, dtype=torch.float64)
    x, tangent = torch.randn(2, 5, 16, dtype=torch.float64)
    value, derivative = torch.func.jvp(layer, (x,), (tangent,))
    assert_close(value, layer(x), "value")
    assert_close(derivative, tangent @ layer.to_dense().T, "derivative")


def exported_for_any_number_of_tokens(layer, sample, most=300):
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    x = torch.randn(sample, layer.in_features)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},)).module()
    for count in (1, 7, most):
        x = torch.randn(count, layer.in_features)
        assert_close(program(x), layer(x), f"exported, {count} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@each(list(ONE.values()))
def test_export_with_any_number_of_tokens(structure, order):
    layer = build(structure, 16, 20)
    layer.use_plan(order)
    most = 40 if order == "backward" else 300  # outer products: of 300 tokens they take 10 s
    for sample in (5, 128):
        exported_for_any_number_of_tokens(layer, sample, most)


@pytest.mark.parametrize("name", families())
def test_export_of_a_large_layer(name):
    structure = within(families()[name], 768, 768, 0.5)[0]
    exported_for_any_number_of_tokens(build(structure, 768, 768), 128)
