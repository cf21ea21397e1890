"""Layers whose entries share values in a pattern, and Toeplitz-like ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structlin import PatternLinear, ToeplitzLikeLinear, ToeplitzLinear
from structlin.testing import assert_close

SIZES = [(12, 20), (16, 16), (20, 12), (7, 1)]


def make(i, o, *a, **k):
    torch.manual_seed(0)
    return PatternLinear(i, o, *a, pattern=torch.arange(i * o).view(o, i) // 2 % (i * o // 3), **k)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dense_matrix(sizes, bias):
    layer = make(*sizes, bias, dtype=torch.float64)
    x = torch.randn(3, 5, sizes[0], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.to_dense(), layer.bias)
    assert_close(y, expected, "output", 1e-12)
    seed = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(y, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        assert_close(found, wanted, "gradient", 1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_fit_is_optimal_in_the_frobenius_norm_and_that_of_a_gram(sizes):
    dense = nn.Linear(*sizes, dtype=torch.float64)
    layer = make(*sizes, dtype=torch.float64)
    x = torch.randn(64, sizes[0], dtype=torch.float64) @ torch.randn(sizes[0], sizes[0], dtype=torch.float64)
    for gram in (None, x.T @ x):
        layer.fit_(dense, gram)
        metric = torch.eye(sizes[0], dtype=torch.float64) if gram is None else gram
        gap = dense.weight - layer.to_dense()
        (slope,) = torch.autograd.grad((gap @ metric * gap).sum(), layer.values)
        scale = torch.autograd.grad((dense.weight @ metric * layer.to_dense()).sum(), layer.values)[0].norm()
        assert slope.norm() <= 1e-5 * scale  # no direction of the values lowers the error
        assert torch.equal(layer.bias, dense.bias)


def test_members_are_found_exactly():
    member = make(16, 16, dtype=torch.float64)
    dense = nn.Linear(16, 16, dtype=torch.float64)
    dense.weight.data.copy_(member.to_dense())
    assert_close(member.fit_(dense).to_dense(), dense.weight, "W")


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_toeplitz_like_outputs_are_those_of_its_circulants(n):
    torch.manual_seed(0)
    layer = ToeplitzLikeLinear(n, rank=min(n, 2), dtype=torch.float64)
    places = (torch.arange(n).unsqueeze(1) - torch.arange(n)) % n
    sign = torch.where(torch.arange(n).unsqueeze(1) >= torch.arange(n), 1.0, -1.0).double()
    expected = sum(a[places] @ (b[places] * sign) for a, b in zip(layer.left, layer.right, strict=True))
    assert_close(layer.to_dense(), expected, "W", 1e-12)
    x = torch.randn(3, n, dtype=torch.float64)
    assert_close(layer(x), F.linear(x, expected, layer.bias), "output", 1e-12)


def test_toeplitz_like_takes_empty_batches():
    layer = ToeplitzLikeLinear(16, rank=2)
    x = torch.zeros(2, 0, 16, requires_grad=True)
    gradients = torch.autograd.grad(layer(x).sum(), [x, layer.left, layer.right])
    assert gradients[0].shape == x.shape
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_toeplitz_like_in_low_precision(dtype):
    layer = ToeplitzLikeLinear(16, rank=2).to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    y = layer(x)
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.left.grad.dtype is dtype
    assert_close(y.float(), copy.deepcopy(layer).float()(x.float()), "output", 0.02)


def test_products_of_toeplitz_matrices_have_a_small_displacement():
    torch.manual_seed(0)
    first, second = (ToeplitzLinear(16, 16, dtype=torch.float64).to_dense().detach() for _ in range(2))
    dense = nn.Linear(16, 16, dtype=torch.float64)
    for matrix, rank in ((first, 2), (torch.linalg.inv(first), 2), (first @ second, 4)):
        dense.weight.data.copy_(matrix)
        assert_close(ToeplitzLikeLinear.from_linear(dense, rank=rank).to_dense(), matrix, "W", 1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatternLinear(2, 2, pattern=torch.tensor([[0, 2], [0, 0]])), "leave out none"),
        (lambda: PatternLinear(2, 3, pattern=torch.zeros(2, 2, dtype=torch.long)), r"must be \(3, 2\)"),
        (lambda: ToeplitzLikeLinear(4, rank=5), "rank=5 is outside"),
        (lambda: ToeplitzLikeLinear.from_linear(nn.Linear(4, 5), rank=1), "not square"),
        (lambda: make(2, 2).fit_(nn.Linear(2, 3)), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
