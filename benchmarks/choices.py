"""How good the predicted choice is: every way to run a layer, timed beside the one that is predicted to be the fastest.

    python benchmarks/choices.py
    python benchmarks/choices.py --sizes 768x768 --structures lowrank phm --tokens 512
    python benchmarks/choices.py --dtype bfloat16

Each structure at half of the parameters, in eval and training (forward and backward), one thread. A cell
runs in the way of least predicted time by the record of this machine: what `measure_machine` stored, else the shipped
one. Stores results/choices.jsonl and .md, or choices_bfloat16 of them, a line per mode and number of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _speed import TOLERANCE, median_seconds, relative_error
from torch import Tensor, nn

from structlin.fitting.budget import within
from structlin.runtime import contract, kernels
from structlin.runtime.machines import machine_of
from structlin.runtime.ways import Key, Mode, Way, predicted, ways
from structlin.structures import families, family

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, environment, say, store

SIZES = ("384x384", "768x768", "768x3072", "2048x2048")  # out x in
TOKENS, RATIO, MODES = (1, 8, 32, 128, 512), 0.5, ("eval", "training")
CPU = torch.device("cpu")
SECONDS, SAMPLES = 5e-3, 5  # of a sample; samples of each way, in turn
HOPELESS = 8  # ways whose predicted time is so many times the least are not timed
COLUMNS = {
    "mode": ("mode", ""), "tokens": ("tokens", ""), "cells": ("cells", ""), "native kernel": ("native", ".0%"),
    "chosen / fastest": ("mean", ".3f"), "largest": ("largest", ".2f"), "of": ("of", ""),
    "chosen / dense": ("dense", ".2f"), "slower than dense": ("slower", ""), "fastest way too": ("least", ""),
}  # fmt: skip
NOTES = """\
Each structure at half of the parameters of layers of several sizes. All ways to run it are checked, timed
in turn (median of 5 samples), and the time of the way that is predicted to be the fastest is divided by that of the one
that is. *native kernel*: the share of cells that run by it. *chosen / fastest*: geometric mean over the cells;
*largest*, *of*: the worst cell. *chosen / dense*: geometric mean, against `nn.Linear` in the same run. *slower than
dense*: cells beyond 1.1 of it; *fastest way too*: those of them that no way makes faster. Layers with `autotune=True`
choose by time; all others by these predictions."""


def cell(name: str, size: str, tokens: int, mode: Mode, dtype: torch.dtype) -> dict[str, Any] | None:
    """Time all ways of a layer; None where the structure has no member of the size."""
    out, inside = map(int, size.split("x"))
    try:
        structure = within(family(name), inside, out, RATIO)[0]
    except ValueError:
        return None
    spec = structure.spec(inside, out)
    training = mode == "training"
    factors = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_(training) for shape in spec.shapes]
    x = torch.randn(tokens, inside, dtype=dtype, requires_grad=training)
    bias = torch.zeros(out, dtype=dtype, requires_grad=training)
    dense = nn.Linear(inside, out, dtype=dtype)
    found = ways(spec, Key(tokens, dtype, CPU, native=kernels.available(), mode=mode))
    chosen = predicted(found)
    found = [way for way in found if way.seconds < HOPELESS * chosen.seconds]

    def step(y: Tensor, *leaves: Tensor) -> None:
        if training:
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    def call(way: Way) -> None:
        step(way(x, factors, bias), x, bias, *factors)

    expected = x.double() @ contract.to_dense(spec, [factor.double() for factor in factors]).mT
    assert all(relative_error(way(x, factors, bias), expected) < TOLERANCE[dtype] for way in found)
    with torch.set_grad_enabled(training):
        calls = [*(lambda way=way: call(way) for way in found), lambda: step(dense(x), x, *dense.parameters())]
        *times, beside = median_seconds(calls, SECONDS, SAMPLES)
    by_way = {str(way): value for way, value in zip(found, times, strict=True)}
    return {
        "of": f"{name}, {size}", "fastest": min(by_way.values()), "chosen": by_way[str(chosen)],
        "dense": beside, "native": chosen.name == "native kernel",
    }  # fmt: skip


def summary(mode: str, tokens: int, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the cells of a mode and a number of tokens."""
    losses = [row["chosen"] / row["fastest"] for row in cells]
    beside = [row["chosen"] / row["dense"] for row in cells]
    worst, row = max(zip(losses, cells, strict=True), key=lambda pair: pair[0])
    return {
        "mode": mode, "tokens": tokens, "cells": len(cells), "native": statistics.mean(row["native"] for row in cells),
        "mean": statistics.geometric_mean(losses), "largest": worst, "of": row["of"],
        "dense": statistics.geometric_mean(beside), "slower": sum(value > 1.1 for value in beside),
        "least": sum(row["fastest"] > 1.1 * row["dense"] for row in cells),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="of layers, OUTxIN")
    parser.add_argument("--structures", nargs="+", default=sorted(families()))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, name = getattr(torch, args.dtype), "choices" + ("" if args.dtype == "float32" else f"_{args.dtype}")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for mode, tokens in itertools.product(MODES, args.tokens):
        say(f"{mode}, {tokens} tokens")
        made = (cell(*each, tokens, mode, dtype) for each in itertools.product(args.structures, args.sizes))
        groups[mode, tokens] = [row for row in made if row]
    about = environment(argv) | {
        "dtype": args.dtype,
        "record": machine_of(CPU).name,
        "native kernel": kernels.available(),
    }
    rows = [summary(*group, cells) for group, cells in groups.items()]
    args.results.mkdir(parents=True, exist_ok=True)
    store(args.results, name, f"Predicted choices, {args.dtype}", NOTES, about, rows, COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])
