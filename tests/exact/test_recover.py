"""Fast algorithms found from dense matrices."""

from __future__ import annotations

import pytest
import torch

from structlin import exact
from structlin.testing import assert_close

MAPS = {
    "dft": lambda n: torch.fft.fft(torch.eye(n, dtype=torch.complex128)),
    "idft": lambda n: torch.fft.ifft(torch.eye(n, dtype=torch.complex128)),
    "circulant": lambda n: torch.stack([torch.arange(n).double().sin().roll(k) for k in range(n)], 1),
    "permutation": lambda n: torch.eye(n, dtype=torch.float64)[torch.randperm(n)],
    "butterfly": lambda n: exact.hadamard(n, dtype=torch.float64).to_dense().detach() * torch.rand(n, 1).double(),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [8, 16, 64, 256])
def test_maps_are_recovered_from_their_dense_matrices(name, n):
    torch.manual_seed(0)
    dense = MAPS[name](n)
    for matrix, tolerance in (
        (dense, 1e-12),
        (dense.to(torch.complex64 if dense.is_complex() else torch.float32), 1e-6),
    ):
        layer = exact.recover(matrix)
        assert_close(layer.to_dense(), matrix.to(layer.factors[0].dtype), name, tolerance)
        assert layer.num_parameters <= 8 * n * n.bit_length()  # O(n log n)


def test_mixed_radices_are_recovered():
    dense = torch.fft.fft(torch.eye(36, dtype=torch.complex128))
    assert_close(exact.recover(dense).to_dense(), dense, "DFT", 1e-12)


def test_what_is_none_of_the_maps_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="no butterfly, circulant or permutation"):
        exact.recover(torch.randn(16, 16))
    with pytest.raises(ValueError, match="must be square"):
        exact.recover(torch.randn(16, 8))


def test_a_tolerance_accepts_noise():
    torch.manual_seed(0)
    dense = exact.hadamard(16).to_dense().detach()
    noisy = dense + 1e-3 * torch.randn(16, 16)
    with pytest.raises(ValueError, match="is within 1e-05"):
        exact.recover(noisy)
    assert_close(exact.recover(noisy, tolerance=1e-2).to_dense(), dense, "Hadamard", 2e-3)
