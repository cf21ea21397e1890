"""Compress a sentence encoder with calibration, without fine-tuning, and compare with the whitened SVD.

Grams are collected on docstring sentences of the standard library; all else is measured on other sentences, and on
STS-B where the file is given. The pooler, which sentence embeddings do not use, stays dense.

    python recipes/calibrate_minilm.py --stsb sts-dev.csv
    python recipes/calibrate_minilm.py --methods auto --ratios 0.5

Stores benchmarks/results/minilm_calibrated.jsonl (one line per row) and .md (the table).
"""

from __future__ import annotations

import argparse
import copy
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _minilm import Stsb, docstring_sentences, embed, length, model_path, read_stsb, spearman, tokenise
from _results import RESULTS, environment, say, store
from torch import nn

import structlin

# Independent fits to the inputs of the dense model.
PLAIN: dict[str, Any] = {"output_metric": False, "sequential": False, "block_epochs": 0, "allocation": "uniform"}
ALONE = ("cp", "tucker", "glt", "kronchain", "circulant", "toeplitz", "diagonal", "sparse")
METHODS: dict[str, dict[str, Any]] = {
    "SVD": {"structure": "lowrank", "calibration": None},
    "whitened SVD": PLAIN | {"structure": "lowrank"},
    "auto, plain": PLAIN | {"structure": "auto"},
    **{f"{name}, plain": PLAIN | {"structure": name} for name in ALONE},
    "low rank": {"structure": "lowrank"},
    "auto": {"structure": "auto"},
}
COLUMNS = {
    "method": ("method", ""),
    "ratio": ("ratio", ".2f"),
    "kept": ("kept", ".4f"),
    "structures": ("structures", ""),
    "output error": ("output_error", ".3f"),
    "cosine": ("cosine", ".4f"),
    "STS-B dev": ("stsb", ".4f"),
    "STS-B first 750": ("stsb_750", ".4f"),
    "s": ("seconds", ".0f"),
}
NOTES = """*kept*: parameters of the compressed weights / before; *output error*: mean over the layers of the relative
error of the outputs, in the norms that the fit minimised, before refinement; rows but the plain ones have all stages of
the pipeline; *cosine*: mean cosine of the sentence embeddings to the dense model's, on sentences that
calibration did not see; *STS-B*: Spearman correlation, no scores or sentences of it were used; *s*: the whole call,
calibration included. Of the calibration batches a tenth is held back."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or local path (default: all-MiniLM-L6-v2 from its PyPI package)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["SVD", "whitened SVD", "auto, plain", "low rank", "auto"]
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.5, 0.48, 0.25])
    parser.add_argument("--sentences", type=int, default=300, help="for calibration; as many others are measured on")
    parser.add_argument("--pairs", type=Path, help="STS-B file whose sentences to calibrate on, in place of docstrings")
    parser.add_argument("--max-length", type=int, default=256, help="tokens after which a sentence is cut")
    parser.add_argument("--stsb", type=Path, help="STS-B file, for example sts-dev.csv")
    parser.add_argument("--refine", type=int, help="steps of refinement (default: the structures' own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="minilm_calibrated", help="of the stored table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def described(report: structlin.Report) -> str:
    """Count the structures of a report, without their sizes."""
    names = (
        " + ".join(part.split("(")[0] for part in row.structure.split(" + ")) for row in report.layers if row.structure
    )
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def pair_sentences(path: Path, count: int) -> list[str]:
    """Draw distinct sentences of an STS-B file, the same ones each time; its scores are not read."""
    _, first, second = read_stsb(path)
    found = list(dict.fromkeys((*first, *second)))
    return random.Random(0).sample(found, min(count, len(found)))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = "docstrings" if args.pairs is None else args.pairs.name
    about = {"calibration": f"{args.sentences} sentences of {text}", **environment(argv)}
    path = model_path(args.model)
    dense = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    limit = length(args.max_length, dense)
    sentences = docstring_sentences(2 * args.sentences)
    seen = sentences[: args.sentences] if args.pairs is None else pair_sentences(args.pairs, args.sentences)
    calibration = [inputs for _, inputs in tokenise(tokenizer, seen, limit)]
    others = tokenise(tokenizer, sentences[args.sentences :], limit)
    reference = embed(dense, others)
    stsb = Stsb(args.stsb, tokenizer, limit) if args.stsb is not None else None

    def judged(model: nn.Module) -> dict[str, float]:
        row = {"cosine": (embed(model, others) * reference).sum(-1).mean().item()}
        if stsb is not None:
            found = embed(model, stsb.batches)
            cosines = (found[stsb.first] * found[stsb.second]).sum(-1)
            row["stsb"] = spearman(cosines, stsb.scores)
            row["stsb_750"] = spearman(cosines[:750], stsb.scores[:750])
        return row

    title = "all-MiniLM-L6-v2 compressed with calibration, without fine-tuning"
    rows: list[dict[str, Any]] = [{"method": "dense", **judged(dense)}]
    for ratio in args.ratios:
        for method in args.methods:
            options = {"calibration": calibration, **METHODS[method]}
            start = time.perf_counter()
            report = structlin.compress_model(
                copy.deepcopy(dense), options.pop("structure"), ratio=ratio, rules={"pooler*": None}, skip_last=False,
                refine=args.refine, **options,
            )  # fmt: skip
            row = {"method": method, "ratio": ratio, "kept": report.ratio, "structures": described(report)}
            row["seconds"] = time.perf_counter() - start
            errors = [layer.output_error for layer in report.layers if layer.output_error is not None]
            row["output_error"] = statistics.mean(errors) if errors else None
            rows.append(row | judged(report.model))
            say(f"{method} at {ratio}: cosine {rows[-1]['cosine']:.4f}, {row['seconds']:.0f} s")
        about["peak memory"] = (
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, all of the process"
        )
        store(args.results, args.name, title, NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
