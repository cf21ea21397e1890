"""Translate with K-matrices in the decoder: BLEU, and sentences per second, against dense linear layers.

    pip install "structlin[recipes]"
    python recipes/translate.py                       # a language invented by the recipe
    python recipes/translate.py --data FOLDER         # Multi30k, German to English: train.de.gz, train.en.gz, val.*
    python recipes/translate.py --quick               # a tiny run that stores nothing among the results

A small Transformer is trained from scratch twice: with dense linear layers in its decoder, and with K-matrices there.
The encoder, the embedding and the output layer (tied to it) are dense in both. Speed: one sentence at a time, greedy,
one thread, keys and values kept. Stores benchmarks/results/translate_<data>.jsonl and .md, draws
docs/figures/translate_<data>.svg and .png.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _figures import draw, panels, style
from _findings import conclude, options
from _languages import BEGIN, END, PAD, Pairs, invented, multi30k, subwords
from _results import environment, say
from _translator import LONGEST, Translator
from sacrebleu import corpus_bleu
from tokenizers import Tokenizer
from torch import Tensor, nn

import structlin
from structlin import KMatrix, param_groups
from structlin.layers.linear import StructuredLinear

Coded = list[tuple[list[int], list[int]]]

COLUMNS = {
    "decoder": ("decoder", ""), "its linear layers": ("linear", ","), "all parameters": ("parameters", ","),
    "BLEU": ("bleu", ".1f"), "lowest": ("lowest", ".1f"), "highest": ("highest", ".1f"),
    "sentences/s": ("rate", ".0f"), "speed / dense": ("speed", ".2f"), "training, s": ("seconds", ".0f"),
}  # fmt: skip
NOTES = """\
{data}: {train} pairs for training, {test} for BLEU (sacrebleu, cased), {vocabulary} joint byte-pair subwords.
Transformer, one encoder layer and {layers} of the decoder, width {width}, inner {inner}, trained for {epochs} epochs in
{precision}, the same for all; {seeds}. *speed*: batch 1, beam 1, {threads} thread, float32, as many tokens as the
reference has, sentences alternated between the models; ratio of the median times. *plain torch*: the same network
without the native kernel. The paper (Dao et al. 2020) puts K-matrices into the decoder of a DynamicConv model of
IWSLT'14 German-English and reports 36 % more speed. Ours is a Transformer, smaller and trained for minutes, on other
data: neither network is trained to its end, so BLEU compares what they learn in equally many steps, not what they
reach."""
INVENTED = "An invented language (verbs last, genders, clauses in reverse)"


def batches(rows: Coded, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pad sentences of similar length into batches, in random order."""
    order = sorted(range(len(rows)), key=lambda k: len(rows[k][1]) + random.random())
    found = []
    for start in range(0, len(rows), size):
        chosen = [rows[k] for k in order[start : start + size]]
        found.append(tuple(
            nn.utils.rnn.pad_sequence([torch.tensor(row[side]) for row in chosen], True, PAD) for side in (0, 1)
        ))  # fmt: skip
    random.shuffle(found)
    return found  # type: ignore[return-value]


def train(model: Translator, rows: Coded, args: argparse.Namespace) -> None:
    """Train with AdamW, label smoothing and a cosine schedule after a warm-up, in bfloat16 where it is asked for."""
    optimizer = torch.optim.AdamW(param_groups(model, args.learning_rate, weight_decay=0.01), betas=(0.9, 0.98))
    total = args.epochs * -(-len(rows) // args.batch)

    def rate(step: int) -> float:
        return min((step + 1) / (0.1 * total), 0.5 + 0.5 * math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for epoch in range(args.epochs):
        losses = []
        for source, target in batches(rows, args.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
                logits = model(source, target[:, :-1])
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        say(f"  epoch {epoch + 1}: loss {statistics.mean(losses[-50:]):.3f}")
    model.eval()


def bleu(model: Translator, tokenizer: Tokenizer, rows: Coded, references: Sequence[str]) -> float:
    found = [tokenizer.decode(model.translate(source)) for source, _ in rows]
    say(f"  for example: {found[0]!r} for {references[0]!r}")
    return corpus_bleu([text.strip() for text in found], [list(references)]).score


def times(models: dict[str, Translator], rows: Coded) -> dict[str, list[float]]:
    """Return seconds per sentence, the models taking turns, after a few sentences to warm up."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for source, target in [*rows[:5], *rows]:
        for name, model in models.items():
            start = time.perf_counter()
            model.translate(source, len(target) - 1)
            found[name].append(time.perf_counter() - start)
    return {name: values[5:] for name, values in found.items()}


def build(name: str, vocabulary: int, args: argparse.Namespace) -> Translator:
    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs) if name == "dense" else KMatrix(inputs, outputs, width=args.k_width)

    return Translator(vocabulary, args.width, args.inner, args.layers, linear)


def linear_parameters(model: Translator) -> int:
    """Count the weights of the decoder's linear layers, without biases."""
    return sum(
        parameter.numel()
        for module in model.blocks.modules() if isinstance(module, (nn.Linear, StructuredLinear))
        for name, parameter in module.named_parameters() if name != "bias"
    )  # fmt: skip


def native_kernel() -> bool:
    """Build the native kernel; say so where there is no compiler."""
    try:
        structlin.kernels.build()
    except RuntimeError as error:
        say(f"without the native kernel: {error}")
    return structlin.kernels.available()


def run(args: argparse.Namespace, pairs: Pairs, test: Pairs, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Train and judge both decoders for every seed, then time the last ones."""

    def coded(pairs: Pairs) -> Coded:
        return [
            ([*tokenizer.encode(source).ids[: LONGEST - 2], END],
             [BEGIN, *tokenizer.encode(" " + target).ids[: LONGEST - 2], END])
            for source, target in pairs
        ]  # fmt: skip

    rows, unseen = coded(pairs), coded(test)
    models: dict[str, Translator] = {}
    scores, seconds = defaultdict(list), defaultdict(list)
    for seed in range(args.seeds):
        for name in ("dense", "kmatrix"):
            torch.manual_seed(seed)
            random.seed(seed)
            models[name] = build(name, tokenizer.get_vocab_size(), args)
            start = time.perf_counter()
            train(models[name], rows, args)
            seconds[name].append(time.perf_counter() - start)
            scores[name].append(bleu(models[name], tokenizer, unseen, [target for _, target in test]))
            say(f"{name}, seed {seed}: BLEU {scores[name][-1]:.2f}, {seconds[name][-1]:.0f} s")
    table = []
    for name, took in measured(models, unseen[: args.sentences]).items():
        network = name.split(",")[0]
        found = scores[network]
        table.append({
            "decoder": name, "linear": linear_parameters(models[network]),
            "parameters": sum(p.numel() for p in models[network].parameters()),
            "bleu": statistics.mean(found), "lowest": min(found), "highest": max(found),
            "rate": 1 / took[0], "speed": took[1], "seconds": statistics.median(seconds[network]),
        })  # fmt: skip
    return table


def measured(models: dict[str, Translator], rows: Coded) -> dict[str, tuple[float, float]]:
    """Return seconds per sentence and the speed over dense, with the native kernel where there is one, and without."""
    structured = [module for module in models["kmatrix"].modules() if isinstance(module, StructuredLinear)]
    found = {}
    # A named order runs in plain torch, "auto" in the kernel.
    for name, order in (("kmatrix", "auto"), ("kmatrix, plain torch", "forward")):
        if order == "auto" and not native_kernel():
            continue
        for layer in structured:
            layer.use_plan(order)
        took = {model: statistics.median(values) for model, values in times(models, rows).items()}
        found.setdefault("dense", (took["dense"], 1.0))
        found[name] = took["kmatrix"], took["dense"] / took["kmatrix"]
    return found


def findings(rows: Sequence[dict[str, Any]]) -> str:
    """Judge the paper's claim by the best K-matrix row."""
    dense, *others = rows
    best = max(others, key=lambda row: row["speed"])
    loss = dense["bleu"] - best["bleu"]
    held = best["speed"] >= 1.36 and loss <= 1
    return (
        "A decoder with K-matrices is at least 36 % faster at no more than 1 BLEU less: "
        f"{'confirmed' if held else 'refuted'} "
        f"({best['decoder']}: {100 * (best['speed'] - 1):+.0f} % sentences per second, {-loss:+.1f} BLEU)."
    )


def picture(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """Draw BLEU, with the range of the seeds, and speed."""
    figure, axes = panels(2, width=3.6)
    for axis, chosen, key, title in (
        (axes[0, 0], rows[:2], "bleu", "BLEU"), (axes[0, 1], rows, "rate", "sentences per second"),
    ):  # fmt: skip
        for k, row in enumerate(chosen):
            colour = style(row["decoder"].split(",")[0])["color"]
            hatch = "" if row["decoder"] == "dense" else "//" if "plain" in row["decoder"] else ".."
            axis.bar(k, row[key], 0.6, facecolor="none" if hatch else colour, edgecolor=colour, hatch=hatch)
            top = row["highest"] if key == "bleu" else row[key]
            if key == "bleu":  # of the seeds
                axis.vlines(k, row["lowest"], top, color="grey", linewidth=3)
            text = f"{row[key]:.1f}" if key == "bleu" else f"{row['speed']:.2f} x"
            axis.text(k, top, text, ha="center", va="bottom")
        axis.set_xticks(range(len(chosen)), [row["decoder"].replace(", ", ",\n") for row in chosen])
        axis.set_ylabel(title)
        axis.margins(y=0.1)
    draw(figure, name, folder)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of Multi30k; a language invented by the recipe without it")
    parser.add_argument("--sentences-to-train", type=int, help="the first so many pairs; all by default")
    parser.add_argument("--vocabulary", type=int, help="of subwords; 3000, or 600 for the invented language")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1, help="of the decoder")
    parser.add_argument("--k-width", type=int, default=1, help="the power of B B* in the K-matrices")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of training")
    parser.add_argument("--sentences", type=int, default=200, help="that are timed")
    parser.set_defaults(seeds=1)
    args = parser.parse_args(argv)
    if args.quick:
        args.width, args.inner, args.epochs, args.sentences = 64, 128, 2, 5
        args.precision = "float32"  # bfloat16 is slow where the processor has no units for it
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    invented_size = (600, 20) if args.quick else (6000, 300)
    pairs, test = invented(*invented_size) if args.data is None else multi30k(args.data)
    pairs = pairs[: args.sentences_to_train]
    tokenizer = subwords(pairs, args.vocabulary or (600 if args.data is None else 3000))
    rows = run(args, pairs, test, tokenizer)
    verdict = findings(rows)
    notes = NOTES.format(
        data=INVENTED if args.data is None else "Multi30k, German to English",
        train=len(pairs), test=len(test), vocabulary=tokenizer.get_vocab_size(), layers=args.layers, width=args.width,
        inner=args.inner, epochs=args.epochs, precision=args.precision, threads=args.threads,
        seeds="one seed" if args.seeds == 1 else f"{args.seeds} seeds",
    )  # fmt: skip
    name = f"translate_{'invented' if args.data is None else 'multi30k'}"
    title = "Translation with K-matrices in the decoder"
    conclude(args.results, name, title, notes, verdict, about, rows, COLUMNS)
    if not args.quick:
        picture(rows, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
