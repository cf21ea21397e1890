"""The attacks at full length, and how a large model loads: what was tried, and what came of it.

    python benchmarks/reliability.py [--attacks "savers or trees" | --layers] [--seed 7]

Runs `pytest -m fuzz tests/fuzz` (each attack asserts that nothing silent, slow or lost happens, and counts the rest),
and times plan, report, save and load of a model of 400 layers. Rows of an earlier run are kept,
unless they are run again. Stores results/reliability.jsonl and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structlin

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, ROOT, environment, say, store

NAME = "reliability"
LAYERS, SIZE = 400, 64
COLUMNS = {
    "attack": ("attack", ""), "rounds": ("rounds", ","), "outcomes": ("outcomes", ""), "seed": ("seed", ""),
    "s": ("seconds", ",.1f"), "commit": ("commit", ""),
}  # fmt: skip
NOTES = """\
Each row is one attack, at full length. It ran to its end without a failure: no wrong result, no silent error, no
other exception than the documented one, nothing lost, nothing changed by what was refused. *outcomes*: how often each
of the allowed ends was met. `STRUCTLIN_FUZZ=<seed> pytest -m fuzz tests/fuzz -k <attack>` repeats it."""


def attacks(selected: str | None, seed: int | None) -> tuple[list[dict[str, Any]], bool]:
    """Run the attacks; return a row for each that passed, and whether all did."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environ = {
            **os.environ,
            "STRUCTLIN_FUZZ_LOG": str(log),
            **({} if seed is None else {"STRUCTLIN_FUZZ": str(seed)}),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "fuzz",
            "tests/fuzz",
            *(["-k", selected] if selected else []),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["outcomes"] = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(row.pop("counts").items()))
    return rows, done.returncode == 0


def large_model() -> list[dict[str, Any]]:
    """Time each step of a model of many layers."""
    dense = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)))
    rows = []

    def timed(step: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        name = f"{LAYERS} layers of {SIZE} x {SIZE}: {step}"
        rows.append({"attack": name, "rounds": 1, "outcomes": "done", "seconds": time.perf_counter() - start})
        return result

    plan = timed("plan", lambda: structlin.plan_compression(dense, "lowrank", ratio=0.5, skip_last=False))
    model = copy.deepcopy(dense)
    report = timed("compress by the plan", lambda: structlin.compress_model(model, plan))
    timed("print the report", lambda: str(report))
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: structlin.save(model, folder))
        timed("verify", lambda: structlin.verify(folder))
        loaded = timed("load", lambda: structlin.load(dense, folder))
    x = torch.randn(2, SIZE)
    assert torch.equal(loaded(x), model(x))
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", help="an expression for pytest -k; without it all, and the model of many layers")
    parser.add_argument("--layers", action="store_true", help="the model of many layers alone")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = environment(argv)
    found, whole = ([], True) if args.layers else attacks(args.attacks, args.seed)
    found += [] if args.attacks else large_model()
    stored = args.results / f"{NAME}.jsonl"
    old = [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()] if stored.exists() else []
    again = {row["attack"] for row in found}
    rows = sorted(
        [*(row for row in old if row["attack"] not in again), *({**row, **about} for row in found)],
        key=lambda row: row["attack"],
    )
    store(args.results, NAME, "Reliability", NOTES, about, rows, COLUMNS)
    stored.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # each with its own command
    if not whole:
        say("an attack failed; its row is not stored")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
