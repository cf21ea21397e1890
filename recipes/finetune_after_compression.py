"""Compress a trained model by every structure, then fine-tune it with AdamW: accuracy before, after, and at the end.

Trains a dense 64-256-256-256-10 network on handwritten digits, compresses a copy of it by each structure in one line,
and trains that copy for a few more epochs with an ordinary optimizer: structured layers are modules with parameters.

    pip install "structlin[recipes]"
    python recipes/finetune_after_compression.py
    python recipes/finetune_after_compression.py --ratio 0.5 --epochs 20

Stores benchmarks/results/finetune_digits.jsonl (one line per structure) and .md (the table).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _digits import Data, accuracy, digits, mlp, parameters, train
from _results import RESULTS, environment, say, store
from torch import nn

import structlin
from structlin.structures import families

COLUMNS = {
    "structure": ("structure", ""),
    "parameters": ("parameters", ","),
    "kept": ("kept", ".3f"),
    "error, mean": ("error", ".3f"),
    "dense": ("before", ".4f"),
    "compressed": ("compressed", ".4f"),
    "fine-tuned": ("finetuned", ".4f"),
    "compress, s": ("seconds_compression", ".2f"),
    "fine-tune, s": ("seconds_finetuning", ".2f"),
}
NOTES = """\
A 64-256-256-256-10 network on scikit-learn's digits (1347 training, 450 test images): test accuracy of the trained
dense network, after compression of both 256 x 256 layers, and after fine-tuning with AdamW, each the mean over the
seeds. Row `dense` is the uncompressed network, trained on for as long. *kept*: of the compressed weights; *error*:
relative Frobenius error of a weight; seconds: median of a run."""


def run(name: str, dense: nn.Sequential, data: tuple[Data, Data], args: argparse.Namespace) -> dict[str, float]:
    """Compress a copy of the dense network and fine-tune it."""
    training, test = data
    model = copy.deepcopy(dense)
    row: dict[str, float] = {"before": accuracy(model, test)}
    if name != "dense":
        start = time.perf_counter()
        report = structlin.compress_model(model, name, ratio=args.ratio, rules={"0": None})  # the small layer stays
        row["seconds_compression"] = time.perf_counter() - start
        row["kept"] = report.ratio
        row["error"] = statistics.mean(layer.error for layer in report.layers if layer.structure)
        row["compressed"] = accuracy(model, test)
    start = time.perf_counter()
    train(model, training, args.epochs, args.learning_rate)
    row["seconds_finetuning"] = time.perf_counter() - start
    return row | {"finetuned": accuracy(model, test), "parameters": parameters(model)}


def summary(name: str, runs: Sequence[dict[str, float]]) -> dict[str, object]:
    """Average the runs of all seeds; take the median of their times."""
    averages = {
        key: (statistics.median if key.startswith("seconds") else statistics.mean)([row[key] for row in runs])
        for key in runs[0]
    }
    return {"structure": name, **averages, "parameters": int(runs[0]["parameters"])}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(families())
    parser.add_argument("--structures", nargs="+", choices=names, default=names)
    parser.add_argument("--ratio", type=float, default=0.25, help="parameters kept of each large layer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dense-epochs", type=int, default=30, help="training of the dense network")
    parser.add_argument("--epochs", type=int, default=10, help="fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more do not help layers this small")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    data = digits()
    trained = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        trained.append(mlp(args.width))
        train(trained[-1], data[0], args.dense_epochs, learning_rate=3e-3)
        say(f"dense network {seed}: accuracy {accuracy(trained[-1], data[1]):.4f}")
    rows = []
    for name in ("dense", *args.structures):
        rows.append(summary(name, [run(name, dense, data, args) for dense in trained]))
        say(f"{name}: fine-tuned accuracy {rows[-1]['finetuned']:.4f}")
    names = ("ratio", "dense_epochs", "epochs", "learning_rate", "seeds")
    about = {name: getattr(args, name) for name in names} | environment(argv)
    title = "Digits: a trained network compressed, then fine-tuned"
    store(args.results, "finetune_digits", title, NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
