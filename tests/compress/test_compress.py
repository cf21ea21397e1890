"""compress_model and its plan, report and inverse: every case of the walker."""

import copy
import json
import math
import sys

import pytest
import torch
from torch import nn

import structlin
from structlin import (
    Compression,
    CompressionPlan,
    LowRankLinear,
    StructuredLinear,
    compress_model,
    plan_compression,
    to_dense_,
)
from structlin.compress import fit_layers
from structlin.structures import Kronecker, LowRank, TensorTrain, families

# Many models here are kept dense on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:nothing was compressed", "ignore:more than half of the parameters")


class Shared(nn.Module):
    """One module under two names, two layers with one weight, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.left = nn.Linear(16, 24)
        self.right = nn.Linear(16, 24, bias=False)
        self.right.weight = self.left.weight
        self.back = nn.Linear(24, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.again(self.first(self.embedding(ids)))
        return self.head(self.back(self.left(x) + self.right(x)))


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def rows_of(report):
    return {row.name: row for row in report.layers}


def same_state(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(families()))
def test_every_structure_by_ratio(mlp, name):
    before = copy.deepcopy(mlp)
    x = torch.randn(7, 32)
    report = compress_model(mlp, name, ratio=0.6, refine=5)
    assert report.model is mlp
    for index in (0, 2):
        row = rows_of(report)[str(index)]
        layer = mlp[index]
        assert isinstance(layer, StructuredLinear)
        assert layer.num_parameters <= 0.606 * before[index].weight.numel()
        assert row.parameters_after == layer.num_parameters
        assert all(part in row.structure for part in name.split("+"))
        expected = torch.linalg.vector_norm(layer.weight - before[index].weight) / before[index].weight.norm()
        assert row.error == pytest.approx(expected.item(), rel=1e-4)
        assert torch.equal(layer.bias, before[index].bias)
    assert type(mlp[4]) is nn.Linear
    assert "output layer" in rows_of(report)["4"].reason
    # The whole model computes what its dense matrices say.
    dense = copy.deepcopy(before)
    dense[0].weight.data, dense[2].weight.data = mlp[0].weight.detach(), mlp[2].weight.detach()
    torch.testing.assert_close(mlp(x), dense(x), rtol=1e-4, atol=1e-5)


def test_full_rank_keeps_the_outputs(mlp):
    x = torch.randn(5, 32)
    expected = mlp(x)
    # Full rank has more parameters than dense, so it must be asked for layer by layer.
    layer = LowRankLinear.from_linear(mlp[0], rank=32)
    mlp[0] = layer
    torch.testing.assert_close(mlp(x), expected)


# The cases of the walker ---------------------------------------------------------------------------------------------


def test_module_under_several_names_is_swapped_once():
    model = Shared()
    report = compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    assert model.first is model.again
    assert isinstance(model.first, LowRankLinear)
    assert rows_of(report)["first"].aliases == ("again",)
    assert sum("again" in row.aliases for row in report.layers) == 1


def test_layers_with_one_weight_share_the_factors():
    model = Shared()
    bias = model.left.bias
    compress_model(model, "lowrank", ratio=0.5)
    assert model.left is not model.right
    assert model.left.left is model.right.left
    assert model.left.right is model.right.right
    assert model.left.bias is bias
    assert model.right.bias is None


def test_weight_tied_to_embedding_is_skipped():
    model = Shared()
    report = compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    assert model.head.weight is model.embedding.weight
    assert "tied to embedding.weight" in rows_of(report)["head"].reason


def test_all_uses_of_a_tied_weight_are_replaced_on_request():
    model = Shared()
    ids = torch.tensor([[1, 2, 0, 49]])
    compress_model(model, "lowrank", ratio=0.5, tied="replace")  # the output layer too
    assert isinstance(model.head, LowRankLinear)
    assert model.embedding.linear is model.head
    torch.testing.assert_close(model.embedding(ids), model.head.weight[ids])
    model(ids).sum().backward()
    assert model.head.left.grad.abs().sum() > 0
    expected = model(ids)
    to_dense_(model)
    assert type(model.embedding) is nn.Embedding
    assert model.head.weight is model.embedding.weight
    assert model.left.weight is model.right.weight
    torch.testing.assert_close(model(ids), expected)


def test_a_tied_output_layer_stays_dense_where_a_rule_says_so():
    model = Shared()
    report = compress_model(model, "lowrank", ratio=0.5, tied="replace", exclude=["head"])
    assert "keeps it dense" in rows_of(report)["head"].reason
    assert model.head.weight is model.embedding.weight


def test_tied_and_shared_layers_go_through_a_checkpoint(tmp_path):
    model = Shared()
    skeletons = [copy.deepcopy(model), copy.deepcopy(model).to("meta")]
    compress_model(model, "lowrank", ratio=0.5, skip_last=False, tied="replace")
    structlin.save(model, tmp_path / "tied")
    ids = torch.tensor([[1, 2, 0, 49]])
    for skeleton in [*skeletons, copy.deepcopy(model)]:
        loaded = structlin.load(skeleton, tmp_path / "tied")
        assert loaded.embedding.linear is loaded.head
        assert loaded.embedding.padding_idx == 0
        assert loaded.first is loaded.again
        assert loaded.left.left is loaded.right.left
        assert torch.equal(loaded(ids), model(ids))


def test_tie_that_cannot_be_replaced_keeps_its_reason():
    model = Shared()
    model.embedding.max_norm = 1.0
    report = compress_model(model, "lowrank", ratio=0.5, skip_last=False, tied="replace")
    assert "untie it first" in rows_of(report)["head"].reason


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_stays_right(training, norm_first):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).train(training)
    report = compress_model(model, "kronecker", ratio=0.5, skip_last=False)
    assert sum(row.structure is not None for row in report.layers) == 12
    dense = to_dense_(copy.deepcopy(model))
    assert type(dense.layers[0].linear1) is nn.Linear
    x = torch.randn(3, 5, 16)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_root_that_is_linear():
    linear = nn.Linear(16, 16)
    report = compress_model(linear, "lowrank", ratio=0.5)
    assert isinstance(report.model, LowRankLinear)
    assert report.layers[0].name == ""
    assert type(linear) is nn.Linear
    back = to_dense_(report.model)
    assert type(back) is nn.Linear
    torch.testing.assert_close(back.weight, report.model.to_dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_dtype_flags_and_bias_are_kept(dtype):
    model = nn.Sequential(nn.Linear(16, 16, bias=False, dtype=dtype), nn.Linear(16, 16, dtype=dtype), nn.Linear(16, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].eval()
    compress_model(model, "tt", ratio=0.5)
    assert model[0].bias is None
    assert {p.dtype for p in model[:2].parameters()} == {dtype}
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].factors)
    assert not model[1].bias.requires_grad
    assert model[0].training
    assert not model[1].training
    dense = to_dense_(model)
    assert not dense[0].weight.requires_grad
    assert dense[1].weight.dtype == dtype


def test_hooks_are_kept_and_their_handles_work(mlp):
    calls = []
    handle = mlp[0].register_forward_hook(lambda *_: calls.append("forward"))
    mlp[0].register_forward_pre_hook(lambda *_args, **_kwargs: calls.append("pre"), with_kwargs=True)
    mlp[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    report = compress_model(mlp, "lowrank", ratio=0.5)
    assert rows_of(report)["0"].hooks == 3
    assert "0: 3 hooks kept" in str(report)
    mlp(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    handle.remove()
    mlp(torch.randn(2, 32))
    assert calls.count("forward") == 1


def test_weights_that_cannot_be_taken_say_why():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class Quantised(nn.Parameter):
        pass

    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("meta", "parametrised", "hooked", "patched", "tensor")})
    model["special"] = Special(16, 16)
    model["lazy"] = nn.LazyLinear(16)
    model["meta"].to("meta")
    torch.nn.utils.parametrizations.orthogonal(model["parametrised"])
    torch.nn.utils.parametrize.register_parametrization(model["hooked"], "weight", nn.Identity())
    model["patched"].forward = lambda x: x
    model["tensor"].weight = Quantised(model["tensor"].weight.detach())
    model["small"] = nn.Linear(1, 1)
    model["plain"] = nn.Linear(16, 16)
    reasons = {
        name: row.reason for name, row in rows_of(compress_model(model, "lowrank", ratio=0.5, skip_last=False)).items()
    }
    assert reasons.pop("plain") is None
    expected = {
        "meta": "meta device", "parametrised": "parametrised", "hooked": "parametrised",
        "patched": "replaced on the instance", "tensor": "Quantised", "special": "subclass of nn.Linear",
        "lazy": "not initialised", "small": "keeps 0.5",
    }  # fmt: skip
    for name, text in expected.items():
        assert text in reasons[name], (name, reasons[name])


def test_weight_norm_hook_says_why():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    assert "computed by a hook" in compress_model(model, "lowrank", ratio=0.5).layers[0].reason


def test_integer_weight_says_why():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    assert "int8" in compress_model(model, "lowrank", ratio=0.5).layers[0].reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weight_is_an_error_that_names_the_layer(mlp, bad):
    with torch.no_grad():
        mlp[2].weight[3, 4] = bad
    state = copy.deepcopy(mlp.state_dict())
    with pytest.raises(ValueError, match=r"layer '2': weight holds NaN or infinite values"):
        compress_model(mlp, "lowrank", ratio=0.5)
    assert [type(m) for m in mlp] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert torch.equal(mlp[0].weight, state["0.weight"])


def test_layer_that_would_not_shrink_is_left_alone(mlp):
    report = compress_model(mlp, LowRank(rank=28))
    assert rows_of(report)["0"].reason == "lowrank(rank=28) would keep 2,240 of 1,536 parameters"
    assert type(mlp[0]) is nn.Linear


def test_structure_that_does_not_fit_is_reported(mlp):
    report = compress_model(mlp, LowRank(rank=40), skip_last=False)
    assert "rank=40 is outside 1..32" in rows_of(report)["0"].reason


def test_failure_in_a_later_layer_leaves_the_model_as_it_was(mlp, monkeypatch):
    state = copy.deepcopy(mlp.state_dict())
    modules = list(mlp)
    calls = []
    fit = fit_layers.fit

    def failing(weight, structure, **options):
        calls.append(structure)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return fit(weight, structure, **options)

    monkeypatch.setattr(fit_layers, "fit", failing)
    with pytest.raises(RuntimeError, match="layer '2': did not converge; the model is unchanged"):
        compress_model(mlp, "lowrank", ratio=0.5)
    assert list(mlp) == modules
    assert same_state(mlp, state)


def test_second_run_is_a_no_op(mlp):
    compress_model(mlp, "lowrank", ratio=0.5)
    modules, state = list(mlp), copy.deepcopy(mlp.state_dict())
    with pytest.warns(UserWarning, match="nothing was compressed: .* are already structured"):
        report = compress_model(mlp, "lowrank", ratio=0.5)
    assert str(report).startswith("nothing was compressed")
    assert list(mlp) == modules
    assert same_state(mlp, state)
    assert all(row.structure is None for row in report.layers)
    assert report.coverage.unreached["LowRankLinear (already structured)"] == sum(
        p.numel() for m in (mlp[0], mlp[2]) for p in m.parameters()
    )


def test_output_layer_is_skipped_unless_named(mlp):
    other = copy.deepcopy(mlp)
    compress_model(mlp, "lowrank", ratio=0.5, rules={"4": LowRank(rank=2)})
    assert mlp[4].structure == LowRank(rank=2)
    compress_model(other, "lowrank", ratio=0.5, skip_last=False)
    assert isinstance(other[4], LowRankLinear)


def test_declared_output_layer_is_the_one_skipped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(16, 16)
            self.body = nn.Linear(16, 16)

        def get_output_embeddings(self):
            return self.lm_head

    model = Model()
    compress_model(model, "lowrank", ratio=0.5)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.body, LowRankLinear)


# Coverage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["skip", "replace"])
def test_coverage_accounts_for_every_parameter(tied):
    model = nn.ModuleDict({"shared": Shared(), "norm": nn.LayerNorm(7), "conv": nn.ConvTranspose1d(3, 5, 2)})
    model["attention"] = nn.MultiheadAttention(8, 2)
    total = sum(p.numel() for p in model.parameters())
    report = compress_model(model, "lowrank", ratio=0.5, tied=tied)
    coverage = report.coverage
    assert coverage.total == total
    assert coverage.compressed + coverage.skipped + sum(coverage.unreached.values()) == total
    assert report.parameters_before == total
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert coverage.unreached["ConvTranspose1d"] == 35
    line = str(report).splitlines()[-2]
    assert line.startswith(f"coverage: {total:,} parameters")


@pytest.mark.parametrize("seed", range(40))
def test_random_module_trees(seed):
    """Whatever the tree, coverage is whole, shared modules stay shared, and to_dense_ gives dense layers back."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    pool: list[nn.Module] = []

    def tree(depth):
        kind = number(0, 6) if depth else number(0, 3)
        if pool and number(0, 5) == 0:
            return pool[number(0, len(pool))]
        if kind <= 1:
            module: nn.Module = nn.Linear(number(1, 24), number(1, 24), bias=bool(number(0, 2)))
        elif kind == 2:
            module = nn.LayerNorm(number(1, 9))
        elif kind == 3:
            module = nn.ModuleDict({f"ключ_{k}": tree(depth - 1) for k in range(number(0, 4))})
        else:
            module = nn.ModuleList([tree(depth - 1) for _ in range(number(0, 4))])
        if number(0, 3) == 0:
            module.requires_grad_(False)
        pool.append(module)
        return module

    model = nn.ModuleList([tree(3) for _ in range(4)])
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    total = sum(p.numel() for p in model.parameters())
    report = compress_model(model, "lowrank", ratio=0.6)
    assert report.coverage.total == total
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    again = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert again == names
    for row in report.layers:
        module = model.get_submodule(row.name)
        assert isinstance(module, StructuredLinear) == (row.structure is not None)
        assert all(model.get_submodule(alias) is module for alias in row.aliases)
    to_dense_(model)
    assert not any(isinstance(m, StructuredLinear) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == total


# Rules ---------------------------------------------------------------------------------------------------------------


def test_rules_by_glob_regex_predicate_first_match_wins(mlp):
    rules = {
        "re:[02]": {"ratio": 0.25},
        "*": None,
    }
    compress_model(mlp, "lowrank", ratio=0.5, rules=rules)
    assert mlp[0].structure == LowRank(rank=1536 // 4 // 80)
    assert type(mlp[4]) is nn.Linear

    other = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 8))

    def is_wide(name, module):
        return module.out_features == 64

    compress_model(other, None, rules={is_wide: {"structure": "kronecker", "terms": 3}, "0": TensorTrain(rank=2)})
    assert isinstance(other[1].structure, Kronecker)
    assert other[1].structure.terms == 3
    assert isinstance(other[0].structure, TensorTrain)
    assert type(other[2]) is nn.Linear


def test_rule_reasons_are_reported(mlp):
    report = compress_model(mlp, "lowrank", ratio=0.5, rules={"0": None})
    assert rows_of(report)["0"].reason == "rule '0' keeps it dense"
    assert rows_of(compress_model(mlp, None))["0"].reason == "the default keeps it dense"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "lowrank", "ratio": 0.5, "rules": {"nothing.*": None}}, r"rule 'nothing\.\*' matches no linear"),
        ({"structure": "lowrank"}, "structure 'lowrank' needs a ratio"),
        ({"structure": "butterflies", "ratio": 0.5}, "structure 'butterflies' is unknown; use one of"),
        ({"structure": "lowrank", "ratio": 0.5, "tied": "maybe"}, "tied='maybe' is unknown"),
        ({"structure": None, "rules": {"0": {"ratio": 0.5}}}, "names no structure and there is no default"),
        ({"structure": "lowrank", "ratio": 0.5, "rules": {"0": {"rank": 2, "ratio": 0.5}}}, "give one"),
        ({"structure": None, "rules": {"0": {"structure": "lowrank", "terms": 2}}}, "lowrank does not take"),
    ],
)
def test_bad_arguments(mlp, arguments, message):
    with pytest.raises(ValueError, match=message):
        compress_model(mlp, **arguments)
    assert type(mlp[0]) is nn.Linear


def test_a_model_made_in_inference_mode_is_not_refined():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    given = {"ratio": 0.5, "calibration": list(torch.randn(4, 8, 64)), "output_metric": False}
    with pytest.raises(ValueError, match=r"made under torch.inference_mode, and its blocks .* or pass block_epochs=0"):
        compress_model(model, "lowrank", **given)
    assert plan_compression(model, "lowrank", **given).entries[0].structure
    compress_model(model, "lowrank", block_epochs=0, **given)
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize("value", [3, {"structure": 3}, {"structure": None, "ratio": 0.5}])
def test_bad_rule_value(mlp, value):
    with pytest.raises(TypeError, match=r"a rule holds (int|NoneType); use"):
        compress_model(mlp, "lowrank", ratio=0.5, rules={"0": value})


def test_a_mapping_holds_what_a_rule_may_be(mlp):
    settings = Compression(
        "lowrank", ratio=0.5, rules={"0": {"structure": LowRankLinear, "ratio": 0.25}, "2": {"structure": None}}
    )
    for each in (settings, Compression.from_json(settings.to_json())):
        rows = rows_of(compress_model(copy.deepcopy(mlp), each))
        assert rows["0"].structure == "lowrank(rank=4)"
        assert rows["2"].reason == "rule '2' keeps it dense"


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_ratio_out_of_range_is_an_error(mlp, ratio):
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        compress_model(mlp, "lowrank", ratio=ratio)


# Plans ---------------------------------------------------------------------------------------------------------------


def test_plan_touches_nothing_and_goes_through_json(mlp):
    state, modules = copy.deepcopy(mlp.state_dict()), list(mlp)
    plan = plan_compression(mlp, "monarch", ratio=0.5, rules={"2": "tt"})
    assert list(mlp) == modules
    assert same_state(mlp, state)
    text = plan.to_json()
    assert CompressionPlan.from_json(text) == plan
    assert "monarch(blocks=" in str(plan)
    report = compress_model(mlp, CompressionPlan.from_json(text))
    for entry in plan.entries:
        layer = mlp.get_submodule(entry.name)
        assert getattr(layer, "structure", None) == entry.structure
    direct = nn.Sequential(*[copy.deepcopy(m) for m in modules])
    compress_model(direct, "monarch", ratio=0.5, rules={"2": "tt"})
    assert same_state(direct, mlp.state_dict())
    assert rows_of(report)["0"].parameters_after == plan.entries[0].parameters_after


def test_edited_plan(mlp):
    content = json.loads(plan_compression(mlp, "lowrank", ratio=0.5).to_json())
    content["layers"][0]["structure"] = {"kind": "kronecker", "terms": 2}
    content["layers"][1]["structure"] = None
    report = compress_model(mlp, CompressionPlan.from_json(json.dumps(content)))
    assert mlp[0].structure.terms == 2
    assert rows_of(report)["2"].reason == "left dense in the plan"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"structure": {"kind": "unheard"}}, "layer '0' of the plan: structure 'unheard' is unknown"),
        ({"structure": {"kind": "lowrank", "rank": 99}}, "layer '0' of the plan: rank=99 is outside"),
        ({"structure": {"kind": "lowrank", "width": 1}}, r"lowrank has no field \['width'\]"),
        ({"structure": {"kind": "lowrank"}}, "layer '0' of the plan"),
    ],
)
def test_bad_plan(mlp, edit, message):
    content = json.loads(plan_compression(mlp, "lowrank", ratio=0.5).to_json())
    content["layers"][0] |= edit
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_json(json.dumps(content))


def test_plan_version_and_model_are_checked(mlp):
    plan = plan_compression(mlp, "lowrank", ratio=0.5)
    content = json.loads(plan.to_json())
    with pytest.raises(ValueError, match="plan version 9 is unknown"):
        CompressionPlan.from_json(json.dumps(content | {"version": 9}))
    with pytest.raises(ValueError, match="the plan names layer '0', which this model has not"):
        compress_model(nn.Sequential(nn.ReLU()), plan)
    with pytest.raises(ValueError, match=r"layer '0' has \(in, out\)"):
        compress_model(nn.Sequential(nn.Linear(3, 3)), plan)
    with pytest.raises(ValueError, match="a plan holds its ratio layer by layer"):
        compress_model(mlp, plan, ratio=0.5)
    torch.nn.utils.parametrizations.orthogonal(mlp[0])
    with pytest.raises(ValueError, match="layer '0' cannot be compressed: its weight is parametrised"):
        compress_model(mlp, plan)


def test_dry_run_reports_but_touches_nothing(mlp):
    modules, state = list(mlp), copy.deepcopy(mlp.state_dict())
    dry = compress_model(mlp, "lowrank", ratio=0.5, dry_run=True)
    assert list(mlp) == modules
    assert same_state(mlp, state)
    real = compress_model(mlp, "lowrank", ratio=0.5)
    assert [row.error for row in dry.layers] == [row.error for row in real.layers]


# Report and progress -------------------------------------------------------------------------------------------------


def test_report_json_and_table(mlp):
    report = compress_model(mlp, "lowrank", ratio=0.5)
    content = json.loads(report.to_json())
    row = content["layers"][0]
    assert row["structure"] == "lowrank(rank=9)"
    assert row["parameters_before"] == 1536
    assert row["parameters_after"] == 720
    assert row["flops_before"] == 3072
    assert row["flops_after"] == 1440
    assert 0 < row["error"] < 1
    assert content["coverage"]["compressed"] == 1536 + 48 + 1536 + 32
    text = str(report)
    assert "lowrank(rank=9)" in text
    assert "dense: it is the output layer" in text
    assert f"model: {report.parameters_before:,} -> {report.parameters_after:,}" in text


def test_progress_bar(mlp, capsys):
    pytest.importorskip("tqdm")
    compress_model(mlp, "lowrank", ratio=0.5, progress=True)
    assert "compress: 100%" in capsys.readouterr().err


def test_without_tqdm_there_is_no_bar_and_no_error(mlp, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    compress_model(mlp, "lowrank", ratio=0.5, progress=True)
    assert capsys.readouterr().err == ""


def test_fine_tuning_the_result_lowers_the_loss(mlp):
    x, target = torch.randn(64, 32), torch.randn(64, 10)
    compress_model(mlp, "kronecker", ratio=0.5)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(mlp(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_public_names():
    assert structlin.compress_model is compress_model
    assert set(structlin.__all__) <= set(dir(structlin))


def test_the_taxonomy_states_dimensions_and_losses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    batches = [torch.randn(32, 12) for _ in range(4)]
    task = iter([0.9, 0.7])
    report = structlin.compress_model(
        model, "lowrank", ratio=0.5, calibration=batches, evaluate=lambda _: next(task), skip_last=False
    )
    found = report.taxonomy()
    expected = [m.structure.rank * (m.in_features + m.out_features - m.structure.rank) for m in (model[0], model[2])]
    assert [row.dimension for row in found.layers] == expected
    assert found.size == report.parameters_after / report.parameters_before
    assert found.accuracy_lost == pytest.approx(0.2)
    assert found.fidelity_lost == pytest.approx(1 - report.qualities[-1].cosine)
    assert "projection to" in str(found)
    assert "(delta_1, delta_2, eta) = (0.2000, " in str(found)


def test_the_taxonomy_says_what_was_not_measured():
    report = structlin.compress_model(nn.Sequential(nn.Linear(12, 16)), "lowrank", ratio=0.5, skip_last=False)
    assert "(not measured, not measured, " in str(report.taxonomy())
