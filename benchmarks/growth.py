"""How costs grow with the size of a layer, the tokens and the number of layers: fitted exponents beside theory.

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 256 1024 4096 16384 --structures lowrank tt

Forward, training step, plan and fit of square layers in plain torch, one thread; peak memory of a training step. An
exponent is the slope of log(cost) over log(size). Theory is the slope of counted FLOPs, parameters or bytes over the
same sizes, and for fits the known cost of their decompositions. Stores results/growth.*, results/first_call.* (import,
plan and first call of a model of 400 layers in a fresh process) and docs/figures/growth.*.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["STRUCTLIN_KERNELS"] = "off"

import torch
from _speed import EVAL, TRAINING, Call, peak_bytes
from torch import nn

from structlin.equation.structure import Structure
from structlin.layers.linear import StructuredLinear, build
from structlin.runtime import planner
from structlin.structures import PHM, Butterfly, Kronecker, LowRank, Monarch, TensorTrain

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _figures import FIGURES, draw, legend, panels, style
from _results import RESULTS, environment, say, store

# Hyperparameters fixed, so that the exponents are those of the structure; cost of the fit: n^exponent.
STRUCTURES: dict[str, tuple[Structure, float]] = {
    "lowrank": (LowRank(rank=32), 3),  # SVD, n x n
    "kronecker": (Kronecker(terms=4), 3),  # SVD of the rearranged weight, n x n
    "phm": (PHM(n=4), 2),  # SVD, 16 x n^2 / 16
    "tt": (TensorTrain(rank=8, cores=2), 3),  # SVD, n x n
    "butterfly": (Butterfly(), 2.5),  # n SVDs, sqrt(n) x sqrt(n)
    "monarch": (Monarch(blocks=4), 3),  # 16 SVDs, n/4 x n/4
}
SIZES, TOKENS, LAYERS = (256, 512, 1024, 2048, 4096), (1, 8, 64, 512, 4096), (1, 4, 16, 64)
MODEL = 400  # layers
COLUMNS = {
    "over": ("over", ""), "structure": ("structure", ""), "cost": ("cost", ""), "exponent": ("exponent", ".2f"),
    "last": ("last", ".2f"), "theory": ("theory", ".2f"), "least": ("least", ".4g"),
    "most": ("most", ".4g"), "unit": ("unit", ""),
}  # fmt: skip
NOTES = """\
Square layers with bias in plain torch, kernel off, one thread, float32. *over*: what grows; the rest is fixed: 32
tokens and one layer over n, n = 1024 over tokens, n = 256 over layers. *exponent*: least-squares slope of log(cost)
over log(size); *last*: between the two largest sizes; *theory*: the slope of the counted FLOPs (forward, training), of
parameters and activations (memory: the peak of a training step), or of the known cost of the decomposition (fit); a
plan is made once for a shape, whatever its size. *least*, *most*: the cost at the smallest and the largest size. Times
are medians of the CPU time of the process, for other processes run on this machine. Small layers are bound by the cost
of operations and large ones by memory, so exponents of times are mostly below theory where layers are small. The
structures were measured in one run each; the command is that of the last."""
FIRST_NOTES = f"""\
A model of {MODEL} layers of 768 x 768, 3072 x 768 and 768 x 3072 in plain torch, in a fresh process, wall-clock time:
import of structlin beside that of torch before it, all plans (part of the first call), the first call with 8 tokens and
the second."""
CHILD = f"""\
import time; start = time.perf_counter()
import torch; torch.set_num_threads(1); torched = time.perf_counter()
import structlin; imported = time.perf_counter()
sizes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
layers = [structlin.LowRankLinear(*sizes[k % 6], rank=96) for k in range({MODEL})]
xs = [torch.randn(8, layer.in_features) for layer in layers[:6]]
def call():
    start = time.perf_counter()
    with torch.no_grad():
        for k, layer in enumerate(layers): layer(xs[k % 6])
    return time.perf_counter() - start
print(torched - start, imported - torched, call(), call())
"""


def seconds(call: Callable[[], object], rounds: int = 5, least: float = 1e-3) -> float:
    """Median CPU seconds per call over short samples."""
    call()
    samples = []
    for _ in range(rounds):
        calls, start = 0, time.process_time()
        while (passed := time.process_time() - start) < least or not calls:
            call()
            calls += 1
        samples.append(passed / calls)
    return statistics.median(samples)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log(cost) over log(size)."""
    return statistics.linear_regression(
        [torch.tensor(float(s)).log().item() for s in sizes], [torch.tensor(float(c)).log().item() for c in costs]
    ).slope


def costs_of(make: Callable[[], nn.Module], tokens: int) -> dict[str, float]:
    """Forward and training seconds, and peak bytes of a training step."""
    module = make()
    first = next(m for m in module.modules() if isinstance(m, nn.Linear | StructuredLinear))
    found: dict[str, float] = {}
    for cost, mode in (("forward", EVAL), ("training", TRAINING)):
        call = Call.new(module, first.weight.detach().new_empty(first.out_features, first.in_features), mode, tokens)
        with call.grad_mode():
            found[cost] = seconds(call.work())
    return found | {"memory": float(peak_bytes(call) or 0)}


def planning(structure: Structure, n: int) -> float:
    """Seconds to plan a forward pass of 32 tokens."""
    spec = structure.resolve(n, n).spec(n, n)
    plan = planner.find_plan.__wrapped__  # without the cache
    return seconds(lambda: plan(spec, 32, machine=planner.CPU), rounds=5)


def fitting(structure: Structure, n: int) -> float:
    """Seconds of a fit without refinement."""
    resolved, weight = structure.resolve(n, n), torch.randn(n, n)
    return seconds(lambda: resolved.decompose(weight), rounds=1, least=0)


def counted(structure: Structure | None, n: int, tokens: int) -> dict[str, float]:
    """FLOPs of a forward pass and a step; parameters and activations that a step holds, with their gradients."""
    spec = None if structure is None else structure.resolve(n, n).spec(n, n)
    flops = 2 * n * n if spec is None else planner.flops_per_token(spec)
    parameters = n * n if spec is None else spec.num_parameters
    return {"forward": flops * tokens, "training": 3 * flops * tokens, "memory": parameters + 2 * n * tokens}


def measured(name: str, sizes: Sequence[int], most_fit: int) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """By what grows and cost: (size, measured, theory) of each size."""
    structure, fit_exponent = STRUCTURES.get(name, (None, 0.0))

    def layer(n: int) -> nn.Module:
        return nn.Linear(n, n) if structure is None else build(structure.resolve(n, n), n, n)

    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}

    def note(over: str, size: int, costs: dict[str, float], theory: dict[str, float]) -> None:
        for cost, value in costs.items():
            found.setdefault((over, cost), []).append((size, value, theory[cost]))

    for n in sizes:
        note("n", n, costs_of(lambda n=n: layer(n), 32), counted(structure, n, 32))
        if structure is not None:
            note("n", n, {"plan": planning(structure, n)}, {"plan": 1.0})
            if n <= most_fit:
                note("n", n, {"fit": fitting(structure, n)}, {"fit": float(n) ** fit_exponent})
    for tokens in TOKENS:
        note("tokens", tokens, costs_of(lambda: layer(1024), tokens), counted(structure, 1024, tokens))
    for layers in LAYERS:
        theory = {cost: layers * value for cost, value in counted(structure, 256, 32).items()}
        note("layers", layers, costs_of(lambda k=layers: nn.Sequential(*(layer(256) for _ in range(k))), 32), theory)
    return found


def rows_of(name: str, found: dict[tuple[str, str], list[tuple[float, float, float]]]) -> list[dict[str, Any]]:
    rows = []
    for (over, cost), points in found.items():
        sizes, values, theory = zip(*points, strict=True)
        unit, scale = ("MiB", 2**-20) if cost == "memory" else ("ms", 1e3)
        rows.append({
            "over": over, "structure": name, "cost": cost, "exponent": slope(sizes, values),
            "last": slope(sizes[-2:], values[-2:]),
            "theory": slope(sizes, theory), "least": scale * values[0], "most": scale * values[-1], "unit": unit,
            "sizes": sizes, "costs": [scale * value for value in values],
        })  # fmt: skip
    return rows


def figure(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw time over n (forward, training step, fit), memory over n, and time over tokens."""
    shown = [("n", "forward"), ("n", "training"), ("n", "memory"), ("n", "fit"), ("n", "plan"), ("tokens", "forward")]
    page, axes = panels(3, 2)
    for axis, (over, cost) in zip(axes.flat, shown, strict=True):
        for row in rows:
            if (row["over"], row["cost"]) == (over, cost):
                axis.loglog(row["sizes"], row["costs"], label=row["structure"], **style(row["structure"]))
                axis.minorticks_off()
                axis.set_xticks(row["sizes"], map(str, row["sizes"]))
                axis.set(xlabel=over, ylabel=f"{cost}, {row['unit']}")
    legend(page, axes)
    draw(page, "growth", folder)


def first_call() -> list[dict[str, Any]]:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:]), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", CHILD], env=environ, capture_output=True, text=True, check=True).stdout
    torched, imported, first, second = map(float, out.split())
    return [{
        "layers": MODEL, "torch": torched, "import": imported, "first": first, "second": second,
        "planning": first - second, "all": imported + first,
    }]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--most-fit", type=int, default=2048, help="largest n of which a fit is timed")
    parser.add_argument("--structures", nargs="+", choices=["dense", *STRUCTURES], default=["dense", *STRUCTURES])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = environment(argv)
    columns = {
        "layers": ("layers", ""), "import torch, s": ("torch", ".2f"), "import structlin, s": ("import", ".2f"),
        "plans, s": ("planning", ".2f"), "first call, s": ("first", ".2f"), "second call, s": ("second", ".2f"),
        "import + first call, s": ("all", ".2f"),
    }  # fmt: skip
    store(args.results, "first_call", "Import and first call", FIRST_NOTES, about, first_call(), columns)
    rows = []
    for name in args.structures:
        say(f"  {name}")
        rows += rows_of(name, measured(name, args.sizes, args.most_fit))
    stored = args.results / "growth.jsonl"
    if stored.exists():  # structures that are not measured now keep their rows, if they are of this commit
        old = map(json.loads, stored.read_text(encoding="utf-8").splitlines())
        rows += [row for row in old if row["structure"] not in args.structures and row["commit"] == about["commit"]]
    rows.sort(key=lambda row: ["dense", *STRUCTURES].index(row["structure"]))
    store(args.results, "growth", "Growth of costs", NOTES, about, rows, COLUMNS)
    figure(rows, FIGURES if args.results == RESULTS else args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
