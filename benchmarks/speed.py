"""Time structured layers beside `nn.Linear` of the same shape, in named suites of cases.

    python benchmarks/speed.py
    python benchmarks/speed.py --suite kronecker compressors --threads 1 2 --mode inference forward training
    python benchmarks/speed.py --suite butterfly --only 1024 --quick

Each cell is a case at a number of tokens, a dtype, a number of threads and a mode. Output (and input gradient) are
compared with `F.linear` and the layer's dense matrix before anything is timed; then short samples of both alternate.
A suite is stored as results/speed_NAME.jsonl (one line per cell) and .md; trials (`--quick`, `--only`) go to out/.
Layers run by the native kernel, which is built where needed; with `--kernel off` by torch alone (speed_NAME_torch;
other devices, dtypes and numbers of threads stand in the name as well).
A row `simple` is the structure in a few lines of einsum and bmm (`_simple.py`), the fastest form at each cell.
`--peers` adds rows of other libraries that are installed (tensorly-torch, torchTT, lazylinop, pyfaust, pyfastkron,
linear_operator). Suites: kronecker, tt, butterfly, compressors, simple, overhead, all, bfloat16 (--dtype bfloat16),
llm (for a GPU: --device cuda).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from _peers import counterparts, versions
from _simple import simple_subjects
from _speed import INFERENCE, MODES, TRAINING, Effort, Row, Subject, fastest, measure
from torch import nn

from structlin.equation.modes import divisors
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import within
from structlin.layers.linear import build
from structlin.runtime.kernels.native import SWITCH
from structlin.structures import PHM, Butterfly, Kaleidoscope, Kronecker, LowRank, Sum, TensorTrain, families, family

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, ROOT, Columns, environment, say, store

TRIALS = ROOT / "out"
OURS, SIMPLE = "structlin", "simple"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Sizes = tuple[int, int]  # (in_features, out_features)


@dataclass(frozen=True)
class Case:
    """A structure at a size.

    Args:
        label: which structure, in few words.
        sizes: (in_features, out_features).
        structure: open fields are filled in.
    """

    label: str
    sizes: Sizes
    structure: Structure

    @property
    def name(self) -> str:
        """Label and `out x in`."""
        return f"{self.label}, {self.sizes[1]} x {self.sizes[0]}"


# The suites ------------------------------------------------------------------------------------------------------


def kronecker_cases() -> Iterator[Case]:
    sizes = [(768, 768), (1024, 1024), (768, 3072)]
    for size in [*sizes, (4096, 4096)]:
        yield Case("kronecker, 4 terms", size, Kronecker(terms=4))
    for size in sizes:
        yield from (Case(f"phm, n={n}", size, PHM(n=n)) for n in (2, 4, 8))


def tt_cases() -> Iterator[Case]:
    paper = TensorTrain(rank=4, in_modes=(2, 7, 8, 8, 7, 4), out_modes=(4,) * 6)
    yield Case("tt, rank 4, 6 cores", (25088, 4096), paper)
    yield Case("tt, rank 4, 4 cores", (4096, 4096), TensorTrain(rank=4, in_modes=(8,) * 4, out_modes=(8,) * 4))


def butterfly_cases() -> Iterator[Case]:
    for n in (512, 1024, 4096):
        yield Case("butterfly", (n, n), Butterfly())
        yield Case("kmatrix, width 1", (n, n), Kaleidoscope())


COMPRESSORS = ((384, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))


def compressor_cases(shapes: Sequence[Sizes] = COMPRESSORS) -> Iterator[Case]:
    for sizes in shapes:
        for width in (2, 4):
            found = largest_kmatrix(width, sizes, 0.5)
            if found:
                yield Case(f"kmatrix, width {width}", sizes, found)
            else:
                say(f"  left out: no K-matrix of width {width} over two digits keeps half of {sizes[1]} x {sizes[0]}")
        yield Case("lowrank + kmatrix, width 2", sizes, lowrank_beside(Kaleidoscope(width=2), sizes, 0.5))


def largest_kmatrix(width: int, sizes: Sizes, ratio: float) -> Structure | None:
    """The K-matrix over two digits with the most parameters within a ratio, no wider inside than the layer."""
    in_splits, out_splits = ([(first, size // first) for first in divisors(size)] for size in sizes)
    members = [
        Kaleidoscope(width=width, in_modes=in_modes, out_modes=out_modes)
        for in_modes in in_splits
        for out_modes in out_splits
        if max(in_modes[0], out_modes[0]) * max(in_modes[1], out_modes[1]) == max(sizes)
    ]
    counts = {member: member.spec(*sizes).num_parameters for member in members}
    fitting = {member: count for member, count in counts.items() if count <= ratio * sizes[0] * sizes[1]}
    return max(fitting, key=lambda member: fitting[member], default=None)


def lowrank_beside(part: Structure, sizes: Sizes, ratio: float) -> Structure:
    """A sum in which a low rank takes what the other part leaves of the parameters."""
    part = part.resolve(*sizes)
    left = int(ratio * sizes[0] * sizes[1]) - part.spec(*sizes).num_parameters
    return Sum(parts=(LowRank(rank=left // sum(sizes)), part))


def sized_cases(names: Sequence[str], shapes: Sequence[Sizes], ratios: Sequence[float]) -> Iterator[Case]:
    """The first candidate of each structure within each ratio; says where there is none."""
    for sizes in shapes:
        for ratio in ratios:
            for name in names:
                try:
                    first = within(family(name), *sizes, ratio)[0]
                except ValueError as error:
                    say(f"  left out: {error}")
                else:
                    yield Case(f"{name} at {ratio}", sizes, first)


def half_cases(shapes: Sequence[Sizes]) -> Iterator[Case]:
    for sizes in shapes:
        yield from sized_cases(("lowrank", "monarch"), [sizes], (0.5,))
        yield Case("kronecker, 4 terms", sizes, Kronecker(terms=4))
        yield Case("lowrank + kmatrix, width 2", sizes, lowrank_beside(Kaleidoscope(width=2), sizes, 0.5))


@dataclass(frozen=True)
class Suite:
    """Cases that are stored as one table.

    Args:
        title: of the table.
        cases: what is timed.
        tokens: unless told otherwise.
    """

    title: str
    cases: Callable[[], Iterable[Case]]
    tokens: tuple[int, ...] = (1, 32, 512)


LLM = ((4096, 4096), (4096, 11008))
SUITES = {
    "kronecker": Suite("Sums of Kronecker products and PHM", kronecker_cases),
    "tt": Suite("Tensor trains", tt_cases, (1, 32, 100, 512)),
    "butterfly": Suite("Butterflies and K-matrices of width 1", butterfly_cases, (1, 32, 256, 512)),
    "compressors": Suite("What compresses best: K-matrices and low rank + K-matrix at half the size", compressor_cases),
    "simple": Suite(
        "Low rank and Monarch",
        lambda: sized_cases(("lowrank", "monarch"), [(768, 3072), (4096, 4096)], (0.5, 0.25)),
    ),
    "overhead": Suite(
        "Overhead: every structure at 64 x 64, one token",
        lambda: sized_cases(sorted(families()), [(64, 64)], (0.5,)),
        (1,),
    ),
    "bfloat16": Suite(
        "Half precision: four structures beside nn.Linear of the same dtype",
        lambda: half_cases(((768, 768), (768, 3072), (4096, 4096))),
    ),
    "llm": Suite(
        "Sizes of language models, for a GPU",
        lambda: [*sized_cases(("lowrank", "monarch"), LLM, (0.5,)), *compressor_cases(LLM)],
        (1, 16, 512, 4096),
    ),
    "all": Suite(
        "Every structure at half and a quarter of the parameters",
        lambda: sized_cases(sorted(families()), [(384, 384), (768, 768), (768, 3072)], (0.5, 0.25)),
    ),
}

APART = ("bfloat16", "llm")  # run on request: for another dtype, for a GPU

COLUMNS: Columns = {
    "case, out x in": ("case", ""),
    "library": ("library", ""),
    "mode": ("mode", ""),
    "dtype": ("cell_dtype", ""),
    "threads": ("cell_threads", ""),
    "tokens": ("tokens", ""),
    "dense, us": ("dense_us", ",.1f"),
    "layer, us": ("layer_us", ",.1f"),
    "time ratio": ("ratio", ".3f"),
    "lower": ("lower_quartile", ".3f"),
    "upper": ("upper_quartile", ".3f"),
    "FLOP ratio": ("flop_ratio", ".3f"),
    "break-even": ("break_even", ".3f"),
    "parameters": ("parameters_ratio", ".4f"),
    "plan": ("plan", ""),
    "saved, B": ("layer_saved_bytes", ","),
    "dense saved, B": ("dense_saved_bytes", ","),
    "peak, B": ("layer_peak_bytes", ","),
    "dense peak, B": ("dense_peak_bytes", ","),
}
NOTES = """\
`dense` is `nn.Linear` of the same shape in the same process; samples of both alternate, times are medians per call.
*time ratio*: layer / dense, below 1 is faster; *lower*, *upper*: its quartiles over the rounds; *FLOP ratio*: of the
factor-by-factor product; *break-even*: FLOP ratio / time ratio, the FLOP ratio below which a layer with this one's rate
is faster than dense; *parameters*: kept / dense, without bias; *plan*: how forward runs.
*inference*: no gradients, layers frozen (`structlin.freeze_`); *eval*: no gradients, nothing kept between calls;
*forward*: with the graph; *training*: forward and backward, input gradient included.
*saved*: bytes kept for the backward pass beyond input and parameters; *peak*: allocated by torch within a training
step, gradients included. Before timing, all outputs and input gradients agreed with `F.linear` and the layer's dense
matrix to 1e-4 (float32) or 3e-2 (bfloat16).
`simple`: a few lines of einsum and bmm as the repository of a paper has them (benchmarks/_simple.py), the fastest of
the forms at each cell; *plan* names it. It keeps nothing between calls."""


# The run ---------------------------------------------------------------------------------------------------------


def subjects_of(case: Case, dtype: torch.dtype, device: str, peers: bool) -> dict[str, list[Subject]]:
    """Our layer, its simple forms, then the other libraries' counterparts, by library."""
    layer = build(case.structure, *case.sizes, dtype=dtype, device=device)
    found = {OURS: [Subject.of(case.name, layer)], SIMPLE: list(simple_subjects(layer).values())}
    return found | ({name: [peer] for name, peer in counterparts(layer, say).items()} if peers else {})


def rows_of(case: Case, args: argparse.Namespace, tokens: Sequence[int], effort: Effort) -> Iterator[Row]:
    """Measure all cells of a case; what is wrong with another library is said, with ours it is raised."""
    for dtype in args.dtype:
        torch.manual_seed(0)
        dense = nn.Linear(*case.sizes, dtype=DTYPES[dtype], device=args.device)
        subjects = subjects_of(case, DTYPES[dtype], args.device, args.peers)
        cells = product(subjects, args.threads, args.mode, tokens)
        for library, threads, mode, count in cells:
            torch.set_num_threads(threads)
            where = f"  {case.name}, {library}, {dtype}, {threads} threads, {mode}, {count} tokens"
            found = subjects[library]
            try:
                subject = found[0] if len(found) == 1 else fastest(found, mode, count, effort)
                row = measure(subject, dense, mode, count, effort)
            except (ValueError, RuntimeError) as error:
                if library in (OURS, SIMPLE):
                    raise
                say(f"{where}: left out: {error}")
                continue
            say(f"{where}: {row['ratio']:.3f} of {row['dense_us']:,.1f} us")
            yield {
                "case": case.name, "library": library, "structure": show(case.structure), "mode": mode,
                "cell_dtype": dtype, "cell_threads": threads, "tokens": count, **row,
            }  # fmt: skip


def stored_as(name: str, args: argparse.Namespace) -> str:
    """Name of a suite's table, with what is not as by default."""
    kernel = "torch" if args.kernel == "off" else ""
    threads = "" if args.threads == [1] else f"{'_'.join(map(str, args.threads))}threads"
    dtypes = "" if args.dtype in (["float32"], [name]) else "_".join(args.dtype)
    device = "" if args.device == "cpu" else args.device
    return "_".join(filter(None, ["speed", name, device, kernel, dtypes, threads]))


def kept(path: Path, rows: Sequence[Row], commit: str) -> list[Row]:
    """Read the stored rows of cases that are not measured anew; all runs of a commit differ by `--only` alone."""
    if not path.exists():
        return []
    measured = {row["case"] for row in rows}
    stored = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in stored if row["commit"] == commit and row["case"] not in measured]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", nargs="+", choices=list(SUITES), default=[name for name in SUITES if name not in APART]
    )
    parser.add_argument("--only", metavar="SUBSTRING", help="only cases whose name (as shown) contains it")
    parser.add_argument("--tokens", nargs="+", type=int, help="rows of the input; each suite has its own otherwise")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=[INFERENCE, TRAINING])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="samples of each layer, from 2; 21, or 5 with --quick")
    parser.add_argument("--add", action="store_true", help="keep stored rows of other cases, if of this commit")
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, where others share the machine")
    parser.add_argument("--quick", action="store_true", help="a trial: few and short samples, no 512 tokens")
    parser.add_argument("--kernel", choices=("on", "off"), default="on", help="the native kernel")
    parser.add_argument("--peers", action="store_true", help="also other libraries that are installed")
    parser.add_argument("--results", type=Path, help="folder of the tables; results/, or out/ for a trial")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    os.environ[SWITCH] = "build" if args.kernel == "on" else "off"
    trial = args.quick or args.only is not None
    clock = time.process_time if args.cpu_time else time.perf_counter
    effort = Effort(args.rounds or (5 if args.quick else 21), 5e-4 if args.quick else 2e-3, clock)
    about = environment(argv) | {"threads": ", ".join(map(str, args.threads)), "dtype": ", ".join(args.dtype)}
    # Other processes make times long and, with several threads, meaningless: the load at the start is stored.
    if args.device == "cuda":
        about |= {"machine": torch.cuda.get_device_name()}
    about |= {
        "native kernel": args.kernel,
        "load": round(os.getloadavg()[0], 2),
        "rounds": effort.rounds,
        "clock": "CPU time of the process" if args.cpu_time else "wall",
    } | (versions() if args.peers else {})
    for name in args.suite:
        suite = SUITES[name]
        say(f"suite {name}")
        cases = [case for case in suite.cases() if args.only is None or args.only in case.name]
        tokens = args.tokens or [count for count in suite.tokens if not args.quick or count <= 32]
        rows = [row for case in cases for row in rows_of(case, args, tokens, effort)]
        folder, stored = args.results or (TRIALS if trial else RESULTS), stored_as(name, args)
        if args.add:
            rows = kept(folder / f"{stored}.jsonl", rows, str(about["commit"])) + rows
            order = [case.name for case in suite.cases()]
            rows.sort(key=lambda row: order.index(row["case"]))  # stable
        if rows:
            store(folder, stored, suite.title, NOTES, about, rows, COLUMNS)
        else:
            say(f"  no case of {name} contains {args.only!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
