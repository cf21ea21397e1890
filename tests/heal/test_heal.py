"""heal: distillation of a compressed model towards its teacher, its limits, its file, and what it leaves alone."""

import copy
import json
import math
import sys
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import structlin
from structlin import StructuredLinear, compress_model, distillation_loss, freeze_
from structlin.heal import HealReport, HealStep, heal
from structlin.heal.run import learning_rate

STEPS = {"steps": 12, "every": 4, "lr": 1e-2}


class StopHereError(Exception):
    """What a test raises in the middle."""


class Net(nn.Module):
    """Blocks, a norm, dropout, running statistics and an output that can be of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.running = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.dropout(self.running(self.norm(x)))) * scale


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= 3  # otherwise the biases alone give most of the output
    return model


@pytest.fixture
def student(teacher):
    model = copy.deepcopy(teacher)
    compress_model(model, "lowrank", ratio=0.5)
    return model


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Net()
    student = copy.deepcopy(teacher)
    compress_model(student, "lowrank", ratio=0.5)
    return student, teacher


def data(count=8, rows=32, features=24, seed=1):
    """Batches in a subspace, which a fit of the weights alone knows nothing of."""
    subspace = torch.randn(6, features, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 6, generator=generator) @ subspace / 6**0.5 for _ in range(count)]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def distance(student, teacher, batches):
    with torch.no_grad():
        expected = torch.cat([teacher(x) for x in batches])
        return ((torch.cat([student(x) for x in batches]) - expected).norm() / expected.norm()).item()


def wrapped(make):
    """Give the output of both models another form."""
    return lambda model, batch: make(model(batch))


def failing_at(count):
    """A loss that raises at its count-th call with gradients."""
    calls = []

    def loss(found, expected, batch):
        if torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == count:
                raise StopHereError
        return distillation_loss(found, expected, batch)

    return loss


# What it does --------------------------------------------------------------------------------------------------------


def test_distance_to_the_teacher_shrinks_on_new_data(student, teacher):
    held_back = data(seed=2)
    before = distance(student, teacher, held_back)
    untouched = state_of(teacher)
    report = heal(student, teacher, data(40), steps=200, lr=5e-3)
    assert distance(student, teacher, held_back) < 0.5 * before
    assert report.loss_after < 0.25 * report.loss_before
    assert same_state(teacher, untouched)
    assert isinstance(student[0], StructuredLinear)


def test_report(student, teacher):
    report = heal(student, teacher, data(), steps=10, every=4, validation=data(2, seed=2))
    assert isinstance(report, HealReport)
    assert (report.steps, report.stopped, report.validated) == (10, "steps", True)
    assert report.trained == sum(p.numel() for p in student.parameters())
    assert [row.step for row in report.history] == [4, 8, 10]
    assert all(isinstance(row, HealStep) and row.loss > 0 and row.validation > 0 for row in report.history)
    assert 0 < report.history[0].seconds < report.history[-1].seconds <= report.seconds
    assert report.loss_after == min(row.validation for row in report.history) < report.loss_before
    content = json.loads(report.to_json())
    assert content["history"][1]["step"] == 8
    assert content["loss_after"] == report.loss_after
    first, second = str(report).splitlines()
    assert first.startswith(f"healed {report.trained:,} parameters in 10 steps, ")
    assert second == f"loss on validation batches: {report.loss_before:.4g} -> {report.loss_after:.4g}"


def test_losses_without_validation_are_on_the_first_four_batches(student, teacher):
    batches = data()

    def mean():
        with torch.no_grad():
            return sum(distillation_loss(student(x), teacher(x), x).item() for x in batches[:4]) / 4

    before = mean()
    report = heal(student, teacher, batches, steps=6)
    assert report.loss_before == pytest.approx(before)
    assert report.loss_after == pytest.approx(mean())
    assert report.history[-1].validation is None
    assert "first training batches" in str(report)


def test_blocks_are_drawn_to_the_teachers(pair):
    student, teacher = pair
    hooks = [len(module._forward_hooks) for model in pair for module in model.modules()]
    before = state_of(student)
    report = heal(student, teacher, data(features=16), mode="blocks", blocks="blocks.*", steps=60, lr=1e-2)
    assert report.loss_after < 0.5 * report.loss_before
    assert [len(module._forward_hooks) for model in pair for module in model.modules()] == hooks
    assert torch.equal(student.head.weight, before["head.weight"])  # it comes after the last block
    assert not torch.equal(student.blocks[0][0].left, before["blocks.0.0.left"])


def test_block_loss_is_the_mean_of_the_relative_squared_errors(pair):
    student, teacher = pair
    batches = data(1, features=16)
    outputs = []
    for model in pair:
        for name in ("blocks.0", "blocks.2"):
            module = model.get_submodule(name)
            module.register_forward_hook(lambda _m, _i, output: outputs.append(output.detach()), always_call=True)
    for model in pair:
        model.eval()(batches[0])
    ours, theirs = outputs[:2], outputs[2:]
    expected = sum(((a - b).norm() / b.norm()) ** 2 for a, b in zip(ours, theirs, strict=True)) / 2
    options = {"mode": "blocks", "blocks": ["blocks.0", "blocks.2*"], "steps": 1}
    report = heal(copy.deepcopy(student), teacher, batches, **options)
    assert report.loss_before == pytest.approx(expected.item())
    both = heal(student, teacher, batches, **options, loss=distillation_loss)
    end = heal(copy.deepcopy(student), copy.deepcopy(teacher), batches, steps=1).loss_before
    assert both.loss_before > report.loss_before
    assert end > 0


def test_factors_norms_and_biases_only(pair):
    student, teacher = pair
    before = state_of(student)
    heal(student, teacher, data(features=16), steps=5, parameters="factors", lr=1e-2)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    biases = {"running.bias", "head.bias", "norm.weight", "norm.bias", "running.weight"}
    layers = {f"blocks.{k}.0.{factor}" for k in range(3) for factor in ("left", "right", "bias")}
    assert changed == biases | layers


def test_factors_are_scales_where_they_are_integers(student, teacher):
    structlin.train_scales_(structlin.quantize_(student, "int8").model)
    before = state_of(student)
    heal(student, teacher, data(), steps=3, parameters="factors", lr=1e-2)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    scales = {name for name in before if name.endswith(".scale")}
    assert scales
    assert scales <= changed


def test_predicate_chooses_and_frozen_stays_frozen(student, teacher):
    before = state_of(student)
    student[0].bias.requires_grad_(False)
    wanted = []

    def loss(found, expected, batch):
        wanted.extend(name for name, parameter in student.named_parameters() if parameter.requires_grad)
        return distillation_loss(found, expected, batch)

    heal(student, teacher, data(), steps=3, parameters=lambda name, parameter: parameter.ndim == 1, loss=loss)
    assert set(wanted) == {"2.bias", "4.bias"}
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.bias", "4.bias"}


def test_equal_seeds_give_equal_results(student, teacher):
    twin = copy.deepcopy(student)
    dataset = TensorDataset(torch.cat(data()))
    results = []
    for model in (student, twin):
        torch.manual_seed(3)
        loader = DataLoader(dataset, batch_size=32, shuffle=True)
        results.append(heal(model, teacher, loader, epochs=2))
    assert same_state(student, state_of(twin))
    assert results[0].loss_after == results[1].loss_after


def test_optimizer_of_the_caller_follows_the_schedule(student, teacher):
    rates = []

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    heal(student, teacher, data(), steps=40, optimizer=make)
    assert rates == pytest.approx([0.1 * learning_rate((k + 0.5) / 40) for k in range(40)])
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[0] < 0.03
    assert rates[-1] < 0.001


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_heal_as_others_do(student, teacher, make):
    """Their steps leave the version counters of the parameters alone; measurements between them run in eval."""
    reports = [
        heal(
            copy.deepcopy(student), teacher, data(), validation=data(2, seed=2), steps=20, every=5,
            optimizer=lambda parameters, fused=fused: make(parameters, lr=3e-3, fused=fused),
        )
        for fused in (False, True)
    ]  # fmt: skip
    plain, fused = [[step.validation for step in report.history] for report in reports]
    assert plain[-1] < plain[0]
    assert fused == pytest.approx(plain, rel=1e-4)


def test_schedule():
    assert learning_rate(0) == 0.02
    assert learning_rate(0.025) == pytest.approx(0.5)
    assert learning_rate(0.05) == 1
    assert learning_rate(0.525) == pytest.approx(0.5)
    assert learning_rate(1) == learning_rate(1.5) == pytest.approx(0, abs=1e-12)


# What it leaves alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_hooks_are_restored(pair, fails):
    student, teacher = pair
    student.norm.eval()
    teacher.blocks[1].eval()
    student.blocks[0].requires_grad_(False)
    student.head.bias.grad = gradient = torch.ones(4)
    untouched = state_of(teacher)
    flags = [(m.training, len(m._forward_hooks)) for model in pair for m in model.modules()]
    wanted = [p.requires_grad for model in pair for p in model.parameters()]
    options = {**STEPS, "mode": "blocks", "blocks": "blocks.*", "loss": failing_at(3 if fails else -1)}
    if fails:
        with pytest.raises(StopHereError):
            heal(student, teacher, data(features=16), **options)
    else:
        heal(student, teacher, data(features=16), **options)
    assert [(m.training, len(m._forward_hooks)) for model in pair for m in model.modules()] == flags
    assert [p.requires_grad for model in pair for p in model.parameters()] == wanted
    assert student.head.bias.grad is gradient
    assert torch.equal(gradient, torch.ones(4))
    assert all(p.grad is None for model in pair for p in model.parameters() if p is not student.head.bias)
    assert same_state(teacher, untouched)


def test_dropout_is_off_and_running_statistics_stay(pair):
    student, teacher = pair
    before = state_of(student)
    twin = copy.deepcopy(student)
    for model in (student.train(), twin.eval()):
        heal(model, teacher, data(features=16), **STEPS)
    assert same_state(student, state_of(twin))
    assert torch.equal(student.running.running_mean, before["running.running_mean"])


def test_frozen_parameters_may_be_shared_with_the_teacher(student, teacher):
    student[4] = teacher[4]
    untouched = state_of(teacher)
    with pytest.raises(ValueError, match=r"the student's '4\.weight' is the teacher's '4\.weight'"):
        heal(student, teacher, data(), steps=3)
    heal(student, teacher, data(), steps=3, parameters=lambda name, _: not name.startswith("4"))
    assert same_state(teacher, untouched)
    assert teacher[4].weight.requires_grad


def test_it_trains_where_gradients_are_off(student, teacher):
    with torch.no_grad():
        report = heal(student, teacher, data(), **STEPS)
    assert report.loss_after < report.loss_before


# Limits and validation -----------------------------------------------------------------------------------------------


def test_validation_is_never_worse_than_at_the_start(student, teacher):
    before = state_of(student)
    report = heal(student, teacher, data(), steps=20, every=5, lr=10.0, validation=data(2, seed=2))
    assert all(row.validation > report.loss_before for row in report.history)
    assert report.loss_after == report.loss_before
    assert report.best_step == 0
    assert same_state(student, before)
    assert "the weights of step 0 are kept" in str(report)


def test_best_weights_are_kept(student, teacher):
    held_back, calls = data(2, seed=2), []

    def away_after_ten(found, expected, batch):
        calls.extend([0] * torch.is_grad_enabled())
        return distillation_loss(found, expected, batch) * (-1 if torch.is_grad_enabled() and len(calls) > 10 else 1)

    report = heal(student, teacher, data(), steps=30, every=1, validation=iter(held_back), loss=away_after_ten)
    assert 8 <= report.best_step <= 20
    assert report.loss_after == min(row.validation for row in report.history)
    with torch.no_grad():
        again = sum(distillation_loss(student(x), teacher(x), x).item() for x in held_back) / 2
    assert again == pytest.approx(report.loss_after, rel=1e-6)


@pytest.mark.parametrize("given", [{"validation": data(2, seed=2)}, {"held_back": 0.25}], ids=["given", "held back"])
def test_patience(student, teacher, given):
    report = heal(student, teacher, data(), steps=100, every=2, lr=10.0, patience=3, **given)
    assert report.stopped == "patience"
    assert report.steps == 6


def test_seconds(student, teacher):
    report = heal(student, teacher, data(), seconds=0.3)
    assert report.stopped == "seconds"
    assert report.steps >= 2
    assert report.seconds >= 0.3
    assert report.loss_after < report.loss_before


def test_epochs(student, teacher):
    report = heal(student, teacher, data(5), epochs=3)
    assert (report.stopped, report.steps) == ("epochs", 15)
    assert heal(student, teacher, data(5), epochs=3, steps=4).stopped == "steps"


def test_iterator_that_runs_out_says_so(student, teacher):
    report = heal(student, teacher, iter(data(3)), steps=10)
    assert (report.stopped, report.steps) == ("batches", 3)


def test_non_finite_loss_restores_the_best_weights(student, teacher):
    weights = []

    def loss(found, expected, batch):
        if torch.is_grad_enabled():
            weights.append(state_of(student))
        return distillation_loss(found, expected, batch) * (math.nan if len(weights) == 7 else 1)

    with pytest.raises(RuntimeError, match=r"the training loss is nan at step 6; .* weights of step 4 again"):
        heal(student, teacher, data(), **{**STEPS, "steps": 100}, loss=loss)
    assert same_state(student, weights[4])
    assert not same_state(student, weights[6])


def constant(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_non_finite_gradient_and_validation(student, teacher):
    before = state_of(student)
    with pytest.raises(RuntimeError, match=r"the gradient's norm is (nan|inf) at step 0; .* weights of step 0 again"):
        heal(student, teacher, data(), steps=3, loss=lambda a, _b, _batch: (a * 0).abs().sqrt().sum())
    with pytest.raises(RuntimeError, match="the loss on the validation batches is nan before the first step"):
        heal(student, teacher, data(), steps=3, validation=[torch.full((2, 24), math.nan)])
    with pytest.raises(RuntimeError, match="the loss on the first training batches is inf before the first step"):
        heal(student, teacher, data(), steps=3, loss=lambda a, _b, _batch: a.sum() * 0 + math.inf)
    assert same_state(student, before)


# Interruption --------------------------------------------------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """An optimizer whose state holds a number, a tuple and None besides tensors."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["pair"] = (parameter.detach().mean(), None)
                parameter.data.add_(state["pair"][0], alpha=1e-3 * state["seen"] / group["count"])


OPTIMIZERS = {
    "default": None,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "amsgrad": lambda p: torch.optim.Adam([{"params": p[:2]}, {"params": p[2:], "lr": 1e-3}], lr=1e-2, amsgrad=True),
    "custom": lambda p: Averaging(p, lr=0.05, momentum=0.9),
}


def shuffled(generator=None, sampler=None):
    dataset = TensorDataset(torch.cat(data(5)))
    order = None if sampler is None else RandomSampler(dataset, generator=sampler)
    return DataLoader(dataset, 32, shuffle=sampler is None, sampler=order, generator=generator)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize(
    ("source", "optimizer"),
    [
        ("shuffled", "default"),
        ("shuffled", "sgd"),
        ("shuffled", "amsgrad"),
        ("shuffled", "custom"),
        ("list", "default"),
        ("own generator", "default"),
        ("own sampler", "default"),
        ("iterator", "default"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(student, teacher, tmp_path, optimizer, validated, source):
    def run(model, loss, checkpoint, seed=5):
        torch.manual_seed(seed)
        sources = {
            "list": lambda: data(5),
            "shuffled": shuffled,
            "own generator": lambda: shuffled(torch.Generator().manual_seed(6)),
            "own sampler": lambda: shuffled(sampler=torch.Generator().manual_seed(6)),
            "iterator": lambda: iter(data(30)),
        }

        def noisy(found, expected, batch):  # draws from the generator that shuffles
            return loss(found + 1e-3 * torch.randn_like(found), expected, batch)

        return heal(
            model, teacher, sources[source](), steps=14, every=4, lr=1e-2, optimizer=OPTIMIZERS[optimizer], loss=noisy,
            validation=data(2, seed=2) if validated else None, checkpoint=checkpoint,
        )  # fmt: skip

    whole, resumed = copy.deepcopy(student), copy.deepcopy(student)
    expected = run(whole, distillation_loss, None)
    path = tmp_path / "new" / "heal.state"
    for count in (7, 6):  # fails in steps 6 and, resumed at 4, in step 9
        with pytest.raises(StopHereError):
            run(resumed, failing_at(count), path, seed=5 if count == 7 else 8)
        resumed = copy.deepcopy(student)
    report = run(resumed, distillation_loss, path, seed=9)
    assert same_state(resumed, state_of(whole))
    assert (report.steps, report.stopped, report.best_step) == (14, "steps", expected.best_step)
    for name in ("loss_before", "loss_after"):
        assert getattr(report, name) == getattr(expected, name)
    assert [row[::2] for row in report.history] == [row[::2] for row in expected.history]
    assert [row.validation for row in report.history] == [row.validation for row in expected.history]
    assert [file.name for file in path.parent.iterdir()] == ["heal.state"]


def test_best_weights_come_through_an_interruption(student, teacher, tmp_path):
    before, resumed = state_of(student), copy.deepcopy(student)
    options = {**STEPS, "lr": 10.0, "validation": data(2, seed=2), "checkpoint": tmp_path / "heal"}
    with pytest.raises(StopHereError):
        heal(student, teacher, data(), **options, loss=failing_at(10))
    assert same_state(student, before)  # the best so far
    report = heal(resumed, teacher, data(), **options)
    assert report.best_step == 0
    assert same_state(resumed, before)


def test_patience_is_counted_across_an_interruption(student, teacher, tmp_path):
    options = {"steps": 100, "every": 2, "lr": 10.0, "validation": data(2, seed=2), "patience": 3}
    with pytest.raises(StopHereError):
        heal(copy.deepcopy(student), teacher, data(), **options, checkpoint=tmp_path / "heal", loss=failing_at(5))
    report = heal(student, teacher, data(), **options, checkpoint=tmp_path / "heal")
    assert (report.stopped, report.steps, report.best_step) == ("patience", 6, 0)


def test_finished_run_is_not_trained_again_but_can_go_on(student, teacher, tmp_path):
    options = {**STEPS, "validation": data(2, seed=2), "checkpoint": tmp_path / "heal"}
    start = copy.deepcopy(student)
    first = heal(student, teacher, data(), **options)
    again = copy.deepcopy(start)
    second = heal(again, teacher, data(), **options, loss=failing_at(1))
    assert same_state(again, state_of(student))
    assert second.history == first.history
    third = heal(copy.deepcopy(start), teacher, data(), **{**options, "steps": 20})
    assert third.steps == 20
    assert third.history[:3] == first.history
    assert third.loss_after <= first.loss_after


class Wide(torch.optim.SGD):
    """An optimizer whose moment is wider than its parameter."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter, dtype=torch.float64))
            moment.mul_(0.9).add_(parameter.grad.double(), alpha=self.param_groups[0]["lr"])
            parameter.data.copy_(parameter.data.double() - moment)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_other_dtypes_and_wider_moments_keep_their_bits(dtype, tmp_path):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight += 0.1
    options = {**STEPS, "optimizer": None if dtype.is_complex else lambda p: Wide(p, lr=0.03)}
    batches = [torch.randn(4, 8, dtype=dtype) for _ in range(3)]
    whole, resumed = copy.deepcopy(student), copy.deepcopy(student)
    heal(whole, teacher, batches, **options)
    with pytest.raises(StopHereError):
        heal(resumed, teacher, batches, **options, checkpoint=tmp_path / "heal", loss=failing_at(6))
    heal(resumed, teacher, batches, **options, checkpoint=tmp_path / "heal")
    assert same_state(resumed, state_of(whole))
    assert not same_state(student, state_of(whole))


def test_no_code_in_the_file_is_run(student, teacher, tmp_path):
    path = tmp_path / "heal"
    heal(copy.deepcopy(student), teacher, data(), **STEPS, checkpoint=path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "about": Output}, path)  # a class of this module
    with pytest.raises(ValueError, match=r"not a checkpoint of .*heal; delete it to start again"):
        heal(student, teacher, data(), **STEPS, checkpoint=path)


def test_checkpoint_of_another_healing_is_refused(student, teacher, tmp_path):
    path = tmp_path / "heal"
    heal(copy.deepcopy(student), teacher, data(), **STEPS, checkpoint=path)
    other = copy.deepcopy(teacher)
    compress_model(other, "lowrank", ratio=0.25)
    before = state_of(other)
    with pytest.raises(ValueError, match=r"0\.left is \(48, 4\) torch.float32 .* in the file \(48, 8\) torch.float32"):
        heal(other, teacher, data(), **STEPS, checkpoint=path)
    dense = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=r"0\.weight is .* in the file missing; .*\(and \d+ more\)"):
        heal(dense, teacher, data(), **STEPS, checkpoint=path)
    for options, text in (
        ({"optimizer": constant}, "the optimizer is SGD, in the file AdamW"),
        ({"parameters": "factors"}, r"4\.weight is .* not trained, in the file .* trained as number 6 of group 0"),
        ({"validation": data(1)}, "validated is True, in the file False"),
        ({"mode": "blocks", "blocks": "0"}, "mode is blocks, in the file end; blocks is 0, in the file None"),
        (
            {"optimizer": lambda p: torch.optim.AdamW(p[::-1])},
            r"0\.left is .* number 7 .*, in the file .* number 0 of",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            heal(copy.deepcopy(student), teacher, data(), **STEPS, checkpoint=path, **options)
    twin = copy.deepcopy(student)
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"batches ends after 3 batches; the checkpoint has read 4"):
        heal(twin, teacher, data(3), **STEPS, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert same_state(twin, state_of(student))
    assert same_state(other, before)


def test_damaged_checkpoint_is_refused(student, teacher, tmp_path):
    path = tmp_path / "heal"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"not a checkpoint of .*heal; delete it to start again"):
        heal(student, teacher, data(), **STEPS, checkpoint=path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of"):
        heal(student, teacher, data(), **STEPS, checkpoint=path)
    torch.save({"about": {"the format": "99"}}, path)
    with pytest.raises(ValueError, match=r"the format is 4, in the file 99.* or delete it"):
        heal(student, teacher, data(), **STEPS, checkpoint=path)
    with pytest.raises(ValueError, match="is not a file"):
        heal(student, teacher, data(), **STEPS, checkpoint=tmp_path)


def test_a_file_of_any_damage_changes_nothing(student, teacher, tmp_path):
    path, made = tmp_path / "heal", []
    options = {**STEPS, "checkpoint": path, "optimizer": lambda p: made.append(torch.optim.Adam(p)) or made[-1]}
    heal(copy.deepcopy(student), teacher, data(), **options)
    whole, before, generator = path.read_bytes(), state_of(student), torch.get_rng_state()
    for cut in (whole[:-1], whole[:-90], whole[: len(whole) // 2], whole[:100], b""):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"damaged, or not a checkpoint of this version of heal; delete it"):
            heal(student, teacher, data(), **options)
        assert path.read_bytes() == cut
        assert made[-1].state == {}
    assert same_state(student, before)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", ["file/heal", "x" * 300, "/proc/nobody/heal"])
def test_a_checkpoint_that_cannot_be_written_is_found_before_the_first_step(student, teacher, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    before = state_of(student)
    with pytest.raises(OSError, match=r"the checkpoint cannot be written: .*(heal|xxx)"):
        heal(student, teacher, data(), **STEPS, checkpoint=tmp_path / name)
    assert same_state(student, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of resources")
def test_a_full_disk_names_the_file_and_leaves_the_old_one(student, teacher, tmp_path):
    import resource

    path = tmp_path / "heal"
    heal(copy.deepcopy(student), teacher, data(), **STEPS, checkpoint=path)
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
        with pytest.raises(OSError, match=r"the checkpoint cannot be written: File too large.*heal"):
            heal(student, teacher, data(), **{**STEPS, "steps": 16}, checkpoint=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["heal"]


class Breaking(list):
    """A loader that raises in the middle of its second pass."""

    def __init__(self, batches, error):
        super().__init__(batches)
        self.error, self.passes = error, 0

    def __iter__(self):
        self.passes += 1
        yield from self[:2] if self.passes > 1 else self[:]
        if self.passes > 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopHereError(), OSError("the file server is gone")])
def test_an_interruption_restores_the_best_weights(student, teacher, error):
    before, options = state_of(student), {**STEPS, "validation": data(2, seed=2)}
    with pytest.raises(type(error)):
        heal(student, teacher, Breaking(data(), error), **{**options, "lr": 10.0})
    assert same_state(student, before)
    with pytest.raises(type(error)):
        heal(student, teacher, Breaking(data(), error), **options)
    best = state_of(student)
    assert not same_state(student, before)
    with pytest.raises(type(error)):
        heal(student, teacher, Breaking(data(), error), **STEPS)  # no validation: as it is
    assert not same_state(student, best)


def test_float16_is_healed_by_the_default_optimizer(student, teacher):
    student, teacher = student.half(), teacher.half()
    report = heal(student, teacher, [x.half() for x in data(40)], steps=100, lr=2e-3, every=20)
    assert report.loss_after < 0.7 * report.loss_before


def test_healing_works_under_inference_mode(student, teacher):
    with torch.inference_mode():
        report = heal(student, teacher, data(), **STEPS)
        made = nn.Linear(24, 8)
        with pytest.raises(ValueError, match=r"only frozen ones|under torch.inference_mode, and can never be trained"):
            heal(made, teacher, data(), **STEPS)
    assert report.loss_after < report.loss_before


def test_optimizer_state_that_cannot_be_stored(student, teacher, tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["odd"] = object()

    with pytest.raises(TypeError, match=r"the optimizer's state holds builtins.object, which is not stored"):
        heal(student, teacher, data(), **STEPS, optimizer=lambda p: Odd(p, lr=0.1), checkpoint=tmp_path / "heal")
    assert list(tmp_path.iterdir()) == []


# Batches and outputs -------------------------------------------------------------------------------------------------


def test_kinds_of_batches(pair):
    student, teacher = pair
    xs = data(4, features=16)
    results = []
    for batches, forward in (
        (xs, None),
        ([{"x": x} for x in xs], None),
        ([(x,) for x in xs], None),
        (DataLoader(TensorDataset(torch.cat(xs)), batch_size=32), None),
        ([{"inputs": [x], "label": "unused"} for x in xs], lambda model, batch: model(batch["inputs"][0])),
    ):
        model = copy.deepcopy(student)
        heal(model, teacher, batches, **STEPS, forward=forward)
        results.append(state_of(model))
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


@dataclass
class Output:
    loss: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (y, "cache"),
        lambda y: {"loss": y.sum(), "ids": y.argmax(-1), "hidden": y},
        lambda y: {"pooled": y[:1], "last_hidden_state": y},
        lambda y: Output(y.sum(), y),
        lambda y: namedtuple("Pair", ["ids", "last_hidden_state"])(y[:1], y),
        lambda y: {"logits": y[..., None]},  # one class: numbers
    ],
)
def test_kinds_of_outputs(student, teacher, make):
    plain = copy.deepcopy(student)
    heal(plain, teacher, data(), steps=2)
    heal(student, teacher, data(), steps=2, forward=wrapped(make))
    assert same_state(student, state_of(plain))


def test_masked_divergence_of_logits_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    teacher, student = p.log().expand(1, 3, 3).clone(), q.log().expand(1, 3, 3).clone()
    student[0, 1] = p.log()  # equal
    student[0, 2] = math.nan  # masked
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    once = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    found = distillation_loss({"logits": student}, {"logits": teacher + 7}, batch)
    assert found.item() == pytest.approx(once / 2, rel=1e-6)
    # One row of logits per sequence: the mask is of other positions.
    found = distillation_loss({"logits": student[:, 0]}, {"logits": teacher[:, 0]}, batch)
    assert found.item() == pytest.approx(once, rel=1e-6)


def test_divergence_of_impossible_classes_is_finite():
    logits = torch.tensor([[0.3, -math.inf, 0.5]])
    student = logits.clone().requires_grad_()
    loss = distillation_loss({"logits": student}, {"logits": logits.flip(0)}, None)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert torch.isfinite(student.grad).all()


def test_masked_hidden_state_by_hand():
    teacher, student = torch.ones(2, 2, 3), torch.ones(2, 2, 3)
    student[0, 0, 0], student[1, 1] = 3.0, 9.0
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    assert distillation_loss(student, teacher, batch).item() == pytest.approx(4 / 9)
    assert distillation_loss(student.half(), teacher.half(), batch).dtype == torch.float32
    with pytest.raises(ValueError, match="the mask of a batch is 0 everywhere; leave that batch out"):
        distillation_loss(student, teacher, {"attention_mask": torch.zeros(2, 2)})
    additive = torch.tensor([[0, -math.inf], [0, 0]])
    with pytest.raises(ValueError, match="other values than 0 and 1; give 1 for each position that counts"):
        distillation_loss(student, teacher, {"attention_mask": additive})


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "nothing ends the training; give steps=, seconds= or epochs="),
        ({"steps": 0}, "steps=0; give a whole number from 1"),
        ({"steps": 1.5}, "steps=1.5; give a whole number from 1"),
        ({"seconds": 0.0}, "seconds=0.0; give a positive finite number"),
        ({"steps": 1, "lr": math.nan}, "lr=nan; give a positive finite number"),
        ({"steps": 1, "clip": -1.0}, "clip=-1.0; give a positive"),
        ({"steps": 1, "every": None}, "every=None; give a whole number"),
        ({"steps": 1, "patience": 2}, "patience=2 counts measurements on validation; give validation="),
        ({"steps": 1, "mode": "local"}, 'mode=\'local\'; use "end" or "blocks"'),
        ({"steps": 1, "mode": "blocks"}, "mode='blocks' with blocks=None; give"),
        ({"steps": 1, "blocks": "0"}, "mode='end' with blocks='0'"),
        ({"steps": 1, "mode": "blocks", "blocks": []}, r"blocks=\[\]; give"),
        ({"steps": 1, "mode": "blocks", "blocks": "layer.*"}, r"'layer\.\*' matches no module of the student; .*'0'"),
        ({"steps": 1, "parameters": "head"}, 'parameters=\'head\'; use "all", "factors" or a predicate'),
        ({"steps": 1, "parameters": lambda *_: False}, "no parameter to train: .* chooses only frozen ones"),
        ({"steps": 1, "validation": []}, "validation is empty"),
        ({"steps": 1, "loss": lambda _a, b, _batch: b.sum()}, "does not depend on the trained parameters"),
        (
            {"steps": 1, "optimizer": lambda _: constant([nn.Parameter(torch.ones(1))])},
            "parameters that are not trained",
        ),
    ],
)
def test_bad_values(student, teacher, options, text):
    before = state_of(student)
    with pytest.raises(ValueError, match=text):
        heal(student, teacher, data(2), **options)
    assert same_state(student, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batches": torch.ones(2, 24)}, r"batches is a Tensor; give an iterable of batches, for one batch \[batch\]"),
        ({"batches": None}, "batches is a NoneType"),
        ({"batches": 7}, "batches is a int"),
        ({"validation": {"x": torch.ones(2, 24)}}, "validation is a dict"),
        ({"batches": ["text"]}, "a batch is a str; .*pass forward="),
        ({"forward": lambda *_: "text"}, "an output is a str without a float tensor in it; pass loss="),
        ({"loss": lambda *_: 1.0}, "loss returned float; it returns a tensor with one number"),
        ({"loss": lambda a, *_: a[:2, 0]}, r"loss returned \(2,\); it returns a tensor"),
        ({"optimizer": lambda _: "adam"}, "optimizer returned str; give one such as lambda p"),
        ({"step": 3}, "heal has no setting 'step'; did you mean steps?"),
        ({"warmth": 3}, "heal has no setting 'warmth'; did you mean steps, seconds, epochs, mode"),
    ],
)
def test_wrong_kinds(student, teacher, options, text):
    before = state_of(student)
    with pytest.raises(TypeError, match=text):
        heal(student, teacher, **{"batches": data(2), "steps": 1, **options})
    assert same_state(student, before)


def test_batches_that_are_empty_or_have_no_length(student, teacher):
    with pytest.raises(ValueError, match="batches is empty"):
        heal(student, teacher, [], steps=1)
    with pytest.raises(ValueError, match="batches is empty"):
        heal(student, teacher, [], steps=1, validation=data(1))
    with pytest.raises(ValueError, match="epochs=2 needs batches with a length"):
        heal(student, teacher, iter(data(2)), epochs=2)
    assert heal(student, teacher, iter(data(2)), epochs=1, steps=9).stopped == "epochs"


def test_pairs_that_cannot_be_compared(student, teacher, pair):
    options = {"batches": data(2), "steps": 1}
    with pytest.raises(
        ValueError, match=r"the student gives output \(32, 8\), the teacher output \(32, 24\); pass loss="
    ):
        heal(student, nn.Identity(), **options)
    with pytest.raises(ValueError, match="parameters are on cpu, meta; move student and teacher to one device"):
        heal(student, copy.deepcopy(teacher).to("meta"), **options)
    with pytest.raises(ValueError, match="chooses only frozen ones; choose others, or unfreeze"):
        heal(copy.deepcopy(student).requires_grad_(False), teacher, **options)
    with pytest.raises(ValueError, match="the teacher has no module '4'"):
        heal(student, teacher[:4], **options, mode="blocks", blocks="4")
    with pytest.raises(ValueError, match=r"block '0' gives \(32, 48\) in the student and \(32, 8\) in the teacher"):
        heal(student, nn.Sequential(nn.Linear(24, 8)), **options, mode="blocks", blocks="0")
    with pytest.raises(
        ValueError,
        match="block 'blocks' gives nothing in the student and nothing in the teacher; name modules that run",
    ):
        heal(*pair, data(2, features=16), steps=1, mode="blocks", blocks="blocks")


# Around it -----------------------------------------------------------------------------------------------------------


def test_progress_bar(student, teacher, capsys, monkeypatch):
    heal(student, teacher, data(), **STEPS, progress=False)
    heal(student, teacher, data(), **STEPS)
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm")
    heal(student, teacher, data(), **STEPS, progress=True)
    assert "12/12" in (text := capsys.readouterr().err)
    assert "loss " in text
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    heal(student, teacher, data(), **STEPS, progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["end", "blocks"])
def test_bert(mode, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.5,
    )  # fmt: skip
    teacher = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in teacher.encoder.parameters():
            parameter.mul_(4)
    student = copy.deepcopy(teacher)
    report = compress_model(student, "monarch", ratio=0.5)
    assert any(row.structure for row in report.layers)
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batches = [
        transformers.BatchEncoding({"input_ids": torch.randint(60, (8, 12)), "attention_mask": mask}) for _ in range(6)
    ]
    untouched = state_of(teacher)
    blocks = "encoder.layer.*" if mode == "blocks" else None
    healed = heal(
        student, teacher, batches[2:], mode=mode, blocks=blocks, steps=30, lr=3e-3, every=10,
        validation=batches[:2], checkpoint=tmp_path / "heal",
    )  # fmt: skip
    assert healed.loss_after < 0.8 * healed.loss_before
    assert same_state(teacher, untouched)
    assert isinstance(batches[0], transformers.BatchEncoding)


def test_language_model_by_its_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    teacher = transformers.GPT2LMHeadModel(config)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.transformer.h[0].mlp.c_fc.weight.zero_()
        student.transformer.wte.weight *= 3
    batches = [{"input_ids": torch.randint(50, (4, 8))} for _ in range(4)]
    report = heal(student, teacher, batches, steps=20, lr=1e-2)
    assert report.loss_after < 0.5 * report.loss_before
    assert student.lm_head.weight is student.transformer.wte.weight


def test_a_frozen_student_is_measured_as_it_learns():
    """What a frozen layer keeps must not stand for the factors of later steps."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    student = copy.deepcopy(teacher).eval()
    compress_model(student, "phm", ratio=0.5)
    x = torch.randn(64, 32)
    freeze_(student)(x)
    report = heal(student, teacher, [x], validation=[x], progress=False, **STEPS)
    assert len({row.validation for row in report.history}) == len(report.history)
    assert not student[0].frozen
    with torch.no_grad():
        assert distillation_loss(student(x), teacher(x)).item() == pytest.approx(report.loss_after, rel=1e-4)


# What strangers do ---------------------------------------------------------------------------------------------------


def test_a_tenth_of_a_list_is_held_back_and_the_student_never_ends_worse_on_it(student, teacher):
    data = [torch.randn(16, 24) for _ in range(20)]
    report = heal(student, teacher, data, steps=30, lr=10.0, every=10)  # a learning rate that ruins it
    assert report.loss_after <= report.loss_before
    with torch.no_grad():
        held = [data[k] for k in range(20) if k in (5, 15)]
        losses = [distillation_loss(student(x), teacher(x)).item() for x in held]
    assert report.loss_before == pytest.approx(sum(losses) / 2, rel=0.5)


def test_held_back_can_be_switched_off(student, teacher):
    seen = set()
    data = [torch.randn(16, 24) for _ in range(20)]
    heal(student, teacher, data, epochs=1, held_back=0.0, forward=lambda m, x: (seen.add(x.sum().item()), m(x))[1])
    assert len(seen) == 20
    with pytest.raises(ValueError, match=r"held_back=1\.0; give a share"):
        heal(student, teacher, data, epochs=1, held_back=1.0)


def test_swapped_models_are_refused(student, teacher):
    with pytest.raises(ValueError, match="they are swapped"):
        heal(teacher, student, [torch.randn(4, 24)], steps=1)


class Writes(nn.Module):
    """Scales its batch in place, as some models do with masks and embeddings."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mul_(0.0).add_(1.0)) if x.sum() < 0 else self.inner(x.mul_(0.5))


def test_models_that_write_into_their_batch_learn_from_the_batch_as_it_was(student, teacher):
    data = [torch.full((4, 24), 2.0) for _ in range(3)]
    report = heal(Writes(student), Writes(teacher), data, steps=2)
    assert report.loss_before > 0
    assert all(torch.equal(x, torch.full((4, 24), 2.0)) for x in data)
