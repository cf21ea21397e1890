"""The relaxed switches of a learned permutation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from structlin import LearnedPermutation, exact
from structlin.testing import assert_close


@pytest.mark.parametrize("n", [2, 8, 64])
def test_a_matrix_in_training_is_doubly_stochastic_and_in_eval_a_permutation(n):
    torch.manual_seed(0)
    layer = LearnedPermutation(n, temperature=0.5, dtype=torch.float64)
    soft = layer.to_dense()
    assert soft.min() >= 0
    for axis in (0, 1):
        assert_close(soft.sum(axis), torch.ones(n, dtype=torch.float64), "sums", 1e-12)
    layer.eval()
    hard = layer.to_dense()
    assert torch.equal(hard, torch.eye(n, dtype=torch.float64)[layer.order()])
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.equal(layer(x), x[:, layer.order()])
    assert_close(exact.permutation(layer.order(), dtype=x.dtype)(x), x[:, layer.order()], "hardened", 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(training):
    layer = LearnedPermutation(8).train(training)
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


def test_in_eval_entries_that_are_not_finite_move_like_others():
    layer = LearnedPermutation(8).eval()
    x = torch.arange(8.0)
    x[3], x[5] = -torch.inf, torch.nan
    torch.testing.assert_close(layer(x), x[layer.order()], rtol=0, atol=0, equal_nan=True)


def test_soft_outputs_are_those_of_the_matrix():
    layer = LearnedPermutation(16, noise=0.0, dtype=torch.float64)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    assert_close(layer(x), F.linear(x, layer.to_dense()), "output", 1e-12)


def test_a_permutation_is_learned_from_examples():
    """Least squares on inputs and permuted outputs, annealed: most places are right (local minima remain)."""
    torch.manual_seed(0)
    wanted = torch.randperm(8)
    layer = LearnedPermutation(8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(600):
        layer.temperature = 0.1 ** (step / 600)
        x = torch.randn(32, 8)
        loss = F.mse_loss(layer(x), x[:, wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.order() == wanted).sum() >= 6


@pytest.mark.parametrize("arguments", [{"features": 12}, {"features": 1}, {"features": 8, "temperature": 0}])
def test_sizes_and_temperatures_are_checked(arguments):
    with pytest.raises(ValueError, match=r"power of two|not above 0"):
        LearnedPermutation(**arguments)
