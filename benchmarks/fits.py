"""Fit the weights of all-MiniLM-L6-v2 by structures of a given size, and measure the errors.

    python benchmarks/fits.py
    python benchmarks/fits.py --table joint kmatrix --threads 4

Tables, each stored as results/fits_NAME.jsonl (one line per row) and .md:

- joint: low rank + K-matrix against the best low rank (whitened SVD) at 48 % of the parameters on all 36 linear layers
  of the encoder (not the pooler), on the Gram that was fitted and on that of other sentences.
- kmatrix: K-matrices alone against the best low rank on the 24 attention weights, at 27 % and 48 %.
- frobenius: five weights at 27 % without a Gram.
- weighted: what a Gram gains over the weight-space fit, for every structure at 50 %.

`--threads` is the number of fits at a time. Each computes with one thread, so that the errors do not depend on it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _weights import (
    ATTENTION,
    MODULES,
    RESULTS,
    Columns,
    Layer,
    environment,
    output_error,
    read_layers,
    say,
    side_by_side,
    store,
)

from structlin.equation.structure import show
from structlin.fitting.budget import within
from structlin.fitting.fit import fit
from structlin.structures import families, family

Row = dict[str, Any]
Places = list[tuple[int, str]]  # number and role of each layer

ALL: Places = [(number, role) for number in range(6) for role in MODULES]
ATTENTIONS: Places = [(number, role) for number in range(6) for role in ATTENTION]
EVERY_OTHER: Places = [(number, role) for number in (0, 2, 5) for role in ATTENTION]
FIVE: Places = [(0, "query"), (2, "value"), (5, "attention output"), (2, "intermediate"), (2, "output")]
SMALL = 0.271  # "27 %": 104 of 384, a K-matrix of width 2 over digits of 24 and 16
SVD, K, BOTH = "lowrank", "kmatrix", "lowrank+kmatrix"


@dataclass(frozen=True)
class Case:
    """One fit.

    Args:
        layer: its weight and Grams.
        structure: name of its family.
        ratio: of the parameters.
        weighted: whether the Gram of the calibration sentences is given.
        refine: steps; None for the library's choice.
    """

    layer: Layer
    structure: str
    ratio: float
    weighted: bool = True
    refine: int | None = None


def measure(case: Case) -> Row:
    """Fit and measure on both Grams (and without); the Fit's own errors must be those of its dense matrix."""
    layer = case.layer
    gram = layer.gram if case.weighted else None
    start = time.perf_counter()
    found = fit(layer.weight, family(case.structure), ratio=case.ratio, gram=gram, refine=case.refine)
    seconds = time.perf_counter() - start
    grams = {"frobenius": None, "error": layer.gram, "held_out": layer.held_out}
    errors = {name: output_error(layer.weight, found.spec, found.factors, gram) for name, gram in grams.items()}
    assert abs(errors["frobenius"] - found.error) < 1e-6, (errors, found.error)
    assert found.output_error is None or abs(errors["error"] - found.output_error) < 1e-6, (errors, found.output_error)
    kept = found.spec.num_parameters / layer.weight.numel()
    say(f"  {layer.name:20s} {show(found.structure)}: minimised {found.minimised:.4f}, {seconds:.1f} s")
    return {**errors, "kept": kept, "seconds": seconds, "structure": show(found.structure)}


def wide(cases: Sequence[Case], measured: Iterable[Row], contender: str | None, errors: Sequence[str]) -> list[Row]:
    """Gather the measurements of a weight at a ratio in one row, then means and the number of wins for each ratio.

    Args:
        cases: what was fitted.
        measured: what came out, in the same order.
        contender: the structure that is compared with SVD, or None.
        errors: which errors are compared.
    """
    rows: dict[tuple[float, str], Row] = {}
    for case, found in zip(cases, measured, strict=True):
        about = {"weight": case.layer.name, "shape": case.layer.shape, "ratio": case.ratio}
        row = rows.setdefault((case.ratio, case.layer.name), about)
        row |= {f"{case.structure} {key}": value for key, value in found.items()}
    result = []
    for ratio in dict.fromkeys(case.ratio for case in cases):
        group = [row for (each, _), row in rows.items() if each == ratio]
        numbers = [key for key, value in group[0].items() if isinstance(value, float)]
        mean: Row = {"weight": f"mean of {len(group)}"} | {k: statistics.mean(row[k] for row in group) for k in numbers}
        for error in errors if contender else ():
            wins = [row[f"{contender} {error}"] < row[f"{SVD} {error}"] for row in group]
            for row, won in zip(group, wins, strict=True):
                row[f"lower {error}"] = "yes" if won else "no"
            mean[f"lower {error}"] = f"{sum(wins)} of {len(wins)}"
        result += [*group, mean]
    return result


# The tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What is fitted, how it is summed up, and what is shown.

    Args:
        title: of the stored table.
        notes: below it.
        places: the layers.
        cases: the fits of these layers.
        rows: of the cases and what was measured.
        columns: to show.
    """

    title: str
    notes: str
    places: Places
    cases: Callable[[Sequence[Layer]], list[Case]]
    rows: Callable[[Sequence[Case], Iterable[Row]], list[Row]]
    columns: Columns


def joint_cases(layers: Sequence[Layer]) -> list[Case]:
    return [Case(layer, name, 0.48) for layer in layers for name in (SVD, BOTH)]


def kmatrix_cases(layers: Sequence[Layer]) -> list[Case]:
    return [Case(layer, name, ratio) for ratio in (SMALL, 0.48) for layer in layers for name in (SVD, K)]


def frobenius_cases(layers: Sequence[Layer]) -> list[Case]:
    names = (SVD, K, BOTH, "lowrank+blast")
    return [Case(layer, name, SMALL, weighted=False) for layer in layers for name in names]


def weighted_cases(layers: Sequence[Layer]) -> list[Case]:
    """For every structure and weight, the fit without a Gram or refinement, then that with the Gram."""
    return [
        Case(layer, name, 0.5, weighted, None if weighted else 0)
        for name in sorted(families())
        for layer in layers
        if _exists(name, layer)
        for weighted in (False, True)
    ]


def _exists(name: str, layer: Layer) -> bool:
    out_features, in_features = layer.weight.shape
    try:
        within(family(name), in_features, out_features, 0.5)
    except ValueError as error:
        say(f"  left out: {error}")
        return False
    return True


def weighted_rows(cases: Sequence[Case], measured: Iterable[Row]) -> list[Row]:
    """One row for each structure: means over the weights, which stand in the line as lists."""
    found = dict(zip(cases, measured, strict=True))
    rows = []
    for name in dict.fromkeys(case.structure for case in cases):
        of_name = [case for case in cases if case.structure == name]
        own, new = ([found[case] for case in of_name if case.weighted is given] for given in (False, True))
        gains = [100 * (1 - b["error"] / a["error"]) for a, b in zip(own, new, strict=True)]
        held_out = [100 * (1 - b["held_out"] / a["held_out"]) for a, b in zip(own, new, strict=True)]
        row: Row = {"structure": name, "number": len(gains), "weights": [c.layer.name for c in of_name if c.weighted]}
        for label, fits in (("own", own), ("weighted", new)):
            for key in ("error", "held_out", "kept", "seconds"):
                row[f"{label} {key}"] = statistics.mean(each[key] for each in fits)
            row[f"{label} errors"] = [each["error"] for each in fits]
        row |= {"gain": statistics.mean(gains), "least gain": min(gains), "held-out gain": statistics.mean(held_out)}
        rows.append(row)
    return rows


def wide_columns(structures: Sequence[str], errors: Columns, *, ratio: bool = False) -> Columns:
    """Columns of `wide`: each error for all structures, then who won and the seconds."""
    columns: dict[str, tuple[str, str]] = {"weight": ("weight", ""), "out x in": ("shape", "")}
    columns |= {"ratio": ("ratio", ".2f")} if ratio else {}
    for suffix, (error, form) in errors.items():
        columns |= {f"{name}{suffix}": (f"{name} {error}", form) for name in structures}
        columns[f"lower{suffix}"] = (f"lower {error}", "")
    return columns | {f"{name}, s": (f"{name} seconds", ".1f") for name in structures}


WHAT = """\
*Output error*: sqrt(tr(D G D^T) / tr(W G W^T)), D = W - What, G the Gram of the layer's inputs on 300 sentences from
docstrings of Python's standard library; *held out*: on the Gram of 300 others. *s*: seconds of a fit on one thread,
the search for its size included; *threads*: how many fits ran at a time."""

TABLES = {
    "joint": Table(
        "Low rank + K-matrix against SVD at 48 % of the parameters, all linear layers of the encoder",
        f"Both were given the Gram: `{SVD}` is the whitened SVD, the optimum of its rank. {WHAT}",
        ALL, joint_cases,
        lambda cases, measured: wide(cases, measured, BOTH, ("error", "held_out")),
        wide_columns((SVD, BOTH), {"": ("error", ".3f"), ", held out": ("held_out", ".3f")}),
    ),
    "kmatrix": Table(
        "K-matrices against SVD on the attention weights",
        f"Both were given the Gram: `{SVD}` is the whitened SVD, the optimum of its rank. {WHAT}",
        ATTENTIONS, kmatrix_cases,
        lambda cases, measured: wide(cases, measured, K, ("error",)),
        wide_columns((SVD, K), {"": ("error", ".3f")}, ratio=True),
    ),
    "frobenius": Table(
        "Fits without a Gram at 27 % of the parameters",
        "Relative Frobenius error; `intermediate` maps 384 to 1536, `output` 1536 to 384. *s*: seconds of a fit on one "
        "thread, the\nsearch for its size included; *threads*: how many fits ran at a time.",
        FIVE, frobenius_cases,
        lambda cases, measured: wide(cases, measured, None, ()),
        wide_columns((SVD, K, BOTH, "lowrank+blast"), {"": ("frobenius", ".3f")}),
    ),
    "weighted": Table(
        "What the Gram gains over the weight-space fit at 50 % of the parameters",
        "Means over the weights. *Own*: the structure's closed form or projection, neither refined nor given the "
        "Gram;\n*weighted*: given the Gram, with the library's refinement. *Lower, %*: the mean reduction of the "
        f"output error,\nand the least of all weights.\n{WHAT}",
        EVERY_OTHER, weighted_cases, weighted_rows,
        {
            "structure": ("structure", ""), "weights": ("number", ""), "kept": ("weighted kept", ".3f"),
            "own": ("own error", ".3f"), "weighted": ("weighted error", ".3f"), "lower, %": ("gain", ".0f"),
            "least": ("least gain", ".0f"), "own, held out": ("own held_out", ".3f"),
            "weighted, held out": ("weighted held_out", ".3f"), "lower, held out, %": ("held-out gain", ".0f"),
            "own, s": ("own seconds", ".1f"), "weighted, s": ("weighted seconds", ".1f"),
        },
    ),
}  # fmt: skip


# The run ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument(
        "--layers", help="only the first N weights of each table, for a trial; 'all': 24 instead of 12 in `weighted`"
    )
    parser.add_argument("--threads", type=int, default=2, help="number of fits at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(argv)


def places_of(name: str, layers: str | None) -> Places:
    """The layers of a table."""
    if layers is None:
        return TABLES[name].places
    if layers == "all":
        return ATTENTIONS if name == "weighted" else TABLES[name].places
    return TABLES[name].places[: int(layers)]


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    about = {**environment(argv), "threads": args.threads}
    places = {name: places_of(name, args.layers) for name in args.table}
    needed = list(dict.fromkeys(place for some in places.values() for place in some))
    layers = dict(zip(needed, read_layers(needed), strict=True))
    for name in args.table:
        say(f"table {name}")
        table = TABLES[name]
        cases = table.cases([layers[place] for place in places[name]])
        rows = table.rows(cases, side_by_side(measure, cases, args.threads))
        store(args.results, f"fits_{name}", table.title, table.notes, about, rows, table.columns)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
