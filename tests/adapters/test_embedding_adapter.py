"""Embeddings in a model: compressed where a rule names them, stored, merged back; scaled ones are found by a probe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structlin
from structlin import LowRankLinear, StructuredEmbedding
from structlin.adapters import Origin, adapter_of
from structlin.adapters.adapter import shell_of


class Gemma(nn.Embedding):
    def __init__(self, rows, columns, padding_idx=None, embed_scale=1.0):
        super().__init__(rows, columns, padding_idx)
        self.scalar_embed_scale = embed_scale
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Bart(nn.Embedding):
    def __init__(self, rows, columns, padding_idx=None, embed_scale=1.0):
        super().__init__(rows, columns, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Positional(nn.Embedding):
    def forward(self, ids, offset):
        return super().forward(ids + offset)


SCALED = {"plain": nn.Embedding, "Gemma": Gemma, "Bart": Bart}
SCALE = 2048**0.5


def make(name, rows=50, columns=24):
    return SCALED[name](rows, columns, 49, **({} if name == "plain" else {"embed_scale": SCALE}))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_looks_up_the_same_and_closing_gives_the_form_back(name, dtype):
    module = make(name).to(dtype).eval()
    adapter, ids = adapter_of(module), torch.randint(50, (3, 7))
    opened = adapter.open(module)
    assert torch.equal(opened(ids), module(ids))
    assert opened.linear.weight is module.weight
    assert opened.padding_idx == 49
    back = Origin(adapter, shell_of(module)).close(opened)
    assert type(back) is type(module)
    assert back.weight is module.weight
    assert torch.equal(back(ids), module(ids))


@pytest.mark.parametrize("name", SCALED)
def test_a_module_on_meta_knows_its_scale(name):
    module = make(name)
    with torch.device("meta"):
        empty = make(name)
    adapter, ids = adapter_of(empty), torch.randint(50, (3, 7))
    opened = adapter.open(empty)
    opened.linear.weight = module.weight
    assert torch.equal(opened(ids), module(ids))
    assert torch.equal(Origin(adapter, shell_of(empty)).close(opened)(ids), module(ids))


@pytest.mark.parametrize(
    "module", [Shifted(50, 24), Normed(50, 24), Positional(50, 24)], ids=lambda m: type(m).__name__
)
def test_other_subclasses_stay(module):
    assert adapter_of(module) is None


@pytest.mark.parametrize(("options", "reason"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse")])
def test_reasons(options, reason):
    module = nn.Embedding(50, 24, **options)
    assert reason in adapter_of(module).reason(module)


@pytest.mark.parametrize("name", SCALED)
def test_a_rule_compresses_stores_and_merges_back(name, tmp_path):
    model = nn.Sequential(make(name, 200, 32), nn.Linear(32, 32))
    skeleton, dense = copy.deepcopy(model), copy.deepcopy(model)
    structlin.compress_model(dense, "lowrank", ratio=0.5, skip_last=False)
    assert type(dense[0]) is SCALED[name]  # without a rule it stays
    report = structlin.compress_model(model, "lowrank", ratio=0.5, rules={"0*": "lowrank"}, skip_last=False)
    assert type(model[0]) is StructuredEmbedding
    assert type(model[0].linear) is LowRankLinear
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    ids = torch.randint(200, (3, 7))
    y = model(ids)
    loaded = structlin.load(skeleton, structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(ids), y)
    merged = structlin.to_dense_(loaded)
    assert type(merged[0]) is SCALED[name]
    torch.testing.assert_close(merged(ids), y, rtol=1e-4, atol=1e-4)
