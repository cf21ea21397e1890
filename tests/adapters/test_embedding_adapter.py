"""A probe tells how embeddings scale their rows, to the last bit in every dtype, and on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("module", [Normed(50, 24), Positional(50, 24)], ids=lambda m: type(m).__name__)
def test_other_subclasses_stay(module):
    assert adapter_of(module) is None
