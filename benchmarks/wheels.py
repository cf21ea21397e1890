"""Time the kernel of structlin-kernels beside the one that `structlin.kernels.build()` made, both beside `nn.Linear`.

    python benchmarks/wheels.py --built FOLDER [--visits 2]

structlin-kernels must be installed, and FOLDER be the cache ($STRUCTLIN_CACHE) that `build` filled, in this
environment; tests/wheels.sh does both. A process for each kernel times a case in turn; each time is a ratio to
`nn.Linear` in the same process and moment. One thread, and its CPU time: other processes leave that alone. Stored as
results/wheels.jsonl and .md; trials (`--only`) go to out/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from _speed import Call
from torch import nn

from structlin import kernels
from structlin.equation.structure import Structure
from structlin.layers.linear import build
from structlin.runtime.kernels import native
from structlin.structures import Kaleidoscope, Kronecker, LowRank, Sum

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, ROOT, Columns, environment, say, store

SAMPLES, SECONDS = 7, 1e-3  # of a visit to a case: number, and least time of each


class Cell(NamedTuple):
    """A structure at a size, for a number of tokens."""

    name: str
    structure: Structure
    size: int
    tokens: int
    mode: str  # "eval" or "training"
    dtype: torch.dtype


def cells() -> list[Cell]:
    """List what is timed."""
    found = []
    for size in (64, 512, 2048):
        structures = {
            "low rank": LowRank(rank=size // 8),
            "kronecker, 4 terms": Kronecker(terms=4),
            "low rank + K-matrix": Sum(parts=(LowRank(rank=size // 16), Kaleidoscope(width=2))),
        }
        for name, structure in structures.items():
            for tokens in (1, 32, 256):
                found += [Cell(name, structure, size, tokens, mode, torch.float32) for mode in ("eval", "training")]
            found.append(Cell(name, structure, size, 1, "eval", torch.bfloat16))
    return found


# The processes that time -----------------------------------------------------------------------------------------


def serve() -> None:
    """Time the cells whose numbers come in, one a line, until there are no more."""
    torch.set_num_threads(1)
    print(json.dumps(str(kernels.origin())), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(cells()[int(line)])), flush=True)


def timed(cell: Cell) -> dict[str, Any]:
    """Time a layer and `nn.Linear` in turn: medians in us, and which way the layer runs."""
    torch.manual_seed(0)
    layer = build(cell.structure, cell.size, cell.size, dtype=cell.dtype)
    dense = nn.Linear(cell.size, cell.size, dtype=cell.dtype)
    x = torch.randn(cell.tokens, cell.size, dtype=cell.dtype, requires_grad=cell.mode == "training")
    pull = torch.randn_like(x)
    with torch.set_grad_enabled(cell.mode == "training"):
        y = layer(x)
        error = (y - nn.functional.linear(x, layer.to_dense(), layer.bias)).norm() / y.norm()
        assert error < (1e-4 if cell.dtype is torch.float32 else 3e-2), (cell, error)
        calls = [work(module.train(cell.mode == "training"), cell, x, pull) for module in (dense, layer)]
        counts = [max(1, round(SECONDS / min(sample(call, 1) for _ in range(3)))) for call in calls]
        rows = [[sample(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(SAMPLES)]
    dense_us, layer_us = (1e6 * statistics.median(column) for column in zip(*rows, strict=True))
    way = next(option.way for option in layer.options(cell.tokens) if option.mode == cell.mode and option.chosen)
    return {"dense_us": dense_us, "layer_us": layer_us, "ratio": layer_us / dense_us, "way": way}


def sample(call: Callable[[], Any], calls: int) -> float:
    """Return the seconds of this thread per call."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


def work(module: nn.Module, cell: Cell, x: torch.Tensor, pull: torch.Tensor) -> Callable[[], Any]:
    """Return a forward pass, or a training step."""
    return Call(module, "training", x, pull).work() if cell.mode == "training" else partial(module, x)


class Server:
    """A process that runs one kernel."""

    def __init__(self, cache: str) -> None:
        command = [sys.executable, __file__, "--serve"]
        variables = {**os.environ, "STRUCTLIN_CACHE": cache, native.SWITCH: "on"}
        self.process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.origin = Path(self.answer())

    def answer(self) -> Any:
        """Read a line."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def time(self, number: int) -> dict[str, Any]:
        """Time a cell."""
        out: IO[str] | None = self.process.stdin
        assert out
        out.write(f"{number}\n")
        out.flush()
        return dict(self.answer())


# The comparison --------------------------------------------------------------------------------------------------


def compare(built: Server, wheel: Server, number: int, visits: int) -> dict[str, Any]:
    """Time a cell by both in turn; medians over the visits."""
    cell = cells()[number]
    rows = [(built.time(number), wheel.time(number)) for _ in range(visits)]
    ways = {row["way"] for pair in rows for row in pair}
    own, other = (statistics.median(pair[k]["ratio"] for pair in rows) for k in (0, 1))
    extra = [pair[1]["layer_us"] - pair[0]["layer_us"] for pair in rows]
    return {
        "case": f"{cell.name}, {cell.size} x {cell.size}", "mode": cell.mode, "tokens": cell.tokens,
        "cell_dtype": str(cell.dtype).removeprefix("torch."), "way": ", ".join(sorted(ways)),
        "built": own, "wheel": other, "wheel_to_built": other / own, "extra_us": statistics.median(extra),
        "dense_us": statistics.median(pair[1]["dense_us"] for pair in rows),
    }  # fmt: skip


COLUMNS: Columns = {
    "case": ("case", ""),
    "mode": ("mode", ""),
    "dtype": ("cell_dtype", ""),
    "tokens": ("tokens", ""),
    "way": ("way", ""),
    "dense, us": ("dense_us", ",.1f"),
    "built here / dense": ("built", ".3f"),
    "wheel / dense": ("wheel", ".3f"),
    "wheel / built here": ("wheel_to_built", ".2f"),
    "wheel - built here, us": ("extra_us", ",.1f"),
}
NOTES = """\
`built here` is the library of `structlin.kernels.build()` (`-march=native`, calls without boxing, autograd in C++),
`wheel` that of structlin-kernels, on the same machine without any compiler. CPU times of one thread, as ratios to
`nn.Linear` in the same process: medians over {visits} visits of each process in turn. A wheel's call goes through
torch.ops, and its autograd is Python: a constant that small layers feel (last column; noise where calls are long)."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", help="cache folder with the library that was built here")
    parser.add_argument("--visits", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name contains this; stored in out/")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve()
        return
    if not args.built:
        parser.error("--built is missing: the cache folder that structlin.kernels.build() filled")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as empty:
        built, wheel = Server(args.built), Server(empty)
        if built.origin.parent != Path(args.built) or wheel.origin.parent.name != "structlin_kernels":
            raise SystemExit(f"the two kernels that were found are {built.origin} and {wheel.origin}")
        rows = []
        for number, cell in enumerate(cells()):
            if args.only in cell.name:
                rows.append(compare(built, wheel, number, args.visits))
                say(f"  {rows[-1]['case']}, {cell.tokens}, {cell.mode}: {rows[-1]['wheel_to_built']:.2f}")
    about = {**environment(sys.argv[1:] if argv is None else argv), "library": wheel.origin.name}
    notes = NOTES.format(visits=args.visits)
    title = "The kernel of structlin-kernels beside one that is built here"
    store(ROOT / "out" if args.only else RESULTS, "wheels", title, notes, about, rows, COLUMNS)


if __name__ == "__main__":
    main()
