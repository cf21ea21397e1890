"""Time the fits of "auto" at .5, with their errors: the twelve matrices of blocks 1 and 4 of all-MiniLM-L6-v2.

    python benchmarks/fit_time.py --label before
    python benchmarks/fit_time.py --label after

Each fit has one thread. Seconds are CPU time of the process (`time.process_time`): other work on the machine lengthens
it less than the time on the clock. Errors are those that the fit minimised, in the norm of the layer's inputs. The
label names two columns of results/fit_time.md; the columns of other labels stay. STRUCTLIN_KERNELS=off leaves out the
native kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _weights import MODULES, RESULTS, Layer, environment, read_layers, say, store

from structlin.compress.config import AUTO
from structlin.compress.statistics import SHRINKAGE
from structlin.equation.structure import show
from structlin.fitting.fit import fit
from structlin.fitting.objective import InputGram
from structlin.runtime import kernels

NAME, RATIO = "fit_time", 0.5
NOTES = __doc__.partition("\n\n    python")[0] + "\n\n" + __doc__.rpartition("label after\n\n")[2].strip()


def measure(layer: Layer) -> dict[str, Any]:
    """Fit as `compress_model` does with calibration."""
    gram = InputGram.of(layer.gram, SHRINKAGE)
    start = time.process_time()
    found = fit(layer.weight, AUTO, ratio=RATIO, gram=gram)
    seconds = time.process_time() - start
    say(f"  {layer.name:20s} {show(found.structure)}: {found.minimised:.5f}, {seconds:.1f} s")
    return {"seconds": seconds, "error": found.minimised, "structure": show(found.structure)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of the columns, such as before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = environment(argv)
    layers = read_layers([(number, role) for number in (1, 4) for role in MODULES])
    measured = [measure(layer) for layer in layers]
    known = args.results / f"{NAME}.jsonl"
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    rows: dict[str, dict[str, Any]] = {row["weight"]: row for row in map(json.loads, lines)}
    for layer, result in zip(layers, measured, strict=True):
        found = {f"{args.label} {key}": value for key, value in result.items()}
        source = {f"{args.label} commit": about["commit"], f"{args.label} kernel": kernels.available()}
        rows[layer.name] = {"shape": layer.shape, **rows.get(layer.name, {}), "weight": layer.name, **found, **source}
    each = [rows[layer.name] for layer in layers]
    labels = [key.removesuffix(" seconds") for key in each[0] if key.endswith(" seconds")]
    last: dict[str, Any] = {"weight": "sum of seconds, mean error"}
    for label in labels:
        last[f"{label} seconds"] = sum(row[f"{label} seconds"] for row in each)
        last[f"{label} error"] = statistics.mean(row[f"{label} error"] for row in each)
    columns = {"weight": ("weight", ""), "shape": ("shape", "")}
    for label in labels:
        columns |= {f"{label}, s": (f"{label} seconds", ".1f"), f"{label}, error": (f"{label} error", ".5f")}
    about.pop("commit")  # each label has its own
    about["labels"] = "; ".join(
        f"{label}: commit {each[0][f'{label} commit']}, kernel {'on' if each[0][f'{label} kernel'] else 'off'}"
        for label in labels
    )
    store(
        args.results, NAME, 'Fits of "auto" at .5: seconds of CPU time and errors', NOTES, about, [*each, last], columns
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
