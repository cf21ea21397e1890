"""Bugs that other libraries of structured layers have had, one test each; the names say what went wrong there.

Further ones break a law that every structure obeys elsewhere: inputs of any shape and strides, low precision and
autocast (structures/test_laws.py), biases, copies and `load_state_dict(assign=True)` (test_layer.py).
"""

import math

import pytest
import torch
from torch import nn

import structlin
from structlin import (
    ButterflyLinear,
    KaleidoscopeLinear,
    KroneckerLinear,
    LowRankLinear,
    MonarchLinear,
    PHMLinear,
    ShapeshifterLinear,
    StructuredLinear,
    TTLinear,
)

LAYERS = {
    "lowrank": lambda i, o, **kw: LowRankLinear(i, o, rank=2, **kw),
    "kronecker": lambda i, o, **kw: KroneckerLinear(i, o, terms=2, **kw),
    "phm": lambda i, o, **kw: PHMLinear(i, o, n=4, **kw),
    "hamilton": lambda i, o, **kw: PHMLinear(i, o, n=4, algebra="hamilton", **kw),
    "shapeshifter": lambda i, o, **kw: ShapeshifterLinear(i, o, rank=2, **kw),
    "tt": lambda i, o, **kw: TTLinear(i, o, rank=3, **kw),
    "butterfly": lambda i, o, **kw: ButterflyLinear(i, o, radix=2, **kw),
    "kmatrix": KaleidoscopeLinear,
    "monarch": lambda i, o, **kw: MonarchLinear(i, o, blocks=4, **kw),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_tltorch_crash_on_empty_input(name):
    layer = LAYERS[name](16, 12)
    x = torch.empty(0, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 12)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


@pytest.mark.parametrize("size", [67, 127, 1021])
@pytest.mark.parametrize("name", ["kronecker", "shapeshifter", "tt", "butterfly"])
def test_silently_dense_on_primes(name, size):
    layer = LAYERS[name](size, size)
    assert layer.num_parameters < 0.4 * size * size
    x = torch.randn(3, size)
    assert layer(x).shape == (3, size)


def test_tltorch_30522_needs_two_million_parameters_at_rank_8():
    layer = TTLinear(384, 30522, rank=8, device="meta")
    assert layer.num_parameters < 25_000


@pytest.mark.parametrize("depth", [2, 4, 6, 10])
def test_tltorch_and_compacter_init_scale(depth):
    """Others: 0.006 to 2.5 times the standard deviation of nn.Linear."""
    size = 1024 if depth != 6 else 4096
    modes = {2: (32, 32), 4: (4, 8, 8, 4), 6: (4,) * 6, 10: (2,) * 10}[depth]
    for rank in (1, 4):
        layer = TTLinear(size, size, rank=rank, in_modes=modes, out_modes=modes, bias=False)
        with torch.no_grad():
            y = layer(torch.randn(2048, size))
        assert y.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_torch_butterfly_init_shrinks_with_depth(width):
    layer = KaleidoscopeLinear(256, 256, width=width, radix=2, bias=False)
    with torch.no_grad():
        y = layer(torch.randn(512, 256))
    assert y.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)


@every_layer
def test_blast_stale_dense_cache_after_load_state_dict(name):
    layer, other = LAYERS[name](16, 12).eval(), LAYERS[name](16, 12)
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x), layer.weight.clone()
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        torch.testing.assert_close(layer.weight, other.weight)
        assert not torch.equal(before[1], layer.weight)
        layer.get_parameter(layer.spec.factors[-1].name).mul_(2)
        torch.testing.assert_close(layer.weight, 2 * other.weight)


def test_torch_butterfly_is_silently_wrong_on_lazily_conjugated_input():
    layer = ButterflyLinear(16, 16, radix=2, dtype=torch.complex128)
    x = torch.randn(3, 16, dtype=torch.complex128)
    assert x.conj().is_conj()
    torch.testing.assert_close(layer(x.conj()), layer(x.conj().resolve_conj()))
    negative = x.conj().imag
    assert negative.is_neg()
    real = ButterflyLinear(16, 16, radix=2, dtype=torch.float64)
    torch.testing.assert_close(real(negative), real(negative.resolve_neg()))


def test_torch_butterfly_double_backward_is_silently_zero():
    layer = KaleidoscopeLinear(8, 8, dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.pow(2).sum(), list(layer.factors))
    assert all(g.abs().sum() > 0 for g in second)


@pytest.mark.parametrize("build", [
    lambda: KroneckerLinear(12, 12, terms=17, shape=((4, 4), (3, 3))), lambda: LowRankLinear(12, 8, rank=9),
    lambda: TTLinear(8, 8, rank=(5,), in_modes=(2, 4), out_modes=(2, 4)), lambda: MonarchLinear(8, 8, blocks=4, rank=3),
])  # fmt: skip
def test_kronecker_kd_and_tensornet_take_more_terms_than_there_are(build):
    with pytest.raises(ValueError, match=r"outside 1|maximum"):
        build()


def test_compacter_fails_with_its_own_defaults():
    assert PHMLinear(8, 8, n=4)(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("out_features", [8, 10, 13])
def test_phc_gnn_bias_is_partly_uninitialised(out_features, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: torch.full(*_shape(size), math.nan, **kw))
    assert torch.isfinite(PHMLinear(16, out_features, n=4).bias).all()


def _shape(size):
    return (size if isinstance(size[0], int) else tuple(size[0]),) if len(size) == 1 else (size,)


def test_tensorly_svd_fails_on_bad_weights_without_saying_where():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        LowRankLinear.from_linear(linear, rank=2)


@pytest.mark.filterwarnings("ignore:nothing was compressed")
def test_neuralops_swapped_layers_that_are_larger_than_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    report = structlin.compress_model(model, structlin.structures.LowRank(rank=12))
    assert type(model[0]) is nn.Linear
    assert "would keep 384 of 256 parameters" in report.layers[0].reason


def test_lora_merges_silently_wrong_into_a_subclass_of_linear():
    assert not issubclass(StructuredLinear, nn.Linear)
    layer = LowRankLinear(8, 8, rank=2)
    before = layer(torch.ones(8))
    layer.weight.data += 1  # goes to a temporary, as documented
    assert torch.equal(layer(torch.ones(8)), before)
    assert "weight" not in layer.state_dict()


def test_fsdp_warns_of_outputs_that_are_views():
    for make in LAYERS.values():
        for bias in (True, False):
            assert not make(17, 13, bias=bias)(torch.randn(2, 3, 17))._is_view()
