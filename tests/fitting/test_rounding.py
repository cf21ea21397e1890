"""Factors as integers: formats, packing, balance, and rounding that makes up for its errors."""

import pytest
import torch
from cases import ONE, SMALL, naming

from structlin.equation.spec import Spec, equation
from structlin.equation.unfolding import application, unfoldings
from structlin.fitting.objective import InputGram
from structlin.fitting.rounding import _Pass, balanced, round_factors
from structlin.layers.linear import build
from structlin.runtime.contract import to_dense
from structlin.runtime.quantized import (
    Format,
    dequantize,
    fold,
    format_for,
    pack,
    stored_bytes,
    unfold,
    unpack,
)
from structlin.structures import Dense, LowRank

# Tied numbers stay as they are.
UNTIED = [(structure, *sizes) for structure, *sizes in SMALL if not structure.resolve(*sizes).spec(*sizes).tied]
NAMED = {name: structure for name, structure in ONE.items() if not structure.resolve(97, 60).spec(97, 60).tied}


def forms_of(spec, bits, group=32):
    return [
        format_for(bits, unfolding, group) if factor.learned else None
        for factor, unfolding in zip(spec.factors, unfoldings(spec), strict=True)
    ]


def restored(spec, factors, rounding):
    return [
        value if part is None else dequantize(part.codes, part.scale, part.form, unfolding)
        for value, part, unfolding in zip(factors, rounding.factors, unfoldings(spec), strict=True)
    ]


def gram(size):
    """Inputs of which a few directions carry nearly all."""
    rows = torch.randn(4 * size, size) @ torch.diag(torch.logspace(0, -2, size)) @ torch.randn(size, size)
    return InputGram.of(rows.T @ rows, 0.03)


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_packing_is_exact(columns):
    codes = torch.randint(-7, 8, (3, 5, columns), dtype=torch.int8)
    stored = pack(codes, Format(4, columns))
    assert (stored.dtype, stored.shape) == (torch.uint8, (3, 5, -(-columns // 2)))
    assert torch.equal(unpack(stored, Format(4, columns), columns), codes)


def test_every_factor_unfolds_to_a_matrix_and_back():
    for structure, in_features, out_features in UNTIED:
        with naming(structure, in_features, out_features):
            layer = build(structure, in_features, out_features)
            for factor, unfolding in zip(layer.factors, unfoldings(layer.spec), strict=True):
                matrix = unfold(factor, unfolding)
                assert matrix.shape == (unfolding.rows, unfolding.columns)
                assert torch.equal(fold(matrix, unfolding), factor)
                assert torch.equal(fold(matrix.expand(2, -1, -1), unfolding)[1], factor)


def test_rows_are_what_a_factor_gives_and_columns_what_it_sums():
    eq = equation("t o1 i1, t o2 i2 -> o1 o2 i1 i2", ("a", "b"), {"t": 3, "o1": 4, "i1": 5, "o2": 6, "i2": 7})
    first, second = unfoldings(Spec(35, 24, (eq,)))
    assert (first.rows, first.columns, second.rows, second.columns) == (12, 5, 6, 21)  # a comes first


def test_bytes_are_those_of_codes_and_scales():
    (matrix,) = unfoldings(Dense().spec(300, 10))
    assert stored_bytes(Format(4, 128), matrix, 2) == 10 * 150 + 10 * 3 * 2
    assert stored_bytes(Format(8, 300), matrix, 4) == 10 * 300 + 10 * 4


# Rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_every_structure_is_restored_within_half_a_scale(bits):
    """Plain rounding, entry by entry: of the balanced factors, whose product is that of the factors."""
    for structure, in_features, out_features in UNTIED:
        with naming(structure, in_features, out_features):
            layer = build(structure, in_features, out_features, dtype=torch.float64)
            spec, factors = layer.spec, [factor.detach() for factor in layer.factors]
            even = [factor for eq, part in spec.split(factors) for factor in balanced(eq, part, even=True)]
            torch.testing.assert_close(to_dense(spec, even), to_dense(spec, factors), rtol=1e-9, atol=1e-9)
            dtypes = [torch.float64] * len(factors)
            found = _Pass(spec, factors, forms_of(spec, bits), dtypes, compensates=False, even=True).run(
                torch.eye(in_features, dtype=torch.float64)
            )
            for part, value, back, unfolding in zip(
                found.factors, even, restored(spec, factors, found), unfoldings(spec), strict=True
            ):
                if part is not None:
                    scale = dequantize(pack(torch.ones(unfolding.rows, unfolding.columns), part.form), part.scale,
                                       part.form, unfolding)  # fmt: skip
                    assert ((back - value).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_result_is_never_worse_than_plain_rounding_in_its_own_norm(bits, weighed):
    for name, structure in NAMED.items():
        with naming(name):
            layer = build(structure, 97, 60)
            spec, factors = layer.spec, [factor.detach() for factor in layer.factors]
            metric = gram(97) if weighed else None
            rows = torch.eye(97) if metric is None else metric.root
            forms, dtypes = forms_of(spec, bits), [torch.float32] * len(factors)
            plain = _Pass(spec, factors, forms, dtypes, compensates=False, even=True).run(rows)
            found = round_factors(spec, factors, forms, metric)
            assert found.error <= plain.error
            exact = rows @ to_dense(spec, factors).T
            given = rows @ to_dense(spec, restored(spec, factors, found)).T
            error = torch.linalg.vector_norm(given - exact) / torch.linalg.vector_norm(exact)
            assert found.error == pytest.approx(error.item(), rel=1e-2, abs=1e-6)


def test_compensation_halves_the_error_of_int4_where_inputs_are_correlated():
    layer = build(LowRank(rank=32), 128, 128)
    factors = [factor.detach() for factor in layer.factors]
    found = [
        _Pass(layer.spec, factors, forms_of(layer.spec, 4), [torch.float32] * 2, compensates=flag, even=True)
        .run(gram(128).root).error
        for flag in (True, False)
    ]  # fmt: skip
    assert found[0] < 0.6 * found[1]


def test_balance_saves_a_bond_of_unequal_scales():
    """One column of the left factor is 1000 times the others, and its row of the right one as much smaller."""
    layer = build(LowRank(rank=16), 64, 64)
    left, right = (factor.detach().clone() for factor in layer.factors)
    left[:, 3] *= 1000
    right[3] /= 1000
    spec, forms = layer.spec, forms_of(layer.spec, 8)
    eq = spec.equations[0]
    with torch.no_grad():
        given = [unfold(value, u) for value, u in zip((left, right), unfoldings(spec), strict=True)]
        scales = [matrix.abs().amax(1, keepdim=True) / 127 for matrix in given]
        unbalanced = [(m / s).round() * s for m, s in zip(given, scales, strict=True)]
    exact = to_dense(spec, [left, right])

    def error(pair):
        return (torch.linalg.vector_norm(to_dense(spec, pair) - exact) / torch.linalg.vector_norm(exact)).item()

    found = round_factors(spec, [left, right], forms)
    assert error(restored(spec, [left, right], found)) < 0.02 * error(unbalanced)
    even = balanced(eq, [left, right], even=True)
    torch.testing.assert_close(even[0].abs().amax(0), even[1].abs().amax(1))


def test_a_factor_without_a_format_stays():
    layer = build(LowRank(rank=4), 16, 16)
    factors = [factor.detach() for factor in layer.factors]
    right = unfoldings(layer.spec)[1]
    found = round_factors(layer.spec, factors, [None, format_for(8, right, 32)])
    assert found.factors[0] is None
    assert found.factors[1] is not None
    assert application(layer.spec.equations[0])[0].factor == 1


def test_zeros_and_one_column_round_to_themselves():
    spec = Dense().spec(1, 3)
    weight = torch.tensor([[0.0], [2.0], [-2.0]])
    found = round_factors(spec, [weight], forms_of(spec, 8))
    torch.testing.assert_close(restored(spec, [weight], found)[0], weight, rtol=1e-5, atol=0)
    assert round_factors(spec, [torch.zeros(3, 1)], forms_of(spec, 4)).error == 0
