"""Compare refinement on all rows of a Gram's root with refinement on samples of them, and K-matrices with half widths.

    python benchmarks/samples.py

A rotation of the root's rows leaves the Gram as it is and makes the rows alike: a sample of them is an estimate of all.
Tables, in the norm of the inputs of weights of all-MiniLM-L6-v2:

- samples: low rank + K-matrix on two wide weights (384 x 1536), where the Gram costs most, with minibatches of rotated
  rows for the first part of the learning rates; and races of the structures of "auto" on such minibatches.
- half_widths: low rank + K-matrix at five ratios, with powers in whole steps and in steps of a half.

Stores results/NAME.jsonl and .md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _weights import RESULTS, Layer, environment, read_layers, say, store
from optimisers import PLACES, gathered
from torch import Tensor

from structlin.compress.config import AUTO
from structlin.compress.statistics import SHRINKAGE
from structlin.equation.spec import Spec
from structlin.equation.structure import Structure, show
from structlin.fitting.budget import within
from structlin.fitting.fit import PACE, fit
from structlin.fitting.objective import InputGram, Objective, make_objective
from structlin.fitting.refine import Refinement
from structlin.structures import Kaleidoscope, LowRank, Sum, sum_of

Row = dict[str, Any]

WIDE = [(1, "output"), (4, "output")]
RATIOS = (0.25, 0.4, 0.5, 0.6, 0.75)
STRUCTURE = Sum((LowRank(22), Kaleidoscope(width=2, in_modes=(48, 32), out_modes=(16, 24))))
STEPS = (150, 200, 300, 400, 600)
# (parts that the rows are dealt to, share of the learning rates that minibatches get, steps)
SAMPLED = [(4, 0.5, 400), (4, 0.5, 600), (4, 0.5, 800), (4, 1.0, 600), (2, 0.5, 600), (8, 0.5, 600)]


class Sampled(Refinement):
    """A refinement whose steps see one part of the rows after the other; the last steps, and all measures, see all."""

    def __init__(
        self, spec: Spec, factors: Sequence[Tensor], objective: Objective, steps: int, parts: Sequence[Objective],
        share: float,
    ) -> None:  # fmt: skip
        self.shown = -1  # the part that the present step sees; -1: all rows
        super().__init__(spec, factors, objective, steps)
        self.share = share
        self.views = [_View(Refinement(spec, factors, part, 0)) for part in parts]
        self.views.append(_View(self))
        for part in parts:
            part.__dict__["total"] = objective.total  # of all rows: their errors are relative to one number

    def _show(self, part: int) -> None:
        self.shown = part
        self.objective, self._plan, self._chain, self._gram = self.views[part].seen

    def _step(self) -> None:
        sampled = self._schedule.progress < self.share
        self._show(self._schedule.taken % (len(self.views) - 1) if sampled else -1)
        super()._step()
        if sampled:  # errors of parts say nothing of a plateau
            self._schedule.stride, self._schedule.mark = 1.0, math.inf

    def _measure(self) -> float:
        if hasattr(self, "views"):
            self._show(-1)
        return super()._measure()

    def _keep(self, error: float) -> None:
        if self.shown == -1:
            super()._keep(error)


class _View:
    """What a refinement computes with: its objective and the way to its residual."""

    def __init__(self, refinement: Refinement) -> None:
        self.seen = refinement.objective, refinement._plan, refinement._chain, refinement._gram


@dataclass(frozen=True)
class Problem:
    """A wide weight with the Gram of its inputs."""

    layer: Layer
    gram: InputGram

    def parts(self, objective: Objective, count: int) -> list[Objective]:
        """Rotate the root's rows by random signs and a discrete Hartley transform, and deal them to `count` parts."""
        root, generator = self.gram.root.float(), torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (len(root), 1), generator=generator) * 2 - 1
        waves = torch.fft.fft(signs * root, dim=0)
        rows = (waves.real - waves.imag)[torch.randperm(len(root), generator=generator)]  # of norm sqrt(n): unbiased
        return [Objective(objective.weight, part / math.sqrt(len(part))) for part in rows.chunk(count)]

    def refined(self, structure: Structure, steps: int, count: int = 1, share: float = 0.0, until: int = 0) -> Row:
        """Refine a structure, by default to the end."""
        start = time.process_time()
        exact, _ = make_objective(self.layer.weight, self.gram)
        objective = exact.to(torch.float32)
        found = structure.resolve(self.layer.weight.shape[1], self.layer.weight.shape[0])
        spec = found.spec(self.layer.weight.shape[1], self.layer.weight.shape[0])
        factors = [factor.float() for factor in found.decompose(exact.weight)]
        if count == 1:
            run = Refinement(spec, factors, objective, steps)
        else:
            run = Sampled(spec, factors, objective, steps, self.parts(objective, count), share)
        error = run.advance(until or None)
        return {"kept": spec.num_parameters / self.layer.weight.numel(), "error": error,
                "seconds": time.process_time() - start}  # fmt: skip

    def raced(self, count: int) -> Row:
        """Race the structures of "auto" through PACE[1] steps each, and refine the winner from its start."""
        rows, columns = self.layer.weight.shape
        options = [one for family in AUTO for one in within(family, columns, rows, 0.5, "parameters")]
        trials = [(one, self.refined(one, 400, count, 1.0, PACE[1])) for one in options if one.refine_steps]
        winner = min(trials, key=lambda trial: trial[1]["error"])[0]
        found = self.refined(winner, 400)
        raced = sum(trial["seconds"] for _, trial in trials)
        return {**found, "winner": show(winner), "seconds": found["seconds"] + raced}


# The tables -------------------------------------------------------------------------------------------------------


def samples(layers: Sequence[Layer]) -> Iterator[Row]:
    """Yield the rows of the table `samples`, layer by layer within a row."""
    problems = [Problem(layer, _gram(layer)) for layer in layers]
    for steps, problem in itertools.product(STEPS, problems):
        yield {"what": "all rows", "steps": steps, **problem.refined(STRUCTURE, steps)}
    for (count, share, steps), problem in itertools.product(SAMPLED, problems):
        what = f"1/{count} of the rows for {share:.0%} of the learning rates"
        yield {"what": what, "steps": steps, **problem.refined(STRUCTURE, steps, count, share)}
    for count, problem in itertools.product((1, 4), problems):
        what = f"race on {'all rows' if count == 1 else '1/4 of the rows'}, then 400 steps on all"
        yield {"what": what, "steps": 400, **problem.raced(count)}


@dataclass(frozen=True)
class Wholes:
    """Low rank + K-matrix with whole powers: halves are rounded down, and the low rank takes what is left."""

    name: str = "lowrank+kmatrix of whole widths"
    refine_steps: int = Sum.refine_steps

    def candidates(self, in_features: int, out_features: int, budget: int) -> Iterator[Structure]:
        """Yield the sums."""
        for found in sum_of(LowRank, Kaleidoscope).candidates(in_features, out_features, budget):
            _, chain = found.parts
            assert isinstance(chain, Kaleidoscope)
            whole = replace(chain, width=int(chain.width))
            left = budget - whole.spec(in_features, out_features).num_parameters
            yield Sum((LowRank(left // (in_features + out_features)), whole))


def halves(layers: Sequence[Layer]) -> Iterator[Row]:
    """Yield the rows of the table `half_widths`."""
    families = {"whole widths": Wholes(), "half widths": sum_of(LowRank, Kaleidoscope)}
    for ratio, (what, family), layer in itertools.product(RATIOS, families.items(), layers):
        start = time.process_time()
        found = fit(layer.weight, family, ratio=ratio, gram=_gram(layer))
        yield {"what": what, "ratio": ratio, "kept": found.spec.num_parameters / layer.weight.numel(),
               "error": found.minimised, "seconds": time.process_time() - start}  # fmt: skip


def _gram(layer: Layer) -> InputGram:
    gram = InputGram.of(layer.gram, SHRINKAGE)
    assert gram is not None
    return gram


NOTES = """\
Output errors sqrt(tr(D G D^T) / tr(W G W^T)), D = W - What, G the Gram of the layer's inputs on 300 sentences from
docstrings of Python's standard library, shrunk as in `compress_model`. *s*: mean CPU seconds for a weight, on one
thread."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("samples", "half_widths")
    parser.add_argument("--table", nargs="+", choices=tables, default=tables)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = environment(argv)
    work = {
        "samples": (samples, WIDE, "Refinement on samples of rotated rows", ("steps", "")),
        "half_widths": (
            halves,
            [*PLACES, (1, "intermediate"), (1, "output")],
            "K-matrices of half widths",
            ("ratio", ""),
        ),
    }
    for name in args.table:
        run, places, title, size = work[name]
        say(title)
        layers = read_layers(places)
        rows = gathered(layers, run(layers))
        columns = {"what": ("what", ""), size[0]: size, "kept": ("kept", ".3f")}
        columns |= {layer.name: (layer.name, ".4f") for layer in layers}
        columns |= {"mean": ("error", ".4f"), "s": ("seconds", ".1f")}
        store(args.results, name, title, NOTES, about, rows, columns)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
