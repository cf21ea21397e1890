"""Well-known maps as K-matrices equal what torch and scipy compute, at every size."""

import math

import pytest
import scipy.fft
import torch
import torch.nn.functional as F

from structlin import exact
from structlin.structures import Butterfly, Kaleidoscope

POWERS = [2**k for k in range(13)]  # 1 to 4096
SOME = [1, 2, 4, 8, 64, 4096]  # for long chains, which take seconds to plan; benchmarks/exact.py has all
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def agree(layer, wanted, dtype, n):
    """Compare a layer with a function on random vectors; both take and return (rows, n)."""
    x = torch.randn(5, n, dtype=dtype)
    factors = next(layer.parameters()).dtype
    with torch.no_grad():
        found = layer(x.to(factors)).to(torch.complex128)
    right = wanted(x.double()).to(torch.complex128)
    error = torch.linalg.vector_norm(found - right) / torch.linalg.vector_norm(right)
    assert error <= BOUND[dtype], f"n={n}: {error:.1e}"


def cos_or_sin(kind, x):
    return torch.from_numpy(getattr(scipy.fft, kind)(x.numpy(), norm="ortho"))


@both
def test_fourier_cosine_sine_and_hadamard(dtype):
    kind = COMPLEX[dtype]
    for n in POWERS:
        agree(exact.dft(n, dtype=kind), torch.fft.fft, dtype, n)
        agree(exact.idft(n, dtype=kind), torch.fft.ifft, dtype, n)
        agree(exact.hadamard(n, dtype=dtype), walsh_hadamard, dtype, n)
    for n in SOME:
        agree(exact.dct(n, dtype=kind), lambda x: cos_or_sin("dct", x), dtype, n)
        agree(exact.dst(n, dtype=kind), lambda x: cos_or_sin("dst", x), dtype, n)


def walsh_hadamard(x):
    """Sylvester's matrix times x, without forming it."""
    rows, n = x.shape
    step = 1
    while step < n:
        a, b = x.view(rows, -1, 2, step).unbind(2)
        x, step = torch.stack([a + b, a - b], 2).reshape(rows, n), 2 * step
    return x


@pytest.mark.parametrize("n", [3, 6, 7, 12, 24, 36, 48, 90, 97, 360, 1000])
def test_other_sizes_of_fourier(n):
    for dtype in BOUND:
        agree(exact.dft(n, dtype=COMPLEX[dtype]), torch.fft.fft, dtype, n)
        agree(exact.idft(n, dtype=COMPLEX[dtype]), torch.fft.ifft, dtype, n)


@both
def test_circulant_and_toeplitz(dtype):
    for n in [*POWERS, 12, 210, 1000]:
        column, row = torch.randn(2, n, dtype=dtype)
        spectrum = torch.fft.fft(column.double())
        agree(exact.circulant(column), lambda x, s=spectrum: torch.fft.ifft(torch.fft.fft(x) * s), dtype, n)
    for n in POWERS:
        column, row = torch.randn(2, n, dtype=dtype)
        row[0] = column[0]
        around = torch.cat([column, column[:1] * 0, row[1:].flip(0)]).double()

        def corner(x, around=around):
            spectrum = torch.fft.fft(x, n=len(around)) * torch.fft.fft(around)
            return torch.fft.ifft(spectrum)[:, : x.shape[1]]

        agree(exact.toeplitz(column, row), corner, dtype, n)


@both
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 16])
def test_convolution_is_conv1d(dtype, length):
    kernel = torch.randn(length, dtype=dtype)

    def wanted(x):
        before = (length - 1) // 2
        return F.conv1d(F.pad(x, (before, length - 1 - before)).unsqueeze(1), kernel.double()[None, None])[:, 0]

    for n in (16, 64):
        agree(exact.convolution(kernel, n), wanted, dtype, n)


@both
def test_any_permutation(dtype):
    for n in POWERS:
        orders = [torch.randperm(n), torch.arange(n), torch.arange(n).flip(0), torch.arange(n).roll(1)]
        for order in orders:
            layer, x = exact.permutation(order, dtype=dtype), torch.randn(3, n, dtype=dtype)
            assert torch.equal(layer(x), x[:, order])
            assert layer.structure.width == 1
            assert layer.num_parameters == (2 * n * (2 * int(math.log2(n)) - 1) if n > 1 else 1)


@both
def test_fastfood_acdc_and_low_rank(dtype):
    for n in SOME:
        scale, gauss, signs = torch.randn(3, n, dtype=dtype)
        order = torch.randperm(n)

        def food(x, scale=scale, gauss=gauss, signs=signs, order=order):
            return walsh_hadamard(walsh_hadamard(x * signs)[:, order] * gauss) * scale

        agree(exact.fastfood(scale, gauss, order, signs), food, dtype, n)

        def acdc(x, a=scale, d=gauss):
            return torch.from_numpy(scipy.fft.idct((cos_or_sin("dct", x * a) * d).numpy(), norm="ortho"))

        agree(exact.acdc(scale, gauss), acdc, dtype, n)
        left, right = torch.randn(2, n, 3, dtype=dtype)
        agree(exact.low_rank(left, right), lambda x, u=left, v=right: x @ v.double() @ u.double().T, dtype, n)


def test_widths_and_sizes_are_those_of_the_docstrings():
    n = 1024
    vector, order = torch.randn(n), torch.randperm(n)
    made = {
        (2, 1): [exact.dft(n), exact.idft(n)],
        (5, 1): [exact.dct(n), exact.dst(n)],
        (1, 1): [exact.circulant(vector), exact.permutation(order)],
        (1, 2): [exact.toeplitz(vector, vector), exact.convolution(vector[:5], n)],
        (3, 1): [exact.fastfood(vector, vector, order, vector)],
        (10, 1): [exact.acdc(vector, vector)],
        (1, 4): [exact.low_rank(torch.randn(n, 4), torch.randn(n, 4))],
    }
    for (width, expansion), layers in made.items():
        for layer in layers:
            assert isinstance(layer.structure, Kaleidoscope)
            assert (layer.structure.width, layer.structure.expansion) == (width, expansion)
            assert layer.num_parameters <= 4 * width * expansion * n * 10
    assert isinstance(exact.hadamard(n).structure, Butterfly)
    assert exact.hadamard(n).num_parameters == 2 * n * 10


def test_the_layers_can_be_trained():
    layer = exact.dft(16)
    layer(torch.randn(3, 16, dtype=torch.complex64)).abs().sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in layer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exact.dft(0), "n=0 is below 1"),
        (lambda: exact.dft(8, dtype=torch.float32), "is real"),
        (lambda: exact.dct(12), "no power of two; pad the input to 16"),
        (lambda: exact.circulant(torch.ones(11)), "prime factor above 7; pad the column to 12"),
        (lambda: exact.toeplitz(torch.ones(4), torch.ones(8)), "4 entries and row 8"),
        (lambda: exact.convolution(torch.ones(9), 8), "takes 1 to 8"),
        (lambda: exact.permutation(torch.tensor([0, 0, 1, 2])), "each of 0 to 3 once"),
        (lambda: exact.fastfood(torch.ones(4), torch.ones(8), torch.arange(4), torch.ones(4)), "same length"),
        (lambda: exact.low_rank(torch.ones(4, 2), torch.ones(4, 3)), r"both are \(n, rank\)"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
