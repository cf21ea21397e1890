"""Cross interpolation against the full tensor."""

from __future__ import annotations

import pytest
import torch

from structlin.tensor_train import TT, cross
from structlin.testing import assert_close

FUNCTIONS = {
    "hilbert": lambda at: 1 / (1.0 + at.double().sum(1)),
    "sine": lambda at: torch.sin(at.double() @ torch.arange(1.0, at.shape[1] + 1, dtype=torch.float64)),
    "product": lambda at: torch.exp(-0.1 * at.double()).prod(1),
    "complex": lambda at: torch.polar(torch.ones(len(at), dtype=torch.float64), 0.3 * at.double().square().sum(1)),
}


def grid(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (7, 4, 6), (4, 3, 5, 4, 3)])
def test_the_train_has_the_values_of_the_function(name, shape):
    function = FUNCTIONS[name]
    full = function(grid(shape)).view(shape)
    train = cross(function, shape, tolerance=1e-9)
    assert_close(train.full(), full, name, 1e-8)
    assert max(train.ranks) <= max(TT.from_full(full, tolerance=1e-11).ranks)


def test_few_values_are_read():
    read = 0

    def function(at: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read += len(at)
        return FUNCTIONS["sine"](at)

    train = cross(function, (10,) * 10)
    assert train.ranks == (2,) * 9
    assert read < 100_000  # of 10^10


def test_a_rank_that_is_too_small_is_an_error():
    with pytest.raises(RuntimeError, match="max_rank=1"):
        cross(FUNCTIONS["sine"], (6, 6, 6), max_rank=1)


def test_functions_and_shapes_are_checked():
    with pytest.raises(ValueError, match="two or more"):
        cross(FUNCTIONS["sine"], (6,))
    with pytest.raises(ValueError, match="values not finite"):
        cross(lambda at: at.double().sum(1).log(), (3, 3))
    with pytest.raises(ValueError, match="returned"):
        cross(lambda at: at.double(), (3, 3))


def test_a_tensor_of_zeros_is_found():
    assert cross(lambda at: at.double().sum(1) * 0, (3, 4, 5)).full().abs().max() == 0
