"""Swap layers in training code: train an MLP on handwritten digits, dense and with every structure, for equal epochs.

The two large layers of a 64-256-256-256-10 network become structured layers of about a quarter of the parameters, drawn
from scratch (nothing is decomposed); optimizer, data and number of epochs stay the same.

    pip install "structlin[recipes]"
    python recipes/train_from_scratch.py
    python recipes/train_from_scratch.py --structures monarch kmatrix --ratio 0.1 --width 1024

Stores benchmarks/results/train_digits.jsonl (one line per network) and .md (the table).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _digits import accuracy, digits, mlp, parameters, train
from _results import RESULTS, environment, say, store
from torch import nn

from structlin.fitting.budget import within
from structlin.layers.linear import build
from structlin.structures import families, family

COLUMNS = {
    "structure": ("structure", ""),
    "test accuracy": ("accuracy", ".4f"),
    "lowest": ("lowest", ".4f"),
    "highest": ("highest", ".4f"),
    "parameters": ("parameters", ","),
    "training, s": ("seconds", ".2f"),
    "hidden layer": ("layer", ""),
}
NOTES = """\
A 64-256-256-256-10 network on scikit-learn's digits (1347 training, 450 test images), both 256 x 256 layers structured
and drawn from scratch, AdamW, equal epochs. Row `dense` is `nn.Linear`. *test accuracy*: mean over the seeds, with
the lowest and the highest; *parameters*: of the whole network;
*training*: median of a run (layers of this size are too small to be faster)."""


def structured(name: str, ratio: float, width: int) -> nn.Sequential:
    """Build the network with its two large layers replaced."""
    model = mlp(width)
    for k in (2, 4):
        dense = model[k]
        sizes = dense.in_features, dense.out_features
        members = within(family(name), *sizes, ratio)  # one for each choice of shape
        largest = max(members, key=lambda member: member.spec(*sizes).num_parameters)
        model[k] = build(largest, *sizes)
    return model


def run(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train one kind of network once per seed."""
    training, test = digits()
    accuracies, times = [], []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = mlp(args.width) if name == "dense" else structured(name, args.ratio, args.width)
        start = time.perf_counter()
        train(model, training, args.epochs, args.learning_rate)
        times.append(time.perf_counter() - start)
        accuracies.append(accuracy(model, test))
    return {
        "structure": name,
        "accuracy": statistics.mean(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "parameters": parameters(model),
        "seconds": statistics.median(times),
        "layer": str(getattr(model[2], "structure", "Linear")),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(families())
    parser.add_argument("--structures", nargs="+", choices=names, default=names)
    parser.add_argument("--ratio", type=float, default=0.25, help="parameters kept of each large layer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more do not help layers this small")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name in ("dense", *args.structures):
        rows.append(run(name, args))
        say(f"{name}: accuracy {rows[-1]['accuracy']:.4f}, {rows[-1]['seconds']:.1f} s a run")
    about = {name: getattr(args, name) for name in ("ratio", "epochs", "learning_rate", "seeds")} | environment(argv)
    store(args.results, "train_digits", "Digits: layers trained from scratch", NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
