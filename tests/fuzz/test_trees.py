"""Random trees of modules, compressed: a failure changes nothing, a success computes what its dense twin does."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import CASES
from torch import nn

import structlin
from structlin.compress import fit_layers
from structlin.testing import assert_close

STRUCTURES = sorted({*CASES} - {"conv", "dense"} | {"auto", "lowrank+kronecker"})
TOKENS = 11
FIT = fit_layers.fit


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Mapping(nn.Module):
    """Parts in a dict and a list, called in an order that is not theirs."""

    def __init__(self, parts):
        super().__init__()
        self.named = nn.ModuleDict({f"part_{k}": part for k, part in enumerate(parts[::2])})
        self.listed = nn.ModuleList(parts[1::2])

    def forward(self, x):
        for part in (*self.listed, *self.named.values()):
            x = part(x)
        return x


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x[None], x[None], x[None])[0][0]


class Recurrent(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.cell = nn.LSTM(size, size, batch_first=True)

    def forward(self, x):
        return self.cell(x[None])[0][0]


class Pointwise(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv = nn.Conv1d(size, size, 3, padding=1)

    def forward(self, x):
        return self.conv(x.T[None])[0].T


class Reader(nn.Module):
    """Reads the weight of its layer instead of calling it."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight) + self.linear.bias


class Same(nn.Linear):
    """A subclass that computes the same."""


class Other(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x).tanh()


class Language(nn.Module):
    """A table, a tree, and an output layer that may be tied to the table."""

    def __init__(self, size, body, tied, bias):
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(19, size), body, nn.Linear(size, 19, bias=bias)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(self.body(self.table(tokens)))


def tree(random, size, depth, made):
    """A module from (tokens, size) to (tokens, size); `made` are earlier ones, which may come again."""
    leaves = {
        "linear": lambda: nn.Linear(size, size, bias=random.random() < 0.7),
        "mlp": lambda: nn.Sequential(
            nn.Linear(size, hidden := random.choice((7, 24, 40))), nn.GELU(), nn.Linear(hidden, size)
        ),
        "norm": lambda: nn.LayerNorm(size),
        "attention": lambda: Attention(size),
        "recurrent": lambda: Recurrent(size),
        "conv": lambda: Pointwise(size),
        "reader": lambda: Reader(size),
        "same": lambda: Same(size, size),
        "other": lambda: Other(size, size),
        "shared": lambda: random.choice(made) if made else nn.Identity(),
        "tied": lambda: tied(size, made),
    }
    nodes = {
        "residual": lambda: Residual(tree(random, size, depth - 1, made)),
        "chain": lambda: nn.Sequential(*(tree(random, size, depth - 1, made) for _ in range(random.randint(1, 3)))),
        "mapping": lambda: Mapping([tree(random, size, depth - 1, made) for _ in range(random.randint(1, 4))]),
    }
    kinds = leaves if depth == 0 else nodes if depth == 2 else leaves | nodes
    made.append(found := kinds[random.choice([*kinds])]())
    return found


def tied(size, made):
    layer = nn.Linear(size, size)
    for other in (part for part in made if type(part) is nn.Linear):
        layer.weight = other.weight
    return layer


def model_of(random):
    size = random.choice((8, 12, 16, 30))
    made = []
    body = nn.Sequential(tree(random, size, 2, made), nn.Linear(size, size), tree(random, size, 1, made))
    model = Language(size, body, random.random() < 0.5, random.random() < 0.5) if random.random() < 0.3 else body
    x = torch.randint(19, (TOKENS,)) if model is not body else torch.randn(TOKENS, size)
    for parameter in model.parameters():
        parameter.requires_grad_(random.random() < 0.9)
    if random.random() < 0.2:
        model = model.double()
        x = x.double() if x.is_floating_point() else x
    return model.eval(), x


def settings_of(random, x):
    found = {"ratio": random.choice((0.03, 0.2, 0.5, 0.9, 1.0)), "skip_last": random.random() < 0.5}
    if random.random() < 0.5:
        found["tied"] = random.choice(("replace", "skip"))
    if random.random() < 0.15:
        found |= {"calibration": [x, x.flip(0)], "block_epochs": 0, "allocation": "uniform"}
    return found


def state_of(model):
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return modules, tensors


def assert_unchanged(model, before):
    modules, tensors = state_of(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, value) in tensors.items():
        assert identity == before[1][name][0], name
        assert torch.equal(value, before[1][name][1]), name


def unique_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def failing_at(countdown):
    """`fit`, which fails once when the countdown ends."""

    def failing(*args, **kwargs):
        if next(countdown) == 0:
            raise ZeroDivisionError("injected")
        return FIT(*args, **kwargs)

    return failing


def try_with_a_failure(model, structure, settings, attack, monkeypatch):
    """Compress, fail in one of the first fits, and leave the model as it was; it may have fewer fits than that."""
    before = state_of(model)
    with monkeypatch.context() as patched:
        patched.setattr(fit_layers, "fit", failing_at(itertools.count(attack.random.randint(0, 4), -1)))
        try:
            structlin.compress_model(model, structure, **settings)
        except ValueError:
            attack.count("refused")
        except RuntimeError as error:
            if "injected" not in str(error):
                raise
            attack.count("failed as injected")
        else:
            return
    assert_unchanged(model, before)


@pytest.mark.filterwarnings(
    "ignore:.*nothing was compressed",
    "ignore:.*more than half of the parameters",
    "ignore:fitted without the metric",  # a tree may hold no map at all
)
def test_trees_of_modules(attack, monkeypatch, tmp_path):
    for _ in attack.rounds(6, 1000):
        model, x = model_of(attack.random)
        skeleton = copy.deepcopy(model)
        structure, settings = attack.random.choice(STRUCTURES), settings_of(attack.random, x)
        print(structure, {key: value for key, value in settings.items() if key != "calibration"}, model)
        try_with_a_failure(copy.deepcopy(model), structure, settings, attack, monkeypatch)
        before = state_of(model)
        try:
            report = structlin.compress_model(model, structure, **settings)
        except ValueError:
            assert_unchanged(model, before)
            continue
        model = report.model
        attack.count("compressed" if any(row.structure for row in report.layers) else "nothing to compress")
        assert report.parameters_before == unique_parameters(skeleton)
        assert report.parameters_after == unique_parameters(model)
        with torch.no_grad():
            y = model(x)
            # In float64: parts of a sum may cancel, and lose digits by it.
            wide, wide_x = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
            assert_close(wide(wide_x), structlin.to_dense_(copy.deepcopy(wide))(wide_x), "dense twin", 1e-9)
            assert torch.equal(copy.deepcopy(model)(x), y)
            structlin.save(model, tmp_path / "checkpoint")
            assert torch.equal(structlin.load(skeleton, tmp_path / "checkpoint").eval()(x), y)
        # A second run may reach layers that the first left dense: their inputs, and so their best shapes, are others.
        states = [
            (layer, state_of(layer)) for layer in model.modules() if isinstance(layer, structlin.StructuredLinear)
        ]
        again = structlin.compress_model(model, structure, **settings).model
        assert {layer for layer, _ in states} <= {*again.modules()}
        for layer, state in states:
            assert_unchanged(layer, state)
