"""Dimensions against the rank of the Jacobian, for every structure."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, naming

from structlin.equation.geometry import composition, dimension
from structlin.layers.init import initial_factors
from structlin.runtime.contract import to_dense
from structlin.structures import CP, Kronecker, LowRank, Monarch

# Where the count is a bound: blocks of one entry or padding, products that have further gauges, sums of low ranks.
BOUNDS = {"blast", "kronchain", "sum", "conv", "toeplitz", "diagonal"}


def jacobian_rank(spec) -> int:
    """The rank of the derivative of the dense matrix at random factors."""
    torch.manual_seed(0)
    factors = [torch.randn_like(factor) for factor in initial_factors(spec, dtype=torch.float64)]
    constants = initial_factors(spec, dtype=torch.float64)
    learned = [k for k, factor in enumerate(spec.factors) if factor.learned]

    def dense(*values):
        given = dict(zip(learned, values, strict=True))
        return to_dense(spec, [given.get(k, constant) for k, constant in enumerate(constants)])

    parts = torch.autograd.functional.jacobian(dense, tuple(factors[k] for k in learned))
    return int(torch.linalg.matrix_rank(torch.cat([part.flatten(0, 1).flatten(1) for part in parts], 1)))


@pytest.mark.parametrize("name", CASES)
def test_dimension_is_the_rank_of_the_jacobian(name):
    """For every structure: never above the count of the equation, and equal to it where nothing is degenerate."""
    for sizes in ((12, 20), (16, 16), (8, 12)):
        for member in CASES[name].at(*sizes):
            with naming(member, sizes):
                spec = member.spec(*sizes)
                rank, bound = jacobian_rank(spec), dimension(spec)
                assert rank <= bound <= spec.num_parameters
                assert rank == bound or name in BOUNDS


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (LowRank(rank=3), "projection to 3, embedding into 12"),
        (Kronecker(terms=1, shape=((3, 4), (4, 4))), "Kronecker projection to 12, Kronecker rotation and scaling"),
        (Monarch(blocks=4), "blockwise rotation and scaling, blockwise projection to 12"),
        (
            CP(rank=2),
            "Kronecker projection to 8, blockwise projection to 2, "
            "blockwise embedding into 6, Kronecker embedding into 12",
        ),
    ],
)
def test_composition_names_the_maps_in_the_order_of_application(structure, expected):
    spec = structure.resolve(16, 12).spec(16, 12)
    assert composition(spec) == expected
