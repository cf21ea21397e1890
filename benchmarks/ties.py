"""Time circulant, Toeplitz, diagonal and sparse layers beside `nn.Linear`.

    python benchmarks/ties.py

One forward pass in single precision on one thread, factors not frozen; medians of alternated calls, as a share of
`nn.Linear` of the same sizes, *dense*. *runs*: how the layer chose to run. Stores results/ties.jsonl and .md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from _speed import median_seconds
from _weights import RESULTS, environment, say, store
from torch import nn

from structlin import StructuredLinear
from structlin.equation.structure import Structure, show
from structlin.structures import Circulant, Diagonal, Sparse, Toeplitz

SIZES, ROWS = (256, 1024, 4096), (1, 16, 256)
LEAST, ROUNDS = 5e-3, 9  # seconds of a sample; samples
MEMBERS: tuple[Structure, ...] = (
    Circulant(), Circulant(block=64), Toeplitz(), Toeplitz(blocks=4), Diagonal(), Diagonal(blocks=8),
)  # fmt: skip
COLUMNS = {
    "structure": ("structure", ""), "n": ("n", ","), "rows": ("rows", ","), "parameters": ("parameters", ","),
    "ratio": ("ratio", ".4f"), "runs": ("runs", ""), "time": ("time", ".3f"), "dense, us": ("dense", ".0f"),
}  # fmt: skip


def measured(structure: Structure, n: int, rows: int) -> dict[str, Any]:
    """Time one layer and its dense counterpart in turn."""
    layer = StructuredLinear(n, n, structure=structure).eval()
    dense, x = nn.Linear(n, n), torch.randn(rows, n)
    with torch.no_grad():
        seconds, base = median_seconds([lambda: layer(x), lambda: dense(x)], LEAST, ROUNDS)
    chosen = next(option for option in layer.options(rows) if option.chosen and option.mode == "eval")
    row = {"structure": show(structure), "n": n, "rows": rows, "parameters": layer.num_parameters}
    runs = chosen.way.partition(":")[0]
    return {**row, "ratio": layer.spec.ratio, "runs": runs, "time": seconds / base, "dense": base * 1e6}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about, found = environment(argv), []
    for n in args.sizes:
        for structure in (*MEMBERS, Sparse(count=n * n // 10)):
            for rows in ROWS:
                found.append(measured(structure.resolve(n, n), n, rows))
                say(str(found[-1]))
    title = "Structures whose entries share numbers in a pattern: time beside nn.Linear"
    store(RESULTS, "ties", title, __doc__.rpartition("benchmarks/ties.py\n\n")[2].strip(), about, found, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
