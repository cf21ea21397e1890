"""Convolutions with kernel 1 and tables of rows, compressed, stored and merged back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structlin
from structlin.adapters import adapter_of
from structlin.layers.conv import StructuredConv

INPUTS = {1: (2, 32, 9), 2: (2, 32, 5, 6), 3: (2, 32, 3, 4, 5)}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"bias": False}, {"padding": 1}])
def test_a_convolution_of_kernel_1_is_compressed_calibrated_stored_and_merged_back(dims, settings, tmp_path):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(32, 48, 1, **settings), nn.Tanh(), conv(48, 8, 1)).eval()
    dense = copy.deepcopy(model)
    data = [torch.randn(INPUTS[dims]) for _ in range(3)]
    report = structlin.compress_model(model, "lowrank", ratio=0.5, calibration=data)
    assert [row.name for row in report.layers if row.structure] == ["0"]
    assert report.layers[0].output_error < report.layers[0].error
    assert report.coverage.unreached == {}
    assert isinstance(model[0], StructuredConv)
    y = model(data[0])
    assert y.shape == dense(data[0]).shape
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "out"))
    assert torch.equal(loaded(data[0]), y)
    merged = structlin.to_dense_(model)
    assert type(merged[0]) is conv
    assert merged[0].stride == dense[0].stride
    torch.testing.assert_close(merged(data[0]), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("module", [nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 1)])
def test_other_convolutions_are_left_alone(module):
    assert adapter_of(module) is None


class Scaled(nn.Embedding):
    """As in Gemma: the scale is a buffer that is not stored, rounded to the dtype of the table."""

    def __init__(self, rows, columns, padding_idx=None, scale=1.0):
        super().__init__(rows, columns, padding_idx)
        self.scalar_embed_scale = scale
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


class Squared(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 640**0.5])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_tables_open_to_the_same_rows(dtype, scale, device):
    module = Scaled(50, 16, 0, scale).to(dtype)
    opened = adapter_of(module.to(device)).open(module)
    assert torch.tensor(opened.scale).to(dtype) == torch.tensor(scale).to(dtype)
    if device == "cpu":
        ids = torch.arange(50).reshape(5, 10)
        assert torch.equal(opened(ids), module(ids))


@pytest.mark.parametrize("cls", [Shifted, Squared])
def test_tables_that_do_more_are_left_alone(cls):
    assert adapter_of(cls(50, 16)) is None


@pytest.mark.parametrize("kind", [lambda: nn.Embedding(60, 32, 0), lambda: Scaled(60, 32, 0, 32**0.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_compressed_stored_and_merged_back(kind, tied, tmp_path):
    model = nn.ModuleDict({"embed": kind(), "head": nn.Linear(32, 60)})
    if tied:
        model["head"].weight = model["embed"].weight
    dense = copy.deepcopy(model)
    settings = {"tied": "replace", "skip_last": False} if tied else {"rules": {"embed": {"ratio": 0.5}}}
    report = structlin.compress_model(model, "lowrank", ratio=0.5, **settings)
    assert report.coverage.compressed >= 60 * 32
    ids = torch.tensor([[0, 3, 59]])
    y = model["embed"](ids)
    torch.testing.assert_close(y, model["embed"].weight[ids] * model["embed"].scale, atol=1e-5, rtol=1e-4)
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "out"))
    assert torch.equal(loaded["embed"](ids), y)
    merged = structlin.to_dense_(model)
    assert type(merged["embed"]) is type(dense["embed"])
    assert (merged["head"].weight is merged["embed"].weight) == tied
    torch.testing.assert_close(merged["embed"](ids), y, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:more than half of the parameters")
def test_tables_with_max_norm_or_sparse_gradients_say_why():
    for settings in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        model = nn.ModuleDict({"embed": nn.Embedding(60, 32, **settings), "head": nn.Linear(32, 32)})
        report = structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
        (kind,) = report.coverage.unreached
        assert next(iter(settings)) in kind
