"""The native kernel runs integer factors as plain torch runs the factors that they stand for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CASES, switch_on
from rounded import rounded

from structlin import LowRankLinear, quantize_
from structlin.layers.linear import build
from structlin.runtime.kernels import QuantizedChain, native, wheel
from structlin.runtime.quantized import Format
from structlin.structures import PHM, Blast, Dense, Kronecker, LowRank, Monarch
from structlin.testing import assert_close

SIZES = [(16, 20), (33, 48), (64, 64), (17, 5), (1, 7), (96, 130)]
TIED = {"circulant", "toeplitz", "diagonal", "sparse"}  # are not quantised
FORMS = [(8, 128, False), (8, 32, True), (8, 5, True), (4, 128, False), (4, 32, False), (4, 5, False)]
# Activations are rounded to 16 bits once per factor: by at most max |a| / 65024, here up to 2e-5 of their norm.
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def built(monkeypatch):
    switch_on(monkeypatch)


def case(structure=None, in_features=96, out_features=130, bits=8):
    structure = LowRank(rank=40) if structure is None else structure
    layer = build(structure, in_features, out_features)
    chain, codes, scales = rounded(layer, bits)
    return chain, codes, scales, layer.bias.detach()


def agrees(chain, codes, scales, bias, x, what="", tolerance=TOLERANCE):
    with torch.no_grad():
        assert chain.suits(x, codes, scales, bias)
        y = chain(x, codes, scales, bias)
        assert y.dtype is x.dtype
        assert_close(y, chain.plainly(x, codes, scales, bias), what, tolerance)


# Results -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "outliers"), FORMS)
@pytest.mark.parametrize("name", sorted(CASES.keys() - TIED))
def test_forward(name, bits, group, outliers):
    for in_features, out_features in SIZES:
        for structure in CASES[name].at(in_features, out_features):
            layer = build(structure, in_features, out_features)
            chain, codes, scales = rounded(layer, bits, group, outliers)
            for tokens in (0, 1, 3, 4, 9, 33, 130):
                agrees(chain, codes, scales, layer.bias.detach(), torch.randn(tokens, in_features), str(layer))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("structure", [LowRank(rank=290), Monarch(blocks=2, rank=70), Blast(blocks=4, rank=70)])
def test_long_rows(structure, bits):
    chain, codes, scales, bias = case(structure, 700, 516, bits)
    for tokens in (1, 40):
        agrees(chain, codes, scales, bias, torch.randn(tokens, 700))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("structure", [LowRank(rank=1024), Blast(blocks=4, rank=1024), Kronecker(terms=64)])
def test_large_layers_on_threads(structure, threads):
    chain, codes, scales, bias = case(structure, 2048, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agrees(chain, codes, scales, bias, torch.randn(1, 2048))
        agrees(chain, codes, scales, bias, torch.randn(300, 2048))
    finally:
        torch.set_num_threads(before)


def test_constant_factors_stay_floats():
    chain, codes, scales, bias = case(PHM(n=4, algebra="hamilton"), 64, 96)
    assert None in chain.forms
    agrees(chain, codes, scales, bias, torch.randn(2, 64))


@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16(tokens):
    chain, codes, scales, bias = case()
    x = torch.randn(tokens, 96).bfloat16()
    with torch.no_grad():
        y = chain(x, codes, scales, bias.bfloat16())
        exact = chain.plainly(x.float(), codes, scales, bias.bfloat16().float())
    assert_close(y.float(), exact, "bfloat16", 2.0**-8)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])  # of NaNs; some round up to 2^31
def test_scales_that_are_not_numbers_stay_so_in_bfloat16(tokens, pattern):
    chain, codes, scales, _ = case()
    for scale in scales:
        scale.view(torch.int32).fill_(pattern)
    with torch.no_grad():
        assert chain(torch.randn(tokens, 96).bfloat16(), codes, scales, None).isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_leading_dimensions_and_strides(bits):
    chain, codes, scales, bias = case(bits=bits)
    for x in (torch.randn(96), torch.randn(2, 3, 96), torch.randn(5, 192)[:, ::2], torch.randn(1, 96).expand(4, 96)):
        agrees(chain, codes, scales, bias, x)
        agrees(chain, codes, scales, None, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 40])
def test_inputs_that_are_not_finite_stay_visible(tokens, value):
    chain, codes, scales, bias = case()
    x = torch.randn(tokens, 96)
    x[0, 5] = value
    with torch.no_grad():
        y = chain(x, codes, scales, bias)
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-37, 1e30])
def test_inputs_of_any_size(scale):
    chain, codes, scales, _ = case()
    x = scale * torch.randn(1, 96)
    with torch.no_grad():
        y, exact = chain(x, codes, scales, None), chain.plainly(x, codes, scales, None)
    assert (y - exact).norm() <= max(TOLERANCE * exact.norm(), 1e-36)


def test_one_large_activation_costs_little():
    """Rounding is relative to the largest: with n columns at most sqrt(n) / 65024 of the norm."""
    chain, codes, scales, bias = case(LowRank(rank=64), 1024, 256)
    x = torch.randn(1, 1024)
    x[0, 7] = 1e4
    agrees(chain, codes, scales, bias, x, tolerance=1024**0.5 / 65024)


# Who may call it -----------------------------------------------------------------------------------------------------


def test_factors_beyond_int32_run_otherwise():
    x, scale = torch.randn(1, 8192), torch.ones(1, 1)
    for rows, runs in ((2**18 - 1, True), (2**18, False)):  # 2^31 entries have no offsets
        chain = QuantizedChain(Dense().spec(8192, rows), (Format(bits=8, columns=8192, rows=1),))
        codes = torch.empty(1, dtype=torch.int8).expand(rows, 8192)
        assert chain.suits(x, [codes], [scale], None) == runs


def test_what_suits():
    chain, codes, scales, bias = case()
    x = torch.randn(2, 96)
    assert not chain.suits(x.double(), codes, scales, bias)
    assert not chain.suits(x.half(), codes, scales, bias.half())
    assert not chain.suits(x.bfloat16(), codes, scales, bias)
    assert not chain.suits(x.requires_grad_(), codes, scales, bias)
    with torch.no_grad():
        assert chain.suits(x, codes, scales, bias)


def test_no_kernel(monkeypatch):
    chain, codes, scales, bias = case()
    monkeypatch.setattr("structlin.runtime.kernels.native._State.usable", False)
    assert not chain.suits(torch.randn(2, 96), codes, scales, bias)


def test_a_gradient_is_refused_by_the_kernel_and_given_by_torch():
    if native._State.calls is wheel:
        pytest.skip("torch's stable ABI does not say whether a tensor requires a gradient")
    chain, codes, scales, bias = case()
    x = torch.randn(2, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"quantized_chain has no gradient; call it under torch\.no_grad"):
        chain(x, codes, scales, bias)
    y = chain.plainly(x, codes, scales, bias)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_tensors_of_another_size_are_refused():
    chain, codes, scales, bias = case()
    x = torch.randn(2, 96)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="factor 0 has 5160 bytes and 130 scales, not 5200 and 130"):
            chain(x, [codes[0][:-1], codes[1]], scales, bias)
        with pytest.raises(RuntimeError, match="factor 1 has 3840 bytes and 39 scales, not 3840 and 40"):
            chain(x, codes, [scales[0], scales[1][:-1]], bias)
        with pytest.raises(RuntimeError, match="the input does not fit the program"):
            chain(x[:, :-1], codes, scales, bias)
        with pytest.raises(RuntimeError, match="bias has 129 entries of Float, not 130 of Float"):
            chain(x, codes, scales, bias[:-1])


def test_copies_share_their_tables():
    chain = case()[0]
    assert copy.deepcopy(chain) is chain
    assert pickle.loads(pickle.dumps(chain)) is chain


def test_compiled_code_calls_the_kernel():
    chain, codes, scales, bias = case()
    x = torch.randn(3, 96)

    def run(x):
        return chain(x, codes, scales, bias) if chain.suits(x, codes, scales, bias) else x.new_zeros(1)

    with torch.no_grad():
        y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(y, chain(x, codes, scales, bias))


def test_the_fake_kernel_knows_the_shape():
    chain, codes, scales, bias = case()
    program, forms = chain.tables
    x = torch.randn(2, 3, 96, device="meta")
    stored = [code.to("meta") for code in codes], [scale.to("meta") for scale in scales]
    y = torch.ops.structlin.quantized_chain(x, *stored, bias.to("meta"), program.to("meta"), forms.to("meta"), 130)
    assert y.shape == (2, 3, 130)


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_layer_runs_by_the_kernel_where_no_gradient_is_asked_for(to, monkeypatch):
    layer = LowRankLinear(96, 130, rank=40)
    quantize_(layer, to)
    x = torch.randn(3, 96)
    plainly = layer(x).detach()  # its bias asks for a gradient
    seen = []
    monkeypatch.setattr(QuantizedChain, "__call__", lambda self, *given: seen.append(given) or plainly)
    assert layer(x) is not plainly
    with torch.no_grad():
        assert layer(x) is plainly
    monkeypatch.undo()
    with torch.no_grad():
        assert_close(layer(x), plainly, to, TOLERANCE)
    assert len(seen) == 1
