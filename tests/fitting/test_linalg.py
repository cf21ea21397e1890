"""Closed forms: optimal where an optimum is known, exact on their own kind."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin import ButterflyLinear, KaleidoscopeLinear, PHMLinear, StructuredLinear, TTLinear
from structlin.fitting import linalg, trains
from structlin.fitting.fit import fit
from structlin.structures import (
    PHM,
    Butterfly,
    Kaleidoscope,
    Kronecker,
    LowRank,
    Monarch,
    Shapeshifter,
    TensorTrain,
)
from structlin.structures.phm import HAMILTON

F64 = torch.float64


def tail(matrix, rank):
    """Norm of the singular values beyond `rank`, relative to all: the least error of that rank."""
    values = torch.linalg.svdvals(matrix.to(torch.complex128 if matrix.is_complex() else F64))
    return (values[rank:].norm() / values.norm()).item()


def weight(out_features, in_features, dtype=torch.float32):
    """A matrix with decaying singular values, as trained weights have."""
    left = torch.linalg.qr(torch.randn(out_features, min(out_features, in_features), dtype=F64))[0]
    right = torch.linalg.qr(torch.randn(in_features, min(out_features, in_features), dtype=F64))[0]
    values = torch.linspace(1, 0.05, left.shape[1], dtype=F64) ** 2
    return (left * values @ right.T).to(dtype)


# Optimality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40), (97, 97)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_low_rank_equals_the_tail(rows, columns, rank):
    w = weight(rows, columns)
    assert fit(w, LowRank(rank=rank)).error == pytest.approx(tail(w, rank), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [((4, 8), (10, 8)), ((10, 8), (4, 8)), ((2, 32), (20, 2)), ((1, 64), (40, 1))])
@pytest.mark.parametrize("terms", [1, 3])
def test_kronecker_equals_the_tail(shape, terms):
    w = weight(40, 64)
    expected = tail(linalg.rearranged(w, shape), terms)
    assert fit(w, Kronecker(terms=terms, shape=shape)).error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_phm_equals_the_tail(n):
    w = weight(40, 64)
    expected = tail(linalg.rearranged(w, ((n, n), (40 // n, 64 // n))), n)
    assert fit(w, PHM(n=n)).error == pytest.approx(expected, rel=1e-5)


def test_shapeshifter_equals_the_tail_in_both_orders():
    w = weight(144, 36)
    found = fit(w, Shapeshifter(rank=9, order="reshape"))
    assert found.error == pytest.approx(tail(w.reshape(72, 72), 9), rel=1e-5)
    assert fit(w.T, Shapeshifter(rank=9, order="reshape")).error == pytest.approx(
        tail(w.T.reshape(72, 72), 9), rel=1e-5
    )
    (o1, i1), (o2, i2) = ((12, 6), (12, 6))
    assert fit(w, Shapeshifter(rank=9)).error == pytest.approx(
        tail(linalg.rearranged(w, ((o1, i1), (o2, i2))), 9), rel=1e-5
    )
    square = weight(48, 48)
    assert fit(square, Shapeshifter(rank=5, order="reshape")).error == pytest.approx(tail(square, 5), rel=1e-5)


def test_monarch_is_the_best_of_every_block():
    w = weight(40, 64)
    blocks = w.reshape(4, 10, 4, 16).transpose(1, 2)
    total = sum((tail(blocks[p, q], 2) * blocks[p, q].double().norm()) ** 2 for p in range(4) for q in range(4))
    expected = (total**0.5 / w.double().norm()).item()
    assert fit(w, Monarch(blocks=4, rank=2)).error == pytest.approx(expected, rel=1e-5)
    layer = StructuredLinear.from_linear(_linear(w), structure=Monarch(blocks=4, rank=2))
    assert all(
        torch.linalg.matrix_rank(block, rtol=1e-4) == 2
        for block in layer.to_dense().detach().reshape(4, 10, 4, 16).transpose(1, 2).flatten(0, 1)
    )


def _linear(w):
    linear = torch.nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype)
    with torch.no_grad():
        linear.weight.copy_(w)
    return linear


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31), st.booleans())
@settings(max_examples=100, deadline=None)
def test_leading_is_a_singular_value_decomposition(rows, columns, seed, singular):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=F64)
    if singular:
        matrix[:, columns // 2 :] = 0
    left, values, right = linalg.leading(matrix)
    torch.testing.assert_close((left * values) @ right, matrix, rtol=1e-10, atol=1e-7)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-7, atol=1e-7)
    if not singular or rows <= columns:  # else vectors of zero singular values come from the larger side, and are 0
        torch.testing.assert_close(left.mT @ left, torch.eye(left.shape[1], dtype=F64), rtol=0, atol=1e-6)
    top = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (top >= 0).all()


def test_truncated_svd_of_a_batch_and_of_complex_matrices():
    batch = torch.randn(3, 2, 5, 7, dtype=torch.complex64)
    left, right = linalg.truncated_svd(batch, 5)
    torch.testing.assert_close((left @ right).to(torch.complex64), batch)
    with pytest.raises(ValueError, match=r"rank=6 is outside 1\.\.5 for a 5 x 7 matrix"):
        linalg.truncated_svd(batch, 6)


# Kronecker and quaternions -------------------------------------------------------------------------------------------


def test_kronecker_layer_is_a_sum_of_products():
    layer = StructuredLinear(12, 10, structure=Kronecker(terms=3, shape=((2, 4), (5, 3))), dtype=F64)
    expected = sum(torch.kron(a, b) for a, b in zip(layer.left, layer.right, strict=True))
    torch.testing.assert_close(layer.to_dense(), expected)
    assert fit(expected.detach(), layer.structure).error < 1e-12


def quaternion_product(p, q):
    a, b, c, d = p
    e, f, g, h = q
    return torch.stack([
        a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e,
    ])  # fmt: skip


def test_hamilton_is_quaternion_multiplication():
    layer = PHMLinear(4, 4, bias=False, algebra="hamilton", dtype=F64)
    x = torch.randn(4, dtype=F64)
    torch.testing.assert_close(layer(x), quaternion_product(layer.right[:, 0, 0], x))
    # A wide layer multiplies a matrix of quaternions with a vector of them.
    wide = PHMLinear(4 * 3, 4 * 2, bias=False, algebra="hamilton", dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    expected = quaternion_product(wide.right[:, :, :], x[:, None, :].expand(4, 2, 3)).sum(-1)
    torch.testing.assert_close(wide(x.flatten()).reshape(4, 2), expected)
    assert [name for name, _ in wide.named_parameters()] == ["right"]
    assert wide.num_parameters == 4 * 2 * 3


def test_hamilton_projection_is_orthogonal():
    w = torch.randn(24, 16, dtype=F64)
    layer = PHMLinear.from_linear(_linear(w), algebra="hamilton")
    residual = w - layer.to_dense().detach()
    torch.testing.assert_close(layer.left, torch.tensor(HAMILTON, dtype=F64))
    for _ in range(10):
        direction = sum(torch.kron(a, torch.randn(6, 4, dtype=F64)) for a in layer.left)
        assert abs((residual * direction).sum()) < 1e-10 * residual.norm() * direction.norm()


# Tensor train --------------------------------------------------------------------------------------------------------

MODES = {"out_modes": (3, 4, 2), "in_modes": (4, 2, 5)}


def unfoldings(w, out_modes, in_modes):
    tensor = trains.tt_matrix(w, out_modes, in_modes)
    for k in range(1, len(out_modes)):
        yield tensor.reshape(math.prod(tensor.shape[: 2 * k]), -1)


@pytest.mark.parametrize("ranks", [(1, 1), (5, 4), (12, 10), (12, 2)])
def test_tt_svd_is_within_the_square_root_of_the_best_tails(ranks):
    w = weight(24, 40)
    tails = [tail(unfolding, rank) for unfolding, rank in zip(unfoldings(w, **MODES), ranks, strict=True)]
    error = fit(w, TensorTrain(rank=ranks, **MODES)).error
    assert max(tails) * (1 - 1e-5) - 1e-6 <= error <= math.hypot(*tails) * (1 + 1e-5) + 1e-6
    assert error <= math.sqrt(2) * max(tails) * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("cores", [2, 3, 4, 5])
@pytest.mark.parametrize("tolerance", [0.5, 0.2, 1e-2, 1e-6, 0.0])
def test_tt_tolerance_is_guaranteed(cores, tolerance):
    out_modes, in_modes = (2, 3, 2, 2, 2)[:cores], (3, 2, 2, 2, 2)[:cores]
    w = weight(math.prod(out_modes), math.prod(in_modes), F64)
    found = trains.tt_svd(trains.tt_matrix(w, out_modes, in_modes), tolerance=tolerance, axes=2)
    layer = StructuredLinear.from_linear(
        _linear(w), structure=TensorTrain(tolerance=tolerance, out_modes=out_modes, in_modes=in_modes)
    )
    error = ((layer.to_dense() - w).norm() / w.norm()).item()
    assert error <= tolerance + 1e-10
    assert layer.structure.rank == tuple(core.shape[-1] for core in found[:-1])


def test_tt_svd_refuses_a_negative_tolerance():
    for call in (trains.tt_svd, lambda t, tolerance: trains.tt_round([t.reshape(1, 2, 2, 1)], tolerance=tolerance)):
        with pytest.raises(ValueError, match=r"tolerance=-0.1 is negative"):
            call(torch.ones(2, 2), tolerance=-0.1)
        with pytest.raises(ValueError, match="tolerance=nan is negative or NaN"):
            call(torch.ones(2, 2), tolerance=math.nan)


def cores_of(layer):
    first, *middle, last = (core.detach() for core in layer.factors)
    return [first[None], *middle, last[..., None]]


def test_rounding_undoes_a_sum():
    layer = TTLinear(40, 24, rank=(3, 4), **MODES, dtype=F64)
    cores = cores_of(layer)
    doubled = [torch.cat([cores[0]] * 2, 3)]
    block = torch.zeros(6, 4, 2, 8, dtype=F64)
    block[:3, :, :, :4] = block[3:, :, :, 4:] = cores[1]
    doubled += [block, torch.cat([cores[2]] * 2, 0)]
    rounded = trains.tt_round(doubled, tolerance=1e-12)
    assert [tuple(core.shape) for core in rounded] == [tuple(core.shape) for core in cores]
    again = TTLinear(40, 24, rank=(3, 4), **MODES, dtype=F64)
    again.fill([rounded[0][0], rounded[1], rounded[2][..., 0]], None)
    torch.testing.assert_close(again.to_dense(), 2 * layer.to_dense(), rtol=1e-12, atol=1e-12)


def test_layer_rounds_itself():
    layer = TTLinear(40, 24, rank=(8, 8), **MODES, dtype=F64).eval()
    layer.core_0.requires_grad_(False)
    smaller = layer.rounded(rank=4)
    best = fit(layer.to_dense().detach(), TensorTrain(rank=4, **MODES)).error
    error = ((smaller.to_dense() - layer.to_dense()).norm() / layer.to_dense().norm()).item()
    assert error <= math.sqrt(2) * best * (1 + 1e-9)
    assert smaller.structure.rank == (4, 4)
    assert torch.equal(smaller.bias, layer.bias)
    assert smaller.bias is not layer.bias
    assert not smaller.training
    assert smaller.core_1.dtype == F64
    same = layer.rounded(tolerance=1e-13)
    torch.testing.assert_close(same.to_dense(), layer.to_dense(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="rank=99 is outside"):
        layer.rounded(rank=99)


def test_kronecker_product_has_tt_ranks_one():
    w = torch.kron(torch.kron(torch.randn(3, 4), torch.randn(4, 2)), torch.randn(2, 5)).to(F64)
    found = trains.tt_svd(trains.tt_matrix(w, **MODES), tolerance=1e-6, axes=2)
    assert [core.shape[-1] for core in found] == [1, 1, 1]


# Butterflies ---------------------------------------------------------------------------------------------------------


def hadamard(n):
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def fourier_with_bit_reversal(n, dtype):
    k = torch.arange(n, dtype=F64)
    matrix = torch.exp(-2j * math.pi * torch.outer(k, k) / n) / math.sqrt(n)
    bits = n.bit_length() - 1
    order = torch.tensor([int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(n)])
    return matrix[:, order].to(dtype)


@pytest.mark.parametrize("n", [2, 16, 256, 1024])
def test_projection_recovers_hadamard(n):
    assert fit(hadamard(n), Butterfly(radix=2)).error < 1e-6
    assert fit(hadamard(n).double(), Butterfly(radix=2)).error < 1e-12


@pytest.mark.parametrize("n", [2, 16, 256, 1024])
def test_projection_recovers_fourier(n):
    assert fit(fourier_with_bit_reversal(n, torch.complex64), Butterfly(radix=2)).error < 1e-6
    assert fit(fourier_with_bit_reversal(n, torch.complex128), Butterfly(radix=2)).error < 1e-12


@pytest.mark.parametrize(
    ("out_modes", "in_modes"),
    [((2,) * 10, (2,) * 10), ((16, 24), (24, 16)), ((3, 5, 4), (2, 7, 6)), ((1, 4, 8), (4, 1, 2)), ((7,), (5,))],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12), (torch.complex64, 1e-6)])
def test_projection_recovers_random_butterflies(out_modes, in_modes, dtype, tolerance):
    structure = Butterfly(out_modes=out_modes, in_modes=in_modes)
    sizes = math.prod(in_modes), math.prod(out_modes)
    spec = structure.resolve(*sizes).spec(*sizes)
    wide = torch.complex128 if dtype.is_complex else F64
    layer = StructuredLinear(*sizes, structure=structure, dtype=wide)
    layer.fill([torch.randn(shape, dtype=wide) for shape in spec.shapes], None)
    assert fit(layer.to_dense().detach().to(dtype), structure).error < tolerance


def butterfly_dense(n, transposed):
    """A dense butterfly by Dao et al.: B = B_n ... B_2 with 2 x 2 blocks of diagonals; or its transpose."""
    dense = torch.eye(n, dtype=F64)
    k = 2
    while k <= n:
        factor = torch.block_diag(*[
            torch.cat([
                torch.cat([torch.diag(torch.randn(k // 2, dtype=F64)), torch.diag(torch.randn(k // 2, dtype=F64))], 1)
                for _ in range(2)
            ])
            for _ in range(n // k)
        ])  # fmt: skip
        dense = factor @ dense
        k *= 2
    return dense.T if transposed else dense


def test_first_stage_has_stride_one():
    dense = butterfly_dense(16, False)
    assert fit(dense, Butterfly(radix=2)).error < 1e-12
    assert fit(butterfly_dense(16, True), Butterfly(radix=2)).error > 0.1


def test_kmatrix_holds_butterfly_times_transposed_butterfly():
    """(B B*) in 2 k - 1 merged stages, each butterfly factor set into its stage."""
    n, k = 8, 3
    layer = KaleidoscopeLinear(n, n, radix=2, bias=False, dtype=F64)
    assert layer.structure.stages() == [0, 1, 2, 1, 0]
    star, plain = ([torch.randn(n // 2, 2, 2, dtype=F64) for _ in range(k)] for _ in range(2))
    # B* maps digits 0, 1, 2, B maps 2, 1, 0: the two in the middle are one product.
    stages = [star[0], star[1], plain[2] @ star[2], plain[1], plain[0]]
    layer.fill([stage.reshape(2, 2, 2, 2) for stage in stages], None)
    dense = torch.eye(n, dtype=F64)
    for digit, blocks in [(0, star[0]), (1, star[1]), (2, star[2]), (2, plain[2]), (1, plain[1]), (0, plain[0])]:
        dense = one_stage(blocks, digit, n) @ dense
    torch.testing.assert_close(layer.to_dense(), dense)


def one_stage(blocks, digit, n):
    """Dense n x n matrix of one radix-2 stage on a digit (0 = most significant): blocks indexed by the other digits."""
    dense = torch.zeros(n, n, dtype=F64)
    bits = n.bit_length() - 1
    for index, (new, old) in itertools.product(range(n // 2), itertools.product(range(2), repeat=2)):
        others = [index >> (bits - 2 - b) & 1 for b in range(bits - 1)]
        row, column = (int("".join(map(str, [*others[:digit], bit, *others[digit:]])), 2) for bit in (new, old))
        dense[row, column] = blocks[index, new, old]
    return dense


@pytest.mark.parametrize(("width", "expansion"), [(1, 1), (2, 1), (1, 2), (2, 3), (1.5, 2)])
def test_expansion_is_the_corner_of_a_larger_kmatrix(width, expansion):
    """S E S^T: the layer equals the top left corner of the larger K-matrix, whatever its other blocks hold."""
    n, modes = 12, (3, 4)
    small = KaleidoscopeLinear(
        n, n, width=width, expansion=expansion, in_modes=modes, out_modes=modes, bias=False, dtype=F64
    )
    inner = (expansion * 3, 4)
    large = KaleidoscopeLinear(
        expansion * n, expansion * n, width=width, in_modes=inner, out_modes=inner, bias=False, dtype=F64
    )
    assert len(small.factors) == len(large.factors) == 2 * width + 1
    padded = []
    for factor, target in zip(small.factors, large.factors, strict=True):
        full = torch.randn(target.shape, dtype=F64)  # what S drops may be anything
        full[tuple(slice(size) for size in factor.shape)] = factor.detach()
        padded.append(full)
    large.fill(padded, None)
    torch.testing.assert_close(small.to_dense(), large.to_dense()[:n, :n])


@pytest.mark.parametrize("width", [1, 1.5, 2, 4])
def test_stage_counts(width):
    assert len(KaleidoscopeLinear(64, 64, width=width).factors) == 2 * width + 1
    assert len(KaleidoscopeLinear(64, 64, width=width, radix=2).factors) == 10 * width + 1
    assert Kaleidoscope(width=width).resolve(64, 64).spec(64, 64).num_parameters == (2 * width + 1) * 64 * 8


def test_kmatrix_start_is_the_butterfly_projection():
    w = weight(24, 36)
    start = fit(w, Kaleidoscope(in_modes=(4, 9), out_modes=(4, 6)), refine=0)
    assert start.error <= 1
    butterfly = fit(w, Butterfly(in_modes=(4, 9), out_modes=(4, 6)))
    assert start.error == pytest.approx(butterfly.error, rel=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(24, 36), (36, 24), (30, 30)])
def test_half_a_power_adds_a_butterfly_on_the_larger_side(rows, columns):
    w = weight(rows, columns)
    half = Kaleidoscope(width=1.5).resolve(columns, rows)
    assert half.stages() == ([0, 1, 0, 1] if rows > columns else [1, 0, 1, 0])
    starts = [fit(w, replace(half, width=width), refine=0) for width in (1, 1.5, 2)]
    assert starts[0].spec.num_parameters < starts[1].spec.num_parameters < starts[2].spec.num_parameters
    assert starts[1].error == pytest.approx(starts[0].error, rel=1e-5)
    if rows != columns:
        assert fit(w.T, Kaleidoscope(width=1.5), refine=0).error == pytest.approx(starts[1].error, rel=1e-5)
    assert fit(w, half).error < fit(w, replace(half, width=1)).error


def test_whole_widths_are_integers():
    assert repr(Kaleidoscope(width=2.0).resolve(8, 8)) == repr(Kaleidoscope(width=2).resolve(8, 8))


def test_budgets_are_filled_by_half_powers():
    for stages, width in ((3, 1), (4, 1.5), (5, 2), (6, 2.5), (7, 3)):
        assert [found.width for found in Kaleidoscope.candidates(64, 64, stages * 64 * 8)] == [width]


def dense_stage(stage, digit, before, after):
    """Dense matrix of one stage of any radix: block diagonal over all digits but one."""
    matrix = torch.zeros(*after, *before, dtype=stage.dtype)
    for index in itertools.product(*(range(size) for d, size in enumerate(before) if d != digit)):
        place = (*index[:digit], slice(None), *index[digit:])
        matrix[(*place, *place)] = stage[index]
    return matrix.reshape(math.prod(after), math.prod(before))


@pytest.mark.parametrize("width", [1, 1.5, 2, 2.5, 3])
@pytest.mark.parametrize("expansion", [1, 2])
@pytest.mark.parametrize("digits", [(4, 4), (2, 2, 2), (3, 5)])
def test_kmatrix_is_the_product_of_its_dense_stages(digits, expansion, width):
    n = math.prod(digits)
    layer = KaleidoscopeLinear(n, n, width=width, expansion=expansion, in_modes=digits, out_modes=digits, dtype=F64)
    order = layer.structure.stages()
    current, dense = digits, torch.eye(n, dtype=F64)
    for s, (stage, digit) in enumerate(zip(layer.factors, order, strict=True)):
        size = digits[digit] * (expansion if digit == 0 and digit in order[s + 1 :] else 1)
        after = (*current[:digit], size, *current[digit + 1 :])
        dense = dense_stage(stage.detach(), digit, current, after) @ dense
        current = after
    assert current == digits
    torch.testing.assert_close(layer.to_dense(), dense)


@pytest.mark.parametrize("digits", [(2,) * 4, (3, 4), (2, 3, 2)])
def test_butterfly_is_the_product_of_its_dense_stages_last_digit_first(digits):
    n = math.prod(digits)
    layer = ButterflyLinear(n, n, in_modes=digits, out_modes=digits, dtype=F64)
    dense = torch.eye(n, dtype=F64)
    for stage, digit in zip(layer.factors, reversed(range(len(digits))), strict=True):
        dense = dense_stage(stage.detach(), digit, digits, digits) @ dense
    torch.testing.assert_close(layer.to_dense(), dense)


# Any shapes ----------------------------------------------------------------------------------------------------------

sides = st.integers(1, 9)
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(o1=sides, i1=sides, o2=sides, i2=sides, data=st.data())
def test_nearest_kronecker_at_any_shape(o1, i1, o2, i2, data):
    terms = data.draw(st.integers(1, min(o1 * i1, o2 * i2)))
    torch.manual_seed(o1 + 10 * i1 + 100 * o2 + 1000 * i2)
    w = torch.randn(o1 * o2, i1 * i2, dtype=F64)
    left, right = linalg.nearest_kronecker(w, terms, ((o1, i1), (o2, i2)))
    product = torch.einsum("tab,tcd->acbd", left, right).reshape(w.shape)
    # Rearranged by hand: a row per block of the weight.
    blocks = [w[a * o2 : (a + 1) * o2, b * i2 : (b + 1) * i2].flatten() for a in range(o1) for b in range(i1)]
    error = ((w - product).norm() / w.norm()).item()
    assert error == pytest.approx(tail(torch.stack(blocks), terms), rel=1e-8, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(modes=st.lists(pairs, min_size=2, max_size=4))
def test_tt_svd_and_rounding_are_exact_without_truncation(modes):
    torch.manual_seed(0)
    tensor = torch.randn([size for pair in modes for size in pair], dtype=F64)
    cores = trains.tt_svd(tensor, axes=2)
    for found in (cores, trains.tt_round(cores)):
        product = found[0]
        for core in found[1:]:
            product = torch.tensordot(product, core, 1)
        torch.testing.assert_close(product.squeeze(0).squeeze(-1), tensor)


@settings(max_examples=60, deadline=None)
@given(modes=st.lists(pairs, min_size=1, max_size=4))
def test_butterflies_of_any_digits_are_recovered(modes):
    torch.manual_seed(0)
    out_modes, in_modes = zip(*modes, strict=True)
    structure = Butterfly(in_modes=in_modes, out_modes=out_modes)
    true = StructuredLinear(math.prod(in_modes), math.prod(out_modes), structure=structure, dtype=F64)
    assert fit(true.to_dense(), structure).error <= 1e-10


def test_kmatrix_refines_wide_and_tall_weights_alike():
    """A start with zero columns is a saddle: tall weights stayed near .8 where their transposes reach .4."""
    w = weight(192, 48)
    tall, wide = (fit(m, Kaleidoscope, ratio=0.5, refine=100) for m in (w, w.T))
    assert tall.error == pytest.approx(wide.error, rel=0.05)
    assert all((factor == 0).double().mean() < 0.1 for factor in tall.factors)
