"""Learning rates by factor."""

from __future__ import annotations

import math

import pytest
import torch
from test_layer import MAKERS
from torch import nn

from structlin import CirculantLinear, LowRankLinear, TTLinear, param_groups
from structlin.testing import assert_close


def rates(model: nn.Module, **options: object) -> dict[str, float]:
    """The learning rate of each parameter by its name."""
    by_id = {id(p): group["lr"] for group in param_groups(model, 1e-3, **options) for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


def step_of(model: nn.Linear, direction: torch.Tensor, groups: list[dict]) -> float:
    """The change of the dense matrix in one step of Adam along a direction, in spectral norm."""
    before = model.weight.detach().clone()
    optimizer = torch.optim.Adam(groups)
    (model.weight * direction).sum().backward()
    optimizer.step()
    return torch.linalg.matrix_norm(model.weight.detach() - before, 2)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_moves_the_matrix_as_far_as_a_dense_one(kind):
    """The law: with the rates, a step along a rank-one direction is as large, in spectral norm, as a dense one's."""
    torch.manual_seed(0)
    direction = torch.randn(64, 1) @ torch.randn(1, 48)
    dense = nn.Linear(48, 64, bias=False)
    expected = step_of(dense, direction, [{"params": dense.parameters(), "lr": 1e-4}])
    layer = MAKERS[kind](48, 64, False)
    found = step_of(layer, direction, param_groups(layer, 1e-4))
    # A Toeplitz matrix of the direction's signs has no rank of one: its norm is that of a random one.
    assert (0.2 if kind == "toeplitz" else 0.3) < found / expected < 1.1


def test_rates_of_a_low_rank_layer_are_those_of_the_formula():
    layer = LowRankLinear(256, 64, rank=4)
    rms = math.sqrt(1 / (3 * 256))
    rms_f = math.sqrt(rms / math.sqrt(4))  # W = left right: rms = rms_f^2 sqrt(rank)
    # sqrt(in out) / (N sqrt(in_f out_f) |other|): for left |right| = rms_f sqrt(256), for right |left| = rms_f sqrt(64)
    expected = 1e-3 * math.sqrt(256 * 64) / (2 * math.sqrt(4 * 64) * rms_f * math.sqrt(256))
    assert expected == pytest.approx(1e-3 * math.sqrt(256 * 64) / (2 * math.sqrt(4 * 256) * rms_f * math.sqrt(64)))
    assert rates(layer) == pytest.approx({"left": expected, "right": expected, "bias": 1e-3})


@pytest.mark.parametrize("lr", [1e-3, 1e-1, 10.0])
def test_no_step_is_larger_than_the_factor_that_it_changes(lr):
    torch.manual_seed(0)
    layer = TTLinear(256, 1024, rank=4, in_modes=(8, 8, 4), out_modes=(32, 8, 4))
    sides = {"core_0": (32, 32), "core_1": (32, 32), "core_2": (4, 16)}  # what a core sums over, and what it makes
    by_id = {id(p): group["lr"] for group in param_groups(layer, lr) for p in group["params"]}
    for name, (summed, new) in sides.items():
        core = getattr(layer, name)
        norm = core.detach().square().mean().sqrt().item() * math.sqrt(max(summed, new))
        step = by_id[id(core)] * math.sqrt(summed * new)
        assert step == pytest.approx(norm, rel=0.05) if lr > 0.05 else step < norm / 5, name
    # A single factor moves as a dense weight does at every rate.
    circulant, slow = (param_groups(CirculantLinear(64, 64, bias=False), rate)[0]["lr"] for rate in (lr, 1e-6))
    assert circulant == pytest.approx(slow * lr / 1e-6)


def test_the_width_rule_divides_matrices_only():
    layers = LowRankLinear(128, 32, rank=4), CirculantLinear(128, 32)  # the values of a circulant are a vector
    model = nn.Sequential(nn.Linear(128, 32), nn.LayerNorm(32), *layers)
    plain, narrow = rates(model), rates(model, base_width=32)
    for name in plain:
        expected = 1 if "bias" in name or name.startswith("1.") else 1 / 4
        assert narrow[name] == pytest.approx(plain[name] * expected), name


@pytest.mark.parametrize(("lr", "decay"), [(1e-2, 0.1), (1.0, 1e-3)])  # the second with the largest steps
@pytest.mark.parametrize("layer", [LowRankLinear(64, 64, rank=4), CirculantLinear(64, 64)], ids=["product", "vector"])
def test_decay_of_a_product_is_that_of_a_dense_weight(lr, decay, layer):
    groups = param_groups(layer, lr, weight_decay=decay)
    before = layer.to_dense().detach().clone()
    optimizer = torch.optim.AdamW(groups)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_close(layer.to_dense(), before * (1 - 1e-3), "product", 1e-6)
    assert {group["weight_decay"] for group in groups if layer.bias in set(group["params"])} == {0.0}


def test_groups_hold_each_parameter_once_and_no_frozen_one():
    layer = LowRankLinear(16, 16, rank=2)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    model = nn.ModuleDict({"one": layer, "again": layer, "frozen": frozen, "free": nn.Linear(4, 4)})
    held = [id(p) for group in param_groups(model, 1e-3) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(param_groups(model, 1e-3))


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1e-3, "base_width": 0}])
def test_rates_and_widths_are_positive(options):
    with pytest.raises(ValueError, match="must be positive"):
        param_groups(nn.Linear(2, 2), **options)
