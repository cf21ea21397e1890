"""Orthogonal and square matrices as products of Kronecker sums, and linear circuits as K-matrices."""

import random

import pytest
import torch

from structlin import exact


def turn(n, reflect=False):
    found = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    found[:, 0] *= torch.linalg.det(found).sign() * (-1 if reflect else 1)
    return found


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("n", [4, 9, 16, 25, 36])
def test_an_orthogonal_matrix_is_a_product_of_kronecker_sums(n, reflect):
    m = round(n**0.5)
    for matrix in (turn(n, reflect), torch.eye(n, dtype=torch.float64).roll(1, 0)):
        for terms in range(2, min(m + 1, 4) + 1):
            layer = exact.orthogonal(matrix, terms)
            assert (layer.to_dense() - matrix).abs().max() < 1e-10
            assert layer.structure.terms == terms
            assert layer.structure.depth <= n * (-(-m // (terms - 1)) + 1)
            assert layer.structure.depth <= 3 * n * n / 2  # of the slides, for two terms


@pytest.mark.parametrize("n", [4, 16, 25])
def test_any_square_matrix_is(n):
    for matrix in (torch.randn(n, n).double(), torch.ones(n, n).double(), torch.zeros(n, n).double()):
        for terms in (2, 3):
            assert (exact.square(matrix, terms).to_dense() - matrix).abs().max() < 1e-10


@pytest.mark.parametrize(("n", "count"), [(1, 4), (2, 3), (4, 10), (8, 3), (8, 40), (16, 30)])
def test_a_linear_circuit_is_a_kmatrix(n, count):
    draw = random.Random(count)
    values, depth, gates = [row.clone() for row in torch.eye(n, dtype=torch.float64)], [0] * n, []
    for _ in range(count):
        i, j = (draw.randrange(len(values)) for _ in range(2))
        a, b = (draw.gauss(0, 1) for _ in range(2))
        gates.append((i, a, j, b))
        values.append(a * values[i] + b * values[j])
        depth.append(1 + max(depth[i], depth[j]))
    for outputs in (None, [draw.randrange(n + count) for _ in range(n)]):
        layer = exact.circuit(gates, n, outputs, dtype=torch.float64)
        wanted = torch.stack(values[-n:] if outputs is None else [values[k] for k in outputs])
        assert (layer.to_dense() - wanted).abs().max() < 1e-12 * max(1, wanted.abs().max())
        assert layer.structure.width <= 4 * max(depth) + 3
        assert layer.structure.expansion <= 2 * (2 + 2 * count / n)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exact.orthogonal(torch.eye(6)), "n = 4, 9, 16"),
        (lambda: exact.orthogonal(torch.tensor(1.0)), "n = 4, 9, 16"),
        (lambda: exact.orthogonal(torch.eye(9), terms=1), r"terms=1 is outside 2..4"),
        (lambda: exact.orthogonal(torch.ones(4, 4)), "not orthogonal"),
        (lambda: exact.orthogonal(1.1 * torch.eye(4, dtype=torch.bfloat16)), "not orthogonal"),
        (lambda: exact.circuit([(0, 1.0, 3, 1.0)], 2), "gate 0 reads values 0 and 3; there are 2 before it"),
        (lambda: exact.circuit([(0, 1.0, 1, 1.0)], 2, [0, 3]), "give 2 values from 0 to 2"),
        (lambda: exact.circuit([], 3), "no power of two"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
