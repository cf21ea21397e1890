"""Tucker and CP: bounds, exactness on their own kind, and starts that are orthogonal."""

import math

import pytest
import torch

from structlin import CPLinear, TuckerLinear
from structlin.fitting.fit import fit
from structlin.fitting.tensors import hosvd, orthogonal_terms
from structlin.structures import CP, Tucker
from structlin.testing import check_structure

MODES = {"in_modes": (4, 6), "out_modes": (5, 4)}


def tensor(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_hosvd_is_within_its_bound_and_its_tolerance(dtype):
    given = tensor(5, 4, 6, 3, dtype=dtype)
    for ranks in ((5, 4, 6, 3), (2, 3, 2, 3), (1, 1, 1, 1)):
        core, factors = hosvd(given, ranks=ranks)
        found = torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
        error = torch.linalg.vector_norm(found - given)
        tails = [torch.linalg.svdvals(given.movedim(k, 0).flatten(1))[r:].square().sum() for k, r in enumerate(ranks)]
        assert error.square() <= sum(tails) * (1 + 1e-9) + 1e-20  # each tail bounds the best error from below
        assert all(torch.allclose(f.mH @ f, torch.eye(f.shape[1], dtype=dtype)) for f in factors)
    for tolerance in (0.0, 0.3, 0.7):
        core, factors = hosvd(given, tolerance=tolerance)
        found = torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
        assert torch.linalg.vector_norm(found - given) <= tolerance * torch.linalg.vector_norm(given) + 1e-10
    assert core.numel() < given.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("sizes", [(5, 4, 6, 3), (2, 3, 3, 2, 2, 4)])
def test_all_terms_together_are_the_tensor_and_the_first_is_large(sizes, dtype):
    given = tensor(*sizes, dtype=dtype)
    letters = "abcdef"[: len(sizes)]

    def of(rank):
        vectors = orthogonal_terms(given, rank)
        return torch.einsum(",".join(f"{m}r" for m in letters) + f"->{letters}", *vectors)

    total = torch.linalg.vector_norm(given)
    assert torch.linalg.vector_norm(of(math.prod(sizes)) - given) < 1e-9 * total
    errors = [torch.linalg.vector_norm(of(rank) - given) / total for rank in (1, 4, 16, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8


def test_each_finds_its_own_kind():
    factors = [tensor(size, 3) + k for k, size in enumerate((5, 4, 4, 6))]
    cp = torch.einsum("ar,br,cr,dr->abcd", *factors).reshape(20, 24)
    assert fit(cp, CP(rank=3, **MODES)).error < 2e-3
    assert fit(cp, Tucker(rank=3, **MODES)).error < 1e-7
    core = tensor(2, 3, 3, 2)
    tucker = torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *(f[:, :r] for f, r in zip(factors, core.shape, strict=True)))
    found = fit(tucker.reshape(20, 24), Tucker(rank=(2, 3, 3, 2), **MODES))
    assert found.error < 1e-7
    weight = tucker.reshape(20, 24) + 1e-4 * tensor(20, 24)
    linear = torch.nn.Linear(24, 20, dtype=torch.float64)
    linear.weight.data = weight
    layer = TuckerLinear.from_linear(linear, tolerance=1e-3, **MODES)
    assert layer.structure.rank == (2, 3, 3, 2)
    assert (layer.to_dense() - weight).norm() <= 1e-3 * weight.norm()


def test_no_rank_of_tucker_exceeds_the_product_of_the_others():
    """A mode of rank r has r directions only if the others together have as many."""
    assert Tucker(rank=9, in_modes=(48,), out_modes=(9,)).resolve(48, 9).rank == (9, 9)
    assert Tucker(rank=24, in_modes=(24, 1), out_modes=(2, 3)).resolve(24, 6).rank == (2, 3, 6, 1)
    with pytest.raises(ValueError, match=r"above the product of the others; at most \(9, 9\)"):
        Tucker(rank=(9, 11), in_modes=(48,), out_modes=(32,)).resolve(48, 32)
    for budget in range(200, 900, 7):
        assert all(s.resolve(48, 32).rank == s.rank for s in Tucker.candidates(48, 32, budget))


def test_cp_describes_a_random_tensor_better_than_any_matrix_of_its_size():
    """51 terms of 28 entries and rank 12 of 112 have as many parameters."""
    weight = tensor(64, 48)
    values = torch.linalg.svdvals(weight)
    low_rank = (values[12:].norm() / values.norm()).item()
    assert fit(weight, CP(rank=51)).error < 0.75 * low_rank


def test_all_laws_hold_with_three_modes_a_side():
    for structure in (CP(rank=3, in_modes=(2, 2, 3), out_modes=(2, 2, 5)), Tucker(rank=2, in_modes=(3, 2, 2))):
        check_structure(structure, 12, 20, dtype=torch.float64)


def test_ranks_are_checked():
    with pytest.raises(ValueError, match=r"rank=81 is outside 1..80"):
        CPLinear(24, 20, rank=81, **MODES)
    with pytest.raises(ValueError, match="must give each mode a rank from 1 to its size"):
        TuckerLinear(24, 20, rank=(2, 5, 2, 2), **MODES)
    with pytest.raises(ValueError, match="rank is missing"):
        TuckerLinear(24, 20)
    with pytest.raises(ValueError, match="tolerance gives the ranks from a weight"):
        TuckerLinear(24, 20, tolerance=0.1)
    assert TuckerLinear(24, 20, rank=5, **MODES).structure.rank == (5, 4, 4, 5)
