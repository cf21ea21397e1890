"""nn.MultiheadAttention in a model: compressed, calibrated, stored, merged back, and left alone where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import structlin
from structlin import LowRankLinear, StructuredLinear
from structlin.layers.attention import StructuredMultiheadAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"block_epochs": 0}])
def test_a_transformer_is_compressed_stored_and_merged_back(options, training, tmp_path):
    model = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True).train(training)
    skeleton = copy.deepcopy(model)
    batches = [(torch.randn(8, 7, 32), torch.randn(8, 5, 32)) for _ in range(4)]
    report = structlin.compress_model(
        model, "lowrank", ratio=0.5, calibration=batches, skip_last=False, allocation="uniform", **options
    )
    attentions = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    rows = {row.name: row for row in report.layers}
    assert {name for name in rows if "attn" in name} == {f"{a}.{p}" for a in attentions for p in PROJECTIONS}
    assert all(row.structure is not None for row in rows.values())
    assert all(type(model.get_submodule(name)) is LowRankLinear for name in rows)
    assert sum(rows[name].output_error for name in rows) < sum(rows[name].error for name in rows)
    assert set(report.coverage.unreached) == {"LayerNorm"}
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    y = model(*batches[0])
    loaded = structlin.load(skeleton, structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(*batches[0]), y)
    merged = structlin.to_dense_(loaded)
    assert all(type(merged.get_submodule(name)) is nn.MultiheadAttention for name in attentions)
    assert all(module.training == training for module in merged.modules())
    with torch.no_grad():  # in eval on torch's fast path
        torch.testing.assert_close(merged(*batches[0]), y, rtol=1e-4, atol=1e-5)


def test_projections_of_one_tensor_share_its_gram():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
    grams = structlin.collect_statistics(model, [torch.randn(3, 5, 8)]).grams
    assert len({id(grams[f"layers.0.self_attn.{name}"]) for name in PROJECTIONS}) == 2
    assert grams["layers.0.self_attn.q_proj"] is grams["layers.0.self_attn.k_proj"]


class Cross(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x, y):
        return self.attention(x, y, y)[0]


OPTIONS = [{}, {"bias": False}, {"kdim": 24, "vdim": 24}, {"add_bias_kv": True, "add_zero_attn": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rules", [{}, {"*.v_proj": None}], ids=str)
def test_every_option_is_stored_and_merged_back(rules, options, tmp_path):
    model = Cross(**options)
    dense = copy.deepcopy(model)
    report = structlin.compress_model(model, "lowrank", ratio=0.5, rules=rules, skip_last=False)
    opened = model.attention
    assert type(opened) is StructuredMultiheadAttention
    kept = [name for name in PROJECTIONS if not isinstance(getattr(opened, name), StructuredLinear)]
    assert kept == (["v_proj"] if rules else [])
    if rules:  # the packed parameter is freed
        weight = opened.v_proj.weight
        assert weight.untyped_storage().nbytes() == 4 * weight.numel()
        assert torch.equal(
            weight, dense.attention.v_proj_weight if "vdim" in options else dense.attention.in_proj_weight[64:]
        )
    total = sum(p.numel() for p in dense.parameters())
    assert report.coverage.unreached == ({"MultiheadAttention": 64} if opened.bias_k is not None else {})
    assert report.coverage.total == report.parameters_before == total
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    x, y = torch.randn(2, 5, 32), torch.randn(2, 7, opened.kdim)
    expected = model(x, y)
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(x, y), expected)
    merged = structlin.to_dense_(loaded)
    assert list(merged.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(merged(x, y), expected, rtol=1e-4, atol=1e-5)


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Holding(nn.MultiheadAttention):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gate = nn.Linear(16, 16)


def pruned():
    return prune.random_unstructured(nn.MultiheadAttention(16, 2, batch_first=True), "in_proj_weight", 0.5)


def replaced():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj = LowRankLinear.from_linear(attention.out_proj, rank=2)
    return attention


REFUSED = {
    "Own": lambda: Own(16, 2, batch_first=True),
    "Holding (it holds modules besides out_proj)": lambda: Holding(16, 2, batch_first=True),
    "MultiheadAttention (its weight is computed by a hook (weight_norm, pruning); remove the hook first)": pruned,
    "MultiheadAttention (its out_proj is a LowRankLinear)": replaced,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_attention_that_must_stay_dense_is_left_alone(kind):
    model = nn.Sequential(nn.Linear(64, 64))
    model.add_module("attention", REFUSED[kind]())
    attention, x = model.attention, torch.randn(2, 5, 16)
    expected = attention(x, x, x)[0]
    report = structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    assert isinstance(model[0], LowRankLinear)
    assert model.attention is attention
    assert report.coverage.unreached[kind] == 3 * 16 * 16 + 3 * 16
    assert torch.equal(attention(x, x, x)[0], expected)
    if kind == "Own":
        assert "nn.MultiheadAttention reads the weight itself" in report.layers[1].reason
