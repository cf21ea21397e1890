"""Models with fused experts of every form are compressed, stored, loaded and merged back."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_forms import EXPERTS, FEATURES, TOYS, K, Squared, make
from torch import nn

import structlin
from structlin.adapters import adapter_of
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.experts import StructuredExperts
from structlin.testing import assert_close


class Mixture(nn.Module):
    """A router before experts, called as their form asks."""

    def __init__(self, experts: nn.Module, form: str) -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(FEATURES, EXPERTS)
        self.experts = experts

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        if self.form == "stacked":
            routed = self.experts((x * scores.T.unsqueeze(-1)).reshape(-1, FEATURES))
            return routed.view(EXPERTS, -1, FEATURES).sum(dim=0)
        weights, index = scores.topk(K)
        return self.experts(x.unsqueeze(0) if self.form == "2-D" else x, index, weights).view(x.shape)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("form", TOYS)
def test_a_mixture_is_compressed_stored_loaded_and_merged_back(form, calibrated, tmp_path):
    model = Mixture(make(form), form)
    kind, skeleton = type(model.experts), copy.deepcopy(model)
    calibration = [torch.randn(40, FEATURES) for _ in range(3)] if calibrated else None
    options = {"calibration": calibration, "skip_last": False, "rules": {"router": None}}
    report = structlin.compress_model(model, "lowrank", ratio=0.6, **options)
    leaves = {name: leaf for name, leaf in model.experts.named_children() if name in ("gate_up", "gate", "up", "down")}
    assert all(isinstance(leaf, StructuredExpertLinear) for leaf in leaves.values())
    compressed = {row.name for row in report.layers if row.structure}
    assert compressed == {f"experts.{name}" for name in leaves}
    x = torch.randn(7, FEATURES)
    y = model(x)
    loaded = structlin.load(skeleton, structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(x), y)
    for each in (loaded, model):
        dense = structlin.to_dense_(each)
        assert type(dense.experts) is kind
        assert_close(dense(x), y, "outputs", 1e-5)


def test_a_mixture_that_is_not_understood_stays_dense_with_a_reason():
    model = Mixture(Squared(), "packed")
    with pytest.warns(UserWarning, match=r"Squared \(experts that compute something else than act\(gate\) \* up"):
        structlin.compress_model(model, "lowrank", ratio=0.6, skip_last=False)
    assert type(model.experts) is Squared


def test_opened_experts_are_not_opened_again():
    assert adapter_of(StructuredExperts.from_experts(make("packed"))) is None


@pytest.mark.parametrize("mode", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixtral_generates_as_its_dense_twin_in_every_mode(mode):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    ids = torch.randint(64, (2, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, **options)
        twin = structlin.to_dense_(model)
        twin.set_experts_implementation(mode)
        assert_close(twin(ids).logits, logits, "logits", 1e-5)
        assert torch.equal(twin.generate(ids, **options), tokens)
