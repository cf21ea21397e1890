"""`structlin.quantize_`: every structure and form as integers, stored, loaded, trained and merged."""

import copy
import json
import pickle

import pytest
import torch
from cases import CASES, ONE, naming
from torch import nn

import structlin
from structlin.checkpoint import CheckpointError
from structlin.compress.taxonomy import geometries
from structlin.layers.expert_linear import StructuredExpertLinear
from structlin.layers.linear import build
from structlin.structures import Kaleidoscope, LowRank

TIED = [name for name in CASES if ONE[name].resolve(97, 60).spec(97, 60).tied]
every_structure = pytest.mark.parametrize("name", [name for name in CASES if name not in TIED])
X = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))


def small():
    """A structured layer, a dense one, and an output layer."""
    torch.manual_seed(0)
    return nn.Sequential(structlin.LowRankLinear(24, 24, rank=8), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 5))


def dense():
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 5))


def distance(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


# Laws over all structures --------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_layer_is_the_layer_up_to_its_reported_error(name, to):
    layer = build(ONE[name], 97, 60)
    before = layer.to_dense().detach()
    row = structlin.quantize_(layer, to, group=32).layers[0]
    after = layer.to_dense()
    assert row.error == pytest.approx(distance(after, before), rel=1e-2)
    assert row.error < {"int8": 0.03, "int4": 0.45}[to]
    x = torch.randn(7, 97)
    torch.testing.assert_close(layer(x), x @ after.T + layer.bias, rtol=1e-4, atol=1e-5)
    assert layer.nbytes == row.bytes_after < row.bytes_before
    assert {str(form) for form in layer.formats.values()} == {to}
    assert f"quantized={to}" in repr(layer)


@pytest.mark.parametrize("name", TIED)
def test_tied_numbers_stay_as_they_are(name):
    row = structlin.quantize_(layer := build(ONE[name], 97, 60), "int8").layers[0]
    assert row.format == "tied numbers, which are few as they are"
    assert not layer.formats


@every_structure
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_storage_copies_and_merging_are_exact(name, to, tmp_path):
    model = nn.Sequential(build(ONE[name], 97, 60))
    structlin.quantize_(model, to, group=32)
    x = torch.randn(3, 97)
    wanted = model(x)
    structlin.save(model, tmp_path / "a")
    structlin.verify(tmp_path / "a", check_hashes=True)
    loaded = structlin.load(nn.Sequential(nn.Linear(97, 60)), tmp_path / "a")
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), wanted)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    again = structlin.load(nn.Sequential(nn.Linear(97, 60)), structlin.save(loaded, tmp_path / "b"))
    assert torch.equal(again(x), wanted)
    dense_model = structlin.to_dense_(model)
    assert type(dense_model[0]) is nn.Linear
    assert dense_model[0].weight.requires_grad
    torch.testing.assert_close(dense_model(x), wanted, rtol=1e-4, atol=1e-5)


# Dense layers and corrections ----------------------------------------------------------------------------------------


def test_dense_layers_are_taken_on_request_and_the_output_layer_is_not():
    model = small()
    wanted = model(X)
    report = structlin.quantize_(model, "int8", dense=True)
    assert [(row.name, row.format) for row in report.layers] == [("0", "int8"), ("2", "int8")]
    assert isinstance(model[2], structlin.DenseLinear)
    assert type(model[3]) is nn.Linear
    assert distance(model(X), wanted) < 0.01
    assert "1,344 B of 2 layers" not in str(report)
    assert f"{report.bytes_after:,} B" in str(report)


@pytest.mark.parametrize("asked", [{"dense": True}, {"rules": {"*": "int8"}}], ids=["dense", "rule"])
def test_a_dense_layer_that_must_stay_says_why(asked):
    model = nn.ModuleDict({"table": nn.Embedding(16, 8), "tied": nn.Linear(8, 16, bias=False), "free": nn.Linear(8, 8)})
    model["tied"].weight = model["table"].weight
    model["last"] = nn.Linear(8, 3)
    rows = {row.name: row for row in structlin.quantize_(model, "int8", **asked).layers}
    assert rows["free"].format == "int8"
    assert "its weight is tied to table.weight" in rows["tied"].format
    assert rows["tied"].bytes_before == rows["tied"].bytes_after == 16 * 8 * 4
    assert type(model["tied"]) is nn.Linear


@pytest.mark.parametrize("structure", [LowRank(rank=6), Kaleidoscope()])
def test_a_correction_makes_up_for_what_rounding_lost(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    weight = model[0].weight.detach().clone()
    alone = structlin.quantize_(copy.deepcopy(model), "int4", dense=True).layers[0]
    both = structlin.quantize_(model, "int4", dense=structure).layers[0]
    assert both.error < 0.9 * alone.error
    assert both.format == "int4 + int8"
    assert distance(model[0].to_dense(), weight) == pytest.approx(both.error, rel=1e-2)


def test_int8_rows_have_groups_where_one_entry_is_far_larger_than_the_others():
    torch.manual_seed(0)
    plain, grouped = (structlin.LowRankLinear(512, 64, rank=16) for _ in range(2))
    with torch.no_grad():
        grouped.right[:, 3] *= 100
    for layer, columns in ((plain, 512), (grouped, 32)):
        (row,) = structlin.quantize_(nn.Sequential(layer), "int8").layers
        assert {name: (form.bits, form.columns) for name, form in layer.formats.items()} == {
            "left": (8, 16), "right": (8, columns)
        }  # fmt: skip
    assert row.bytes_after < 1.13 * (64 * 16 + 16 * 512)
    x = torch.randn(5, 512)
    x[:, 3] = 0  # what the large entries meet hides no error
    errors = []
    for group in (64, 512):
        layer = structlin.LowRankLinear(512, 64, rank=16)
        layer.load_state_dict({"left": torch.eye(64)[:, :16], "right": torch.randn(16, 512), "bias": torch.zeros(64)})
        with torch.no_grad():
            layer.right[:, 3] = 100
        wanted = layer(x)
        structlin.quantize_(nn.Sequential(layer), "int8", group=group)
        errors.append(((layer(x) - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.5 * errors[1]


def test_experts_share_a_format():
    torch.manual_seed(0)
    layer = StructuredExpertLinear(3, 512, 64, structure=LowRank(16))
    with torch.no_grad():
        layer.right[1, :, 3] *= 100  # of one
    structlin.quantize_(nn.Sequential(layer), "int8")
    assert layer.formats["right"].columns == 32


def test_statistics_weigh_the_errors_and_the_root_may_be_dense():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(500, 64) @ torch.diag(torch.logspace(0, -2, 64)) @ torch.randn(64, 64)
    statistics = structlin.collect_statistics(linear, [x])
    rules = {"": "int4"}
    blind, seeing = (
        structlin.quantize_(copy.deepcopy(linear), "int4", rules=rules, statistics=given).model
        for given in (None, statistics)
    )
    assert distance(seeing(x), linear(x)) < 0.7 * distance(blind(x), linear(x))


def test_layers_that_share_factors_still_do():
    first = structlin.LowRankLinear(24, 24, rank=4)
    second = structlin.LowRankLinear(24, 24, rank=4)
    second.left, second.right = first.left, first.right
    other = structlin.LowRankLinear(24, 24, rank=4)
    model = nn.ModuleList([first, second, other])
    structlin.quantize_(model, "int8")
    assert first.left is second.left
    assert first.weight_id == second.weight_id != other.weight_id
    merged = structlin.to_dense_(model)
    assert merged[0].weight is merged[1].weight
    assert merged[0].weight is not merged[2].weight


def test_experts_convolutions_and_embeddings_follow():
    conv = structlin.StructuredConv.from_conv(nn.Conv2d(8, 16, 3), structure=LowRank(rank=8))
    table = structlin.StructuredEmbedding.from_structure(50, 24, structure=LowRank(rank=8))
    experts = StructuredExpertLinear(3, 24, 12, structure=LowRank(rank=4))
    image, ids = torch.randn(2, 8, 9, 9), torch.tensor([3, 49])
    for module, call in ((conv, lambda: conv(image)), (table, lambda: table(ids)), (experts, lambda: experts(X, 1))):
        with naming(type(module).__name__):
            before = call()
            structlin.quantize_(module, "int8")
            assert 0 < distance(call(), before) < 0.05
    assert experts.left.codes.shape == (3, 12, 4)
    torch.testing.assert_close(experts(X, 1), X @ experts.to_dense()[1].T + experts.bias[1])
    assert structlin.to_dense_(nn.Sequential(experts)) is not None


# Training, moves, compilers ------------------------------------------------------------------------------------------


def test_factors_are_frozen_and_scales_train_on_request():
    model = small()
    structlin.quantize_(model, "int8")
    assert [name for name, _ in model[0].named_parameters()] == ["bias"]
    structlin.train_scales_(model)
    codes, scale = model[0].left.codes.clone(), model[0].left.scale.detach().clone()
    keys = model.state_dict().keys()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].left.codes, codes)
    assert not torch.equal(model[0].left.scale, scale)
    structlin.freeze_(model.eval())
    structlin.unfreeze_(model)
    structlin.train_scales_(model, False)
    assert model.state_dict().keys() == keys
    assert [name for name, _ in model[0].named_parameters()] == ["bias"]


def test_healing_trains_the_scales():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    batches = [torch.randn(16, 32) for _ in range(8)]
    model = copy.deepcopy(dense)
    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    structlin.quantize_(model, "int4", group=8)
    plain, before = copy.deepcopy(model), model[0].left.scale.clone()
    codes = model[0].left.codes.clone()
    structlin.train_scales_(model)
    healed, others = (structlin.heal(m, dense, batches, epochs=10, lr=1e-2, progress=False) for m in (model, plain))
    assert torch.equal(model[0].left.codes, codes)
    assert not torch.equal(model[0].left.scale, before)
    assert healed.loss_after < 0.9 * others.loss_after  # which trains the biases alone


def test_moves_keep_the_integers_and_cast_the_scales():
    model = small()
    structlin.quantize_(model, "int4", group=16)
    wanted = model(X)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half[0].left.codes.dtype, half[0].left.scale.dtype) == (torch.uint8, torch.bfloat16)
    assert distance(half(X.bfloat16()).float(), wanted) < 0.02
    assert copy.deepcopy(model).to("meta")[0].left.codes.is_meta


def test_a_frozen_layer_keeps_its_factors():
    model = small().eval()
    structlin.quantize_(model, "int8")
    with torch.no_grad():
        wanted = model(X)
        structlin.freeze_(model)
        torch.testing.assert_close(model(X), wanted)
        model[0].load_state_dict(structlin.quantize_(small(), "int8").model[0].state_dict())
    assert not model[0].frozen


def test_compile_and_export():
    model = small().eval()
    structlin.quantize_(model, "int4", dense=True)
    wanted = model(X).detach()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), wanted)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},), strict=False)
    torch.testing.assert_close(program.module()(X[:4]), wanted[:4])


def test_reports_name_the_format():
    model = small()
    structlin.quantize_(model, "int8")
    assert [row.structure for row in geometries(model)] == ["lowrank(rank=8) in int8"]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing():
    model = small()
    structlin.quantize_(model, "int8")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    row = structlin.quantize_(model, "int4").layers[0]
    assert (row.format, row.bytes_before) == ("already int8", row.bytes_after)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "int3"}, "format 'int3' is unknown; use one of"),
        ({"group": 1}, "group=1; use a whole number from 2"),
        ({"rules": {"nothing": "int8"}}, "rules 'nothing' match no layer"),
        ({"rules": {"0": "int2"}}, "format 'int2' is unknown"),
        ({"statistics": structlin.Statistics({}, {})}, "the statistics lack 1 of 1 layers"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        structlin.quantize_(model, **{"to": "int8", **options})
    assert not model[0].formats


def test_statistics_of_units_that_are_gone_are_refused():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    data = list(torch.randn(6, 30, 16))
    statistics = structlin.collect_statistics(model, data)
    structlin.compress_model(model, "auto", ratio=0.3, calibration=data, refine=2, block_epochs=1)
    with pytest.raises(ValueError, match=r"layers \['2'\] have fewer inputs than the statistics, .* from this model"):
        structlin.quantize_(model, "int8", statistics=statistics)
    own = structlin.collect_statistics(model, data)
    assert structlin.quantize_(model, "int8", statistics=own).layers[0].format == "int8"


def test_other_refusals():
    with pytest.raises(ValueError, match="no structured layer to quantise; call compress_model first"):
        structlin.quantize_(dense(), "int8")
    with pytest.raises(TypeError, match="takes 'int8' or 'int4'"):
        structlin.quantize_(small(), object())
    with pytest.raises(TypeError, match="use True, or a structure with its sizes"):
        structlin.quantize_(small(), "int8", dense="lowrank")
    broken = small()
    with torch.no_grad():
        broken[0].left[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '0': its factors hold NaN or infinite values; the model is unchanged"):
        structlin.quantize_(broken, "int8")
    model = small()
    structlin.quantize_(model, "int8")
    with pytest.raises(ValueError, match="are quantised and cannot be drawn"):
        model[0].reset_parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda form: form.update(bits=3), "bits=3 of 'left'; expected"),
        (lambda form: form.update(columns=0), "columns=0 of a scale; expected 1 to 8"),
        (lambda form: form.update(columns=2**40), "expected 1 to 8"),
        (lambda form: form.update(rows=True), "rows is bool, expected int"),
        (lambda form: form.pop("rows"), "found the fields"),
        (lambda form: form.update(bits=4), "expected torch.uint8"),
    ],
)
def test_files_are_checked(change, message, tmp_path):
    model = small()
    structlin.quantize_(model, "int8")
    structlin.save(model, tmp_path / "a")
    file = tmp_path / "a" / "structlin.json"
    document = json.loads(file.read_text())
    change(document["layers"]["0"]["formats"]["left"])
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        structlin.load(dense(), tmp_path / "a")


def test_formats_of_unknown_factors_and_surplus_tensors_are_refused(tmp_path):
    model = small()
    structlin.quantize_(model, "int8")
    model[0].left.register_buffer("more", torch.ones(1))
    with pytest.raises(CheckpointError, match=r"tensor '0.left.more' is unexpected"):
        structlin.save(model, tmp_path / "a")
    del model[0].left.more
    structlin.save(model, tmp_path / "a")
    file = tmp_path / "a" / "structlin.json"
    document = json.loads(file.read_text())
    document["layers"]["0"]["formats"]["middle"] = {"bits": 8, "columns": 1, "rows": 1}
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="middle"):
        structlin.verify(tmp_path / "a")
