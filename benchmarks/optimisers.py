"""Compare what was tried for the refinement: optimisers for one structure, and structures under our optimiser.

    python benchmarks/optimisers.py
    python benchmarks/optimisers.py --table optimisers --layers 1

Tables, on four attention weights of all-MiniLM-L6-v2, in the norm of their inputs:

- optimisers: low rank + K-matrix at 48 % of the parameters, fitted by our refinement at several rates and numbers of
  steps, and by joint Adam, L-BFGS, a Muon-like step and alternating least squares.
- structures_tried: sums and digits at 25, 48 and 75 %, 300 steps of our refinement each.

Every error is that of the dense matrix which the returned factors build. Stores results/NAME.jsonl and .md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, SIZE, STRUCTURE, Problem
from _weights import RESULTS, Columns, Layer, environment, output_error, read_layers, say, side_by_side, store

from structlin.equation.structure import Structure, show
from structlin.fitting.budget import within
from structlin.fitting.fit import fit
from structlin.structures import Blast, Kaleidoscope, LowRank, Monarch, Sum

Row = dict[str, Any]

PLACES = [(0, "query"), (2, "attention output"), (3, "value"), (5, "attention output")]
RATIOS = (0.25, 0.48, 0.75)
SHARE = 0.8  # of the budget at most for the other parts beside a low rank


# The structures --------------------------------------------------------------------------------------------------


def widest(budget: float, modes: tuple[int, ...], *, most: int = 99, expansion: int = 1) -> Structure | None:
    """The widest K-matrix over these digits within a budget."""
    found = None
    for width in range(1, most + 1):
        chain = Kaleidoscope(width=width, expansion=expansion, in_modes=modes, out_modes=modes)
        if size_of(chain) > budget:
            break
        found = chain
    return found


def beside(budget: int, *parts: Structure | None) -> Structure | None:
    """Low rank as large as the other parts leave room for; None where they leave none."""
    known = [part for part in parts if part is not None]
    rank = (budget - sum(map(size_of, known))) // (2 * SIZE)
    return Sum(parts=(LowRank(rank=rank), *known)) if rank >= 1 and len(known) == len(parts) else None


def size_of(structure: Structure) -> int:
    return structure.resolve(SIZE, SIZE).spec(SIZE, SIZE).num_parameters


def blast(budget: float, blocks: int) -> Structure:
    return Blast(blocks=blocks, rank=int(budget) // (2 * SIZE + blocks**2))


def fixed(budget: int, modes: tuple[int, ...], width: int) -> Structure | None:
    """A K-matrix of one width, where it fits."""
    chain = Kaleidoscope(width=width, in_modes=modes, out_modes=modes)
    return chain if size_of(chain) <= budget else None


DIGITS = ((16, 24), (24, 16), (12, 32), (8, 48), (8, 6, 8))
TRIED: dict[str, Callable[[int], Structure | None]] = {
    "low rank": lambda b: within(LowRank, SIZE, SIZE, b / SIZE**2)[0],
    **{f"K-matrix {'x'.join(map(str, d))}": functools.partial(widest, modes=d) for d in DIGITS},
    "K-matrix 24x16, expansion 2": lambda b: widest(b, (24, 16), expansion=2),
    **{f"low rank + K-matrix 24x16, width {w}": lambda b, w=w: beside(b, fixed(b, (24, 16), w)) for w in (1, 2, 3, 4)},
    **{
        f"low rank + K-matrix {'x'.join(map(str, d))}, width to 3": lambda b, d=d: beside(
            b, widest(SHARE * b, d, most=3)
        )
        for d in DIGITS
        if d != (24, 16)
    },
    "low rank + K-matrix 24x16, expansion 2": lambda b: beside(b, widest(0.9 * b, (24, 16), most=3, expansion=2)),
    "low rank + two K-matrices 24x16 and 16x24": lambda b: beside(
        b, *(widest(SHARE * b / 2, d, most=2) for d in ((24, 16), (16, 24)))
    ),
    **{
        f"low rank + Monarch of {n} x {n} blocks": lambda b, n=n: beside(
            b, Monarch(n, int(SHARE * b) // (2 * SIZE * n))
        )
        for n in (4, 8)
    },
    **{f"BLAST of {n} x {n} blocks": functools.partial(blast, blocks=n) for n in (4, 8, 16)},
    **{f"low rank + BLAST of {n} x {n} blocks": lambda b, n=n: beside(b, blast(SHARE * b, n)) for n in (4, 8, 16)},
}


# The run ---------------------------------------------------------------------------------------------------------


def optimise(case: tuple[Layer, str, int]) -> Row:
    """Run a contender on a weight."""
    layer, name, steps = case
    contender = CONTENDERS[name]
    start = time.perf_counter()
    problem = Problem(layer, contender.dtype)
    factors = contender.run(problem, steps)
    seconds = time.perf_counter() - start
    taken = steps if problem.taken is None else problem.taken
    about = {"what": name, "steps": steps, "taken": taken, "kept": size_of(STRUCTURE) / SIZE**2}
    return {**about, "error": problem.error(factors), "seconds": seconds}


def try_structure(case: tuple[Layer, str, float]) -> Row | None:
    """Fit a structure of a size to a weight."""
    layer, name, ratio = case
    structure = TRIED[name](int(ratio * SIZE**2))
    if structure is None:
        return None
    start = time.perf_counter()
    found = fit(layer.weight, structure, gram=layer.gram, refine=300)
    seconds = time.perf_counter() - start
    error = output_error(layer.weight, found.spec, found.factors, layer.gram)
    assert found.output_error is not None
    assert abs(error - found.output_error) < 1e-6, (error, found.output_error)
    about = {"what": name, "ratio": ratio, "structure": show(found.structure), "sizes": _sizes(structure)}
    return {**about, "kept": found.spec.num_parameters / SIZE**2, "error": error, "seconds": seconds}


def _sizes(structure: Structure) -> str:
    """What tells members with the same name apart: ranks and widths."""
    parts = structure.parts if isinstance(structure, Sum) else (structure,)
    return ", ".join(f"{k} {getattr(part, k)}" for part in parts for k in ("rank", "width") if hasattr(part, k))


def gathered(layers: Sequence[Layer], measured: Iterator[Row | None]) -> list[Row]:
    """One row for all weights; the measurements come weight by weight within a contender."""
    rows = []
    for found in zip(*[measured] * len(layers), strict=True):
        of_weights = [one for one in found if one is not None]
        if len(of_weights) == len(layers):
            means = {
                key: statistics.mean(one[key] for one in of_weights)
                for key in ("error", "seconds", "taken")
                if key in of_weights[0]
            }
            each = {layer.name: one["error"] for layer, one in zip(layers, of_weights, strict=True)}
            rows.append({**of_weights[0], **each, **means})
            size = rows[-1].get("steps", rows[-1].get("ratio"))
            say(f"  {rows[-1]['what']}, {size}: {means['error']:.4f}, {means['seconds']:.1f} s")
    return rows


NOTES = """\
*Mean* of the output errors sqrt(tr(D G D^T) / tr(W G W^T)) of four weights, D = W - What, G the Gram of the layer's
inputs on 300 sentences from docstrings of Python's standard library. *s*: mean seconds for a weight on one thread."""

OPTIMISERS = f"""\
{show(STRUCTURE)}, {{kept:.3f}} of the parameters. `ours` eliminates the low rank and is Adam with a rate relative to
the factors' entries; it shortens its schedule when little falls any more (*taken*: steps in the end). The Muon-like
step and the alternation (one stage at a time by so many iterations of conjugate gradients, each a step) eliminate it as
well; joint Adam and L-BFGS (each evaluation a step) move all factors, from the whitened SVD and the projection of what
it leaves. The best factors on the way count. {NOTES}"""

TRIED_NOTES = f"""\
Each 300 steps of our refinement, given the Gram. A row is missing where nothing of the kind fits the ratio. K-matrices
are the widest that fit (to width 3, and within {SHARE} of the budget, beside a low rank, which takes what they leave).
{NOTES}"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("optimisers", "structures_tried")
    parser.add_argument("--table", nargs="+", choices=tables, default=tables)
    parser.add_argument("--layers", type=int, help="only the first N weights, for a trial")
    parser.add_argument("--only", default="", help="only rows whose name has this in it, for a trial with one --table")
    parser.add_argument("--threads", type=int, default=1, help="number of fits at a time, each on one thread")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(argv)


def columns(layers: Sequence[Layer], *middle: str) -> Columns:
    """Columns: what, those between, each weight, then the means."""
    shown = {
        "what": ("what", ""),
        "ratio": ("ratio", ".2f"),
        "steps": ("steps", ""),
        "sizes": ("sizes", ""),
        "taken": ("taken", ".0f"),
    }
    chosen = {"what": shown["what"]} | {name: shown[name] for name in middle} | {"kept": ("kept", ".3f")}
    each = {layer.name: (layer.name, ".3f") for layer in layers}
    return chosen | each | {"mean": ("error", ".4f"), "s": ("seconds", ".1f")}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    about = {**environment(argv), "threads": args.threads}
    layers = read_layers(PLACES[: args.layers])
    if "optimisers" in args.table:
        runs = [(name, steps) for name, one in CONTENDERS.items() if args.only in name for steps in one.steps]
        cases = [(layer, name, steps) for name, steps in runs for layer in layers]
        rows = gathered(layers, side_by_side(optimise, cases, args.threads))
        notes = OPTIMISERS.format(kept=size_of(STRUCTURE) / SIZE**2)
        title = "Optimisers tried for low rank + K-matrix"
        store(args.results, "optimisers", title, notes, about, rows, columns(layers, "steps", "taken"))
    if "structures_tried" in args.table:
        tries = [(layer, name, r) for r in RATIOS for name in TRIED if args.only in name for layer in layers]
        rows = gathered(layers, side_by_side(try_structure, tries, args.threads))
        title = "Structures tried in the norm of the inputs"
        store(args.results, "structures_tried", title, TRIED_NOTES, about, rows, columns(layers, "ratio", "sizes"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
