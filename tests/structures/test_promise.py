"""The promise: a structure is ONE file. A toy is defined here, and is fitted, trained, compressed and stored."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import structlin
from structlin import StructuredLinear
from structlin.equation import structure as registry
from structlin.equation.spec import Spec, equation
from structlin.equation.structure import Structure, register
from structlin.fitting.linalg import truncated_svd


@dataclass(frozen=True)
class ScaledPlusLowRank(Structure):
    """W = scale * ones + left @ right: the sum of two equations with modes of their own."""

    name: ClassVar[str] = "toy"
    rank: int

    def resolve(self, in_features, out_features, weight=None):
        if not 1 <= self.rank <= min(in_features, out_features):
            raise ValueError(f"rank={self.rank} is outside 1..{min(in_features, out_features)}")
        return self

    def spec(self, in_features, out_features):
        columns = equation("o a, a i -> o i", ("scale", "ones"), {"o": out_features, "a": 1, "i": in_features})
        sizes = {"o": out_features, "r": self.rank, "i": in_features}
        return Spec(in_features, out_features, (columns, equation("o r, r i -> o i", ("left", "right"), sizes)))

    def decompose(self, weight):
        scale = weight.mean(1, keepdim=True)
        left, right = truncated_svd(weight - scale, self.rank)
        return scale, torch.ones(1, weight.shape[1]), left, right

    @classmethod
    def candidates(cls, in_features, out_features, budget):
        rank = min(budget // (in_features + out_features) - 1, in_features, out_features)
        if rank >= 1:
            yield cls(rank=rank)


@pytest.fixture(autouse=True)
def registered_toy():
    register(ScaledPlusLowRank)
    yield
    del registry._REGISTRY["toy"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))


def test_layer_from_scratch():
    layer = StructuredLinear(24, 32, structure=ScaledPlusLowRank(rank=3))
    assert dict(layer.named_parameters()).keys() == {"scale", "ones", "left", "right", "bias"}
    assert layer.num_parameters == sum(f.numel() for f in layer.factors) == 24 + 32 + 3 * (24 + 32)
    x = torch.randn(5, 24)
    for order in ("auto", "forward", "backward", "materialise"):
        layer.use_plan(order)
        torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias)
    assert layer.to_dense().std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.1)
    assert "rank=3" in repr(layer)
    assert str(layer.plan(8)).count("products") == 2


def test_fit_is_exact_on_its_own_kind():
    layer = StructuredLinear(24, 32, structure=ScaledPlusLowRank(rank=2), dtype=torch.float64)
    with torch.no_grad():
        layer.ones.fill_(1)
        layer.right -= layer.right.mean(1, keepdim=True)  # rows orthogonal to the ones, as the fit assumes
    again = StructuredLinear.from_linear(layer.to_linear(), structure=ScaledPlusLowRank(rank=2))
    torch.testing.assert_close(again.to_dense(), layer.to_dense(), rtol=1e-10, atol=1e-10)


def test_refinement_comes_with_the_equation(model):
    plain = StructuredLinear.from_linear(model[0], structure=ScaledPlusLowRank, ratio=0.5)
    refined = StructuredLinear.from_linear(model[0], structure=ScaledPlusLowRank, ratio=0.5, refine=50)
    error = [(layer.weight - model[0].weight).norm().item() for layer in (plain, refined)]
    assert error[1] <= error[0]


def test_compression_and_storage(model, tmp_path):
    skeleton = copy.deepcopy(model)
    plan = structlin.plan_compression(model, "toy", ratio=0.6)
    assert structlin.CompressionPlan.from_json(plan.to_json()) == plan
    report = structlin.compress_model(model, plan)
    assert type(model[0]) is StructuredLinear
    assert report.layers[0].structure == f"toy(rank={model[0].structure.rank})"
    structlin.save(model, tmp_path / "toy")
    loaded = structlin.load(skeleton, tmp_path / "toy")
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), model(x))
    assert loaded[2].structure == model[2].structure
    structlin.to_dense_(loaded)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_registry_refuses_what_is_not_a_structure():
    with pytest.raises(ValueError, match="the name 'toy' belongs to ScaledPlusLowRank"):

        @register
        @dataclass(frozen=True)
        class Other(ScaledPlusLowRank):
            pass

    with pytest.raises(TypeError, match="Loose is not a frozen dataclass"):

        @register
        class Loose(Structure):
            name: ClassVar[str] = "loose"
