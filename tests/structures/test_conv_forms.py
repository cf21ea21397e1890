"""Kernels by tensor train, CP and Tucker: the chains of small convolutions, fits, and whole models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structlin
from structlin import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    StructuredConv,
    StructuredLinear,
    TTConv1d,
    TTConv2d,
    TuckerConv1d,
    TuckerConv2d,
)
from structlin.runtime.contract import convolve
from structlin.structures import Blast, ConvKernel, Kronecker, LowRank, sum_of
from structlin.testing import assert_close

ONE_D, TWO_D = (TTConv1d, CPConv1d, TuckerConv1d), (TTConv2d, CPConv2d, TuckerConv2d)
OPTIONS = {
    "plain": {"kernel_size": 3}, "padded": {"kernel_size": 3, "padding": 1, "stride": 2},
    "same": {"kernel_size": 4, "padding": "same"}, "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False},
    "one tap": {"kernel_size": 1, "stride": 2, "padding": 1},
}  # fmt: skip
LONG = {"one axis": {"kernel_size": (1, 5), "stride": (2, 1), "padding": (1, 2)}, "uneven": {"kernel_size": (2, 3)}}
CASES = [(cls, o) for cls in ONE_D for o in OPTIONS.items()]
CASES += [(cls, o) for cls in TWO_D for o in (*OPTIONS.items(), *LONG.items())]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda c: getattr(c, "__name__", None) or c[0])
def test_a_chain_computes_the_convolution_with_its_kernel(cls, options):
    torch.manual_seed(0)
    layer = cls(8, 12, rank=3, dtype=torch.float64, **options[1])
    dense = layer.to_conv((nn.Conv1d if cls in ONE_D else nn.Conv2d)(8, 12, dtype=torch.float64, **options[1]))
    if options[0] != "one tap":
        assert convolve.small_convolutions(layer.linear.spec, layer.kernel_size) is not None
    for batch in ((2,), ()):
        inputs = [torch.randn(*batch, 8, *((9, 11)[: cls.dims]), dtype=torch.float64).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        found, expected = layer(inputs[0]), dense(inputs[1])
        assert_close(found, expected, "output")
        # A hook watches the map of patches: the same numbers by another way.
        with_patches = []
        handle = layer.linear.register_forward_hook(lambda module, args, y, seen=with_patches: seen.append(y))
        assert_close(layer(inputs[0]), expected, "by patches")
        handle.remove()
        assert len(with_patches) == 1
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip((found, expected), inputs, strict=True)]
        assert_close(*grads, "gradient of the input")


def test_gradients_of_the_factors_are_those_of_the_dense_kernel():
    for cls in TWO_D:
        layer = cls(6, 5, (3, 2), stride=2, padding=1, rank=2, dtype=torch.float64)
        x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
        kernel = layer.linear.to_dense().reshape(5, 6, 3, 2)
        expected = torch.autograd.grad(
            F.conv2d(x, kernel, layer.bias, 2, 1).square().sum(), list(layer.linear.parameters())
        )
        found = torch.autograd.grad(layer(x).square().sum(), list(layer.linear.parameters()))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, "gradient")


def test_other_structures_run_as_small_convolutions_where_they_can():
    conv = nn.Conv2d(8, 12, 3, padding=1)
    x = torch.randn(2, 8, 5, 5)
    for structure, ratio, chained in (
        (LowRank(rank=4), None, True), (LowRank(rank=12), None, False), (Kronecker(terms=2), None, False),
        (sum_of(LowRank, Blast), 0.5, False),
    ):  # fmt: skip
        layer = StructuredConv.from_conv(conv, structure=structure, ratio=ratio, refine=0)
        assert (convolve.small_convolutions(layer.linear.spec, (3, 3)) is not None) == chained
        assert_close(layer(x), layer.to_conv(conv)(x), str(structure))
    assert_close(StructuredConv.from_conv(conv, structure=LowRank(rank=12))(x), conv(x), "full rank")


# Fits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*ONE_D, *TWO_D])
def test_a_kernel_of_the_form_is_recovered(cls):
    torch.manual_seed(0)
    true = cls(8, 6, 3, rank=2, dtype=torch.float64, stride=2)
    conv = true.to_conv((nn.Conv1d if cls in ONE_D else nn.Conv2d)(8, 6, 3, stride=2, dtype=torch.float64))
    conv.requires_grad_(False).eval()
    # CP has no closed form, and its refinement is slow between terms that look alike.
    found = cls.from_conv(conv, rank=true.linear.structure.rank, refine=2000 if "CP" in cls.__name__ else None)
    assert type(found) is cls
    assert found.linear.structure == true.linear.structure
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert torch.equal(found.bias, conv.bias)
    error = torch.linalg.vector_norm(found.linear.to_dense() - conv.weight.flatten(1))
    assert error <= (1e-3 if "CP" in cls.__name__ else 1e-10) * torch.linalg.vector_norm(conv.weight)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("cls", [*ONE_D, *TWO_D])
def test_a_ratio_is_used_and_not_exceeded(cls, ratio):
    conv = (nn.Conv1d if cls in ONE_D else nn.Conv2d)(32, 48, 3)
    found = cls.from_conv(conv, ratio=ratio, refine=0)
    kept = found.linear.num_parameters / conv.weight.numel()
    assert 0.9 * ratio <= kept <= ratio * 1.01


def test_ranks_within_the_bounds_of_best_approximation():
    torch.manual_seed(0)
    tensor = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    conv = nn.Conv2d(8, 6, 3, dtype=torch.float64)
    conv.weight = nn.Parameter(tensor)

    def tails(matrix, rank):
        return torch.linalg.svdvals(matrix)[rank:].norm().item()

    found = TuckerConv2d.from_conv(conv, rank=(4, 5))
    cuts = tails(tensor.flatten(1), 4), tails(tensor.movedim(1, 0).flatten(1), 5)
    error = torch.linalg.vector_norm(found.linear.to_dense() - tensor.flatten(1)).item()
    assert max(cuts) - 1e-9 <= error <= math.hypot(*cuts) + 1e-9
    found = TTConv2d.from_conv(conv, rank=(4, 7, 5))
    order = tensor.movedim(1, -1)
    cuts = [tails(order.reshape(math.prod(order.shape[:k]), -1), r) for k, r in ((1, 4), (2, 7), (3, 5))]
    error = torch.linalg.vector_norm(found.linear.to_dense() - tensor.flatten(1)).item()
    assert max(cuts) - 1e-9 <= error <= math.hypot(*cuts) + 1e-9


@pytest.mark.parametrize("cls", TWO_D)
def test_compiles_and_exports_in_one_graph(cls):
    layer = cls(8, 6, 3, rank=2, padding=1).eval()
    x = torch.randn(2, 8, 5, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert_close(exported.module()(torch.cat([x, x, x])), layer(torch.cat([x, x, x])), "exported")


def test_errors_say_what_is_possible():
    with pytest.raises(ValueError, match="form='hosvd' is unknown"):
        StructuredLinear(18, 4, structure=ConvKernel("hosvd", (3, 3), 2))
    with pytest.raises(ValueError, match=r"kernel=\(0, 3\) must hold"):
        StructuredLinear(18, 4, structure=ConvKernel("tt", (0, 3), 2))
    with pytest.raises(ValueError, match="must give each of 2 bonds"):
        TuckerConv2d(4, 4, 3, rank=(1, 2, 3))
    with pytest.raises(ValueError, match=r"rank=\(4, 1\) has a rank above what its kernel can have, \(3, 1\)"):
        TuckerConv1d(4, 4, 3, rank=(4, 1))
    with pytest.raises(ValueError, match=r"rank=999 is outside"):
        CPConv2d(4, 4, 3, rank=999)
    with pytest.raises(ValueError, match="has one rank"):
        CPConv2d(4, 4, 3, rank=(2, 2))
    conv = nn.Conv2d(4, 4, 3)
    for settings in ({}, {"rank": 2, "ratio": 0.5}, {"structure": LowRank(rank=2)}):
        with pytest.raises(ValueError, match="give a rank or a ratio"):
            TTConv2d.from_conv(conv, **settings)
    with pytest.raises(TypeError, match=r"TTConv1d\.from_conv takes an nn\.Conv1d, not Conv2d"):
        TTConv1d.from_conv(conv, rank=2)
    with pytest.raises(TypeError, match=r"not Linear"):
        TTConv1d.from_conv(nn.Linear(4, 4), rank=2)
    with pytest.raises(ValueError, match="groups=2"):
        TTConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), rank=2)


# Models --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2)
        self.c, self.head = nn.Conv1d(24, 32, 5, padding=2), nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.c(x.flatten(2))).mean(-1))


@pytest.mark.parametrize("structure", ["auto", "tt", "cp", "tucker", "lowrank", "kronecker"])
def test_a_network_is_compressed_calibrated_stored_and_merged_back(structure, tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    dense = copy.deepcopy(model)
    data = [torch.randn(4, 3, 9, 9) for _ in range(4)]
    settings = {"refine": 10, "block_epochs": 1}
    report = structlin.compress_model(model, structure, ratio=0.5, calibration=data, progress=False, **settings)
    kinds = {row.name: row.structure for row in report.layers}
    assert kinds.keys() == {"a", "b", "c", "head"}
    assert isinstance(model.b, StructuredConv)
    assert isinstance(model.b.linear, StructuredLinear)
    if structure in ("tt", "cp", "tucker"):
        assert model.b.linear.structure.form == structure
        assert model.b.linear.structure.kernel == (3, 3)
        assert model.c.linear.structure.kernel == (5,)
    if structure != "kronecker":
        assert convolve.small_convolutions(model.b.linear.spec, (3, 3)) is not None
    assert report.ratio < 0.6
    y = model(data[0])
    loaded = structlin.load(copy.deepcopy(dense), structlin.save(model, tmp_path / "out"))
    assert torch.equal(loaded(data[0]), y)
    merged = structlin.to_dense_(model)
    assert type(merged.b) is nn.Conv2d
    assert merged.b.stride == (2, 2)
    torch.testing.assert_close(merged(data[0]), y, atol=1e-5, rtol=1e-4)


def test_patches_make_the_gram_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)).eval()
    data = [torch.randn(2, 3, 7, 7) for _ in range(3)]
    found = structlin.collect_statistics(model, data, dtype=torch.float64).grams["0"]
    rows = torch.cat([F.unfold(x.double(), 3, stride=2, padding=1).mT.reshape(-1, 27) for x in data])
    torch.testing.assert_close(found / found.trace(), (rows.mT @ rows) / rows.square().sum())


def test_a_convolution_by_any_linear_map():
    layer = StructuredConv(LowRankLinear(18, 6, rank=2), 2, kernel_size=(3, 3), padding=(1, 1))
    x = torch.randn(1, 2, 5, 5)
    expected = F.conv2d(x, layer.linear.to_dense().reshape(6, 2, 3, 3), layer.bias, padding=1)
    assert_close(layer(x), expected, "output")
