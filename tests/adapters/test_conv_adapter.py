"""Convolutions with kernel 1 in a model: compressed, calibrated, stored, merged back, and left alone otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import structlin
from structlin import LowRankLinear
from structlin.adapters import adapter_of
from structlin.layers.conv import CONVS, StructuredConv


@pytest.mark.parametrize("conv_class", CONVS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_is_compressed_stored_and_merged_back(conv_class, calibrated, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        conv_class(24, 32, 1, stride=2, padding=1), nn.Tanh(), conv_class(32, 24, 1, bias=False)
    ).eval()
    space = (5, 4, 6)[: len(model[0].kernel_size)]
    mix = torch.randn(24, 24) * torch.linspace(0.01, 1, 24)  # anisotropic inputs, so that the Gram matters
    batches = [torch.einsum("b...c,cd->bd...", torch.randn(4, *space, 24), mix.T) for _ in range(4)]
    skeleton = copy.deepcopy(model)
    report = structlin.compress_model(
        model, "lowrank", ratio=0.5, calibration=batches if calibrated else None, skip_last=False
    )
    assert [row.name for row in report.layers] == ["0", "2"]
    assert all(type(model[k]) is StructuredConv and type(model[k].linear) is LowRankLinear for k in (0, 2))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    if calibrated:
        assert report.layers[0].output_error < report.layers[0].error
    y = model(batches[0])
    loaded = structlin.load(skeleton, structlin.save(model, tmp_path / "stored"))
    assert torch.equal(loaded(batches[0]), y)
    merged = structlin.to_dense_(loaded)
    assert all(type(merged[k]) is conv_class and not merged[k].training for k in (0, 2))
    assert merged[2].bias is None
    torch.testing.assert_close(merged(batches[0]), y, rtol=1e-4, atol=1e-5)


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv1d(8, 8, 1, groups=2),
        nn.ConvTranspose1d(8, 8, 1),
        Twice(8, 8, 1),
        nn.LazyConv1d(8, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_convolutions_stay(module):
    assert adapter_of(module) is None


def test_a_computed_weight_is_a_reason():
    model = nn.Sequential(nn.Conv1d(24, 24, 1))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="nothing was compressed"):
        report = structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    assert "Conv1d (its weight is computed by a hook" in str(report.coverage)
