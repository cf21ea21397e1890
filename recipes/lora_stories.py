"""Fine-tune a compressed language model by LoRA: perplexity before, after, and with the adapters merged.

Compresses a copy of the 260,000-parameter Llama of the llama2.c project by each structure, trains adapters of peft on
every linear layer, dense ones included, by the next-token loss on training stories, stores and loads the adapters,
and merges them into structured layers.

    pip install "structlin[recipes,peft]"
    python recipes/lora_stories.py --model stories260k --data tinystories

--model and --data as for compress_stories.py. Stores benchmarks/results/lora_stories.jsonl and .md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from _lora import NAMES, adapt, compressed, size
from _results import RESULTS, environment, say, store
from compress_stories import Batch, batches, perplexity, read_stories
from torch import nn

COLUMNS = {
    "structure": ("structure", ""), "kept": ("kept", ".3f"), "adapters": ("adapters", ","),
    "perplexity": ("perplexity", ".2f"), "with LoRA": ("adapted", ".2f"), "merged": ("merged", ".2f"),
    "kept, merged": ("kept_merged", ".3f"), "difference, merged": ("difference", ".1e"),
    "s, training": ("seconds", ".0f"),
}  # fmt: skip
NOTES = """\
Perplexity on validation stories: compressed (one ratio for all layers, calibrated, no refinement of blocks), with LoRA
on every linear layer trained by the next-token loss, and with the adapters merged into the structured layers.
*adapters*: trained parameters; *kept*: parameters of the whole model / of the dense one; *difference*: largest of the
logits / largest logit, at most 1e-5 (checked). Adapters that are stored and loaded give the same logits bit by bit
(checked)."""


def train(model: nn.Module, training: Sequence[Batch], args: argparse.Namespace) -> None:
    """Train what requires gradients by the next-token loss."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    model.train()
    for step in range(args.steps):
        batch = training[step % len(training)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        schedule.step()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder (or hub id) of the language model")
    parser.add_argument("--data", required=True, type=Path, help="folder of the tokenised stories")
    parser.add_argument("--structures", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--refine", type=int, help="steps of refinement of a layer (default: the structure's own)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--training", type=int, default=1000, help="stories to train on")
    parser.add_argument("--stories", type=int, default=200, help="validation stories")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    dense = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    valid = batches(read_stories(args.data / "valid.tok512.npy", 512)[: args.stories], 16)
    stories = read_stories(args.data / "train.tok512.npy", 512)[: args.training]
    calibration, training = batches(stories[:64], 16), batches(stories, 8)
    rows = []
    for name in args.structures:
        torch.manual_seed(0)
        model = compressed(dense, name, args.ratio, calibration, args.refine)
        kept = size(model) / size(dense)
        row = adapt(
            model,
            peft.LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            lambda model: train(model, training, args),
            lambda model: model(**valid[0]).logits,
            lambda model: perplexity(model, valid),
        )
        row |= {"perplexity": row.pop("before"), "kept": kept, "kept_merged": kept * row["growth"]}
        rows.append({"structure": name, **row})
        say(f"{name}: {row['perplexity']:.2f}, with LoRA {row['adapted']:.2f}, merged {row['merged']:.2f}")
    store(args.results, "lora_stories", "LoRA on a compressed language model", NOTES, environment(argv), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
