"""Settings: checked when they are made, whole through JSON, and carried by plans and reports."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import structlin
from structlin import Compression, CompressionPlan, Evaluator, collect_statistics, compress_model, plan_compression
from structlin.compress import pipeline
from structlin.structures import Kronecker, LowRank

# Many models here are kept dense on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:nothing was compressed", "ignore:more than half of the parameters")


# Independent fits to the inputs of the dense model.
PLAIN = {"output_metric": False, "sequential": False, "block_epochs": 0}


class Model(nn.Sequential):
    """Counts its forward passes."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


@pytest.fixture
def model():
    return Model()


def batches(count, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(20, 32) * torch.logspace(0, -1, 32) for _ in range(count)]


# Checks at the door --------------------------------------------------------------------------------------------------

BAD = [
    ({"budget": "byte"}, ValueError, "budget='byte' is unknown; use 'parameters', 'bytes' or 'flops'"),
    ({"allocation": "best"}, ValueError, "allocation='best' is unknown; use 'auto', 'uniform' or 'global'"),
    ({"tied": "maybe"}, ValueError, "tied='maybe' is unknown; use 'skip' or 'replace'"),
    ({"ratio": 1.5}, ValueError, r"ratio=1.5 is outside \(0, 1\]"),
    ({"ratio": None}, ValueError, "structure 'lowrank' needs a ratio"),
    ({"refine": -1}, ValueError, "refine=-1; use a whole number from 0"),
    ({"refine": 2.5}, ValueError, "refine=2.5; use a whole number from 0"),
    ({"seed": "x"}, ValueError, "seed='x'; use a whole number from 0"),
    ({"skip_last": 1}, TypeError, "skip_last=1; use True or False"),
    ({"held_back": 1.0}, ValueError, r"held_back=1.0 is outside \(0, 1\)"),
    ({"shrinkage": -0.1}, ValueError, "shrinkage=-0.1 is negative or not finite"),
    ({"mask": "some"}, ValueError, "mask='some' is unknown"),
    ({"rules": [("0", None)]}, TypeError, "rules is a list; give a mapping"),
    ({"rules": {3: None}}, TypeError, "a pattern is a int; use a glob"),
    ({"rules": {"0": 3}}, TypeError, "a rule holds int"),
    ({"rules": {"0": {"ratio": 0.0}}}, ValueError, r"ratio=0.0 is outside \(0, 1\]"),
    ({"rules": {"0": {"refine": -2}}}, ValueError, "refine=-2; use a whole number from 0"),
    ({"rules": {"0": "lowrnk"}}, ValueError, "structure 'lowrnk' is unknown"),
    ({"rules": {"nothing.*": None}}, ValueError, r"rule 'nothing\.\*' matches no linear layer"),
    (
        {"rules": {"0": {"structure": LowRank(2), "ratio": 0.5}}},
        ValueError,
        r"rule .* gives a ratio beside LowRank\(rank=2\), which has its sizes; give one",
    ),
    ({"ratios": 0.5}, TypeError, "compress_model has no setting 'ratios'; did you mean 'ratio'"),
    ({"zzzz": 0.5}, TypeError, "compress_model has no setting 'zzzz'; the settings are"),
    (
        {"sequential": True, "calibration": None},
        ValueError,
        "sequential=True and block or model epochs run the model: pass calibration as batches",
    ),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused_before_anything_runs(model, settings, error, message):
    before = copy.deepcopy(model.state_dict())
    arguments = {"ratio": 0.5, "calibration": batches(4)} | settings
    with pytest.raises(error, match=message):
        compress_model(model, "lowrank", **arguments)
    assert model.passes == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("structure", [LowRank(2), None])
def test_a_ratio_that_nothing_uses_is_refused(model, structure):
    for rules in ({}, {"0": LowRank(3)}, {"0": {"ratio": 0.3, "structure": "lowrank"}, "2": None}):
        with pytest.raises(ValueError, match=r"ratio=0.5 sizes nothing: .* leave ratio out, or name a structure"):
            compress_model(model, structure, ratio=0.5, rules=rules)
    assert model.passes == 0
    report = compress_model(model, structure, ratio=0.5, rules={"0": "lowrank"})  # the rule uses it
    assert report.compression.entries[0].structure == LowRank(9)
    assert CompressionPlan.from_json(report.compression.to_json()).ratio == 0.5


def test_a_weight_that_is_not_finite_is_refused_before_anything_runs(model):
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2': weight holds NaN"):
        compress_model(model, "lowrank", ratio=0.5, calibration=batches(4))
    assert model.passes == 0


def test_an_error_of_a_structure_is_no_reason_to_stay_dense(model, monkeypatch):
    def broken(cls, *_):
        raise ValueError("a bug")

    monkeypatch.setattr(LowRank, "candidates", classmethod(broken))
    with pytest.raises(ValueError, match="layer '0': a bug; the model is unchanged"):
        compress_model(model, "lowrank", ratio=0.5)


# Compression ---------------------------------------------------------------------------------------------------------


def test_settings_go_through_json():
    rules = {
        "0": Kronecker(terms=2),
        "re:[12]": {"ratio": 0.25},
        "*": None,
        "4": {"structure": LowRank(3), "refine": 2},
    }
    settings = Compression("lowrank", ratio=0.5, rules=rules, allocation="global", refine=3, mask=None, seed=4)
    again = Compression.from_json(settings.to_json())
    assert again == settings
    assert list(again.rules) == list(rules)  # the first match wins
    assert Compression.from_json(Compression(LowRank(2)).to_json()).structure == LowRank(2)


def test_functions_do_not_go_through_json():
    for settings in (
        Compression(None, rules={lambda name, module: True: LowRank(2)}),
        Compression(LowRank(2), mask=lambda batch: None),
    ):
        with pytest.raises(ValueError, match="holds a function, which JSON cannot"):
            settings.to_json()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 9}, ValueError, "settings of version 9; this structlin reads version 1"),
        ({"ration": 0.5}, ValueError, "a stored Compression has no setting 'ration'; did you mean 'ratio'"),
        ({"ratio": 7}, ValueError, "ratio=7 is outside"),
    ],
)
def test_bad_records(change, error, message):
    record = Compression("lowrank", ratio=0.5).to_record() | change
    with pytest.raises(error, match=message):
        Compression.from_record(record)


@pytest.mark.parametrize("kind", [Compression, CompressionPlan])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"LONG": 1, "LONG": 2}', "not valid JSON: duplicate key"),
        ('{"version": 1, "ratio": 1e999}', "1e999 is not JSON"),
        ("[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("[]", "a stored (Compression|plan): AttributeError"),
        ('{"version": "LONG"}', r"version '?xxx"),
        ('{"version": 1, "layers": [], "settings": {"version": 1, "LONG": 1}}', "has no setting"),
        ('{"version": 1, "structure": {"kind": "kmatrix", "width": 10000000}}', "kmatrix|'layers'|10000000 tensors"),
    ],
)
def test_hostile_json_is_a_value_error_in_few_words(kind, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        kind.from_json(text.replace("LONG", "x" * 100_000))
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": {"kind": "kmatrix", "width": 10**7}}, "width: 10000000 exceeds 1024"),
        ({"structure": {"kind": "kmatrix", "width": 1000}}, "has 1000 tensors or more; expected up to 128"),
        ({"structure": []}, r"structure=\[\]; use dict or NoneType"),
        ({"in_features": 2**31}, r"\(in, out\)=\(2147483648, .*; use 1 to 2147483647"),
        ({"count": True}, "count=True; use int"),
        ({"aliases": [1]}, r"aliases=\[1\]; use names"),
        ({"name": "2"}, r"layers \['2'\] stand in the plan twice; name each once"),
    ],
)
def test_entries_of_a_plan_are_checked(model, change, message):
    record = json.loads(plan_compression(model, "lowrank", ratio=0.5).to_json())
    record["layers"][0] |= change
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_record(record)
    with pytest.raises(ValueError, match=r"fitted_with=.*; use numbers"):
        CompressionPlan.from_record({**record, "layers": [], "fitted_with": dict.fromkeys(
            ("layers", "tokens", "energy", "output_energy"), "1"
        )})  # fmt: skip


def test_settings_do_not_follow_the_callers_mapping():
    rules = {"0": None}
    settings = Compression("lowrank", ratio=0.5, rules=rules)
    rules["2"] = None
    assert list(settings.rules) == ["0"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.ratio = 0.25


def test_keywords_and_object_are_the_same(model):
    other = copy.deepcopy(model)
    compress_model(model, "lowrank", ratio=0.5, rules={"2": {"ratio": 0.25}})
    compress_model(other, Compression("lowrank", ratio=0.75, rules={"2": {"ratio": 0.25}}), ratio=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_callers_generator_is_left_alone(model):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    compress_model(model, "lowrank", ratio=0.5, require_speedup=True)
    assert torch.equal(torch.randn(3), expected)


# Plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_compression_whose_rules_name_every_layer(model):
    plan = plan_compression(model, "kronecker", ratio=0.5, rules={"2": None}, refine=3)
    assert isinstance(plan, Compression)
    assert list(plan.rules) == ["0", "2", "4"]
    assert plan.rules["0"] == {"structure": plan.entries[0].structure, "refine": 3}
    assert plan.rules["2"] is plan.rules["4"] is None
    again = CompressionPlan.from_json(plan.to_json())
    assert (again, again.structure, again.ratio) == (plan, "kronecker", 0.5)
    report = compress_model(model, again)
    assert report.compression == plan
    assert json.loads(report.to_json())["compression"]["settings"]["ratio"] == 0.5


def test_a_checkpoint_carries_the_plan(model, tmp_path):
    report = compress_model(model, "lowrank", ratio=0.5, calibration=batches(4))
    structlin.save(model, tmp_path / "out", compression=report.compression, metadata={"by": "us"})
    metadata = structlin.verify(tmp_path / "out").metadata
    assert metadata["by"] == "us"
    assert CompressionPlan.from_record(metadata["compression"]) == report.compression


@pytest.mark.parametrize("name", ["structure", "ratio", "rules", "budget", "allocation", "tied", "skip_last", "refine"])
def test_what_a_plan_has_answered_is_not_asked_again(model, name):
    plan = plan_compression(model, "lowrank", ratio=0.5)
    with pytest.raises((ValueError, TypeError), match=f"a plan holds its {name} layer by layer|multiple values"):
        compress_model(model, plan, **{name: getattr(plan, name)})


def test_what_a_plan_leaves_open_may_be_given(model):
    plan = plan_compression(model, "lowrank", ratio=0.5, calibration=batches(6))
    report = compress_model(model, plan, sequential=True, calibration=batches(6))
    assert report.compression.sequential


def test_a_plan_without_a_layer_leaves_it_dense_and_says_so(model):
    plan = plan_compression(model, "lowrank", ratio=0.5)
    report = compress_model(model, dataclasses.replace(plan, entries=plan.entries[:1]))
    assert [row.reason for row in report.layers] == [None, "the plan does not name it", "the plan does not name it"]


def test_plans_of_version_1_are_read(model):
    plan = plan_compression(model, "lowrank", ratio=0.5)
    layers = plan.to_record()["layers"]
    old = CompressionPlan.from_json(json.dumps({"version": 1, "tied": "replace", "layers": layers}))
    assert (old.entries, old.tied, old.ratio) == (plan.entries, "replace", None)
    compress_model(model, old)


# A plan and its statistics -------------------------------------------------------------------------------------------


def output_errors(report):
    return [row.output_error for row in report.layers if row.structure]


@pytest.mark.parametrize("name", ["lowrank", "auto"])
def test_a_plan_is_carried_out_with_its_statistics(model, name):
    statistics = collect_statistics(model, batches(6))
    direct = compress_model(copy.deepcopy(model), name, ratio=0.5, refine=5, calibration=statistics)
    plan = plan_compression(model, name, ratio=0.5, refine=5, calibration=statistics)
    assert "fitted with statistics of 3 layers and 360 inputs" in str(plan)
    read = CompressionPlan.from_json(plan.to_json())
    in_memory = compress_model(copy.deepcopy(model), plan)
    from_file = compress_model(copy.deepcopy(model), read, calibration=statistics)
    recollected = compress_model(copy.deepcopy(model), read, calibration=batches(6), validation=[], **PLAIN)
    assert None not in output_errors(direct)
    for report in (in_memory, from_file, recollected):
        assert output_errors(report) == pytest.approx(output_errors(direct), rel=1e-4)


def test_a_plan_is_refused_with_other_statistics_or_none(model):
    plan = plan_compression(model, "lowrank", ratio=0.5, calibration=collect_statistics(model, batches(6)))
    read = CompressionPlan.from_json(plan.to_json())
    passes = model.passes
    with pytest.raises(ValueError, match=r"made with statistics of 3 layers .*, and there are no statistics"):
        compress_model(model, read)
    others = collect_statistics(copy.deepcopy(model), batches(6, seed=2))
    with pytest.raises(ValueError, match=r"made with .*, not with statistics of 3 layers and 360 inputs"):
        compress_model(model, read, calibration=others)
    assert model.passes == passes
    assert type(model[0]) is nn.Linear
    report = compress_model(model, dataclasses.replace(read, fitted_with=None))
    assert output_errors(report) == [None, None]


def test_a_plan_without_calibration_may_be_carried_out_with_it(model):
    plan = plan_compression(model, "lowrank", ratio=0.5)
    assert None not in output_errors(compress_model(model, plan, calibration=batches(4)))


# The process ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("epochs", [0, 3])
def test_targets_are_found_once_and_the_model_runs_a_known_number_of_times(model, monkeypatch, sequential, epochs):
    finds = []
    for module in (pipeline, structlin.compress.calibrate):
        original = module.find_targets
        monkeypatch.setattr(module, "find_targets", lambda *a, f=original, **k: finds.append(1) or f(*a, **k))
    report = compress_model(
        model, "lowrank", ratio=0.5, calibration=batches(20), sequential=sequential, block_epochs=epochs
    )
    assert len(finds) == 1
    held_back, calibration, layers = 2, 18, 2
    trials = held_back * 7
    behind = 2 * calibration * layers if sequential else 0
    learning, judging = 16, 2  # of the calibration batches; the outputs of all of them are what is learned
    refined = calibration + epochs * (learning + judging) + 2 * judging if epochs else 0
    assert model.passes == calibration + held_back + trials + behind + refined + held_back
    assert [quality.stage for quality in report.qualities] == ["dense", "compressed"]


def test_planning_and_a_dry_run_never_put_a_module_into_the_model(model):
    modules = dict(model.named_modules())
    seen = set()

    def watch(module, args):
        seen.update(map(type, model.children()))

    model.register_forward_pre_hook(watch)
    for run in (plan_compression, lambda *a, **k: compress_model(*a, dry_run=True, **k)):
        run(model, "lowrank", ratio=0.5, calibration=batches(10), allocation="global")
    assert seen == {nn.Linear, nn.Tanh}
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.children())


def test_an_evaluator_of_the_caller_is_used_and_holds_nothing_back(model):
    evaluator = Evaluator(model, batches(2, seed=5))
    passes = model.passes
    compress_model(
        model, "lowrank", ratio=0.5, calibration=batches(10), evaluate=evaluator, allocation="uniform", **PLAIN
    )
    assert model.passes == passes + 10 + 2


def test_a_layer_that_is_never_called_keeps_the_given_ratio():
    class Reader(Model):
        """Reads the weight of its first layer instead of calling it."""

        def forward(self, x):
            return self[2](torch.tanh(nn.functional.linear(x, self[0].weight)))

    model = Reader()
    plan = plan_compression(model, "lowrank", ratio=0.5, skip_last=False, calibration=batches(10), allocation="global")
    kept = {entry.name: entry.parameters_after / entry.parameters_before for entry in plan.entries}
    assert kept["0"] == pytest.approx(0.5, abs=0.06)
