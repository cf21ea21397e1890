"""Tensors and matrices in the TT format: every operation against the full tensor, ranks, derivatives, errors."""

import math
from functools import reduce

import pytest
import torch
from torch.autograd import gradcheck

from structlin import StructuredLinear, TTLinear
from structlin.fitting import trains
from structlin.tensor_train import TT, TTMatrix, total

F64, C128 = torch.float64, torch.complex128
SHAPES = [(5,), (3, 4), (2, 5, 3), (3, 1, 4, 2), (2, 2, 2, 2, 2)]
MODES = [((6,), (5,)), ((2, 3), (4, 3)), ((3, 1, 2), (2, 5, 2)), ((2, 2, 2, 2), (3, 1, 2, 2))]


def tensor(shape, rank, dtype=F64, seed=0):
    return TT.randn(*shape, rank=rank, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(modes, rank, dtype=F64, seed=0):
    drawn = tensor([o * i for o, i in zip(*modes, strict=True)], rank, dtype, seed)
    sizes = zip(drawn.cores, *modes, strict=True)
    return TTMatrix([core.reshape(core.shape[0], o, i, core.shape[-1]) for core, o, i in sizes])


def pairs(dtype):
    """Two trains of each shape and kind, of different ranks."""
    for shape in SHAPES:
        yield tensor(shape, 2, dtype, 1), tensor(shape, 3, dtype, 2)
    for modes in MODES:
        yield matrix(modes, 2, dtype, 1), matrix(modes, 3, dtype, 2)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_algebra_agrees_with_full_tensors(dtype):
    for a, b in pairs(dtype):
        x, y = a.full(), b.full()
        assert x.shape == a.shape
        close((a + b).full(), x + y)
        close((a - b).full(), x - y)
        close((a * b).full(), x * y)
        close((-a).full(), -x)
        close((2.5 * a).full(), 2.5 * x)
        close((a / 4).full(), x / 4)
        close((a + 3).full(), x + 3)
        close((3 - a).full(), 3 - x)
        close((a * torch.tensor(2.0, dtype=dtype)).full(), 2 * x)
        close(a.sum(), x.sum())
        close(a.dot(b), torch.vdot(x.flatten(), y.flatten()))
        close(a.norm(), torch.linalg.vector_norm(x))


def test_ranks_are_those_of_the_sources_table():
    for a, b in pairs(F64):
        ra, rb = a.ranks, b.ranks
        assert (a + b).ranks == tuple(p + q for p, q in zip(ra, rb, strict=True))
        assert (a * b).ranks == tuple(p * q for p, q in zip(ra, rb, strict=True))
        assert (a + 1).ranks == tuple(p + 1 for p in ra)
        assert (a * 2).ranks == ra
    a, b = matrix(MODES[2], 2), matrix((MODES[2][1], (2, 3, 2)), 3)
    assert (a @ b).ranks == (6, 6)
    assert (a @ tensor(MODES[2][1], 4)).ranks == (8, 8)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_rounding_of_a_sum_finds_its_true_ranks(dtype):
    for a, _ in pairs(dtype):
        doubled = a + a
        # Ranks that the modes do not allow are lowered too.
        wanted = a.round(tolerance=1e-12).ranks
        assert doubled.round(tolerance=1e-12).ranks == wanted
        assert all(r <= s for r, s in zip(wanted, a.ranks, strict=True))
        close(doubled.round(tolerance=1e-12).full(), 2 * a.full())
        assert (a - a).norm() <= 1e-13 * a.norm()
        assert (a - doubled.round(tolerance=1e-13) / 2).norm() <= 1e-12 * a.norm()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3, 1e-9])
def test_tolerances_hold(tolerance):
    generator = torch.Generator().manual_seed(3)
    for shape in SHAPES[1:]:
        full, train = torch.randn(shape, dtype=F64, generator=generator), tensor(shape, 4)
        found = TT.from_full(full, tolerance=tolerance), train.round(tolerance=tolerance)
        for approximation, wanted in zip(found, (full, train.full()), strict=True):
            assert (approximation.full() - wanted).norm() <= tolerance * wanted.norm() * (1 + 1e-9)


def test_decompositions_keep_their_promises():
    full = torch.randn(4, 6, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    full = full.cumsum(0).cumsum(1).cumsum(2)  # with singular values that decay
    for rank in (1, 3, (2, 4, 3)):
        found = TT.from_full(full, rank=rank)
        cuts = [torch.linalg.svdvals(full.reshape(math.prod(full.shape[:k]), -1)) for k in (1, 2, 3)]
        least = max(cut[r:].norm() for cut, r in zip(cuts, found.ranks, strict=True))
        assert least <= (found.full() - full).norm() * (1 + 1e-9)
        assert (found.full() - full).norm() <= math.sqrt(3) * least * (1 + 1e-9)
    errors = []
    for ratio in (0.1, 0.3, 0.6, 1.0):
        found = TT.from_full(full, ratio=ratio)
        assert found.num_parameters <= ratio * full.numel()
        uniform = max(
            (TT.from_full(full, rank=r) for r in range(1, 16)),
            key=lambda t: t.num_parameters * (t.num_parameters <= ratio * full.numel()),
        )
        errors.append((found.full() - full).norm())
        assert errors[-1] <= (uniform.full() - full).norm() * (1 + 1e-9)
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match=r"ratio=0\.01 is too small"):
        TT.from_full(full, ratio=0.01)


def test_single_precision_is_kept():
    for dtype in (torch.float32, torch.bfloat16):
        a = tensor((3, 4, 5), 2, F64).to(dtype)
        for found in (a + a, a * a, a.round(rank=1), TT.from_full(a.full(), rank=2), a.sum(), a.norm(), a[1]):
            assert found.dtype == dtype


INDICES = [
    (0,), (1, -1), (slice(None), 2), (slice(None, None, 2), slice(1, 3), 0), (..., 1), (0, ..., 1), (slice(0, 1),),
    (1, 2, 1, 0), (slice(None), slice(None), 1, slice(None)), (-1, slice(2), ...),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indices_are_those_of_torch(index):
    train = tensor((3, 4, 2, 3), 3, seed=5)
    found = train[index]
    wanted = train.full()[index]
    close(found if isinstance(found, torch.Tensor) else found.full(), wanted)
    assert isinstance(found, TT) == (wanted.ndim > 0)


def test_lists_of_places_give_entries():
    train = tensor((3, 4, 2), 3, seed=6)
    places = [0, 2, 1, 1], [3, 3, 0, 1], [1, 0, 1, 1]
    close(train[places], train.full()[places])
    grid = torch.arange(3)[:, None], torch.arange(4), torch.tensor(1)
    close(train[grid], train.full()[:, :, 1])


def test_products_of_matrices_agree_with_full_ones():
    for dtype in (F64, C128):
        for out_modes, in_modes in MODES:
            a = matrix((out_modes, in_modes), 3, dtype, 7)
            x = torch.randn(a.shape[1], 4, dtype=dtype, generator=torch.Generator().manual_seed(8))
            close(a @ x, a.full() @ x)
            close(a @ x[:, 0], a.full() @ x[:, 0])
            close(a.mT.full(), a.full().mT)
            b = matrix((in_modes, out_modes), 2, dtype, 9)
            close((a @ b).full(), a.full() @ b.full())
            v = tensor(in_modes, 2, dtype, 10)
            close((a @ v).full().flatten(), a.full() @ v.full().flatten())
            again = TTMatrix.from_full(a.full(), out_modes, in_modes, tolerance=1e-12)
            close(again.full(), a.full())
            assert again.num_parameters <= a.num_parameters


@pytest.mark.parametrize("few", [0, 1 << 14])
def test_a_plan_and_one_core_after_the_other_multiply_alike(few, monkeypatch):
    monkeypatch.setattr("structlin.tensor_train.matrix._FEW", few)
    for modes in MODES:
        a = matrix(modes, 3, F64, 7)
        x = torch.randn(a.shape[1], 4, dtype=F64, generator=torch.Generator().manual_seed(8))
        for operand in (x, x[:, 0], x[:, ::2], x[:, :0]):
            close(a @ operand, a.full() @ operand)


@pytest.mark.parametrize("last", [1, 5, 60])  # columns of the last core: below, about and above the bond
def test_the_norm_is_that_of_the_full_tensor_even_near_zero(last):
    a = tensor((6, 7, last), 5, seed=11)
    close(a.norm(), torch.linalg.vector_norm(a.full()))
    b = a * (1 + 1e-12)
    close((a - b).norm() / a.norm(), torch.linalg.vector_norm((a - b).full()) / a.norm())
    assert (a - b).norm() < 1e-11 * a.norm()


def test_a_layer_and_its_matrix_are_each_others_inverse():
    layer = TTLinear(24, 40, rank=3, in_modes=(2, 3, 4), out_modes=(4, 5, 2), dtype=F64)
    found = TTMatrix.from_layer(layer)
    close(found.full(), layer.to_dense())
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.factors)
    again = found.to_layer(layer.bias)
    x = torch.randn(3, 24, dtype=F64)
    close(again(x), layer(x))
    assert again.structure == layer.structure
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(again.factors, layer.factors, strict=True))
    assert all(parameter.requires_grad for parameter in found.to_layer(layer.bias.detach()).parameters())
    smaller = found.round(rank=2).to_layer()
    assert isinstance(smaller, StructuredLinear)
    close(smaller.to_dense(), layer.rounded(rank=2).to_dense())
    for flag in (True, False):
        assert {p.requires_grad for p in layer.requires_grad_(flag).rounded(rank=2).parameters()} == {flag}


@pytest.mark.parametrize("make", [tensor, matrix])
def test_complex_constants_make_a_real_train_complex(make):
    a = make(MODES[1] if make is matrix else (2, 3, 4), 2)
    for found, wanted in ((a * 2j, a.full() * 2j), (a + 1j, a.full() + 1j), (1 - a / 1j, 1 - a.full() / 1j)):
        assert {core.dtype for core in found.cores} == {torch.complex128}
        close(found.full(), wanted)


def test_many_terms_are_added_at_the_ranks_of_their_sum():
    base = [tensor((4, 5, 6, 3), 2, seed=k) for k in range(3)]
    weights = torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    terms = [reduce(TT.__add__, (float(w) * b for w, b in zip(row, base, strict=True))) for row in weights]
    found = total(terms, tolerance=1e-12)
    assert found.ranks == reduce(TT.__add__, base).round(tolerance=1e-12).ranks
    close(found.full(), sum(term.full() for term in terms))
    with pytest.raises(ValueError, match="one term or more"):
        total([])


# Derivatives ---------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "sum": lambda a, b: (a + b).sum(),
    "add": lambda a, b: (a + b + 2).full(),
    "multiply": lambda a, b: (a * b * 3).full(),
    "dot": lambda a, b: a.dot(b),
    "norm": lambda a, b: (a + b).norm(),
    "index": lambda a, b: (a * b)[1, :, 0].full(),
    "entries": lambda a, b: (a - b)[[0, 1], [1, 1], [0, 2], [1, 0]],
    "round": lambda a, b: (a + b).round(rank=3).full(),
    "round to the true ranks": lambda a, b: (a + a * 2).round(rank=2).full() + b.sum(),
    "round by tolerance": lambda a, b: (a + b).round(tolerance=0.05).full(),
    "decompose": lambda a, b: TT.from_full((a * b).full(), rank=2).full(),
    "total": lambda a, b: total([a, b, a, b, a]).full(),
}


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name, dtype):
    a, b = tensor((2, 3, 3, 2), 2, dtype, 11), tensor((2, 3, 3, 2), 2, dtype, 12)
    count = len(a.cores)

    def run(*cores):
        return FUNCTIONS[name](TT(cores[:count]), TT(cores[count:]))

    assert gradcheck(run, [core.requires_grad_() for core in (*a.cores, *b.cores)])


def test_derivatives_of_products_with_matrices():
    a = matrix(MODES[2], 2).requires_grad_()
    x = torch.randn(20, 3, dtype=F64, requires_grad=True)
    v = tensor((2, 5, 2), 2, seed=3)

    def run(x, *cores):
        found = TTMatrix(cores)
        return found @ x, (found @ v).full(), (found @ found.mT).full(), found.mT.round(rank=1).full()

    assert gradcheck(run, (x, *a.cores))


def test_truncation_needs_no_gap_inside_what_is_kept():
    """torch.linalg.svd divides by differences of equal singular values here."""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 0.0], dtype=F64)
    equal = (basis * values) @ torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0]

    def run(m):
        left, rest = trains.truncated(m, 3, 0.0)
        return left @ rest

    assert gradcheck(run, equal.requires_grad_())


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    a = tensor((2, 3, 4), 2)
    core = torch.ones(1, 2, 3)
    for cores in ([], [core], [core, torch.ones(2, 2, 1)], [torch.ones(1, 2, 2, 1)]):
        with pytest.raises(ValueError, match="are no TT: each has 3 axes"):
            TT(cores)
    with pytest.raises(ValueError, match="different modes"):
        a + tensor((2, 3, 5), 2)
    with pytest.raises(ValueError, match="different modes"):
        a * TTMatrix([core.unsqueeze(2) for core in a.cores])
    with pytest.raises(TypeError, match="neither a TT nor a number"):
        a + torch.ones(4)
    with pytest.raises(TypeError, match="neither a TT nor a number"):
        a * torch.ones(2)  # as many as the first rank
    for index in ((0, 0, 0, 0), (..., ...), (None,), ([0], 1, 1), (2, 0, 0)):
        with pytest.raises(IndexError):
            a[index]
    with pytest.raises(ValueError, match=r"rank=\[1\] must give each of 2 bonds"):
        a.round(rank=[1])
    with pytest.raises(ValueError, match="rank=0"):
        a.round(rank=0)
    with pytest.raises(ValueError, match="is negative or NaN"):
        a.round(tolerance=-1)
    with pytest.raises(ValueError, match="give one of the three"):
        TT.from_full(a.full())
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        TT.from_full(torch.arange(24).reshape(2, 3, 4), tolerance=1e-6)  # its cores would be rounded
    with pytest.raises(ValueError, match="do not fit a matrix of"):
        TTMatrix.from_full(torch.ones(6, 6), (2, 3), (2, 2), rank=1)
    m = matrix(MODES[1], 2)
    with pytest.raises(ValueError, match="multiplies vectors"):
        m @ torch.ones(5, dtype=F64)
    with pytest.raises(ValueError, match="has others"):
        m @ m
    assert repr(m) == "TTMatrix(2x4 x 3x3, ranks=(2,), torch.float64)"
