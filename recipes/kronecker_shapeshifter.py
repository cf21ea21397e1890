"""Kronecker sums against Shapeshifter (the course project), run again on matrices of 1050 x 1050.

    pip install "structlin[recipes]"
    python recipes/kronecker_shapeshifter.py                    # scikit-learn's digits, 8 x 8
    python recipes/kronecker_shapeshifter.py --mnist FOLDER     # MNIST (train-*, t10k-even-*), padded to 32 x 32
    python recipes/kronecker_shapeshifter.py --quick            # a few seconds, 60 x 60

Three matrices are approximated: a random one, the middle weight of a trained classifier, and a smooth kernel matrix. A
Kronecker term of 30 x 35 and 35 x 30 has 2,100 parameters, as many as a rank of Shapeshifter's or of low rank. Tensor
trains of three cores and PHM, which has one size for each n, stand beside them. The classifier is measured with its
weight replaced, and trained from scratch with the structured layer; times are of a forward pass of the frozen layer.
Stores benchmarks/results/kronecker_shapeshifter_<data> and kronecker_time (jsonl and md), and draws
kronecker_shapeshifter_<data> and kronecker_matrices_<data> in docs/figures (SVG and PNG).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _digits import Data, accuracy, train
from _figures import draw, legend, panels, style
from _findings import conclude, options, settle
from _results import ROOT, environment, say
from tensorizing import load, within
from torch import Tensor, nn

from structlin.equation.modes import balanced_modes
from structlin.equation.structure import Structure
from structlin.fitting.fit import fit
from structlin.layers.linear import build, from_fit
from structlin.structures import PHM, Kronecker, LowRank, Shapeshifter

sys.path.append(str(ROOT / "benchmarks"))  # scripts, not a package

from _speed import Call, Subject, calls_per_sample, check, plan_text

Row = dict[str, Any]

MATRICES = ("random", "trained", "smooth")
TOKENS = (1, 64)
TICKS = 1, 2, 4, 8, 16, 32, 64, 128
ERRORS = {
    title: (key, ".4g") for name in MATRICES for title, key in ((f"error, {name}", name), (f"+- {name}", f"{name}_std"))
}
COLUMNS = {
    "structure": ("structure", ""), "size": ("sizes", ""), "terms": ("terms", ".3g"), "parameters": ("parameters", ","),
    **ERRORS, "replaced": ("replaced", ".4f"), "+- replaced": ("replaced_std", ".4f"),
    "from scratch": ("scratch", ".4f"), "+- scratch": ("scratch_std", ".4f"),
}  # fmt: skip
TIME_COLUMNS = {
    "structure": ("structure", ""), "size": ("sizes", ""), "terms": ("terms", ".3g"), "FLOPs": ("flops", ".3f"),
    **{title: (key, form) for t in TOKENS for title, key, form in (
        (f"time, {t}", f"time_{t}", ".2f"), (f"lower, {t}", f"lower_{t}", ".2f"), (f"upper, {t}", f"upper_{t}", ".2f"),
        (f"plan, {t}", f"plan_{t}", ""),
    )},
}  # fmt: skip
NOTES = """\
Matrices of {n} x {n}, {seeds} seeds, means and standard deviations (+-). *terms*: parameters / those of a Kronecker
term. *error*: relative Frobenius error of the closed-form approximation. *random*: independent normal entries.
*trained*: the middle weight of a classifier with two hidden layers of {n}, {data}. *smooth*:
exp(-(x - y)^2 / 2 / .1^2) at {n} jittered points of 0..1. *replaced*: test accuracy of that classifier with its middle
weight approximated, not trained further; *from scratch*: of one trained with such a layer for as long, {epochs} epochs.

For a square matrix Shapeshifter by reshaping is low rank, and by reshaping and rearranging (`order="kron"`) it is the
Kronecker sum; *shapeshifter* is the former, the reading of the course project. We do not know the source's data and
classifier; the size, the structures and the three panels are its own."""


TIME_NOTES = """\
A forward pass of 1 and of 64 images through the frozen layer, {n} x {n}: processor time as a share of `nn.Linear`'s,
median of {rounds} alternated samples, with the quartiles of the ratio. *plan*: how the layer chose to run; one that
expects to be slower than dense keeps its dense matrix."""


# What is compared ------------------------------------------------------------------------------------------------


def structures(terms: Sequence[int], orders: Sequence[int], n: int) -> Iterator[Structure]:
    """Draw up all structures: one for each number of terms, and PHM for each n."""
    term = size(Kronecker(terms=1), n)
    yield from (Kronecker(terms=t) for t in terms)
    yield from (Shapeshifter(rank=t, order="reshape") for t in terms)
    yield from (LowRank(rank=t) for t in terms)
    yield from (found for t in terms if (found := within(balanced_modes(n, 3), t * term)))
    yield from (PHM(n=order) for order in orders)


def size(structure: Structure, n: int) -> int:
    return structure.resolve(n, n).spec(n, n).num_parameters


def sizes(structure: Structure) -> str:
    """Say the one number that sets the size: terms 4, rank (3, 3) or n 25."""
    key = next(key for key in ("terms", "rank", "n") if hasattr(structure, key))
    return f"{key} {getattr(structure, key)}"


def smooth(n: int, generator: torch.Generator) -> Tensor:
    """Return a Gaussian kernel matrix of sorted, jittered points."""
    points = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return (-((points[:, None] - points) ** 2) / (2 * 0.1**2)).exp()


def classifier(inputs: int, n: int, middle: nn.Module | None = None) -> nn.Sequential:
    """Build a network with two hidden layers of n; the map between them is the one that is structured."""
    return nn.Sequential(
        nn.Linear(inputs, n), nn.ReLU(), middle or nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10),
    )  # fmt: skip


# Measuring -------------------------------------------------------------------------------------------------------


def one_seed(
    seed: int, args: argparse.Namespace, kinds: Sequence[Structure | None], training: Data, test: Data
) -> list[Row]:
    """Fit every structure to the three matrices, replace the classifier's weight, and train from scratch."""
    n, inputs = args.n, training[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dense = classifier(inputs, n)
    train(dense, training, args.epochs, args.rate)
    exact = accuracy(dense, test)
    matrices = dict(
        zip(
            MATRICES,
            (torch.randn(n, n, generator=generator), dense[2].weight.detach(), smooth(n, generator)),
            strict=True,
        )
    )
    rows: list[Row] = []
    for structure in kinds:
        if structure is None:
            rows.append(dict.fromkeys(MATRICES, 0.0) | {"replaced": exact, "scratch": exact})
            continue
        fits = {name: fit(matrix, structure, refine=0) for name, matrix in matrices.items()}
        replaced = copy.deepcopy(dense)
        replaced[2] = from_fit(fits["trained"], dense[2])
        torch.manual_seed(seed)
        model = classifier(inputs, n, build(structure, n, n))
        train(model, training, args.epochs, args.rate)
        rows.append({name: found.error for name, found in fits.items()}
                    | {"replaced": accuracy(replaced, test), "scratch": accuracy(model, test)})  # fmt: skip
        say(f"seed {seed}, {structure}: replaced {rows[-1]['replaced']:.4f}, from scratch {rows[-1]['scratch']:.4f}")
    return rows


def processor_seconds(call: Callable[[], object], calls: int) -> float:
    """Measure a call by the processor's clock, which other work on the machine does not move."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def time_of(structure: Structure | None, n: int, rounds: int) -> Row:
    """Check the frozen layer, then time it beside `nn.Linear`."""
    dense = nn.Linear(n, n)
    if structure is None:
        return {"flops": 1.0} | {f"{key}_{t}": 1.0 for key in ("time", "lower", "upper") for t in TOKENS}
    layer = build(structure, n, n)
    row: Row = {"flops": layer.flops_per_token / (2 * n * n)}
    for tokens in TOKENS:
        calls = [Call.new(module, dense.weight, "inference", tokens) for module in (dense, layer)]
        check(Subject.of(str(structure), layer), calls[1])
        with torch.inference_mode():
            counts = [calls_per_sample(call.work(), 2e-3) for call in calls]
            samples = [[processor_seconds(call.work(), k) for call, k in zip(calls, counts, strict=True)]
                       for _ in range(rounds)]  # fmt: skip
        theirs, ours = (statistics.median(column) for column in zip(*samples, strict=True))
        lower, _, upper = statistics.quantiles((b / a for a, b in samples), n=4)
        row |= {f"time_{tokens}": ours / theirs, f"lower_{tokens}": lower, f"upper_{tokens}": upper,
                f"plan_{tokens}": plan_text(layer, tokens, "inference")}  # fmt: skip
    return row


def described(structure: Structure | None, n: int) -> Row:
    """Say what a row of a table is about."""
    if structure is None:
        return {"structure": "dense", "sizes": "", "parameters": n * n, "terms": n * n / size(Kronecker(terms=1), n)}
    count = size(structure, n)
    return {
        "structure": structure.name, "sizes": sizes(structure), "parameters": count,
        "terms": count / size(Kronecker(terms=1), n), "layer": str(structure),
    }  # fmt: skip


def run(args: argparse.Namespace, kinds: Sequence[Structure | None], training: Data, test: Data) -> list[Row]:
    """Gather the seeds: means, standard deviations and all values."""
    seeds = [one_seed(seed, args, kinds, training, test) for seed in range(args.seeds)]
    rows = []
    for structure, found in zip(kinds, zip(*seeds, strict=True), strict=True):
        row = described(structure, args.n)
        for key in (*MATRICES, "replaced", "scratch"):
            values = [each[key] for each in found]
            row |= {key: statistics.mean(values), f"{key}_std": statistics.pstdev(values), f"{key}_all": values}
        rows.append(row)
    return rows


# What it shows ---------------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row]) -> str:
    """Settle Kronecker sums against Shapeshifter at equal parameters, and against dense in time."""
    found = {(row["structure"], round(row["terms"])): row for row in rows}
    pairs = [(f"{t}", row, found["shapeshifter", t]) for (name, t), row in found.items() if name == "kronecker"]
    texts = [
        settle(f"at equal terms, Kronecker's error is below Shapeshifter's, {name} matrix",
               [(f"terms {t}", a[f"{name}_all"], b[f"{name}_all"]) for t, a, b in pairs], ".4g") for name in MATRICES
    ]  # fmt: skip
    for key, how in (("replaced", "with its weight replaced"), ("scratch", "trained from scratch")):
        lost = [(f"terms {t}", *([100 * (1 - x) for x in r[f"{key}_all"]] for r in (a, b))) for t, a, b in pairs]
        texts.append(settle(f"at equal terms, a classifier {how} errs less with Kronecker than Shapeshifter, %", lost))
    return "\n".join(texts)


def time_findings(rows: Sequence[Row]) -> str:
    """Settle from how many terms on a Kronecker sum is no faster than dense."""
    members = [row for row in rows if row["structure"] == "kronecker"]
    return "\n".join(
        settle(f"a Kronecker sum takes less time than dense, images: {tokens}",
               [(row["sizes"], [row[f"time_{tokens}"]], [1.0]) for row in members]) for tokens in TOKENS
    )  # fmt: skip


def lines(axis: Any, rows: Sequence[Row], key: str, spread: str | None = None) -> None:
    """Draw one line for each structure against its terms, dense as a horizontal one."""
    for name in dict.fromkeys(row["structure"] for row in rows):
        members = sorted((row for row in rows if row["structure"] == name), key=lambda row: row["terms"])
        looks = style(name)
        if name == "dense":
            axis.axhline(members[0][key], label=name, **looks)
            continue
        if name == "lowrank":  # the same as Shapeshifter here: a larger hollow mark around it
            looks |= {"markersize": 9, "markerfacecolor": "none"}
        x, y = ([row[k] for row in members] for k in ("terms", key))
        axis.errorbar(x, y, [row[spread] for row in members] if spread else None, label=name, elinewidth=0.8, **looks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(TICKS, labels=map(str, TICKS))
    axis.set(
        xlim=(0.8, 1.3 * max(row["terms"] for row in rows if row["structure"] != "dense")),
        xlabel="parameters, in Kronecker terms",
    )


def pictures(rows: Sequence[Row], timed: Sequence[Row], name: str, args: argparse.Namespace) -> None:
    """Draw the three panels of the slides, and the error for each matrix."""
    figure, axes = panels(3)
    for axis, key, spread, label in zip(
        axes[0], ("trained", "replaced", f"time_{TOKENS[1]}"), ("trained_std", "replaced_std", None),
        ("relative error, trained weight", "test accuracy, weight replaced", f"time of {TOKENS[1]} images / dense"),
        strict=True,
    ):  # fmt: skip
        lines(axis, timed if key.startswith("time") else rows, key, spread)
        axis.set_ylabel(label)
    axes[0][2].set_yscale("log", base=2)
    axes[0][2].yaxis.set_major_formatter("{x:.2g}")
    legend(figure, axes)
    draw(figure, f"kronecker_shapeshifter_{name}", args.figures)
    figure, axes = panels(3)
    for axis, matrix in zip(axes[0], MATRICES, strict=True):
        lines(axis, [row for row in rows if row["structure"] != "dense"], matrix, f"{matrix}_std")
        axis.set(title=f"{matrix} matrix", ylabel="relative error")
    axes[0][2].set_yscale("log")
    legend(figure, axes)
    draw(figure, f"kronecker_matrices_{name}", args.figures)


def experiment(args: argparse.Namespace, kinds: Sequence[Structure | None], name: str, about: Row) -> list[Row]:
    """Measure errors and accuracies and store the table."""
    training, test = load(args.mnist, args.images, 32 if args.mnist else 8)
    rows = run(args, kinds, training, test)
    data = "MNIST" if args.mnist else "scikit-learn's digits"
    notes = NOTES.format(n=args.n, seeds=args.seeds, epochs=args.epochs,
                         data=f"{data} ({len(training[1])} training and {len(test[1])} test images)")  # fmt: skip
    title = "Kronecker sums and Shapeshifter"
    conclude(args.results, f"kronecker_shapeshifter_{name}", title, notes, findings(rows), about, rows, COLUMNS)
    return rows


def stored(args: argparse.Namespace, name: str) -> list[Row]:
    lines = (args.results / f"kronecker_shapeshifter_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def timing(args: argparse.Namespace, kinds: Sequence[Structure | None], about: Row) -> list[Row]:
    """Time all layers and store the table."""
    rows = [described(structure, args.n) | time_of(structure, args.n, args.rounds) for structure in kinds]
    notes = TIME_NOTES.format(n=args.n, rounds=args.rounds)
    title = "Time of a layer by its terms"
    conclude(args.results, "kronecker_time", title, notes, time_findings(rows), about, rows, TIME_COLUMNS)
    return rows


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; scikit-learn's digits without it")
    parser.add_argument("--images", type=int, default=3000, help="training images of MNIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of all networks")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each time")
    parser.add_argument("--times", action="store_true", help="measure times only, and draw with the stored errors")
    args = parser.parse_args(argv)
    args.n, args.terms, args.orders = (60, (1, 4), (2,)) if args.quick else (1050, TICKS[:-1], (25, 15, 7, 2))
    if args.quick:
        args.epochs, args.rounds = 1, 3
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    name = "digits" if args.mnist is None else "mnist"
    kinds: list[Structure | None] = [None, *structures(args.terms, args.orders, args.n)]
    rows = stored(args, name) if args.times else experiment(args, kinds, name, about)
    pictures(rows, timing(args, kinds, about), name, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
