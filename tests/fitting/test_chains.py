"""Products of Kronecker sums, and group linear transformations: what they equal, and where their fits start."""

import pytest
import torch

from structlin import GLTLinear, KroneckerChainLinear
from structlin.fitting.fit import fit
from structlin.layers.linear import build
from structlin.runtime.contract import to_dense
from structlin.structures import GLT, Kaleidoscope, Kronecker, KroneckerChain, Monarch


def weight(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64)


def test_a_kronecker_chain_is_the_product_of_its_sums():
    layer = KroneckerChainLinear(20, 12, terms=2, depth=3, in_modes=(4, 5), out_modes=(4, 3), dtype=torch.float64)
    product = torch.eye(20, dtype=torch.float64)
    factors = [factor.detach() for factor in layer.factors]
    for left, right in zip(factors[0::2], factors[1::2], strict=True):
        product = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True)) @ product
    torch.testing.assert_close(layer.to_dense(), product)


@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (24, 96), (96, 24)])
def test_a_kronecker_chain_starts_at_the_nearest_sum_and_all_of_its_terms_go_on(rows, columns):
    dense = weight(rows, columns)
    structure = KroneckerChain(terms=3).resolve(columns, rows)
    out_modes, in_modes = structure.digits()
    one = fit(dense, Kronecker(terms=3, shape=tuple(zip(out_modes, in_modes, strict=True))))
    assert fit(dense, structure, refine=0).error == pytest.approx(one.error)
    found = fit(dense, structure)
    assert found.error < 0.97 * one.error
    squares = [f for f in found.factors if f.shape[1] == f.shape[2]]
    assert all(term.norm() > 1e-2 * factor.norm() for factor in squares for term in factor)


def test_no_two_terms_of_a_kronecker_chain_start_alike():
    structure = KroneckerChain(terms=9, in_modes=(3, 8), out_modes=(3, 8)).resolve(24, 24)
    left, *_ = structure.decompose(weight(24, 24))
    angles = torch.nn.functional.normalize(left.flatten(1), dim=1)
    torch.testing.assert_close(angles @ angles.T, torch.eye(9, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (24, 32), (32, 24)])
def test_an_expanded_kmatrix_uses_what_it_has_more(rows, columns):
    dense = weight(rows, columns)
    one = fit(dense, Kaleidoscope())
    two = fit(dense, Kaleidoscope(expansion=2), refine=0)
    assert two.error <= 1.1 * fit(dense, Kaleidoscope(), refine=0).error  # the start is as good, ...
    assert fit(dense, Kaleidoscope(expansion=2)).error < 0.6 * one.error  # ... and no saddle point


def test_two_layers_of_groups_are_blocks_of_a_rank():
    dense = weight(30, 24)
    found = fit(dense, GLT(groups=(3, 5), widths=(30,)), refine=0)
    blocks = dense.reshape(5, 6, 3, 8).permute(0, 2, 1, 3)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    best = (left[..., :2] * values[..., None, :2] @ right[..., :2, :]).permute(0, 2, 1, 3).reshape(30, 24)
    torch.testing.assert_close(to_dense(found.spec, found.factors), best)
    same = fit(dense, Monarch(blocks=6, rank=1))
    assert fit(dense, GLT(groups=(6, 6), widths=(36,)), refine=0).error == pytest.approx(same.error)


def test_a_shuffle_deals_each_group_to_all_groups_of_the_next():
    layer = GLTLinear(24, 20, bias=False, groups=(2, 4, 5), widths=(32, 40), dtype=torch.float64)
    x = torch.randn(7, 24, dtype=torch.float64)
    h = x
    for k, groups in enumerate((2, 4, 5)):
        maps = layer.factors[k].detach().reshape(groups, -1, h.shape[1] // groups)  # (group, outputs, inputs)
        out = torch.einsum("noi,bni->bno", maps, h.reshape(7, groups, -1))
        dealt = out.unflatten(2, ((4, 5, 1)[k], -1))  # (group, next group, position)
        h = dealt.permute(0, 2, 3, 1).flatten(1) if k < 2 else out.flatten(1)
    torch.testing.assert_close(layer(x), h)


def test_wider_layers_start_without_copies():
    structure = GLT(groups=(2, 2, 2), widths=(32, 16)).resolve(16, 16)
    dense = weight(16, 16)
    (first, *_), exact = structure.decompose(dense), build(structure, 16, 16)
    rows = first.flatten(1, 2).flatten(0, 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert ((rows @ rows.T).abs() - torch.eye(len(rows)) < 0.999).all()
    assert exact.spec.num_parameters == sum(f.numel() for f in structure.decompose(dense))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (GLT(groups=(2,)), "two or more"),
        (GLT(groups=(2, 40)), "fewer"),
        (GLT(groups=(1, 1), widths=(17,)), "more than 16"),
        (GLT(groups=(1, 2), widths=(4, 4)), "give 1 whole numbers"),
        (KroneckerChain(depth=0), "below 1"),
        (KroneckerChain(in_modes=(2, 2, 8)), "two modes each"),
        (KroneckerChain(terms=300), "outside 1"),
    ],
)
def test_refusals(structure, message):
    with pytest.raises(ValueError, match=message):
        structure.resolve(16, 32)
