"""Single tokens go through layouts of their own: as fast as possible, and with the same results."""

from __future__ import annotations

import re

import pytest
import torch
from cases import CASES
from test_kernels import built, dense, gradients, low  # noqa: F401

from structlin.layers.linear import build
from structlin.runtime.kernels import chain_of
from structlin.runtime.kernels.layouts import Cost, cost, links
from structlin.runtime.kernels.native import HEADERS
from structlin.runtime.kernels.program import Header, Record, program, stages
from structlin.structures import Kronecker, LowRank, Sum, TensorTrain
from structlin.testing import assert_close

TRAIN = TensorTrain(rank=3, in_modes=(2, 3, 20, 4), out_modes=(4, 3, 2, 5))  # fewer FLOPs from its end
PAIR = Kronecker(terms=4, shape=((24, 32), (32, 24)))


def spec(structure, in_features, out_features):
    return structure.resolve(in_features, out_features).spec(in_features, out_features)


def test_a_kronecker_product_by_hand():
    found = spec(PAIR, 768, 768)
    ((left, right),) = links(found, few=True)
    assert (left.before, left.after) == (("i1", "i2"), ("o1", "t", "i2"))
    assert (right.before, right.after) == (("o1", "t", "i2"), ("o1", "o2"))
    assert left.run(found.equations[0]) == 24
    assert right.run(found.equations[0]) == 1
    flops = 2 * 24 * (4 * 24) * 32, 2 * 24 * 32 * (4 * 24)
    assert cost(found, few=True) == Cost(sum(flops), flops[0], 24 * 32 * (6 + 2), 4 * 32 * 24, 0)


def test_a_train_turns_its_input():
    found = spec(TRAIN, 480, 120)
    (chain,) = links(found, few=True)
    assert chain[0].before == ("i4", "i3", "i2", "i1")
    assert cost(found, few=True).moved == 480
    assert cost(found, few=False).moved == 0


def test_equations_share_the_layouts_of_input_and_output():
    found = spec(Sum(parts=(TRAIN, LowRank(rank=3))), 480, 120)
    for eq, chain in zip(found.equations, links(found, few=True), strict=True):
        assert chain[0].before == eq.inputs
        assert chain[-1].after == eq.outputs


@pytest.mark.parametrize("name", CASES)
def test_runs_are_those_of_the_tables(name):
    for in_features, out_features in ((33, 48), (64, 64), (96, 130)):
        for structure in CASES[name].at(in_features, out_features):
            for few in (True, False):
                for stage in stages(spec(structure, in_features, out_features), few):
                    x, v, o = stage.tables[:3]
                    for start in range(0, len(x), stage.shared):
                        run = range(stage.shared)
                        assert [x[start + k] - x[start] for k in run] == [*run]
                        assert [o[start + k] - o[start] for k in run] == [*run]
                        assert {v[start + k] for k in run} == {v[start]}


@pytest.mark.parametrize("structure", [TRAIN, PAIR, Sum(parts=(TRAIN, Kronecker(terms=2))), Sum(parts=(PAIR, PAIR))])
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_results(structure, tokens):
    sizes = (768, 768) if structure is PAIR or PAIR in getattr(structure, "parts", ()) else (480, 120)
    layer = build(structure, *sizes)
    x, slope = torch.randn(tokens, sizes[0], requires_grad=True), torch.randn(tokens, sizes[1])
    y, expected = chain_of(layer.spec)(x, layer.factors, layer.bias), dense(layer, x)
    assert_close(y, expected, "forward", 1e-5)
    for ours, theirs in zip(gradients(layer, y, x, slope), gradients(layer, expected, x, slope), strict=True):
        assert_close(ours, theirs, "backward", 1e-5)
    half, wide, x, same = low(layer, tokens, sizes[0])
    assert_close(chain_of(layer.spec)(x, half.factors, half.bias), dense(wide, same), "bfloat16", 2.0**-8)


def test_features_that_only_pad_are_zero():
    layer = build(TensorTrain(rank=3, in_modes=(2, 3, 20, 4), out_modes=(4, 3, 2, 5)), 470, 113)
    assert cost(layer.spec, few=True).moved
    for tokens in (1, 5):
        x = torch.randn(tokens, 470)
        assert_close(chain_of(layer.spec)(x, layer.factors, layer.bias), dense(layer, x), "padded", 1e-5)


def test_one_program_where_layouts_agree():
    same, other = spec(LowRank(rank=3), 16, 20), spec(TRAIN, 480, 120)
    assert program(same)[10] == 0
    assert 0 < program(other)[10] < len(program(other))


@pytest.mark.parametrize("part", [Header, Record])
def test_python_and_the_kernel_agree_on_the_integers_of_a_program(part):
    source = next(file.read_text() for file in HEADERS if file.name == "program.h")
    (names,) = re.findall(rf"struct {part.__name__} {{\s*int32_t ([^;]*);", source)
    assert tuple(re.split(r",\s*", names)) == part._fields
