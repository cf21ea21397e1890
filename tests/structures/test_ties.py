"""Structures whose entries share numbers in a pattern: circulant, Toeplitz, diagonal, sparse."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import naming
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import structlin
from structlin import CirculantLinear, DiagonalLinear, SparseLinear, ToeplitzLinear
from structlin.equation.ties import Tie
from structlin.fitting.budget import within
from structlin.fitting.fit import fit
from structlin.layers.expert_linear import ExpertLinear, StructuredExpertLinear
from structlin.layers.linear import build
from structlin.runtime.contract import flops_by_pattern, tied
from structlin.runtime.ways import Direct
from structlin.structures import Circulant, Diagonal, LowRank, Sparse, Toeplitz, sum_of
from structlin.testing import assert_close

MEMBERS = [Circulant(), Circulant(block=5), Toeplitz(), Toeplitz(blocks=2), Diagonal(), Diagonal(blocks=3)]
SPARSE = [Sparse(count=30), Sparse(count=7, block=3)]
SIZES = [(12, 20), (16, 16), (20, 12), (7, 1)]

each = pytest.mark.parametrize("structure", [*MEMBERS, *SPARSE], ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def of_size(structure, in_features, out_features, **options):
    """Build the layer, or skip where the size is too small."""
    try:
        return build(structure, in_features, out_features, dtype=torch.float64, **options)
    except ValueError:
        pytest.skip("too small")


def test_entries_are_where_the_formulas_say():
    circulant = CirculantLinear(6, 4, dtype=torch.float64)
    toeplitz = ToeplitzLinear(6, 4, dtype=torch.float64)
    blocks = CirculantLinear(6, 4, block=2, dtype=torch.float64)
    for o in range(4):
        for i in range(6):
            assert circulant.to_dense()[o, i] == circulant.values[(o - i) % 6]
            assert toeplitz.to_dense()[o, i] == toeplitz.values[o - i + 5]
            assert blocks.to_dense()[o, i] == blocks.values[(o - i) % 2, o // 2, i // 2]
    diagonal = DiagonalLinear(6, 4, dtype=torch.float64)
    assert torch.equal(diagonal.to_dense(), F.pad(diagonal.values.flatten().diag(), (0, 2)))
    diagonal = DiagonalLinear(6, 4, blocks=2, dtype=torch.float64)
    assert torch.equal(diagonal.to_dense(), torch.block_diag(*diagonal.values))
    places = torch.tensor([[True, False, False], [False, True, True]])
    sparse = SparseLinear(3, 2, places=places, dtype=torch.float64)
    assert torch.equal(sparse.to_dense()[places], sparse.values.flatten())
    assert not sparse.to_dense()[~places].any()


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@pytest.mark.parametrize("structure", MEMBERS, ids=str)
def test_the_product_by_its_pattern_is_that_of_the_matrix(structure, in_features, out_features):
    layer = of_size(structure, in_features, out_features)
    way = Direct(layer.spec, 0.0)
    for shape in [(in_features,), (3, in_features), (2, 3, in_features), (0, in_features)]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        found, expected = way(x, layer.factors, layer.bias), F.linear(x, layer.to_dense(), layer.bias)
        assert_close(found, expected, "output", scale=1.0)
        inputs, seed = [x, *layer.parameters()], torch.randn_like(expected)
        pairs = zip(torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True)
        for actual, wanted in pairs:
            assert_close(actual, wanted, "gradient", scale=1.0)


def test_large_circulant_blocks_run_by_fft_and_small_ones_by_the_matrix():
    large, small = CirculantLinear(2048, 2048), CirculantLinear(16, 16)
    assert "by its pattern" in large.explain(16).splitlines()[0]
    assert "kept dense matrix" in small.explain(64)
    x = torch.randn(16, 2048)
    assert_close(large(x), F.linear(x, large.to_dense(), large.bias), "output")
    tiny = CirculantLinear(768, 768, block=2)  # 147,456 FFTs of the values: five times as long as its matrix takes
    assert "by its pattern" not in tiny.explain(1)
    assert flops_by_pattern(SparseLinear(16, 16, ratio=0.5).spec) is None  # no product but that of the matrix


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@each
def test_a_fit_is_optimal_in_the_norm_of_the_grams(structure, in_features, out_features):
    structure = of_size(structure, in_features, out_features).structure
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    x = torch.randn(64, in_features, dtype=torch.float64) @ torch.randn(in_features, in_features, dtype=torch.float64)
    y = torch.randn(64, out_features, dtype=torch.float64)
    for gram, output_gram in ((None, None), (x.T @ x, None), (x.T @ x, y.T @ y)):
        found = fit(weight, structure, gram=gram, output_gram=output_gram, refine=2000)
        g = torch.eye(in_features, dtype=torch.float64) if gram is None else gram
        h = torch.eye(out_features, dtype=torch.float64) if output_gram is None else output_gram
        values = found.factors[0].clone().requires_grad_()
        dense = tied_dense(found, values)
        gap = weight - dense
        (slope,) = torch.autograd.grad((h @ gap @ g * gap).sum(), values)
        (scale,) = torch.autograd.grad((h @ weight @ g * tied_dense(found, values)).sum(), values)
        assert slope.norm() <= 1e-4 * scale.norm()  # no direction of the values lowers the error


def tied_dense(found, values):
    return structlin.runtime.contract.to_dense(found.spec, [values])


def test_the_steps_never_make_a_fit_worse():
    weight, x = torch.randn(20, 12), torch.randn(200, 12) @ torch.randn(12, 12)
    errors = [fit(weight, Toeplitz(), gram=x.T @ x, refine=steps).output_error for steps in (0, 1, 3, 10, 100)]
    pairs = itertools.pairwise(errors)
    assert all(later <= (1 + 1e-6) * before for before, later in pairs)  # equal but for rounding at the end
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", ["circulant", "toeplitz", "diagonal", "sparse"])
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.03])
def test_a_ratio_finds_sizes(name, ratio):
    for in_features, out_features in ((96, 64), (384, 96), (61, 97)):
        found = within(structlin.structures.family(name), in_features, out_features, ratio)
        kept = max(structure.spec(in_features, out_features).ratio for structure in found)
        with naming(found, in_features, out_features):
            assert 0.65 * ratio <= kept <= 1.05 * ratio


def test_a_ratio_of_a_large_matrix_keeps_blocks():
    (structure,) = within(Sparse, 4096, 4096, 0.25)
    assert structure == Sparse(count=2**18, block=4)


def test_sparse_keeps_the_entries_that_matter_for_inputs_and_outputs():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])

    def kept(gram=None, output_gram=None, weight=weight):
        found = fit(weight, Sparse(count=2), gram=gram, output_gram=output_gram)
        return tied_dense(found, found.factors[0]).bool().int().flatten().tolist()

    assert kept() == [1, 1, 0, 0]
    assert kept(torch.diag(torch.tensor([1.0, 1.0, 1.0, 100.0]))) == [1, 0, 0, 1]
    assert kept(output_gram=torch.tensor([1.0, 100.0]), weight=torch.tensor([[4.0, 3.0], [2.0, 1.0]])) == [0, 0, 1, 1]


def test_given_places_are_kept():
    places = torch.tensor([[False, True], [True, False]])
    linear = nn.Linear(2, 2)
    layer = SparseLinear.from_linear(linear, places=places)
    assert torch.equal(layer.to_dense(), linear.weight * places)
    for given in (layer.structure.places, 3 * places):  # as a structure has them; numbers that are not 0
        assert SparseLinear.from_linear(linear, places=given).structure == layer.structure
        assert SparseLinear(2, 2, places=given).structure == layer.structure


def test_places_from_scratch_are_the_same_everywhere():
    assert torch.nonzero(tied.spread(64, 6)).flatten().tolist() == [12, 33, 41, 42, 44, 54]
    rows = tied.pattern(Tie("places", 512), 64, 64) < 512
    assert {int(rows.sum(axis).min()) for axis in (0, 1)} == {3}  # of 8: no row and no column goes without


def test_bits_survive_text():
    for count in (1, 7, 8, 65):
        kept = torch.rand(count) < 0.5
        assert torch.equal(tied.bits(tied.as_text(kept), count), kept)


def test_low_rank_and_sparse_is_a_sum_like_any_other():
    weight = 10 * torch.randn(32, 1) @ torch.randn(1, 24)
    weight[torch.rand(32, 24) < 0.1] += 5
    found, alone = (fit(weight, family, ratio=0.25, refine=100) for family in (sum_of(LowRank, Sparse), LowRank))
    assert found.error < 0.1 * alone.error


@pytest.mark.parametrize("name", ["circulant", "toeplitz", "diagonal", "sparse", "lowrank+sparse"])
def test_a_model_is_compressed_stored_and_loaded(name, tmp_path):
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2))
    skeleton, x = copy.deepcopy(model), torch.randn(64, 24)
    report = structlin.compress_model(model, name, ratio=0.25, calibration=[x], refine=20)
    assert report.model is model
    assert len(str(model)) < 3000  # places are not printed
    structlin.save(model, tmp_path / "out")
    loaded = structlin.load(skeleton, tmp_path / "out")
    assert torch.equal(loaded(x), model(x))


def test_experts_keep_the_same_places():
    linear = ExpertLinear(torch.randn(3, 8, 8))
    structure = Sparse(count=20).suited(torch.linalg.vector_norm(linear.weight.detach(), dim=0))
    fits = [fit(weight.detach(), structure) for weight in linear.weight]
    layer = StructuredExpertLinear.from_fits(fits, linear)
    kept = layer.to_dense() != 0
    assert torch.equal(layer.to_dense()[kept], linear.weight[kept])
    assert kept.sum() == 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CirculantLinear(4, 6, block=7), r"block=7 is outside 1\.\.6"),
        (lambda: ToeplitzLinear(4, 6, blocks=5), r"blocks=5 is outside 1\.\.4"),
        (lambda: DiagonalLinear(4, 6, blocks=5), r"blocks=5 is outside 1\.\.4"),
        (lambda: SparseLinear(2, 2), "ratio=None"),
        (lambda: SparseLinear(2, 2, ratio=1.5), r"ratio=1\.5"),
        (lambda: SparseLinear(2, 2, ratio=0.0), r"ratio=0\.0"),
        (lambda: SparseLinear(2, 2, ratio=0.5, count=2), "not several"),
        (lambda: SparseLinear(2, 2, count=5), r"count=5 is outside 1\.\.4"),
        (lambda: SparseLinear(2, 2, count=2, places="AA=="), "places keep 0 blocks, count=2"),
        (lambda: SparseLinear(2, 2, count=2, places="AAAA"), "3 B of places; 4 places take 1 B"),
        (lambda: SparseLinear(2, 2, ratio=0.5, block=0), r"block=0 is outside 1\.\.2"),
        (lambda: SparseLinear(2, 3, places=torch.ones(2, 3)), r"places have shape \(2, 3\); give \(3, 2\)"),
        (lambda: SparseLinear(2, 3, places=torch.ones(3, 2), block=2), r"give \(2, 1\), a place for each block of 2"),
        (lambda: SparseLinear.from_linear(nn.Linear(2, 3), places=torch.ones(2, 3)), r"give \(3, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@each
def test_places_that_an_export_finds_are_not_kept(structure):
    """What is computed under fake tensors is fake: a layer's first call may be an export."""
    layer, device = build(structure, 12, 20), torch.device("cpu")
    (factor,) = layer.spec.factors
    if factor.tie.once:
        pytest.skip("fake tensors do not know how many places there are")
    tied._found.cache_clear()
    with FakeTensorMode():
        tied._places(factor.tie, 20, 12, device)
    assert type(tied._places(factor.tie, 20, 12, device)) is torch.Tensor
