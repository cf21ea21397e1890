"""What a stranger meets: misuse told clearly, patterns as peft has them, and a verdict where little was reached."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import structlin
from structlin import compress_model, plan_compression


def model():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 32),
            "layer": nn.ModuleList(
                nn.ModuleDict({"query": nn.Linear(32, 32), "my_query": nn.Linear(32, 32), "value": nn.Linear(32, 32)})
                for _ in range(2)
            ),
            "head": nn.Linear(32, 4),
        }
    )


def compressed(report):
    return [row.name for row in report.layers if row.structure]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m: compress_model("gpt2", "lowrank", ratio=0.5), "string 'gpt2'; load it first, by .*from_pretrained"),
        (lambda m: compress_model(m.state_dict(), "lowrank", ratio=0.5), "the model is a OrderedDict; pass a torch"),
        (
            lambda m: compress_model(m, "lowrank", rank=8),
            r"no setting 'rank'; write .*LowRank\(rank",
        ),
        (lambda m: compress_model(m, "lowrank", ratio=0.5, target_modules=["query"]), "name layers in rules"),
        (lambda m: compress_model(m, "lowrank", ratio=0.5, excluded=["query"]), "did you mean 'exclude'"),
        (lambda m: compress_model(m, "lowrank", ratio=0.5, exclude="query"), "give a list of patterns"),
        (lambda m: plan_compression("gpt2", "lowrank", ratio=0.5), "load it first"),
    ],
)
def test_misuse_says_what_to_write(misuse, message):
    with pytest.raises(TypeError, match=message):
        misuse(model())


def test_an_unknown_structure_gets_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'lowrank'"):
        compress_model(model(), "lowrnak", ratio=0.5)


def test_a_layer_class_stands_for_its_structure():
    settings = structlin.Compression(structlin.LowRankLinear, ratio=0.5, rules={"value": structlin.KroneckerLinear})
    again = structlin.Compression.from_json(settings.to_json())
    assert (again.structure, again.rules) == ("lowrank", {"value": "kronecker"})
    report = compress_model(model(), settings)
    assert report.layers[1].structure.startswith("lowrank")
    assert next(row for row in report.layers if row.name.endswith("value")).structure.startswith("kronecker")


def test_patterns_name_the_last_parts_of_a_name_as_in_peft():
    rules = {"query": {"structure": "lowrank", "ratio": 0.5}, "1.value": {"structure": "lowrank", "ratio": 0.5}}
    assert compressed(compress_model(model(), None, rules=rules)) == [
        "layer.0.query", "layer.1.query", "layer.1.value",
    ]  # fmt: skip


def test_exclude_wins_over_rules():
    report = compress_model(
        model(), "lowrank", ratio=0.5, rules={"*": {"ratio": 0.4}}, exclude=["query", "layer.1.*", "embed"]
    )
    assert compressed(report) == ["layer.0.my_query", "layer.0.value", "head"]
    with pytest.raises(ValueError, match="rule 'key' matches no linear layer"):
        compress_model(model(), "lowrank", ratio=0.5, exclude=["key"])


def test_an_embedding_is_a_target_where_a_rule_names_it():
    report = compress_model(model(), "lowrank", ratio=0.5)
    assert "it is an embedding; name it in a rule" in report.layers[0].reason
    found = model()
    report = compress_model(found, "lowrank", ratio=0.5, rules={"embed": {"ratio": 0.6}})
    assert report.layers[0].structure.startswith("lowrank")
    assert isinstance(found["embed"], structlin.StructuredEmbedding)
    ids = torch.tensor([[1, 2], [3, 49]])
    y = found["embed"](ids)
    structlin.to_dense_(found)
    assert type(found["embed"]) is nn.Embedding
    torch.testing.assert_close(found["embed"](ids), y)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(100, 100))


def test_little_reached_is_a_warning_and_the_first_line():
    small = nn.Sequential(nn.Linear(32, 32), Unknown(), nn.Linear(32, 4))
    with pytest.warns(UserWarning, match="more than half of the parameters were not reached: .* Unknown"):
        report = compress_model(small, "lowrank", ratio=0.5)
    assert str(report).startswith("more than half of the parameters were not reached")
    assert json.loads(report.to_json())["verdict"] == report.verdict


def test_nothing_compressed_is_a_warning_and_the_first_line():
    with pytest.warns(UserWarning, match="nothing was compressed: 1 of 1 layers: no lowrank structure"):
        report = compress_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "lowrank", ratio=0.5)
    assert str(report).startswith("nothing was compressed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_counts_bytes(dtype):
    found = model().to(dtype)
    before = sum(p.nbytes for p in found.parameters())
    report = compress_model(found, "lowrank", ratio=0.5)
    assert (report.bytes_before, report.bytes_after) == (before, sum(p.nbytes for p in found.parameters()))


class Reads(nn.Module):
    """Reads the weight of a layer instead of calling it, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.a, self.read, self.b = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(self.a(x) @ self.read.weight.T + self.read.bias)


def test_a_weight_that_is_read_is_found_where_calibration_runs():
    found = Reads()
    report = compress_model(found, "lowrank", ratio=0.5, calibration=[torch.randn(9, 32)] * 2)
    assert [row.called for row in report.layers] == [True, False, None]
    assert "read: calibration never called it" in str(report)


class Inner(nn.Module):
    """The output is a norm's: no linear map is the output layer, though one is the last."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.first(self.last(self.norm(x)))


def test_the_output_layer_is_found_by_running():
    data = [torch.randn(9, 32) for _ in range(2)]
    assert compressed(compress_model(Inner(), "lowrank", ratio=0.5)) == ["first"]
    assert compressed(compress_model(Inner(), "lowrank", ratio=0.5, calibration=data)) == ["last"]


def test_a_last_map_before_a_norm_is_an_inner_one():
    assert compressed(compress_model(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), "lowrank", ratio=0.5)) == ["0"]


class Ways(nn.Module):
    """Registers the ways in and out before the layers between them, as SAM's heads do."""

    def __init__(self, layers, *ways):
        super().__init__()
        for way in ways:
            self.add_module(way, nn.Linear(32, 32))
        self.layers = layers(nn.Linear(32, 32) for _ in range(2))


@pytest.mark.parametrize(
    ("layers", "ways", "inner"),
    [
        (nn.ModuleList, ("proj_in", "proj_out"), True),
        (nn.ModuleList, ("proj_in",), False),
        (nn.ModuleList, (), False),
        (lambda layers: nn.Sequential(*layers), ("proj_in", "proj_out"), False),
    ],
)
def test_a_list_beside_the_ways_in_and_out_ends_in_an_inner_layer(layers, ways, inner):
    found = compressed(compress_model(nn.ModuleDict({"head": Ways(layers, *ways)}), "lowrank", ratio=0.5))
    assert ("head.layers.1" in found) == inner
    assert {"head.layers.0", *(f"head.{way}" for way in ways)} <= set(found)


def test_parts_of_an_adapter_are_left_alone():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(32, 32)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 16, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(16, 32, bias=False)})

    report = compress_model(nn.Sequential(Lora(), nn.Linear(32, 4)), "lowrank", ratio=0.5)
    assert compressed(report) == ["0.base_layer"]
    assert all("part of an adapter" in row.reason for row in report.layers[1:3])


def test_version_is_that_of_the_package():
    assert structlin.__version__[0].isdigit()
