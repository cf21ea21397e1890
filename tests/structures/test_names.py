"""Names of structures: registered names, aliases, and sums of any of them."""

import pytest
import torch
from torch import nn

import structlin
from structlin import KaleidoscopeLinear, KMatrix
from structlin.equation.structure import registered, structure_class
from structlin.fitting.budget import COARSE, SLACK, within
from structlin.fitting.fit import fit
from structlin.structures import Kaleidoscope, LowRank, Monarch, Sum, TensorTrain, families, family, sum_of


@pytest.mark.parametrize("first", registered(sized=True))
def test_a_plus_b_is_the_sum_of_any_two_structures_within_the_budget(first):
    for second in registered(sized=True):
        found = within(family(f"{first}+{second}"), 64, 48, 0.95)
        names = {tuple(part.name for part in structure.parts) for structure in found}
        assert names == {(first, second)}
        assert max(structure.spec(64, 48).num_parameters for structure in found) <= (1 + SLACK) * 0.95 * 64 * 48


def test_a_sum_of_three_shares_the_budget():
    (found, *_) = within(family("lowrank+monarch+kronecker"), 96, 96, 0.5)
    first, *others = found.parts
    sizes = [part.spec(96, 96).num_parameters for part in others]
    assert max(sizes) <= 0.25 * 0.5 * 96 * 96  # an even share of the half that the first leaves
    assert (1 - COARSE) * 0.5 * 96 * 96 <= found.spec(96, 96).num_parameters <= 0.5 * 96 * 96
    assert first == LowRank(rank=(96 * 96 // 2 - sum(sizes)) // 192)


def test_names_are_read_with_spaces_and_aliases():
    assert family("lowrank") is LowRank
    assert family("kaleidoscope") is structure_class("kmatrix") is Kaleidoscope
    assert family("tensortrain") is TensorTrain
    assert family(" lowrank + kaleidoscope ") == sum_of(LowRank, Kaleidoscope) == families()["lowrank+kmatrix"]
    assert "kaleidoscope" not in registered()


def test_kmatrix_is_another_name_of_the_kaleidoscope_layer():
    assert KMatrix is KaleidoscopeLinear
    assert repr(KMatrix(8, 8)).startswith("KaleidoscopeLinear(in_features=8")


def test_families_are_the_sized_structures_and_the_sums_of_auto():
    assert families().keys() == registered(sized=True).keys() | {"lowrank+kmatrix", "lowrank+blast"}
    assert all(found.name == name for name, found in families().items())
    assert not {name for name in registered() if "+" in name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lowrnk", r"structure 'lowrnk' is unknown; use one of \['blast', .*'auto'; did you mean 'lowrank'\?"),
        ("lowrank+kalidoscope", r"structure 'kalidoscope' is unknown.*did you mean 'kaleidoscope'\?"),
        ("lowrank+", "structure '' is unknown"),
        ("xyz", r"structure 'xyz' is unknown.*'auto'$"),
        ("lowrank+auto", r"structure 'auto' is unknown.*'auto'$"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        family(name)


def test_a_sum_needs_two_families_with_sizes():
    with pytest.raises(ValueError, match=r"has fewer than two families; a sum needs at least two"):
        sum_of(LowRank)
    with pytest.raises(ValueError, match=r"a ratio finds no sizes; use 'a\+b', or give parts="):
        within(family("lowrank+sum"), 32, 32, 0.5)
    with pytest.raises(ValueError, match=r"no lowrank\+monarch structure of a 4 x 4 layer keeps 0.1"):
        within(family("lowrank+monarch"), 4, 4, 0.1)


def test_a_fit_chooses_between_sums_and_single_structures():
    torch.manual_seed(0)
    blocks = torch.block_diag(*torch.randn(4, 8, 8))
    weight = blocks + torch.outer(torch.randn(32), torch.randn(32))
    found = fit(weight, [LowRank, sum_of(LowRank, Monarch)], ratio=0.6, refine=20)
    assert isinstance(found.structure, Sum)
    assert found.error < fit(weight, LowRank, ratio=0.6).error


def test_any_sum_compresses_a_model_and_goes_through_files(tmp_path):
    torch.manual_seed(0)
    model, skeleton = (nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4)) for _ in range(2))
    plan = structlin.plan_compression(model, "lowrank + monarch", ratio=0.6, refine=5)
    assert structlin.CompressionPlan.from_json(plan.to_json()) == plan
    structlin.compress_model(model, plan)
    assert [part.name for part in model[0].structure.parts] == ["lowrank", "monarch"]
    structlin.save(model, tmp_path / "sum")
    x = torch.randn(3, 32)
    assert torch.equal(structlin.load(skeleton, tmp_path / "sum")(x), model(x))
