"""The DeLighT block and its group linear transformations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structlin import DeLighTBlock, GroupLinear, LearnedPermutation
from structlin.layers.delight import _dealt
from structlin.testing import assert_close


def test_groups_are_mapped_alone():
    torch.manual_seed(0)
    layer = GroupLinear(8, 12, 4)
    x = torch.randn(2, 3, 8)
    assert_close(layer(x), F.linear(x, torch.block_diag(*layer.weight), layer.bias), "output")
    assert layer.weight.numel() == 8 * 12 / 4


@pytest.mark.parametrize(
    ("layers", "groups", "widths"),
    [(4, [1, 2, 1, 1], [96, 128, 80, 32]), (8, [1, 2, 4, 4, 4, 2, 1, 1], [80, 96, 112, 128, 104, 80, 56, 32])],
)
def test_widths_and_groups_grow_and_shrink_as_in_the_paper(layers, groups, widths):
    block = DeLighTBlock(64, layers=layers, expansion=2.0, max_groups=4)
    assert [layer.groups for layer in block.transform.layers] == groups
    assert [layer.out_features for layer in block.transform.layers] == widths
    assert [layer.in_features for layer in block.transform.layers] == [64, *(64 + width for width in widths[:-1])]


@pytest.mark.parametrize("shuffle", ["fixed", "learned"])
def test_every_parameter_learns_and_later_positions_stay_unseen(shuffle):
    torch.manual_seed(0)
    block = DeLighTBlock(32, layers=6, shuffle=shuffle)
    x = torch.randn(2, 5, 32, requires_grad=True)
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    block.eval()
    changed = x.detach().clone()
    changed[:, 3:] += 1
    assert_close(block(changed)[:, :3], block(x)[:, :3], "earlier positions")
    assert (sum(isinstance(m, LearnedPermutation) for m in block.modules()) > 0) == (shuffle == "learned")


def test_groups_mix_from_layer_to_layer():
    """With the input taken out, an output of the second layer reads all groups of the first."""
    torch.manual_seed(0)
    transform = DeLighTBlock(32, layers=8, max_groups=4).transform
    third, fourth = transform.layers[2:4]  # both of 4 groups
    y = torch.randn(third.out_features, requires_grad=True)
    grouped = torch.cat([_dealt(y, 4), torch.zeros(4, 8)], -1).flatten(-2)
    (grad,) = torch.autograd.grad(fourth(grouped)[0], y)
    assert (grad.unflatten(0, (4, -1)) != 0).any(1).all()


@pytest.mark.parametrize(
    "arguments", [{"layers": 1}, {"expansion": 0.5}, {"max_groups": 3}, {"shuffle": "random"}, {"features": 30}]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=r"layers|max_groups|shuffle"):
        DeLighTBlock(**({"features": 32} | arguments))
