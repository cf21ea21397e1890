"""Plain torch beside simple code: the simple forms equal every layer, and plans include the obvious ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from cases import SMALL, naming

from structlin.equation.structure import registered
from structlin.layers.linear import build
from structlin.runtime import contract, planner
from structlin.runtime.planner import CPU, Plan
from structlin.runtime.recompute import at_once, by_chunks
from structlin.runtime.ways import EVAL, TRAINING, Key, predicted, ways
from structlin.structures import CP, PHM, Kronecker, LowRank, Monarch, Shapeshifter, Sum

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
find_plan = partial(planner.find_plan, machine=CPU)


@pytest.fixture
def simple(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _simple

    return _simple


def spec_of(structure, in_features, out_features):
    return structure.resolve(in_features, out_features).spec(in_features, out_features)


# Simple code ---------------------------------------------------------------------------------------------------------


def test_simple_forms_equal_every_layer(simple):
    torch.manual_seed(0)
    untied = [case for case in SMALL if not spec_of(*case).tied]  # ties.py times the others beside nn.Linear
    patterns = {type(structure) for structure, *sizes in SMALL if spec_of(structure, *sizes).tied}
    assert {*simple.FORMS, Sum} == {*registered().values()} - patterns | {Sum}
    for structure, in_features, out_features in untied:
        layer = build(structure, in_features, out_features, dtype=torch.float64)
        x = torch.randn(5, in_features, dtype=torch.float64)
        for name, subject in simple.simple_subjects(layer).items():
            with naming(structure, in_features, out_features, name):
                torch.testing.assert_close(subject.module(x), layer(x), rtol=1e-10, atol=1e-10)


# Plans ---------------------------------------------------------------------------------------------------------------


def chosen(structure, sizes, tokens, mode):
    key = Key(tokens, torch.float32, torch.device("cpu"), False, mode)
    return predicted(ways(spec_of(structure, *sizes), key))


@pytest.mark.parametrize("mode", [EVAL, TRAINING])
@pytest.mark.parametrize(
    "structure", [Shapeshifter(rank=192), Kronecker(terms=16), PHM(n=16)], ids=["shapeshifter", "kronecker", "phm"]
)
def test_one_token_takes_one_product_per_factor(structure, mode):
    """The sum over terms stands inside the second product; the dense matrix costs many times as much."""
    plan = chosen(structure, (768, 3072), 1, mode).plan
    spec = spec_of(structure, 768, 3072)
    assert [len(part.counted) for part in plan.parts] == [2]
    assert plan.flops < find_plan(spec, 1, order="materialise").flops / 5


def test_many_tokens_of_many_terms_take_the_dense_matrix():
    for structure, sizes in ((Kronecker(terms=16), (384, 384)), (Shapeshifter(rank=192), (768, 3072))):
        for mode in (EVAL, TRAINING):
            plan = chosen(structure, sizes, 512, mode).plan
            assert plan.materialises
            assert plan.parts[0].in_order  # no copy of the output, and the bias costs no pass


def test_a_transposed_product_is_not_copied_back():
    plan = find_plan(spec_of(Kronecker(terms=16), 384, 384), 512)
    (part,) = plan.parts
    assert part.turned
    assert not part.result.copy
    assert part.widest == 0  # nothing between input and output


def test_training_counts_the_gradients():
    """A product with two gradients takes three products; a flat machine predicts three times the FLOPs."""
    machine = planner.Machine("flops only", flops=1.0, bandwidth=float("inf"), op=0.0, tile=1)
    plan = planner.find_plan(spec_of(LowRank(rank=4), 64, 32), 8, machine=machine)
    assert plan.training == 3 * plan.flops == 3 * plan.seconds


def test_outer_products_of_factors_are_no_matrix_products():
    assert CPU.outer(1000, 16, 24, 4) < CPU.product(1000, 16, 1, 24, 4) / 3


# Running -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", planner.ORDERS)
@pytest.mark.parametrize(
    "structure",
    [LowRank(rank=3), Kronecker(terms=16), Monarch(blocks=2), CP(rank=5), Sum((LowRank(rank=2), Monarch(blocks=2)))],
    ids=["lowrank", "kronecker", "monarch", "cp", "sum"],
)
def test_bias_and_sums_in_the_last_product(structure, order):
    torch.manual_seed(0)
    for sizes in ((16, 24), (24, 16)):
        layer = build(structure, *sizes, dtype=torch.float64)
        plan: Plan = layer.plan(40, order)
        operands = contract.merge_factors(layer.spec, layer.factors, plan)
        for shape in ((40,), (5, 8), (0,)):
            x = torch.randn(*shape, sizes[0], dtype=torch.float64)
            dense = x @ layer.to_dense().T
            for bias, expected in ((layer.bias, dense + layer.bias), (None, dense)):
                for run in (at_once, by_chunks):
                    with torch.no_grad():
                        y = run(layer.spec, operands, x, bias, plan)
                    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
                    assert y._base is None
