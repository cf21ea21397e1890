"""Plans on the meta device, and models there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structlin.compress import compress_model, plan_compression


def model(device):
    with torch.device(device):
        return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 5))


def test_a_plan_of_sizes_needs_no_values():
    skeleton = model("meta")
    plan = plan_compression(skeleton, "lowrank", ratio=0.5)
    assert plan.entries == plan_compression(model("cpu"), "lowrank", ratio=0.5).entries
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    report = compress_model(model("cpu"), plan)
    assert report.ratio < 0.5


def test_layers_whose_sizes_need_values_stay_dense_in_a_plan():
    plan = plan_compression(model("meta"), "auto", ratio=0.5)
    assert {entry.reason for entry in plan.entries[:2]} == {
        "its sizes follow from its values, and it is on the meta device"
    }


def test_a_model_on_meta_is_not_compressed():
    skeleton = model("meta")
    with pytest.warns(UserWarning, match="nothing was compressed.*meta device and has no values"):
        report = compress_model(skeleton, "lowrank", ratio=0.5)
    assert not any(row.structure for row in report.layers)
