"""Configs of torchao on models with structured layers; runs where torchao is installed."""

import pytest
import torch
from torch import nn

import structlin

torchao = pytest.importorskip("torchao.quantization")

from structlin.integrations.torchao import quantize_  # noqa: E402 (needs torchao)

CONFIGS = [
    (torchao.Int8WeightOnlyConfig(), "int8"),
    (torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)), "int4"),
]


@pytest.mark.parametrize(("config", "to"), CONFIGS)
def test_factors_and_linears_are_both_reached(config, to):
    torch.manual_seed(0)
    model = nn.Sequential(structlin.LowRankLinear(64, 64, rank=32), nn.Linear(64, 64))
    x = torch.randn(5, 64)
    wanted = model(x)
    report = quantize_(model, config)
    assert [row.format for row in report.layers] == [to]
    assert type(model[1].weight.data) is not torch.Tensor
    error = torch.linalg.vector_norm(model(x) - wanted) / torch.linalg.vector_norm(wanted)
    assert 0 < error < {"int8": 0.03, "int4": 0.3}[to]


def test_a_config_that_matches_nothing_or_has_no_format_is_refused():
    with pytest.raises(ValueError, match=r"matches nothing: the model has no nn.Linear and no structured layer"):
        quantize_(nn.ReLU(), torchao.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="factors have no format for"):
        quantize_(structlin.LowRankLinear(8, 8, rank=2), torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TypeError, match=r"use structlin.integrations.torchao.quantize_"):
        structlin.quantize_(structlin.LowRankLinear(8, 8, rank=2), torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("bad", [1, 2])  # the factors, or a later nn.Linear
def test_an_error_leaves_the_model_as_it_was(bad, monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), structlin.LowRankLinear(64, 64, rank=32), nn.Linear(64, 64))
    weight, x = model[0].weight, torch.randn(5, 64)
    if bad == 1:
        next(model[1].parameters()).data[0, 0] = torch.nan
    else:
        quantize = structlin.integrations.torchao.torchao_quantize_

        def broken(model, config):
            quantize(model, config, filter_fn=lambda module, name: name == "0")
            raise RuntimeError("no kernel for layer 2")

        monkeypatch.setattr(structlin.integrations.torchao, "torchao_quantize_", broken)
    before, shown = model(x), str(model)
    with pytest.raises((ValueError, RuntimeError), match=r"layer '1': its factors hold NaN|no kernel for layer 2"):
        quantize_(model, torchao.Int8WeightOnlyConfig())
    assert model[0].weight is weight
    assert str(model) == shown
    assert torch.equal(model(x), before) or bad == 1
