"""What the default structures leave of low rank's error: the law by which a global budget is divided.

    python benchmarks/gains.py minilm --data stsb
    python benchmarks/gains.py stories --model stories260k --data tinystories --off tinyshakespeare/valid.txt

Fits layers of a model in the metric of its outputs by low rank and by "auto" of the same size, and compares the
squared output errors with GAIN (1 - ratio) of `structlin.compress.allocate`. Models, texts and arguments are those of
ladder.py.
Stores results/gains_<model>.jsonl and .md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from ladder import minilm, parser_of, stories

import structlin
from structlin.compress.allocate import GAIN
from structlin.compress.config import AUTO
from structlin.compress.data import Data
from structlin.compress.gradients import sampled_loss
from structlin.equation.structure import show
from structlin.fitting.fit import fit
from structlin.structures import LowRank

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import environment, say, store

NOTES = """\
Fits of layers in the metric of the dense model's outputs, by the whitened SVD and by the best default structure of the
same size: squared output errors, relative to the layer's outputs. *auto / low rank* is what the division of a budget
takes for *law* at ratios above .7: .85 (1 - ratio), whatever the layer. *power* is the exponent with which the error of
low rank would become that of auto: it differs from layer to layer."""
COLUMNS = {
    "layer": ("layer", ""), "ratio": ("ratio", ""), "structure": ("structure", ""), "low rank": ("lowrank", ".3g"),
    "auto": ("auto", ".3g"), "auto / low rank": ("gain", ".3f"), "law": ("law", ".3f"), "power": ("power", ".2f"),
    "s": ("seconds", ".0f"),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=5, help="of the model, evenly spaced")
    parser.set_defaults(ratios=[0.9, 0.75, 0.5], calibrate="docstrings")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, batches, _, options = (stories if args.kind == "stories" else minilm)(args)
    statistics = structlin.collect_statistics(model, batches, loss=sampled_loss, output="auto", **options)
    data, rows = Data(statistics), []
    names = [name for name in statistics.grams if name in statistics.output_grams]
    chosen = [names[round((k + 0.5) * len(names) / args.layers - 0.5)] for k in range(args.layers)]
    for name in chosen:
        weight = model.get_submodule(name).weight.detach()
        gram, metric = data.grams(name)
        for ratio in args.ratios:
            say(f"{name} at {ratio}")
            start = time.perf_counter()
            simple, best = (
                fit(weight, structure, ratio=ratio, gram=gram, output_gram=metric) for structure in (LowRank, AUTO)
            )
            low, auto = simple.minimised**2, best.minimised**2
            power = torch.tensor(auto).log() / torch.tensor(low).log()
            rows.append({
                "layer": name, "ratio": ratio, "structure": show(best.structure), "lowrank": low, "auto": auto,
                "gain": auto / low, "law": GAIN * (1 - ratio), "power": power.item(),
                "seconds": time.perf_counter() - start,
            })  # fmt: skip
    store(args.results, f"gains_{args.kind}", f"Errors of the default structures: {args.kind}", NOTES,
          environment(argv), rows, COLUMNS)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
