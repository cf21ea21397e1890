"""Hidden units of MLPs: which maps hold them, which of them stay, and that nothing else notices."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import structlin
from structlin import CompressionPlan, compress_model
from structlin.compress import fit_layers, units
from structlin.compress.calibrate import collect_statistics
from structlin.compress.config import AUTO, Choice
from structlin.compress.data import Data
from structlin.compress.patched import Patched, model_passes, model_runs
from structlin.compress.targets import find_targets
from structlin.structures import Dense, LowRank

QUICK = {"refine": 2, "block_epochs": 1, "hidden_units": True, "progress": False}
SIZE = 24


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(SIZE, 40), nn.Linear(SIZE, 40), nn.Linear(40, SIZE, bias=False)

    def forward(self, x):
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """One head: the sizes of an MLP with three maps before one, but no hidden units."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        return x + self.out(weights @ self.value(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(), nn.LayerNorm(SIZE), Gated()

    def forward(self, x):
        return self.mlp(self.norm(self.attention(x)))


class Leaking(nn.Module):
    """Hidden units that another module reads, too."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 40), nn.Linear(40, SIZE)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.down(hidden) + hidden.mean(-1, keepdim=True)


class TwoHeads(nn.Module):
    """The second output of a tuple is that of an MLP whose hidden units the third one reads."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(SIZE, 8), nn.Linear(SIZE, 40), nn.Linear(40, SIZE)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.first(x), self.down(hidden), hidden.softmax(-1)


class Detached(Gated):
    """No gradient passes the MLP."""

    def forward(self, x):
        return x * self.gate.bias.mean() + super().forward(x).detach()


def blocks(count=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def inputs(count=12):
    torch.manual_seed(1)
    return list(torch.randn(count, 2, 7, SIZE))


def found_in(model, batches):
    targets = find_targets(model)
    passes = model_passes(Patched(model, {}), model_runs(model, batches, None), [None] * len(batches))
    choices = {target.name: Choice(AUTO, 0.5) for target in targets}
    mlps = units.find_mlps(targets, passes, choices, collect_statistics(model, batches).grams, True)
    return {mlp.down.name: [target.name for target in mlp.ups] for mlp in mlps}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Gated, {"down": ["gate", "up"]}),
        (Block, {"mlp.down": ["mlp.gate", "mlp.up"]}),
        (Attention, {}),
        (Leaking, {}),
        (TwoHeads, {}),
        (lambda: nn.Sequential(nn.Linear(SIZE, 40), nn.GELU(), nn.Dropout(0.5), nn.Linear(40, 8)), {"3": ["0"]}),
        (lambda: nn.Sequential(nn.Linear(SIZE, 40), nn.LayerNorm(40), nn.Linear(40, 8)), {}),
        (lambda: nn.Sequential(nn.Linear(SIZE, 40), nn.Softmax(-1), nn.Linear(40, 8)), {}),
        (
            lambda: nn.Sequential(nn.Linear(SIZE, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8)),
            {"2": ["0"]},
        ),
    ],
    ids=["gated", "block", "attention", "leaking", "two heads", "sequential", "norm", "softmax", "deep"],
)
def test_only_maps_around_hidden_units_are_found(make, expected):
    torch.manual_seed(0)
    assert found_in(make().eval(), inputs()) == expected


@pytest.mark.parametrize("make", [TwoHeads, Detached])
def test_maps_that_no_gradient_reaches_are_compressed_too(make):
    torch.manual_seed(0)
    report = compress_model(make(), "auto", ratio=0.4, calibration=inputs(), skip_last=False, **QUICK)
    assert all(row.structure for row in report.layers)
    assert ("dense 24x16" in str(report)) == (make is Detached)


def test_the_unit_that_costs_least_goes_first():
    torch.manual_seed(0)
    weight, rows = torch.randn(5, 9, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    gram = rows.mT @ rows

    def error(gone):
        stay = [k for k in range(9) if k not in gone]
        solved = torch.linalg.lstsq(rows[:, stay], rows @ weight.mT).solution
        return torch.linalg.vector_norm(rows[:, stay] @ solved - rows @ weight.mT).item()

    gone = list(units.removed(weight, gram, 4))
    for count in range(1, 5):
        least = min({*range(9)}.difference(gone[: count - 1]), key=lambda k: error([*gone[: count - 1], k]))
        assert gone[count - 1] == least
    assert error(gone) <= 1.2 * min(map(error, itertools.combinations(range(9), 4)))


def test_units_that_nothing_needs_cost_nothing():
    """A model with twice the units that it uses loses the others without a trace."""
    model = nn.Sequential(*(Gated() for _ in range(2)))
    with torch.no_grad():
        for mlp in model:
            mlp.gate.weight[20:], mlp.gate.bias[20:] = mlp.gate.weight[:20], mlp.gate.bias[:20]
            mlp.up.weight[20:], mlp.up.bias[20:] = mlp.up.weight[:20], mlp.up.bias[:20]
    x = inputs()[0]
    expected = model(x)
    report = compress_model(
        model, "auto", ratio=0.5, calibration=inputs(40), shrinkage=1e-6, skip_last=False, allocation="uniform", **QUICK
    )
    assert {row.structure for row in report.layers} == {"dense 20x24", "dense 24x20"}
    assert torch.allclose(model(x), expected, atol=2e-3)


@pytest.mark.parametrize(("option", "width", "kind"), [(0, 28, LowRank), (1, 20, Dense)], ids=["structured", "dense"])
def test_a_model_with_fewer_units_is_a_model(option, width, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(fit_layers, "_best", lambda options, *_: options[option])
    dense, batches = blocks(), inputs()
    model = copy.deepcopy(dense)
    report = compress_model(model, "auto", ratio=0.5, calibration=batches, allocation="uniform", **QUICK)
    assert isinstance(model[0].mlp.down.structure, kind)
    assert not isinstance(model[0].attention.out.structure, Dense)
    assert model[0].mlp.up.out_features == model[0].mlp.gate.out_features == model[0].mlp.down.in_features == width
    assert sum(p.numel() for name, p in model[0].mlp.named_parameters() if p.ndim == 2) <= 0.5 * 3 * SIZE * 40
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    rows = {row.name: row for row in report.layers}
    assert rows["0.mlp.up"].bias_lost == 40 - width
    assert 0 < rows["0.mlp.down"].output_error < 1

    x = batches[0]
    structlin.save(model, tmp_path / "saved")
    loaded = structlin.load(copy.deepcopy(dense), tmp_path / "saved")
    assert torch.equal(loaded(x), model(x))
    for each in (model, loaded):
        expected = each(x)
        structlin.to_dense_(each)
        assert {name: p.shape for name, p in each.named_parameters()} == {
            name: p.shape for name, p in dense.named_parameters()
        }
        assert torch.allclose(each(x), expected, atol=1e-5)

    again = copy.deepcopy(dense)
    plan = CompressionPlan.from_json(report.compression.to_json())
    assert f"{rows['0.mlp.up'].structure}" in str(plan)
    monkeypatch.undo()  # a plan leaves no choice
    compress_model(again, plan, calibration=batches, **{"block_epochs": 1, "progress": False})
    assert torch.allclose(again(x), loaded(x), atol=1e-4)
    statistics = structlin.collect_statistics(dense, batches)
    with pytest.raises(ValueError, match=r"hidden units around \['0.mlp.gate'.*calibration="):
        compress_model(copy.deepcopy(dense), replace(plan, fitted_with=None, block_epochs=0), calibration=statistics)


def test_a_plan_that_gives_and_reads_other_numbers_of_units_is_refused():
    dense, batches = blocks(), inputs()
    settings = {"allocation": "uniform", **QUICK}
    report = compress_model(copy.deepcopy(dense), "auto", ratio=0.5, calibration=batches, **settings)
    entries = [replace(e, sizes=(21, SIZE)) if e.name == "0.mlp.down" else e for e in report.compression.entries]
    plan = replace(report.compression, entries=tuple(entries))
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"'0.mlp.down': the plan leaves it 21 units, others \{20\}"):
        compress_model(dense, plan, calibration=batches)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_choosing_units_leaves_the_statistics_alone():
    model, batches = blocks(1).double(), [batch.double() for batch in inputs()]
    targets = {target.name: target for target in find_targets(model)}
    statistics = collect_statistics(model, batches, dtype=torch.float64)
    mlp = units.Mlp((targets["0.mlp.gate"], targets["0.mlp.up"]), targets["0.mlp.down"])
    known = statistics.shrunken("0.mlp.down")
    before = known.matrix.clone()
    wanted = {target.name: Choice(AUTO, 0.5) for target in mlp.targets}
    assert len(units.narrow(mlp, wanted, Data(statistics), None)) == 2
    assert torch.equal(known.matrix, before)


def test_maps_share_a_budget_of_which_one_may_stay_dense():
    model, batches = blocks(1), inputs()
    targets = {target.name: target for target in find_targets(model)}
    mlp = units.Mlp((targets["0.mlp.gate"], targets["0.mlp.up"]), targets["0.mlp.down"])
    wanted = {target.name: Choice(AUTO, 0.4) for target in mlp.targets} | {"0.mlp.up": "the allocation leaves it dense"}
    for option in units.narrow(mlp, wanted, Data(collect_statistics(model, batches)), None):
        kept = sum(found.entry.parameters_after for found in option)
        assert 0.4 < kept / (3 * SIZE * 40) <= mlp.share(wanted)


def test_units_are_removed_only_where_auto_chooses():
    for structure, settings in (
        ("auto", {"hidden_units": False}),
        ("lowrank", {}),
        ("auto", {"rules": {"up": LowRank(rank=3), "gate": None}}),
        ("auto", {"ratio": units.MOST + 0.05, "allocation": "uniform"}),
    ):
        model = blocks()  # the last map of the second one is the output layer
        compress_model(model, structure, calibration=inputs(), **{"ratio": 0.5, **QUICK, **settings})
        assert model[0].mlp.down.in_features == 40


def test_a_file_that_narrows_inputs_and_outputs_at_once_is_refused(tmp_path):
    smaller = blocks(1)
    smaller[0].mlp.down = structlin.LowRankLinear(20, SIZE - 1, False, rank=3)
    structlin.save(smaller, tmp_path / "saved")
    with pytest.raises(structlin.CheckpointError, match="the skeleton's weight is"):
        structlin.load(blocks(1), tmp_path / "saved")
