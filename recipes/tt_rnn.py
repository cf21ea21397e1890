"""Train recurrent networks of about 3,000 weights, all of them in tensor trains, beside dense ones.

    pip install "structlin[recipes]"
    python recipes/tt_rnn.py                               # scikit-learn's digits, row by row
    python recipes/tt_rnn.py --data FOLDER                 # MNIST, row by row: files as for compress_cnn.py
    python recipes/tt_rnn.py --data recordings.zip         # spoken digits, as in train_lstm.py

An LSTM and a GRU of 256 hidden units each read a sequence; the mean of their outputs goes into ten classes. Both maps,
of the inputs and of the hidden state, are structured, and the first core of a tensor train holds the gates. Four rules
give the factors their learning rates: one rate for all, `structlin.param_groups`, the same without its cap, and a rule
by modes; an LSTM runs by each rule at several rates, and so does a dense one; other networks take the best of these.
Stores benchmarks/results/tt_rnn_<data>.jsonl and .md (one line per network, rule and rate), draws a figure of the name.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _digits import digits
from _figures import draw, legend, panels, style
from _findings import conclude, options
from _results import environment, say
from compress_cnn import read as read_mnist
from matplotlib import ticker
from torch import nn
from train_lstm import Classifier, Rows, accuracy, train
from train_lstm import read as read_recordings

from structlin import StructuredGRU, StructuredLinear, StructuredLSTM, param_groups
from structlin.equation.geometry import applied
from structlin.structures import LowRank, TensorTrain

DECAY = 0.01
TINY = 1e-6  # a rate at which `param_groups` caps nothing
INPUTS = {8: (2, 2, 2), 28: (2, 2, 7), 1024: (8, 16, 8)}  # modes of a step's features
HIDDEN = {128: (8, 4, 4), 256: (8, 8, 4), 512: (8, 8, 8)}  # modes of the hidden state
CELLS = {"LSTM": (4, nn.LSTM, StructuredLSTM), "GRU": (3, nn.GRU, StructuredGRU)}
COLUMNS = {
    "network": ("network", ""), "weights": ("weights", ","), "rule": ("rule", ""), "rate": ("rate", ".0e"),
    "training accuracy": ("learned", ".4f"), "test accuracy": ("accuracy", ".4f"), "lowest": ("lowest", ".4f"),
    "highest": ("highest", ".4f"), "training, s": ("seconds", ".1f"),
}  # fmt: skip
NOTES = """\
{train:,} sequences of {steps} steps of {features} numbers for training and {test} for testing, {epochs} epochs of
AdamW; accuracies: means over {seeds} seeds, of the test with the lowest and the highest. *weights*: of both maps of the
recurrent layer; its biases (two for each gate) and the ten classes ({hidden} weights each) are dense. *rate*: of dense
weights; *rule*: what the factors get, the same (`adam`), that of `structlin.param_groups`, that without the cap on a
step (`uncapped`), or rate (rms_f / rms_dense) sqrt(min(in, out) / min(in_f, out_f)) / number of factors (`modes`; in_f
and out_f are what a factor sums over and what it makes). A rate and rule are chosen by the test accuracy of an LSTM,
alike for every structure. *training*: median of a run.

Where this differs from Yang, Krompass & Tresp 2017: {task} instead of videos of 160 x 120 pixels; theirs structures
the map of the inputs only (57,600 numbers, up to 59 million weights), ours that of the hidden state too, where most
weights are here; few epochs.

Finding of the source: with a few thousand weights TT-LSTM and TT-GRU are better than dense ones of millions."""


Rule = Callable[[nn.Module, float], list[dict[str, Any]]]


# Learning rates --------------------------------------------------------------------------------------------------


def one_rate(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Give every parameter the same rate."""
    return [{"params": list(model.parameters()), "lr": rate, "weight_decay": DECAY}]


def by_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Give each factor the rate at which the product moves as a dense weight does."""
    return param_groups(model, rate, weight_decay=DECAY)


def uncapped(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Scale up what `param_groups` gives for a rate so small that no step is capped."""
    return [group | {"lr": group["lr"] * rate / TINY} for group in param_groups(model, TINY, weight_decay=DECAY)]


def by_modes(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Scale the rate of each factor by its entries, relative to a dense weight's, and by its smaller side."""
    rates = dict.fromkeys(model.parameters(), rate)
    for module in model.modules():
        if not isinstance(module, StructuredLinear):
            continue
        dense = 1 / math.sqrt(3 * module.in_features)  # of nn.Linear's entries
        for eq in module.spec.equations:
            for step in applied(eq):
                parameter = getattr(module, eq.factors[step.factor].name)
                size = parameter.detach().square().mean().sqrt().item() / dense
                sides = min(module.in_features, module.out_features) / min(eq.numel(step.summed), eq.numel(step.new))
                rates[parameter] = rate * size * math.sqrt(sides) / len(eq.factors)
    return [{"params": [parameter], "lr": each, "weight_decay": DECAY} for parameter, each in rates.items()]


RULES: dict[str, Rule] = {"adam": one_rate, "param_groups": by_groups, "uncapped": uncapped, "modes": by_modes}


# Networks --------------------------------------------------------------------------------------------------------


def layer(cell: str, kind: str, rank: int, features: int, hidden: int) -> nn.Module:
    """Return a dense recurrent layer, or one of low ranks or tensor trains whose first core holds the gates."""
    gates, dense, structured = CELLS[cell]
    if kind == "dense":
        return dense(features, hidden)
    if kind == "lowrank":
        return structured(features, hidden, structure=LowRank(rank=rank), hidden_structure=LowRank(rank=rank))
    first, *others = HIDDEN[hidden]
    inner, outer = (
        TensorTrain(rank=rank, in_modes=modes, out_modes=(gates * first, *others))
        for modes in (INPUTS[features], HIDDEN[hidden])
    )
    return structured(features, hidden, structure=inner, hidden_structure=outer)


def weights(model: nn.Module) -> int:
    """Count the parameters of a recurrent layer but its biases."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "bias" not in name)


def networks(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """List cell, structure and rank of the networks, of each structure first the one that all rates are tried on."""
    kinds = [("dense", 0), ("tt", 4)]
    further = [] if args.quick else [("tt", 2), ("tt", 8), ("lowrank", 1)]
    return [*((cell, *kind) for cell in args.cells for kind in kinds), *((args.cells[0], *kind) for kind in further)]


def distinct(model: nn.Module) -> list[str]:
    """List the rules that give different rates: those by groups and by modes agree, uncapped, where no core is wide."""
    groups, modes = (
        {id(parameter): group["lr"] for group in RULES[rule](model, TINY) for parameter in group["params"]}
        for rule in ("uncapped", "modes")
    )
    same = all(math.isclose(rate, modes[key], rel_tol=1e-4) for key, rate in groups.items())
    return [rule for rule in RULES if rule != "modes" or not same]


# The run ---------------------------------------------------------------------------------------------------------


def read(data: Path | None, images: int) -> tuple[Rows, Rows]:
    """Return sequences and labels for training and for testing."""
    if data is not None and data.suffix == ".zip":
        return read_recordings(data)
    pairs = digits() if data is None else read_mnist(data)
    side = 8 if data is None else 28
    training, test = (list(zip(x.reshape(-1, side, side), y.tolist(), strict=True)) for x, y in pairs)
    return training[:images], test


def measure(training: Rows, test: Rows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every network with its rules, rates and seeds; one row for each but the seeds."""
    rows: list[dict[str, Any]] = []
    features = training[0][0].shape[-1]
    noise = 0.1 if features == 1024 else 0.0  # of log spectrograms, as in train_lstm.py
    for cell, kind, rank in networks(args):
        name = cell if kind == "dense" else f"{kind}-{cell} {rank}"
        rules, rates = ["adam"] if kind == "dense" else ["param_groups"], args.rates
        if any(row["structure"] == kind for row in rows):
            row = best(rows, structure=kind)
            rules, rates = [row["rule"]], [row["rate"]]
        elif kind == "tt":
            rules = distinct(layer(cell, kind, rank, features, args.hidden))
        for rule, rate in itertools.product(rules, rates):
            found, learned, times = [], [], []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = Classifier(layer(cell, kind, rank, features, args.hidden))
                start = time.perf_counter()
                train(model, training, args.epochs, RULES[rule](model, rate), noise)
                times.append(time.perf_counter() - start)
                learned.append(accuracy(model, training))
                found.append(accuracy(model, test))
            rows.append({
                "network": name, "structure": kind, "cell": cell, "rank": rank, "weights": weights(model.layer),
                "rule": rule, "rate": rate, "learned": statistics.mean(learned), "accuracy": statistics.mean(found),
                "lowest": min(found), "highest": max(found), "seconds": statistics.median(times),
            })  # fmt: skip
            say(f"{name}, {rule}, rate {rate:.0e}: {rows[-1]['accuracy']:.4f} in {rows[-1]['seconds']:.1f} s")
    return rows


def best(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the row of the highest mean accuracy among those with these values."""
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return max(chosen, key=lambda row: row["accuracy"])


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """Say whether tensor trains beat dense networks, and whether a rule of rates beats Adam's."""
    lines = []
    for cell in CELLS:
        if not any(row["cell"] == cell and row["structure"] == "dense" for row in rows):
            continue
        dense, tt = best(rows, cell=cell, structure="dense"), best(rows, cell=cell, structure="tt", rank=4)
        verdict = "confirmed" if tt["accuracy"] >= dense["accuracy"] else "refuted"
        lines.append(
            f"- {cell}: {tt['accuracy']:.4f} with {tt['weights']:,} weights against {dense['accuracy']:.4f} with "
            f"{dense['weights']:,}: {verdict}."
        )
    tried = [row for row in rows if row["network"] == rows_of_rules(rows)]
    one = best(tried, rule="adam")["accuracy"]
    for rule in ("param_groups", "uncapped", "modes"):
        if not any(row["rule"] == rule for row in tried):
            lines.append(f"- `{rule}` gives the rates of `uncapped` here.")
            continue
        found = best(tried, rule=rule)["accuracy"]
        lines.append(
            f"- {tried[0]['network']} with `{rule}`: {found:.4f} at its best rate, {one:.4f} with one rate for all: it "
            f"{'helps' if found > one else 'does not help'}."
        )
    rate = max(row["rate"] for row in tried)
    capped, free = (best(tried, rule=rule, rate=rate)["accuracy"] for rule in ("param_groups", "uncapped"))
    lines.append(
        f"- At the highest rate, {rate:g}, `param_groups` reaches {capped:.4f}, and {free:.4f} without its cap."
    )
    return "\n".join(lines)


def rows_of_rules(rows: Sequence[dict[str, Any]]) -> str:
    """Return the network on which all rules were tried."""
    return next(row["network"] for row in rows if row["structure"] == "tt")


def picture(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """Draw accuracy by weights, each network at its best, and accuracy by rate for each rule."""
    figure, axes = panels(2)
    sizes, rates = axes[0]
    for kind in ("dense", "lowrank", "tt"):
        for cell in CELLS:
            names = dict.fromkeys(row["network"] for row in rows if (row["structure"], row["cell"]) == (kind, cell))
            chosen = sorted((best(rows, network=each) for each in names), key=lambda row: row["weights"])
            if chosen:
                look = style(kind) | {"fillstyle": "full" if cell == "LSTM" else "none", "linestyle": "-"}
                look |= {"marker": look["marker"] or "o"}
                sizes.errorbar([row["weights"] for row in chosen], [row["accuracy"] for row in chosen], spread(chosen),
                               label=f"{kind}, {cell}", capsize=2, **look)  # fmt: skip
    lines = {"adam": ":", "param_groups": "-", "uncapped": "-.", "modes": "--"}
    tried, dense = rows_of_rules(rows), rows[0]["network"]
    for k, (label, network, rule) in enumerate(
        [("dense", dense, "adam"), *((f"tt, {rule}", tried, rule) for rule in RULES)]
    ):
        chosen = [row for row in rows if (row["network"], row["rule"]) == (network, rule)]
        look = style("dense" if network == dense else "tt")
        look |= {} if network == dense else {"linestyle": lines[rule], "marker": "sDv^"[k - 1]}
        if not chosen:
            continue
        x = [row["rate"] * 1.03 ** (k - 1) for row in chosen]  # side by side
        rates.errorbar(x, [row["accuracy"] for row in chosen], spread(chosen), capsize=2, label=label, **look)
    sizes.set(
        xscale="log", xlabel="weights of the recurrent layer", ylabel="test accuracy", title="each at its best rate"
    )
    rates.set(
        xscale="log",
        xlabel="learning rate of dense weights",
        ylabel="test accuracy",
        title=f"{dense}, by rule and rate",
    )
    rates.set_xticks(sorted({row["rate"] for row in rows}))
    rates.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    rates.xaxis.set_minor_formatter(ticker.NullFormatter())
    legend(figure, axes)
    draw(figure, name, folder)


def spread(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return the distances of the lowest and the highest from the mean."""
    return [[abs(row[side] - row["accuracy"]) for row in rows] for side in ("lowest", "highest")]


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of MNIST or zip file of recordings; without it, small digits")
    parser.add_argument("--images", type=int, default=4000, help="to train on")
    parser.add_argument("--hidden", type=int, choices=HIDDEN, default=256)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2])
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.hidden, args.epochs, args.rates, args.seeds = 256, 128, 4, [1e-2], 2
    torch.set_num_threads(args.threads)
    about = environment(argv)
    training, test = read(args.data, args.images)
    tag, task = ("digits", "images read row by row") if args.data is None else ("mnist", "images read row by row")
    if args.data is not None and args.data.suffix == ".zip":
        tag, task = "spoken", "log spectrograms of spoken digits"
    rows = measure(training, test, args)
    steps, features = training[0][0].shape
    notes = NOTES.format(
        train=len(training), test=len(test), steps=steps if tag != "spoken" else "several", features=features,
        epochs=args.epochs, seeds=args.seeds, hidden=args.hidden, task=task,
    )  # fmt: skip
    title = "Recurrent networks in tensor trains"
    conclude(args.results, f"tt_rnn_{tag}", title, notes, finding(rows), about, rows, COLUMNS)
    if not args.quick:
        picture(rows, f"tt_rnn_{tag}", args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
