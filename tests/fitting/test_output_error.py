"""Fits in the norm of Grams: low rank in closed form, everything else by refinement, sums jointly."""

import dataclasses
import json
import math
import re
from collections import Counter

import pytest
import torch

from structlin import SumLinear
from structlin.equation.structure import from_record, registered, show, to_record
from structlin.fitting import refine as fit_refine
from structlin.fitting.budget import within
from structlin.fitting.fit import PACE, RACE, Run, fit
from structlin.fitting.objective import InputGram, make_objective
from structlin.fitting.refine import HALVINGS, HURRY, WARM_UP, WINDOW, Refinement, Schedule, low_rank_summand
from structlin.runtime.contract import to_dense
from structlin.runtime.planner import flops_per_token
from structlin.structures import (
    PHM,
    Blast,
    Kaleidoscope,
    Kronecker,
    LowRank,
    Monarch,
    Sum,
    TensorTrain,
    families,
    family,
    sum_of,
)

# Counted as the dense product, which torch.compile runs.
TIED = ("circulant", "toeplitz", "diagonal", "sparse")
every_structure = pytest.mark.parametrize("name", sorted(families()))


def gram_of(size, rank=None, dtype=torch.float64, seed=0):
    """A Gram with eigenvalues over six decades, of full or given rank."""
    torch.manual_seed(seed)
    rank = size if rank is None else rank
    x = torch.randn(2 * size, rank, dtype=dtype) * torch.logspace(0, -3, rank, dtype=torch.float64)
    x = x @ torch.randn(rank, size, dtype=dtype)
    return x.mT @ x.conj()


def output_error(weight, found, gram, metric=None):
    """sqrt(tr(H D G D^H) / tr(H W G W^H)), as the formula says."""
    dense = to_dense(found.spec, [factor.to(gram.dtype) for factor in found.factors])
    weight = weight.to(gram.dtype)
    metric = torch.eye(len(weight)).to(gram) if metric is None else metric
    error, total = (torch.trace(metric @ m @ gram @ m.mH).real.item() for m in (weight - dense, weight))
    return math.sqrt(max(error, 0) / total)


# The closed form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [None, 20, 5])
@pytest.mark.parametrize(("rows", "columns"), [(24, 32), (32, 24), (24, 24)])
def test_low_rank_is_the_singular_value_tail(rows, columns, rank, dtype):
    gram = gram_of(columns, rank, dtype)
    torch.manual_seed(1)
    weight = torch.randn(rows, columns, dtype=dtype)
    values, vectors = torch.linalg.eigh(gram)
    singular = torch.linalg.svdvals(weight @ (vectors * values.clamp_min(0).sqrt())).square()
    found = fit(weight, LowRank(6), gram=gram)
    expected = math.sqrt(singular[6:].sum().item() / singular.sum().item())
    assert found.output_error == pytest.approx(expected, abs=2e-6)
    assert output_error(weight, found, gram) == pytest.approx(expected, abs=2e-6)


def test_both_grams_low_rank_is_the_tail_of_both():
    gram, metric = gram_of(16), gram_of(12, seed=3)
    torch.manual_seed(1)
    weight = torch.randn(12, 16, dtype=torch.float64)
    metric = metric + 1e-3 * metric.diagonal().mean() * torch.eye(12)
    roots = [(vectors * values.clamp_min(0).sqrt()) for values, vectors in map(torch.linalg.eigh, (gram, metric))]
    singular = torch.linalg.svdvals(roots[1].mT @ weight @ roots[0]).square()
    found = fit(weight, LowRank(3), gram=gram, output_gram=metric)
    assert output_error(weight, found, gram, metric) == pytest.approx(
        math.sqrt(singular[3:].sum().item() / singular.sum().item()), rel=1e-3
    )
    assert found.output_error == pytest.approx(output_error(weight, found, gram, metric), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("metric", ["none", "diagonal", "full"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (40, 12), (20, 20)])
def test_low_rank_is_optimal_whatever_the_shape_and_the_grams(rows, columns, metric, singular, dtype):
    gram = gram_of(columns, columns // 2 if singular else None, dtype)
    full = gram_of(rows, dtype=dtype, seed=3) if metric == "full" else None
    full = torch.rand(rows).double() + 0.1 if metric == "diagonal" else full
    if metric == "full":
        full = full + 0.03 * full.diagonal().mean() * torch.eye(rows)
    weight = torch.randn(rows, columns, dtype=dtype)
    matrix = torch.eye(rows).to(dtype) if full is None else (full.diag() if full.ndim == 1 else full).to(dtype)
    values, vectors = torch.linalg.eigh(gram)
    scaled = torch.linalg.cholesky(matrix).mH @ weight @ (vectors * values.clamp_min(0).sqrt())
    singulars = torch.linalg.svdvals(scaled).square()
    expected = math.sqrt(singulars[4:].sum().item() / singulars.sum().item())
    found = fit(weight, LowRank(4), gram=gram, output_gram=full)
    assert found.output_error == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert output_error(weight, found, gram, matrix) == pytest.approx(expected, rel=1e-4, abs=2e-6)
    energy, directions = make_objective(weight, gram, full)[0].spectrum()
    tail = energy.clamp_min(0).flip(0)
    assert math.sqrt(tail[4:].sum().item() / tail.sum().item()) == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert directions.shape == (rows, len(energy))


def test_a_wide_layer_takes_no_root_and_one_eigenproblem_of_its_outputs(monkeypatch):
    sizes = []
    eigh, cholesky = torch.linalg.eigh, torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(len(m)) or eigh(m))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: sizes.append(len(m)) or cholesky(m))
    fit(torch.randn(8, 32), LowRank, ratio=0.5, gram=gram_of(32))
    assert sizes == [8]
    sizes.clear()
    fit(torch.randn(32, 8), LowRank, ratio=0.5, gram=InputGram.of(gram_of(8), 0.03))
    assert sizes == [8, 8]  # Cholesky, and the smaller side of the outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("rank", [None, 5])
def test_a_root_of_a_gram(dtype, rank):
    gram = gram_of(16, rank, torch.complex128 if dtype.is_complex else torch.float64)
    found = InputGram.of(gram.to(dtype), 0.01 if rank is None else 0.0)
    expected = gram / gram.diagonal().real.mean() + (0.01 * torch.eye(16, dtype=torch.float64) if rank is None else 0)
    assert found.root.dtype == dtype
    tolerance = 1e-5 if dtype in (torch.float32, torch.complex64) else 1e-12
    torch.testing.assert_close(found.root.mT @ found.root.conj(), expected.to(dtype), rtol=0, atol=16 * tolerance)


def test_grams_with_a_graph_get_no_gradients():
    rows, columns = torch.randn(20, 6, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    for output_gram in (rows.mT @ rows, rows.square().sum(0)):
        gram = columns.mT @ columns
        fit(torch.randn(6, 8), Blast(blocks=2, rank=2), gram=gram, output_gram=output_gram, refine=3)
    assert rows.grad is None
    assert columns.grad is None


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_a_zero_gram_counts_as_none(shape):
    weight, zero = torch.randn(shape), torch.zeros(shape[1], shape[1])
    found, plain = fit(weight, LowRank(3), gram=zero), fit(weight, LowRank(3))
    assert InputGram.of(zero) is None
    assert found.output_error is None
    assert all(torch.equal(a, b) for a, b in zip(found.factors, plain.factors, strict=True))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_products_with_a_gram_in_float32_give_the_same_errors(shape):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(100, shape[1]) * torch.logspace(0, -2, shape[1])
    narrow, exact = (InputGram.of((x.mT @ x).to(dtype), 0.03) for dtype in (torch.float32, torch.float64))
    single, double = (fit(weight, LowRank(12), gram=gram) for gram in (narrow, exact))
    assert make_objective(weight, narrow)[0].targets.dtype == torch.float64
    assert single.output_error == pytest.approx(double.output_error, rel=1e-5)
    assert make_objective(weight, exact)[0].relative_error(
        to_dense(single.spec, single.factors) / make_objective(weight)[1]
    ) == pytest.approx(double.output_error, rel=1e-5)


def test_the_low_rank_part_of_a_refined_sum_is_solved_for_in_float64():
    torch.manual_seed(0)
    weight, gram = torch.randn(24, 48), gram_of(48)
    exact, _ = make_objective(weight, gram)
    structure = Sum((LowRank(12), Monarch(blocks=2))).resolve(48, 24)
    spec, single = structure.spec(48, 24), exact.to(torch.float32)
    start = [factor.float() for factor in structure.decompose(exact.weight)]
    refinement = Refinement(spec, start, single, 20)
    refinement.advance()
    single, double = (
        exact.relative_error(to_dense(spec, [f.double() for f in refinement.result(objective)]))
        for objective in (None, exact)
    )
    assert double < single


def test_row_weights_protect_their_rows_and_equal_a_diagonal_matrix():
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    weights = torch.ones(16)
    weights[3] = 1e6
    found, same = fit(weight, LowRank(2), output_gram=weights), fit(weight, LowRank(2), output_gram=weights.diag())
    plain = fit(weight, LowRank(2))
    errors = [(to_dense(f.spec, f.factors) - weight)[3].norm() for f in (found, plain)]
    assert errors[0] < 1e-2 * errors[1]
    assert torch.equal(found.factors[0], same.factors[0])


# Every structure -----------------------------------------------------------------------------------------------------


@every_structure
def test_output_error_is_what_it_says_and_lower_than_that_of_the_plain_fit(name):
    gram = gram_of(48)
    torch.manual_seed(1)
    weight = torch.randn(64, 48)
    found = fit(weight, family(name), ratio=0.6, gram=gram, refine=100)
    plain = fit(weight, family(name), ratio=0.6, refine=0)
    assert found.output_error == pytest.approx(output_error(weight, found, gram), rel=1e-4)
    assert found.output_error < 0.9 * output_error(weight, plain, gram)
    short, again = (fit(weight, family(name), ratio=0.6, gram=gram, refine=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(short.factors, again.factors, strict=True))


@every_structure
def test_a_wide_range_of_scales_changes_nothing(name):
    gram = gram_of(32)
    torch.manual_seed(1)
    weight = torch.randn(24, 32)
    plain, other = (fit(weight, family(name), ratio=0.7, gram=gram * s, refine=3) for s in (1, 1e-200))
    assert other.output_error == pytest.approx(plain.output_error, rel=1e-3)


def degenerate(k):
    """One of many bad Grams and weights."""
    torch.manual_seed(k)
    rows, columns = (int(size) for size in torch.randint(16, 40, (2,)))
    gram = [
        lambda: gram_of(columns, seed=k),
        lambda: gram_of(columns, 1, seed=k),
        lambda: gram_of(columns, 3, seed=k) * 1e30,
        lambda: gram_of(columns, seed=k) * 1e-30,
        lambda: torch.zeros(columns, columns),
        lambda: torch.diag((torch.arange(columns) == 2).double()),
    ][k % 6]()
    weight = [
        lambda: torch.randn(rows, columns),
        lambda: torch.zeros(rows, columns),
        lambda: torch.randn(rows, 1) @ torch.randn(1, columns),
        lambda: torch.randn(rows, columns) * 1e30,
        lambda: torch.randn(rows, columns) * 1e-30,
    ][k % 5]()
    return weight, gram


@pytest.mark.parametrize("k", range(30))
def test_degenerate_grams_and_weights(k):
    """Each structure meets each of 6 Grams and 5 weights; low rank, by its closed form, all pairs of the two."""
    weight, gram = degenerate(k)
    some = [name for number, name in enumerate(sorted(families())) if (k % 6 + k % 5 + number) % 5 == 0]
    for name in {*some, "lowrank"}:
        found = fit(weight, family(name), ratio=0.9, gram=gram, refine=5)
        assert all(torch.isfinite(factor).all() for factor in found.factors)
        assert math.isfinite(found.error)
        assert 0 <= (found.output_error or 0) < 1.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gram": torch.eye(3)}, r"gram has shape \(3, 3\); this weight needs \(8, 8\)"),
        ({"gram": InputGram.of(torch.eye(3))}, r"gram has shape \(3, 3\); this weight needs \(8, 8\)"),
        ({"output_gram": torch.ones(8)}, r"output_gram has shape \(8,\); this weight needs \(6, 6\) or \(6,\)"),
        ({"gram": torch.full((8, 8), math.nan)}, "gram holds NaN or infinite values; collect it in float64"),
        ({"gram": -torch.eye(8)}, "gram has -1 on its diagonal; give sum x x^H"),
        (
            {"gram": torch.eye(8) + torch.ones(8, 8).triu(1)},
            "gram is not Hermitian: it differs from its adjoint by 1 of",
        ),
        ({"gram": torch.ones(8, 8).triu(1) - torch.ones(8, 8).tril(-1)}, "gram is not Hermitian"),
        ({"gram": torch.ones(8, 8) - torch.eye(8)}, "gram has negative eigenvalues; give sum x x^H"),
        ({"gram": 1.9 * torch.eye(8) - 0.9}, "a Gram has negative eigenvalues"),
        ({"output_gram": 1.9 * torch.eye(6) - 0.9}, "Gram has negative eigenvalues"),
        ({"output_gram": torch.tensor([1.0, 1, -2, 1, 1, 1])}, "output_gram has -2 on its diagonal"),
        ({"gram": torch.eye(8, dtype=torch.int64)}, "gram has dtype torch.int64; use a float or complex one"),
    ],
)
def test_bad_grams(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message) if "^" in message else message):
        fit(torch.randn(*((8, 8) if "a Gram" in message else (6, 8))), LowRank(2), **arguments)


def test_an_output_gram_with_rounded_eigenvalues_below_zero():
    """A singular float32 H whose rounding errors exceed the ridge: its root was cut, and `solve` refused it."""
    torch.manual_seed(0)
    metric = torch.ones(6, 6) + 1e-4 * torch.randn(6, 6).triu()
    metric = metric.triu() + metric.triu(1).T
    assert torch.linalg.eigvalsh(metric)[0] < -1e-5
    found = fit(torch.randn(6, 8), LowRank(2), output_gram=metric)
    assert found.output_error < 0.1


def test_fits_work_under_inference_mode():
    with torch.inference_mode():
        weight, gram = torch.randn(6, 8), torch.eye(8)
        inside = fit(weight, TensorTrain(rank=2), gram=gram, output_gram=torch.ones(6), refine=5)
    outside = fit(weight.clone(), TensorTrain(rank=2), gram=gram.clone(), output_gram=torch.ones(6), refine=5)
    assert not any(factor.is_inference() for factor in inside.factors)
    assert all(torch.equal(a, b) for a, b in zip(inside.factors, outside.factors, strict=True))


# Refinement ----------------------------------------------------------------------------------------------------------


def start(structure, weight, gram=None):
    out_features, in_features = weight.shape
    resolved = structure.resolve(in_features, out_features)
    objective, _ = make_objective(weight, gram)
    factors = [factor.float() for factor in resolved.decompose(objective.weight)]
    return resolved.spec(in_features, out_features), factors, objective.to(torch.float32)


def test_an_eliminated_low_rank_part_is_at_its_best():
    torch.manual_seed(0)
    weight, gram = torch.randn(32, 24), gram_of(24)
    both = fit(weight, Sum((LowRank(3), LowRank(4))), gram=gram, refine=300)
    assert both.output_error == pytest.approx(fit(weight, LowRank(7), gram=gram).output_error, rel=1e-2)


@pytest.mark.parametrize("rate", [1.0, 1e3])
def test_whatever_the_learning_rate_it_is_never_worse_than_its_start(rate):
    torch.manual_seed(0)
    spec, factors, objective = start(Sum((LowRank(2), Kaleidoscope(width=2))), torch.randn(32, 32), gram_of(32))
    refinement = Refinement(spec, factors, objective, 40, learning_rate=rate)
    before = refinement.error
    after = refinement.advance()
    assert after <= before
    dense = to_dense(spec, refinement.result())
    assert objective.relative_error(dense) <= before * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("parts", "metric"), [((Blast(2, 4),), False), ((LowRank(2), Kaleidoscope()), True)])
@pytest.mark.parametrize(("out_features", "rows"), [(16, 32), (16, 12), (32, 32)])  # by the Gram; by its rows; by rows
def test_the_error_of_a_refinement_is_that_of_its_factors(dtype, parts, metric, out_features, rows):
    torch.manual_seed(0)
    weight, inputs = torch.randn(out_features, 32, dtype=dtype), torch.randn(rows, 32, dtype=dtype)
    outputs = gram_of(out_features, dtype=dtype) if metric else None
    objective, _ = make_objective(weight, inputs.mT @ inputs.conj(), outputs)
    resolved = (Sum(parts) if len(parts) > 1 else parts[0]).resolve(32, out_features)
    spec = resolved.spec(32, out_features)
    refinement = Refinement(spec, resolved.decompose(objective.weight), objective, 30)
    before = refinement.error
    for _ in range(2):  # at the start and at the end
        dense = to_dense(spec, refinement.result())
        assert refinement.error == pytest.approx(objective.relative_error(dense), rel=1e-3)  # the basis is iterated
        refinement.advance()
    assert refinement.error < 0.99 * before


def test_it_stops_at_the_floor_and_hurries_on_a_plateau():
    torch.manual_seed(0)
    left, right = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    member = torch.einsum("tab,tcd->acbd", left, right).reshape(16, 16)
    refinement = Refinement(*start(Kronecker(terms=2, shape=((4, 4), (4, 4))), member), 1000)
    refinement.advance()
    assert refinement.steps_taken < 10
    refinement = Refinement(*start(Kronecker(terms=1, shape=((4, 4), (4, 4))), torch.randn(16, 16)), 1000)
    refinement.advance()
    assert refinement.steps_taken < 500


def test_a_low_rank_and_the_rest_do_not_grow_to_cancel(monkeypatch):
    # Without a bound the K-matrix ends at 4 to 10 times the weight, and the low rank at as much against it.
    structure = Sum(parts=(LowRank(rank=1), Kaleidoscope())).resolve(16, 16)
    spec = structure.spec(16, 16)
    rest = dataclasses.replace(spec, equations=spec.equations[1:])
    for seed, gram in ((0, None), (2, None), (0, gram_of(16))):
        torch.manual_seed(seed)
        weight = torch.randn(16, 16)
        sizes = []
        for largest in (math.inf, 2.0):
            monkeypatch.setattr(fit_refine, "LARGEST", largest)
            fitted = fit(weight, structure, gram=gram, refine=400)
            objective, scale = make_objective(weight, gram)
            part = to_dense(rest, [factor.double() for factor in fitted.factors[2:]]) / scale
            sizes.append(objective.error(part) / objective.total)
        assert sizes[0] > 3
        assert sizes[1] < 2.4


def test_the_schedule_warms_up_and_decays_to_zero():
    schedule, fades = Schedule(steps=200, rate=1.0), []
    while not schedule.ended:
        fades.append(schedule.fade())
        schedule.step(error=0.5 ** len(fades))
    assert schedule.taken == len(fades) == 200
    assert fades[0] == pytest.approx(1 / WARM_UP, rel=1e-3)
    assert fades.index(max(fades)) == WARM_UP - 1
    assert fades[100] == pytest.approx(0.5)
    assert fades[-1] < 1e-3


def test_the_schedule_halves_warms_up_again_and_gives_up():
    schedule = Schedule(steps=1000, rate=2.0)
    for _ in range(50):
        schedule.step(1.0)
    place = schedule.position
    schedule.halve()
    assert (schedule.rate, schedule.position, schedule.taken) == (1.0, place, 50)
    assert schedule.fade() < 1.01 / WARM_UP
    for _ in range(HALVINGS - 1):
        assert not schedule.ended
        schedule.halve()
    assert schedule.ended


@pytest.mark.parametrize(("gain", "stride"), [(0.01, 1.0), (1e-6, HURRY)])
def test_the_schedule_hurries_on_a_plateau(gain, stride):
    schedule = Schedule(steps=1000, rate=1.0)
    for k in range(3 * WINDOW):
        schedule.step((1 - gain) ** k)
    assert schedule.stride == stride
    assert schedule.position == (2 * WINDOW + WINDOW * stride if stride > 1 else 3 * WINDOW)


def test_low_rank_summands_are_recognised():
    def summand(structure, size=16):
        return low_rank_summand(structure.resolve(size, size).spec(size, size))

    assert summand(LowRank(2)) == 0
    assert summand(Sum((Kaleidoscope(), LowRank(2)))) == 1
    assert summand(Sum((Kaleidoscope(), Monarch(blocks=2)))) is None
    assert summand(Kronecker(terms=2)) is None


def test_a_gram_in_its_own_form_gives_the_same():
    gram = gram_of(16)
    weight = torch.randn(8, 16)
    by_root, by_gram = (fit(weight, LowRank(3), gram=given) for given in (InputGram.of(gram), gram))
    assert torch.equal(by_root.factors[0], by_gram.factors[0])


# Sums ----------------------------------------------------------------------------------------------------------------


def test_low_rank_and_kmatrix_beats_both_on_noise_plus_low_rank():
    torch.manual_seed(0)
    weight = torch.randn(64, 64) + torch.randn(64, 3) @ torch.randn(3, 64)
    errors = {name: fit(weight, family(name), ratio=0.6).error for name in ("lowrank", "kmatrix")}
    assert fit(weight, sum_of(LowRank, Kaleidoscope), ratio=0.6).error < min(errors.values())


def test_a_sum_of_three_with_padding_recovers_its_members():
    torch.manual_seed(0)
    parts = (LowRank(1), Monarch(blocks=2), Kronecker(terms=1))
    layer = SumLinear(13, 9, parts=parts)
    found = fit(layer.to_dense().detach(), Sum(parts), refine=1500)
    assert found.error < 0.05


def test_several_classes_give_the_best_of_them():
    torch.manual_seed(0)
    weight = torch.kron(torch.randn(8, 8), torch.randn(8, 8))
    found = fit(weight, [LowRank, Kronecker], ratio=0.5)
    assert found.structure.name == "kronecker"
    assert found.error < 1e-6


FAMILIES = [LowRank, sum_of(LowRank, Kaleidoscope), sum_of(LowRank, Blast)]


def test_the_winner_of_a_race_goes_on_from_where_it_stands(monkeypatch):
    torch.manual_seed(0)
    weight, gram, steps = torch.randn(48, 64), gram_of(64), []
    step = Refinement._step

    def counted(self):
        before = self.steps_taken
        step(self)
        steps.extend([self.spec] * (self.steps_taken - before))  # none if it diverged

    monkeypatch.setattr(Refinement, "_step", counted)
    found = fit(weight, FAMILIES, ratio=0.6, gram=gram)
    raced = Counter(steps)
    steps.clear()
    alone = fit(weight, found.structure, gram=gram)
    assert all(torch.equal(a, b) for a, b in zip(found.factors, alone.factors, strict=True))
    assert raced.pop(found.spec) == len(steps)
    assert sorted(raced.values()) == [RACE] * (len(raced) - 1) + [PACE[1]]
    assert found.output_error <= min(fit(weight, LowRank, ratio=0.6, gram=gram).output_error, alone.output_error)


def test_the_expected_error_of_a_run_extrapolates_its_pace():
    class Refined:  # falls as exp(-3 progress) from 2
        finished, schedule = False, Schedule(400, 1.0)

        @property
        def progress(self):
            return self.schedule.progress

        @property
        def error(self):
            return 2 * math.exp(-3 * self.progress)

        def advance(self, until):
            self.schedule.position = until
            return self.error

    run = Run(LowRank(2), None, (), None, Refined())
    assert run.expected() == pytest.approx(2 * math.exp(-3))
    assert run.refinement.schedule.position == PACE[1]


def test_the_progress_of_a_schedule_is_the_share_of_its_learning_rates():
    schedule = Schedule(1000, 1.0, warm_from=-WARM_UP)
    rates = []
    while not schedule.ended:
        rates.append(schedule.fade())
        schedule.step(1.0 / len(rates))
        assert schedule.progress == pytest.approx(sum(rates) / 500, abs=2e-3)


def test_sums_as_records_and_in_words():
    structure = Sum((LowRank(3), Kaleidoscope(width=2))).resolve(16, 16)
    assert from_record(json.loads(json.dumps(to_record(structure)))) == structure
    assert show(structure) == ("lowrank(rank=3) + kmatrix(width=2, expansion=1, in_modes=(4, 4), out_modes=(4, 4))")
    assert registered()["sum"] is Sum
    assert "sum" not in families()


def test_bad_sums():
    with pytest.raises(ValueError, match="fewer than two structures"):
        Sum((LowRank(1),)).resolve(8, 8)
    with pytest.raises(ValueError, match=r"a ratio finds no sizes; use 'a\+b', or give parts="):
        within(Sum, 64, 64, 0.5)
    with pytest.raises(TypeError, match="parts="):
        Sum(("lowrank", "kmatrix"))


@pytest.mark.parametrize(("blocks", "rank"), [(0, 1), (9, 1), (2, 0), (2, 9)])
def test_bad_blast(blocks, rank):
    with pytest.raises(ValueError, match=r"is outside 1\.\.8"):
        Blast(blocks=blocks, rank=rank).resolve(8, 12)


# Budgets -------------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("ratio", [0.4, 0.8])
def test_budget_of_flops(name, ratio):
    try:
        found = within(family(name), 96, 128, ratio, "flops")
    except ValueError as error:
        assert re.search("of its flops or fewer", str(error))  # noqa: PT017
        assert name in ("phm", "tt", "kmatrix", "lowrank+kmatrix", *TIED)
        return
    flops = [flops_per_token(structure.spec(96, 128)) for structure in found]
    assert max(flops) <= 2 * ratio * 96 * 128
    assert max(flops) > ratio * 96 * 128 or name == "phm"


def test_budget_of_bytes_counts_constants():
    assert within(PHM, 64, 64, 0.3)
    assert within(LowRank, 64, 64, 0.5, "bytes") == within(LowRank, 64, 64, 0.5)
    with pytest.raises(ValueError, match="budget='time' is unknown; use one of"):
        within(LowRank, 64, 64, 0.5, "time")
