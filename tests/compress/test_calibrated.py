"""Compression with calibration: output errors, auto, global budgets, sequential compensation, quality."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import structlin
from structlin import Statistics, collect_statistics, compress_model, plan_compression
from structlin.compress import fit_layers, units, workers
from structlin.compress.allocate import LEFT, WHOLE, Share, _Curve, allocate
from structlin.compress.config import AUTO, Choice
from structlin.compress.data import Data
from structlin.compress.evaluate import Evaluator
from structlin.compress.fit_layers import Purse
from structlin.compress.gradients import sampled_loss
from structlin.compress.observe import replaced
from structlin.compress.patched import Patched, model_passes, model_runs
from structlin.compress.plan import dense_entry
from structlin.compress.report import Report
from structlin.compress.sequential import shifted
from structlin.compress.targets import find_targets
from structlin.fitting.fit import fit
from structlin.fitting.objective import make_objective
from structlin.structures import Blast, Kaleidoscope, LowRank, Sum

# Independent fits to the inputs of the dense model.
PLAIN = {"output_metric": False, "sequential": False, "block_epochs": 0, "allocation": "uniform"}


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)
    ).eval()


def batches(count, seed=1):
    """Inputs on a few directions, mostly."""
    torch.manual_seed(7)
    mixing = torch.randn(32, 32) * torch.logspace(0, -2, 32)
    torch.manual_seed(seed)
    return [torch.randn(50, 32) @ mixing.T for _ in range(count)]


def observed(model, data):
    return Data(collect_statistics(model, data[1:]), tuple(data[1:]), tuple(data[:1]))


def changed(report):
    return [row for row in report.layers if row.structure]


def distance(model, other, data):
    with torch.no_grad():
        return sum((model(x) - other(x)).square().sum().item() for x in data) ** 0.5


# Calibration ---------------------------------------------------------------------------------------------------------


def test_calibrated_low_rank_keeps_the_outputs_better(mlp):
    plain, calibrated = (copy.deepcopy(mlp) for _ in range(2))
    compress_model(plain, "lowrank", ratio=0.4)
    report = compress_model(calibrated, "lowrank", ratio=0.4, calibration=batches(10), **PLAIN)
    assert distance(calibrated, mlp, batches(4, seed=2)) < 0.7 * distance(plain, mlp, batches(4, seed=2))
    statistics = collect_statistics(mlp, batches(10)[:5] + batches(10)[6:])  # one batch is held back
    for row in changed(report):
        assert row.output_error is not None
        target = next(t for t in find_targets(mlp) if t.name == row.name)
        expected = fit(target.linear.weight, LowRank(rank_of(row)), gram=statistics.shrunken(row.name)).output_error
        assert row.output_error == pytest.approx(expected, rel=0.05)
    assert "output error" in str(report)


def rank_of(row):
    return int(row.structure.removeprefix("lowrank(rank=").removesuffix(")"))


def test_statistics_and_batches_give_the_same(mlp):
    data = batches(10)
    first, second = (copy.deepcopy(mlp) for _ in range(2))
    compress_model(first, "lowrank", ratio=0.5, calibration=data, validation=data[:1], **PLAIN)
    compress_model(second, "lowrank", ratio=0.5, calibration=collect_statistics(mlp, data))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):  # batches are summed in float64
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_shrunken_grams_are_computed_once(mlp):
    statistics = collect_statistics(mlp, batches(3))
    assert statistics.shrunken("2") is statistics.shrunken("2")


def test_layers_without_tokens_are_fitted_plainly(mlp):
    seen = collect_statistics(mlp, batches(2))
    first = next(iter(seen.tokens))
    statistics = Statistics({**seen.grams, first: torch.zeros_like(seen.grams[first])}, {**seen.tokens, first: 0})
    report = compress_model(mlp, "lowrank", ratio=0.5, calibration=statistics)
    assert {row.name for row in changed(report) if row.output_error is None} == {first}


NAN, HOLLOW = torch.full((32, 32), math.nan), torch.ones(32, 32) - torch.eye(32)


@pytest.mark.parametrize("entry", [compress_model, plan_compression])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: replaced_gram(s, NAN), "layer '0': grams holds NaN or infinite values"),
        (lambda s: replaced_gram(s, HOLLOW), "layer '0': grams has negative eigenvalues"),
        (lambda s: replaced_gram(s, 1.5 * torch.eye(32) - 0.5), "layer '0': grams has negative eigenvalues"),
        (lambda s: replaced_gram(s, -torch.eye(32)), "layer '0': grams has -1 on its diagonal"),
        (lambda s: replaced_gram(s, torch.ones(32, 32).triu()), "layer '0': grams is not Hermitian"),
        (lambda s: replaced_gram(s, torch.eye(31)), r"layer '0': grams of shape \(31, 31\); it needs \(32, 32\)"),
        (lambda s: replaced_gram(s, torch.ones(32)), r"layer '0': grams of shape \(32,\); it needs \(32, 32\)"),
        (lambda s: Statistics(s.grams, s.tokens, {"0": torch.eye(3)}), r"layer '0': output_grams of shape \(3, 3\)"),
        (lambda s: Statistics(s.grams, s.tokens, {"0": -torch.ones(64)}), "layer '0': output_grams has -1 on its"),
        (lambda s: Statistics(s.grams, {**s.tokens, "0": -3}), "layer '0': tokens=-3; give the number of inputs"),
        (lambda s: Statistics(s.grams, {}), "its tokens and its Gram matrices have different names"),
        (
            lambda s: Statistics({f"0.{n}": g for n, g in s.grams.items()}, {f"0.{n}": t for n, t in s.tokens.items()}),
            r"the statistics lack 3 of 3 layers to be compressed, such as \['0', '2', '4'\]; they know \['0.0', '0.2'",
        ),
        (lambda s: Statistics({}, {}), r"the statistics lack 3 of 3 layers .* they are empty"),
        (
            lambda s: Statistics({"0": s.grams["0"]}, {"0": s.tokens["0"]}),
            r"lack 2 of 3 layers .* such as \['2', '4'\]",
        ),
        (lambda s: Statistics(s.grams, dict.fromkeys(s.tokens, 0)), "saw no input: there was no batch"),
    ],
)
def test_statistics_that_nobody_collected_from_this_model(mlp, entry, make, message):
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    bad = make(collect_statistics(mlp, batches(2)))
    with pytest.raises(ValueError, match=message):
        entry(mlp, "lowrank", ratio=0.5, calibration=bad)
    assert before.keys() == mlp.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


class Listed(nn.Module):
    """Runs its first layer by way of a plain list, the second by a bound method kept from before, the third plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(32, 32) for _ in range(4))
        self.plain, self.kept = [self.a], self.b.forward

    def forward(self, x):
        return self.head(self.c(self.kept(self.plain[0](x))))


@pytest.mark.parametrize("count", [1, 3])
def test_layers_that_still_run_dense_are_named(count):
    model = Listed()
    with pytest.warns(
        UserWarning, match=r"still runs the dense weights of 2 layers \(a, b\): it holds the old modules"
    ):
        report = compress_model(model, "lowrank", ratio=0.5, calibration=batches(count))
    assert {row.name for row in report.layers if row.bypassed} == {"a", "b"}
    assert "still runs the dense weights" in str(report)
    assert not any(row.bypassed for row in compress_model(Listed(), "lowrank", ratio=0.5).layers)  # nothing has run


def replaced_gram(statistics, gram):
    return Statistics({**statistics.grams, "0": gram}, statistics.tokens)


def test_dead_inputs_are_fitted_plainly(mlp):
    """A layer behind units that never fire has a zero Gram of many tokens, which says nothing of its weight."""
    report = compress_model(mlp, "lowrank", ratio=0.5, calibration=collect_statistics(mlp, [torch.zeros(5, 32)]))
    assert next(row for row in changed(report) if row.name == "0").output_error is None


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (torch.ones(3, 32), TypeError, "calibration is a Tensor; give Statistics or an iterable of batches"),
        ([], ValueError, "calibration holds no batch"),
    ],
)
def test_bad_calibration(mlp, calibration, error, message):
    with pytest.raises(error, match=message):
        compress_model(mlp, "lowrank", ratio=0.5, calibration=calibration)


def test_one_batch_in_place_of_several_is_refused(mlp):
    one = r"(validation|batches) is a Tensor; give an iterable of batches, for one batch \[batch\]"
    for call in (
        lambda x: compress_model(mlp, "lowrank", ratio=0.5, calibration=batches(2), validation=x),
        lambda x: collect_statistics(mlp, x),
        lambda x: Evaluator(mlp, x),
    ):
        with pytest.raises(TypeError, match=one):
            call(torch.ones(3, 32))
    assert type(mlp[0]) is nn.Linear


# Auto ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [True, False])
def test_auto_is_never_worse_than_low_rank(mlp, calibrated):
    given = {"calibration": collect_statistics(mlp, batches(10))} if calibrated else {}
    reports = {
        name: compress_model(copy.deepcopy(mlp), name, ratio=0.6, refine=60, **given) for name in ("auto", "lowrank")
    }
    for auto, low_rank in zip(changed(reports["auto"]), changed(reports["lowrank"]), strict=True):
        measure = "output_error" if calibrated else "error"
        assert getattr(auto, measure) <= getattr(low_rank, measure) * (1 + 1e-5)
        assert auto.parameters_after <= 0.606 * auto.parameters_before
    assert any("+" in row.structure for row in changed(reports["auto"]))


def test_auto_in_a_rule_and_its_errors(mlp):
    report = compress_model(mlp, None, rules={"2": {"structure": "auto", "ratio": 0.5}}, refine=5)
    assert [row.name for row in changed(report)] == ["2"]
    with pytest.raises(ValueError, match="'auto' needs a ratio"):
        compress_model(mlp, "auto")
    with pytest.raises(ValueError, match="'auto' finds its sizes from a ratio"):
        compress_model(mlp, None, rules={"4": {"structure": "auto", "rank": 3}})


# Plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_keeps_its_fits_until_the_weight_changes(mlp, monkeypatch):
    plan = plan_compression(mlp, "auto", ratio=0.6, refine=5, calibration=collect_statistics(mlp, batches(4)))
    assert structlin.CompressionPlan.from_json(plan.to_json()) == plan
    calls = []
    monkeypatch.setattr(fit_layers, "fit", lambda *a, **k: calls.append(a) or fit(*a, **k))
    compress_model(copy.deepcopy(mlp), plan)
    assert not calls
    with torch.no_grad():
        mlp[0].weight += 0.1
    report = compress_model(mlp, plan)
    assert len(calls) == 1
    assert len(changed(report)) == 3


# Global budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lowrank", "auto"])
def test_global_allocation_meets_the_budget(mlp, name):
    before = copy.deepcopy(mlp.state_dict())
    plan = plan_compression(mlp, name, ratio=0.5, refine=5, calibration=batches(10), allocation="global")
    assert all(torch.equal(value, before[key]) for key, value in mlp.state_dict().items())
    kept = [entry for entry in plan.entries if entry.structure]
    dense = sum(entry.parameters_before for entry in kept)
    assert len(kept) == 3
    smallest = min(entry.in_features + entry.out_features for entry in kept)  # what one rank more costs
    assert 0.5 * dense - smallest < sum(entry.parameters_after for entry in kept) <= 0.5 * dense


def test_what_a_layer_cannot_use_the_next_one_gets(mlp):
    ratios = {"0": 0.5, "2": 0.5, "4": 1.0}
    purse = Purse(ratios)
    first, second, third = (t for t in find_targets(mlp) if t.name in ratios)
    given = Choice(LowRank, 0.3)
    choice = purse.choice(first, given, 1)
    assert choice.ratio == 0.5
    entry = replace(dense_entry(first, None), structure=LowRank(8))  # 8 * 96 of the 1024 parameters
    purse.settle([entry])
    assert purse.spare == 256
    assert purse.choice(second, given, 2).ratio == pytest.approx(0.5 + 128 / 4096)
    assert purse.choice(third, given, 1) == "the allocation leaves it dense"
    assert purse.choice(second, "a reason", 1) == "a reason"


def test_large_layers_of_a_shape_race_once(mlp, monkeypatch):
    first, *_ = find_targets(mlp)
    entry = replace(dense_entry(first, None), structure=Sum((LowRank(4), Kaleidoscope())))
    given = Choice(AUTO, 0.5)
    purse = Purse({}, winners={})
    assert purse.choice(first, given, 1) == given
    purse.settle([replace(entry, structure=LowRank(4))])
    assert purse.choice(first, given, 1) == given  # a closed form is no winner
    purse.settle([entry])
    assert purse.choice(first, given, 1) == given  # small ones race each time
    monkeypatch.setattr(fit_layers, "SMALL", first.linear.weight.numel() - 1)
    purse.settle([entry])
    assert purse.choice(first, given, 1).structure == (AUTO[0], AUTO[1])
    purse.settle([replace(entry, structure=Sum((LowRank(4), Blast(4, 2))))])
    assert purse.choice(first, given, 1).structure == (AUTO[0], AUTO[1])  # the first to win remains
    assert purse.choice(first, Choice(AUTO[2:], 0.5), 1).structure == AUTO[2:]
    assert purse.choice(first, Choice(LowRank, 0.5), 1).structure is LowRank
    other = SimpleNamespace(name="other", linear=nn.Linear(3, 5))
    assert purse.choice(other, given, 1) == given
    assert Purse({}).choice(first, given, 1) == given


def test_allocation_spends_all_and_favours_what_matters(mlp):
    with torch.no_grad():
        mlp[4].weight *= 1e-3  # what layer 2 does hardly reaches the output then; layer 4's outputs are near linear
        mlp[2].weight[1:] = mlp[2].weight[:1]  # rank 1
    data = observed(mlp, batches(10))
    shares = [Share(target, 0.5) for target in find_targets(mlp) if target.name in ("0", "2", "4")]
    evaluator = Evaluator(mlp, batches(1, seed=3))
    modules = list(mlp)

    def moved(answers):
        assert list(mlp) == modules  # planning never swaps
        with replaced(answers):
            return evaluator.distance(mlp)

    data = replace(data, statistics=collect_statistics(mlp, data.batches, loss=sampled_loss))
    ratios = allocate(shares, data, moved)
    sizes = {share.target.name: share.target.linear.weight.numel() for share in shares}
    assert sum(ratios[name] * sizes[name] for name in sizes) == pytest.approx(0.5 * sum(sizes.values()), rel=5e-3)
    assert ratios["2"] < 0.5 < max(ratios["0"], ratios["4"])


def test_no_division_is_taken_that_moves_the_outputs_more(mlp):
    data = observed(mlp, batches(10))
    shares = [Share(target, 0.5) for target in find_targets(mlp) if target.name in ("0", "2", "4")]
    ranks = []

    def moved(answers):
        ranks.append({name for name, child in mlp.named_children() if child in answers})
        return float(len(ranks))  # the first trial, all layers alike, moves them least

    assert allocate(shares, data, moved) == {"0": 0.5, "2": 0.5, "4": 0.5}
    assert ranks == [{"0", "2", "4"}] * 5  # without a loss only slopes are tried


@pytest.mark.parametrize(("given", "trials"), [(0.8, 9), (0.5, 7)])
def test_early_or_late_errors_count_more_at_large_ratios(mlp, given, trials):
    data = batches(10)
    data = replace(observed(mlp, data), statistics=collect_statistics(mlp, data, loss=sampled_loss))
    shares = [Share(target, given) for target in find_targets(mlp) if target.name in ("0", "2", "4")]
    tried = []

    def taken(number):
        tried.clear()
        return allocate(shares, data, lambda answers: tried.append(answers) or float(len(tried) != number))

    *_, early, late = [taken(number) for number in range(1, trials + 1)]
    assert len(tried) == trials
    assert (early["0"] > late["0"] and early["4"] < late["4"]) == (given > WHOLE)


@pytest.mark.parametrize("given", [0.8, 0.5])
def test_stand_ins_leave_the_share_of_the_error_that_the_division_expects(mlp, given):
    data = observed(mlp, batches(10))
    for target in find_targets(mlp):
        curve = _Curve.of(Share(target, given), data)
        grams = data.grams(target.name)
        objective, scale = make_objective(target.linear.weight, *grams)
        for ratio in (0.3, 0.7, 0.9):
            (answer,) = set(curve.answers(ratio).values())
            left = objective.relative_error(answer.weight.detach().double() / scale)
            assert left**2 == pytest.approx(LEFT**2 * curve.error(ratio), rel=1e-3, abs=1e-9)
            rank = max(1, int(ratio * target.linear.weight.numel() / sum(target.linear.weight.shape)))
            best = fit(target.linear.weight, LowRank(rank), gram=grams[0], output_gram=grams[1])
            least = best.minimised**2
            expected = 0.85 * (1 - ratio) * least if given > units.MOST else least**1.5
            assert curve.error(ratio) == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert curve.error(1.0) == 0.0
        assert not curve.answers(1.0)
    assert units.MOST == WHOLE


def test_loss_gradients_weigh_the_layers(mlp):
    loss = lambda y, batch: y.square().sum()  # noqa: E731
    data = batches(10)
    for output in ("full", "diagonal"):
        statistics = collect_statistics(mlp, data, loss=loss, output=output)
        report = compress_model(
            copy.deepcopy(mlp), "lowrank", ratio=0.5, calibration=statistics, validation=data[:2], allocation="global"
        )
        assert report.ratio <= 0.505  # a coarse family may take 1 % more


def test_global_allocation_needs_batches(mlp):
    with pytest.raises(ValueError, match="allocation='global' is checked from end to end: pass calibration as two"):
        plan_compression(
            mlp, "lowrank", ratio=0.5, allocation="global", calibration=collect_statistics(mlp, batches(2))
        )
    with pytest.raises(ValueError, match="allocation='best' is unknown; use 'auto', 'uniform' or 'global'"):
        plan_compression(mlp, "lowrank", ratio=0.5, allocation="best")


@pytest.mark.parametrize("budget", ["flops", "bytes"])
def test_other_budgets(mlp, budget):
    report = compress_model(mlp, "kronecker", ratio=0.5, budget=budget)
    for row in changed(report):
        assert row.flops_after <= 0.5 * row.flops_before or budget == "bytes"
        assert row.parameters_after <= 0.5 * row.parameters_before or budget == "flops"


# Sequential compensation ---------------------------------------------------------------------------------------------


def test_sequential_compensation_is_closer_and_leaves_the_first_layer_alone(mlp):
    data = batches(20)
    first, second = (copy.deepcopy(mlp) for _ in range(2))
    compress_model(first, "lowrank", ratio=0.4, calibration=data, **PLAIN)
    report = compress_model(second, "lowrank", ratio=0.4, calibration=data, **PLAIN | {"sequential": True})
    assert distance(second, mlp, data) < 0.95 * distance(first, mlp, data)
    assert [row.name for row in report.layers] == ["0", "2", "4", "6"]
    assert type(second[6]) is nn.Linear
    torch.testing.assert_close(second[0].weight, first[0].weight, rtol=1e-3, atol=1e-4)


def test_the_shifted_weight_is_the_regression(mlp):
    data = batches(5)
    proxy = copy.deepcopy(mlp[0])
    with torch.no_grad():
        proxy.weight *= 0.7
    target = next(t for t in find_targets(mlp) if t.name == "2")
    patched = Patched(mlp, {}, {mlp[0]: proxy})
    passes = model_passes(patched, model_runs(mlp, data, None), [None] * 5)
    wanted, _ = shifted([target], passes, 0.03, towards=1.0)["2"]
    near, _ = shifted([target], passes, 0.03, towards=0.25)["2"]
    torch.testing.assert_close(near, mlp[2].weight + 0.25 * (wanted - mlp[2].weight), rtol=1e-4, atol=1e-5)
    x = torch.cat([mlp[1](mlp[0](batch)) for batch in data]).double()
    other = torch.cat([mlp[1](proxy(batch)) for batch in data]).double()
    shrinkage = 0.03 * other.square().sum() / 64
    stacked = torch.cat([other, shrinkage.sqrt() * torch.eye(64)])
    weight = mlp[2].weight.double()
    expected = torch.linalg.lstsq(stacked, torch.cat([x, shrinkage.sqrt() * torch.eye(64)]) @ weight.T).solution.T
    torch.testing.assert_close(wanted.double(), expected, rtol=1e-3, atol=1e-4)


def test_sequential_failures_change_nothing(mlp, monkeypatch):
    before = copy.deepcopy(mlp)
    with pytest.raises(ValueError, match="pass calibration as batches"):
        compress_model(mlp, "lowrank", ratio=0.5, sequential=True)
    count = iter(range(2))
    monkeypatch.setattr(fit_layers, "fit", lambda *a, **k: [next(count), fit(*a, **k)][1])
    with pytest.raises(RuntimeError, match="the model is unchanged"):
        compress_model(mlp, "lowrank", ratio=0.5, calibration=batches(4), sequential=True)
    assert all(type(a) is type(b) for a, b in zip(mlp, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), before.parameters(), strict=True))


# Quality -------------------------------------------------------------------------------------------------------------


def test_report_carries_task_fidelity_and_size_before_and_after_healing(mlp):
    teacher = copy.deepcopy(mlp)
    data = batches(20)

    def evaluate(model):
        return -distance(model, teacher, data[:2])

    evaluator = Evaluator(mlp, data[:2], evaluate=evaluate)
    report = compress_model(mlp, "lowrank", ratio=0.4, calibration=data[2:], evaluate=evaluator, **PLAIN)
    dense, compressed = report.qualities
    assert (dense.stage, dense.task, dense.size) == ("dense", 0, 1)
    assert dense.cosine == pytest.approx(1, abs=1e-5)
    assert compressed.task < 0
    assert compressed.cosine < 1
    assert compressed.size == pytest.approx(report.parameters_after / report.parameters_before)
    structlin.heal(mlp, teacher, data, steps=100, lr=3e-3, progress=False)
    healed = report.measure("healed", evaluator)
    assert len(healed.qualities) == 3
    assert healed.qualities[2].task > compressed.task
    assert healed.qualities[2].cosine > compressed.cosine
    assert "healed: size" in str(healed)
    assert '"qualities"' in healed.to_json()


class Logits(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, attention_mask=None):
        return {"logits": self.body(x)}


def test_models_with_logits_get_kl_and_agreement(mlp):
    model = Logits(mlp)
    data = [{"x": x.reshape(5, 10, 32), "attention_mask": torch.ones(5, 10)} for x in batches(4)]
    data[0]["attention_mask"][:, 5:] = 0
    teacher = copy.deepcopy(model)
    report = compress_model(model, "lowrank", ratio=0.4, calibration=data, validation=data)
    quality = report.qualities[1]
    kl, same, count = 0.0, 0, 0
    for batch in data:
        kept = batch["attention_mask"].bool()
        p, q = (m(batch["x"])["logits"][kept].log_softmax(-1) for m in (teacher, model))
        kl += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += int(kept.sum())
    assert quality.kl == pytest.approx(kl / count, rel=1e-4)
    assert quality.top1 == pytest.approx(same / count, abs=1e-6)
    assert quality.cosine is None


def test_a_report_keeps_no_batches_and_no_grams(mlp):
    data = batches(6)
    statistics = collect_statistics(mlp, data)
    evaluate = Task()
    report = compress_model(
        mlp, "auto", ratio=0.5, calibration=statistics, validation=data, evaluate=evaluate, refine=5
    )
    assert len(report.qualities) == 2
    tensors = [*data, *statistics.grams.values()]
    references = [weakref.ref(tensor) for tensor in tensors] + [weakref.ref(evaluate)]
    del data, statistics, tensors, evaluate
    gc.collect()
    assert [reference for reference in references if reference() is not None] == []
    assert isinstance(report, Report)


class Task:
    def __call__(self, model):
        return 1.0


def test_complex_outputs_are_compared():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.complex64) for _ in range(3)))
    given = list(torch.randn(6, 20, 16, dtype=torch.complex64))
    evaluator = Evaluator(copy.deepcopy(model), given)
    report = compress_model(model, "auto", ratio=0.5, calibration=given, refine=2, skip_last=False)
    assert all(row.output_error < 1 for row in report.layers)
    assert 0.5 < report.qualities[-1].cosine < 1
    assert all(block.after < block.before for block in report.blocks)
    found = evaluator(model, "compressed").cosine
    model.register_forward_hook(lambda _module, _inputs, y: -y)
    assert evaluator(model, "turned").cosine == pytest.approx(-found, abs=1e-5)


def test_a_report_without_batches_has_no_quality(mlp):
    assert compress_model(mlp, "lowrank", ratio=0.5).qualities == ()


# Threads -------------------------------------------------------------------------------------------------------------


def test_threads_change_neither_results_nor_settings(mlp):
    models = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            models.append(copy.deepcopy(mlp))
            compress_model(models[-1], "auto", ratio=0.6, refine=20, calibration=collect_statistics(mlp, batches(3)))
            assert torch.get_num_threads() == count
        with pytest.raises(ZeroDivisionError):
            list(workers.each(lambda k: 1 // k, [1, 1, 0, 1]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert math.isfinite(distance(*models, batches(1)))
