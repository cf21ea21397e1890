"""Convolutions as linear maps of patches, or of the channels, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ONE
from torch import nn

from structlin import LowRankLinear, StructuredLinear, freeze_, unfreeze_
from structlin.layers.conv import CONVS, StructuredConv
from structlin.runtime import execution
from structlin.structures import Circulant
from structlin.testing import assert_close

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "both": {"stride": 3, "padding": 1},
    "same": {"padding": "same"},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
}
KERNELS = {"one tap": (1, 1, 1), "three": (3, 3, 3), "mixed": (2, 1, 3)}
every_conv = pytest.mark.parametrize("conv_class", CONVS, ids=lambda c: c.__name__)


def dims_of(conv):
    return len(conv.kernel_size)


def sample(conv, batch=(2,)):
    return torch.randn(*batch, conv.in_channels, *(7, 6, 8)[: dims_of(conv)], dtype=torch.float64)


def shape_of(conv_class, kernel):
    return kernel[: CONVS.index(conv_class) + 1]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@every_conv
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", [(2,), (), (0,)], ids=str)
def test_outputs_and_gradients_are_those_of_the_convolution(conv_class, kernel, options, batch):
    conv = conv_class(7, 9, shape_of(conv_class, kernel), dtype=torch.float64, **options)
    opened = StructuredConv.from_conv(conv)
    x = sample(conv, batch)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = opened(inputs[0]), conv(inputs[1])
    assert_close(found, expected, "output")
    assert found.is_contiguous()
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, "gradient of the input")
    assert_close(opened.linear.weight.grad, conv.weight.grad.flatten(1), "gradient of the weight")


@every_conv
@pytest.mark.parametrize("name", ONE)
def test_structured_leaves(conv_class, name):
    conv = conv_class(12, 20, 1, stride=2, padding=1)
    opened = StructuredConv.from_conv(conv)
    opened.linear = StructuredLinear.from_linear(opened.linear, structure=ONE[name], refine=0)
    merged = opened.to_conv(conv)
    x = sample(conv).float()
    assert_close(opened(x), merged(x), "output")
    assert_close(opened.weight, merged.weight, "weight")
    assert merged.bias is not conv.bias
    assert torch.equal(merged.bias, conv.bias)


@every_conv
@pytest.mark.parametrize("bias", [True, False])
def test_opening_shares_storage_and_merging_gives_it_back(conv_class, bias):
    conv = conv_class(7, 9, 1, bias=bias, stride=2).requires_grad_(False).eval()
    opened = StructuredConv.from_conv(conv)
    assert type(opened.linear) is nn.Linear
    assert not opened.training
    assert not opened.linear.weight.requires_grad
    assert opened.linear.weight.data_ptr() == conv.weight.data_ptr()
    assert opened.linear.bias is opened.bias is conv.bias
    merged = opened.to_conv(copy.deepcopy(conv).to("meta"))
    assert type(merged) is conv_class
    assert merged.weight.data_ptr() == conv.weight.data_ptr()
    assert merged.weight.shape == conv.weight.shape
    assert not merged.weight.requires_grad
    assert merged.bias is conv.bias
    assert not merged.training
    x = sample(conv).float()
    assert torch.equal(merged(x), conv(x))


@every_conv
def test_attributes_are_those_of_the_convolution(conv_class):
    conv = conv_class(7, 9, 1, stride=2, padding=1)
    opened = StructuredConv.from_conv(conv)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(opened, name) == getattr(conv, name), name
    assert torch.equal(opened.weight, conv.weight)
    assert f"7, 9, kernel_size={conv.kernel_size}, stride={conv.stride}, padding={conv.padding}" in repr(opened)


@pytest.mark.parametrize(("conv_class", "layout"), [
    (nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d),
])  # fmt: skip
def test_channels_last_is_kept(conv_class, layout):
    conv = conv_class(7, 9, 1).to(memory_format=layout)
    x = sample(conv).float().contiguous(memory_format=layout)
    opened = StructuredConv.from_conv(conv)
    assert opened.linear.weight.data_ptr() == conv.weight.data_ptr()
    assert opened(x).is_contiguous(memory_format=layout)
    assert_close(opened(x), conv(x), "output")


def test_meta():
    conv = nn.Conv2d(7, 9, 1, device="meta")
    opened = StructuredConv.from_conv(conv)
    assert opened(torch.empty(2, 7, 3, 4, device="meta")).shape == (2, 9, 3, 4)
    assert opened.to_conv(conv).weight.shape == (9, 7, 1, 1)


def test_other_convolutions_are_refused():
    with pytest.raises(ValueError, match=r"groups=2; only convolutions in one group"):
        StructuredConv.from_conv(nn.Conv1d(4, 4, 3, groups=2))
    for wrong in (nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 4)):
        with pytest.raises(TypeError, match=r"from_conv takes an nn\.Conv1d, nn\.Conv2d or nn\.Conv3d, not"):
            StructuredConv.from_conv(wrong)


def test_wrong_sizes_are_refused():
    opened = StructuredConv(LowRankLinear(7, 9, rank=2), 2)
    for shape in ((7, 3), (1, 2, 7, 3, 4), (2, 8, 3, 4), (7,)):
        with pytest.raises(ValueError, match=r"it must be \(batch, 7, h, w\) or \(7, h, w\)"):
            opened(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"stride=\(2,\), padding=\(0, 0\), dilation=\(1, 1\); give 2"):
        StructuredConv(LowRankLinear(7, 9, rank=2), 2, stride=(2,))
    with pytest.raises(ValueError, match=r"in_features=7 is no multiple of the 9 taps of \(3, 3\)"):
        StructuredConv(LowRankLinear(7, 9, rank=2), 2, kernel_size=(3, 3))


def test_a_frozen_convolution_without_a_chain_keeps_its_kernel(monkeypatch):
    layer = StructuredConv(StructuredLinear(36, 6, structure=Circulant(block=3)), 2, kernel_size=(3, 3), padding=(1, 1))
    x = torch.randn(2, 4, 7, 6)
    expected = layer(x)
    calls = []
    to_dense = execution.contract.to_dense
    monkeypatch.setattr(execution.contract, "to_dense", lambda *given: calls.append(1) or to_dense(*given))
    freeze_(layer.eval())
    with torch.no_grad():
        assert_close(layer(x), expected, "output")
        layer(x)
    assert len(calls) == 1
    layer(x).sum().backward()  # asks for gradients: built anew
    assert len(calls) == 2
    assert layer.linear.values.grad is not None
    unfreeze_(layer)
    with torch.no_grad():
        layer.linear.values.zero_()
        assert_close(layer(x), layer.linear.bias.view(6, 1, 1).expand(2, 6, 7, 6), "output of the new factors")
