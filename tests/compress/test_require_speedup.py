"""`require_speedup` keeps dense what is measured to be slower, and says so."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_forms import Packed
from torch import nn

from structlin import compress_model
from structlin.compress import fit_layers, speed
from structlin.compress.speed import time_ratio
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.expert_linear import ExpertLinear, StructuredExpertLinear
from structlin.layers.linear import StructuredLinear
from structlin.structures import Dense, LowRank

# Many models here are kept dense on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:nothing was compressed", "ignore:more than half of the parameters")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_slower_layers_stay_dense(model, monkeypatch, ratio):
    monkeypatch.setattr(speed, "time_ratio", lambda layer, dense, tokens: ratio if dense.in_features == 32 else 0.9)
    before = copy.deepcopy(model)
    report = compress_model(model, "lowrank", ratio=0.5, require_speedup=True)
    first, second, last = report.layers
    assert second.structure is not None
    assert second.speed == 0.9
    assert last.speed is None
    assert first.speed == max(ratio, 0.5)
    total = sum(parameter.numel() for parameter in before.parameters())
    assert report.coverage.total == total
    if ratio < 1:
        assert first.structure is not None
        assert not isinstance(model[0], nn.Linear)
    else:
        assert first.structure is None
        assert "takes 1.50 of the dense time" in first.reason
        assert first.parameters_after == first.parameters_before
        assert model[0].weight is not None
        assert torch.equal(model[0].weight, before[0].weight)
        assert report.coverage.compressed == before[2].weight.numel() + 48


def test_shared_weights_are_taken_back_together(monkeypatch):
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 4)})
    model["b"].weight = model["a"].weight
    monkeypatch.setattr(speed, "time_ratio", lambda layer, dense, tokens: 2.0)
    compress_model(model, LowRank(rank=4), skip_last=False, require_speedup=True)
    assert all(isinstance(module, nn.Linear) for module in model.values())


@pytest.mark.parametrize("slow", [(), ("structured",), ("structured", "dense")])
def test_mlps_with_fewer_units_are_timed_too(model, monkeypatch, slow):
    def ratio(layer, dense, tokens):
        time_ratio(layer, dense, tokens)  # runs on as many inputs as are left
        return 2.0 if ("dense" if layer.structure == Dense() else "structured") in slow else 0.5

    monkeypatch.setattr(speed, "time_ratio", ratio)
    monkeypatch.setattr(fit_layers, "_best", lambda options, part, patched: options[0])
    batches = list(torch.randn(6, 20, 32))
    report = compress_model(
        model, "auto", ratio=0.4, calibration=batches, refine=2, block_epochs=1, allocation="uniform",
        require_speedup=True,
    )  # fmt: skip
    rows = report.layers[:2]
    assert [row.speed for row in rows] == [2.0 if len(slow) == 2 else 0.5] * 2
    if len(slow) == 2:
        assert all("of the dense time" in row.reason for row in rows)
        assert all(isinstance(model[k], nn.Linear) for k in (0, 2))
    else:
        assert all(row.structure.startswith("dense") == (slow == ("structured",)) for row in rows)
    assert model(batches[0]).shape == (20, 8)


def test_layers_are_timed_frozen_and_left_as_they_were(model):
    report = compress_model(model, LowRank(rank=4))
    layer = report.model[0]
    frozen = []
    layer.register_forward_pre_hook(lambda module, args: frozen.append(module.frozen))
    time_ratio(layer, nn.Linear(32, 64), 16)
    assert set(frozen) == {True}
    assert layer.training
    assert not layer.frozen


def test_time_ratio_tells_fast_from_slow():
    dense = nn.Linear(512, 512).train()
    small, large = nn.Linear(512, 512, bias=False), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    small.forward = lambda x: x
    assert time_ratio(small, dense, 64) < 0.5
    assert time_ratio(large, dense, 64) > 2
    assert dense.training


def test_a_table_is_timed_by_lookups(monkeypatch):
    model, seen = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 8)), []

    def called(layer, ids):
        seen.append(ids)
        return layer._dense_rows(ids) if isinstance(layer.linear, nn.Linear) else layer._rows(ids, layer.linear)

    monkeypatch.setattr(StructuredEmbedding, "forward", called)
    monkeypatch.setattr(StructuredLinear, "forward", lambda layer, x: pytest.fail("a table is no matrix product"))
    monkeypatch.setattr(speed, "_seconds", lambda module, x, calls: module(x) is None or 1 + isinstance(
        module.linear, StructuredLinear
    ))  # fmt: skip
    report = compress_model(model, None, rules={"0": LowRank(rank=4)}, require_speedup=True)
    assert {(len(ids), ids.dtype) for ids in seen} == {(rows, torch.int64) for rows in speed.TOKENS}
    assert report.layers[0].speed == 2
    assert report.layers[0].reason == (
        "lowrank(rank=4) takes 2.00 of the dense time at 16 rows, and require_speedup was asked for"
    )
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize("slow", [False, True])
def test_experts_are_timed_one_of_each_map(monkeypatch, slow):
    model, seen = nn.Sequential(Packed()), []

    def seconds(call, x, calls):
        seen.append(call.func)
        assert call(x).shape == (len(x), call.func.out_features)
        return 1 + (slow == isinstance(call.func, StructuredExpertLinear))

    monkeypatch.setattr(speed, "_seconds", seconds)
    report = compress_model(model, "lowrank", ratio=0.5, skip_last=False, require_speedup=True)
    assert {type(module) for module in seen} == {ExpertLinear, StructuredExpertLinear}
    assert [row.speed for row in report.layers] == [2 if slow else 0.5] * 2
    assert all((row.structure is None) == slow for row in report.layers)
    if slow:
        assert "takes 2.00 of the dense time at 16 rows, and" in report.layers[0].reason
