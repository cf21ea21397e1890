"""Fitting and budgets."""

import math
import re

import pytest
import torch
from torch import nn

from structlin import KaleidoscopeLinear, LowRankLinear, StructuredLinear, TTLinear
from structlin.fitting.budget import COARSE, SLACK, within
from structlin.fitting.fit import fit, relative_error
from structlin.runtime.contract import to_dense
from structlin.structures import PHM, Kaleidoscope, LowRank, TensorTrain, families, family

every_structure = pytest.mark.parametrize("name", sorted(families()))
SHAPES = [(64, 64), (96, 384), (384, 96), (97, 64), (127, 131), (384, 384)]
# What no member is small enough for: three stages of a K-matrix, n^3 left entries of PHM.
TOO_SMALL = {
    "kmatrix": {(64, 64): 0.25, (96, 384): 0.1, (384, 96): 0.1, (97, 64): 0.25, (127, 131): 0.25, (384, 384): 0.1},
    "lowrank+kmatrix": {
        (64, 64): 0.25, (96, 384): 0.25, (384, 96): 0.25, (97, 64): 0.25, (127, 131): 0.25, (384, 384): 0.1,
    },
    "phm": {(64, 64): 0.1, (96, 384): 0.1, (384, 96): 0.1, (97, 64): 0.1, (127, 131): 0.1},
}  # fmt: skip


@every_structure
@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_budget_is_kept_and_used(name, ratio, in_features, out_features):
    dense = in_features * out_features
    members = family(name)
    if ratio <= TOO_SMALL.get(name, {}).get((in_features, out_features), 0):
        with pytest.raises(ValueError, match=re.escape(f"no {name} structure")):
            within(members, in_features, out_features, ratio)
        return
    found = within(members, in_features, out_features, ratio)
    sizes = [structure.spec(in_features, out_features).num_parameters for structure in found]
    assert max(sizes) <= (1 + SLACK) * ratio * dense
    assert min(sizes) > 0
    below = [size for size in sizes if size <= ratio * dense]
    if max(sizes) > ratio * dense:  # more was taken: only where a coarse step left the budget unused
        assert not below or max(below) < (1 - COARSE) * ratio * dense


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_structures_with_small_steps_come_near(ratio, in_features, out_features):
    for name, step in {
        "lowrank": in_features + out_features,
        "kronecker": 2 * (in_features + out_features),
        "tt": 4 * (in_features + out_features),
    }.items():
        sizes = [s.spec(in_features, out_features).num_parameters
                 for s in within(family(name), in_features, out_features, ratio)]  # fmt: skip
        assert max(sizes) > ratio * in_features * out_features - step


def test_phm_takes_the_slack():
    found = max(within(PHM, 384, 384, 0.5), key=lambda s: s.spec(384, 384).num_parameters)
    assert found.n == 2
    assert found.spec(384, 384).num_parameters == 384 * 384 // 2 + 8


@pytest.mark.parametrize("ratio", [0, -1, 1.01, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        LowRankLinear.from_linear(nn.Linear(8, 8), ratio=ratio)


def test_ratio_too_small():
    with pytest.raises(ValueError, match=r"no lowrank structure of a 8 x 8 layer keeps 0.1 .* use a larger ratio"):
        LowRankLinear.from_linear(nn.Linear(8, 8), ratio=0.1)


@every_structure
def test_refinement_is_never_worse_and_deterministic(name):
    linear = nn.Linear(48, 64)
    fits = [fit(linear.weight, family(name), ratio=0.5, refine=steps) for steps in (0, 25, 25)]
    assert fits[1].error <= fits[0].error * (1 + 1e-6)  # the start in float32
    assert fits[1].structure == fits[2].structure
    assert all(torch.equal(a, b) for a, b in zip(fits[1].factors, fits[2].factors, strict=True))


def test_refinement_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    fit(nn.Linear(16, 16).weight.detach(), Kaleidoscope(), refine=3)
    torch.manual_seed(0)
    nn.Linear(16, 16)
    torch.set_rng_state(state)
    weight = torch.randn(32, 32)
    before = torch.get_rng_state()
    fit(weight, Kaleidoscope(), refine=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_kmatrix_refines_by_default_and_beats_its_projection_and_the_svd_on_noise():
    torch.manual_seed(0)
    linear = nn.Linear(96, 96)
    projected = KaleidoscopeLinear.from_linear(linear, ratio=0.5, refine=0)
    refined = KaleidoscopeLinear.from_linear(linear, ratio=0.5)
    svd = LowRankLinear.from_linear(linear, ratio=0.5)
    error = [relative_error(linear.weight, layer.weight) for layer in (projected, refined, svd)]
    assert error[1] < 0.8 * error[0]
    assert error[1] < error[2]


@every_structure
def test_extreme_scales(name):
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    plain, small, large = (fit(weight * scale, family(name), ratio=0.6, refine=3) for scale in (1, 1e-30, 1e30))
    for found in (small, large):
        assert all(torch.isfinite(factor).all() for factor in found.factors)
        assert found.error == pytest.approx(plain.error, rel=2e-2)  # Adam is chaotic


@every_structure
def test_degenerate_weights(name):
    torch.manual_seed(0)
    rank_one = torch.outer(torch.randn(32), torch.randn(48))
    for weight in (torch.zeros(32, 48), rank_one, torch.ones(32, 48), torch.eye(32, 48)):
        found = fit(weight, family(name), ratio=0.6, refine=3)
        assert all(torch.isfinite(factor).all() for factor in found.factors)
        assert 0 <= found.error <= 1 + 1e-6
    assert fit(torch.zeros(32, 48), family(name), ratio=0.6, refine=3).error == 0


@every_structure
def test_error_is_of_the_stored_factors(name):
    weight = torch.randn(32, 48).bfloat16()
    found = fit(weight, family(name), ratio=0.6, refine=3)
    assert {factor.dtype for factor in found.factors} == {torch.bfloat16}
    layer = StructuredLinear.from_linear(_linear(weight.float()), structure=found.structure, refine=0)
    assert found.error >= 0.5 * relative_error(weight.float(), layer.weight)


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 1e-3])
def test_tolerance_is_guaranteed(tolerance):
    torch.manual_seed(0)
    grid = torch.linspace(0, 1, 60)
    smooth = torch.exp(-3 * (grid[:, None] - grid[None, :48]).abs()) + 0.01 * torch.randn(60, 48)
    layer = TTLinear.from_linear(_linear(smooth), tolerance=tolerance)
    assert relative_error(smooth, layer.weight) <= tolerance * (1 + 1e-5)
    assert layer.structure.tolerance is None
    looser = TTLinear.from_linear(_linear(smooth), tolerance=2 * tolerance)
    assert looser.num_parameters <= layer.num_parameters


@pytest.mark.parametrize(
    ("structure", "options", "message"),
    [
        (LowRank, {}, "either hyperparameters or a ratio"),
        (LowRank(rank=2), {"ratio": 0.5}, "either hyperparameters or a ratio"),
        (TensorTrain(rank=2, tolerance=0.1), {}, "without rank"),
        (TensorTrain(), {}, "rank is missing"),
    ],
)
def test_bad_requests(structure, options, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.randn(8, 8), structure, **options)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(8), "a dense matrix"),
        (torch.randn(0, 8), "a dense matrix"),
        (torch.ones(8, 8, dtype=torch.int8), "dtype torch.int8"),
        (torch.ones(8, 8).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        (torch.randn(8, 8, device="meta"), "meta device"),
        (torch.full((8, 8), math.inf), "NaN or infinite"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(ValueError, match=message):
        fit(weight, LowRank(rank=2))


@pytest.mark.parametrize("exponent", [900, 500, -500, -900])
def test_weights_whose_squares_leave_float64_fit_like_others(exponent):
    weight = torch.randn(6, 8, dtype=torch.float64)
    plain, scaled = (fit(weight * 2.0**e, TensorTrain(rank=2), refine=5) for e in (0, exponent))
    assert scaled.error == pytest.approx(plain.error, rel=1e-9)
    dense = to_dense(scaled.spec, scaled.factors) * 2.0**-exponent
    assert torch.allclose(dense, to_dense(plain.spec, plain.factors), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_approximation_that_the_dtype_cannot_hold_is_refused(dtype):
    weight = torch.tensor([[1.0, 0.99, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    high = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # rank 1 comes to 1.17
    limit = torch.finfo(dtype).max / 2**8
    assert fit((weight * limit).to(dtype), LowRank(rank=1)).error < 1
    with pytest.raises(
        ValueError, match=r"approximates the weight by entries up to .* use a smaller weight or a wider"
    ):
        fit((high * limit * 2**8).to(dtype), LowRank(rank=1))
    with pytest.raises(ValueError, match=r"the norm of the weight exceeds the largest torch.float64; divide"):
        fit(high * torch.finfo(torch.float64).max, LowRank(rank=1))


def test_from_linear_takes_linear_layers_only():
    with pytest.raises(TypeError, match=r"takes an nn.Linear, not Conv1d"):
        LowRankLinear.from_linear(nn.Conv1d(2, 2, 1), rank=1)
    with pytest.raises(ValueError, match="needs structure="):
        StructuredLinear.from_linear(nn.Linear(4, 4), ratio=0.5)
    with pytest.raises(ValueError, match="either ratio or hyperparameters"):
        LowRankLinear.from_linear(nn.Linear(4, 4), ratio=0.5, rank=2)


def test_relative_error_of_zero():
    zero = torch.zeros(2, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, torch.ones(2, 2)) == math.inf
