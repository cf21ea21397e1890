"""Compress a language model that writes stories by every structure, and heal it: perplexity before and after.

Takes the 260,000-parameter Llama of the llama2.c project (or any other causal language model of transformers) and
stories in its own tokens, compresses a copy by each structure at one ratio, calibrated on some training stories, and
trains the copy towards the original with `structlin.heal` on the training stories: its default loss for a language
model is KL(original || copy) over all positions, and needs no labels. `svd` is the truncated SVD, which knows the
weights only; `lowrank` with calibration is the whitened SVD. The output head is tied to the embedding and stays dense.

    pip install "structlin[recipes]"
    python recipes/compress_stories.py --model stories260k --data tinystories
    python recipes/compress_stories.py --model stories260k --data tinystories --structures auto monarch --ratio 0.25

Of --data it reads train.tok512.npy and valid.tok512.npy: token ids in one row, a story starts at every id 1.
Stores benchmarks/results/stories260k.jsonl (one line per structure) and .md (the table).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _results import RESULTS, environment, say, store
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import structlin
from structlin.structures import families

START = 1  # the id of the token that a story starts with
NAMES = ("svd", "lowrank", *sorted(families().keys() - {"lowrank"}), "auto")

COLUMNS = {
    "structure": ("structure", ""),
    "layers": ("layers", ""),
    "kept": ("kept", ".3f"),
    "parameters, linears": ("parameters", ","),
    "perplexity": ("perplexity", ".3f"),
    "healed": ("healed", ".3f"),
    "KL, healed": ("divergence", ".4f"),
    "healing steps": ("steps", ","),
    "compress, s": ("seconds", ".0f"),
    "heal, s": ("seconds_healing", ".0f"),
}
NOTES = """\
Perplexity on validation stories, each on its own and cut at the model's context, the mean over all predicted tokens,
after compression and after healing. Row `dense` is the original; `svd` the truncated SVD, which knows the weights only;
`lowrank` the whitened SVD, and all others calibrated too. *kept*: parameters kept / dense parameters, over all linear
weights but the output head, those that stay dense included; *KL, healed*: in nats per token, on held-back stories."""

Batch = dict[str, Tensor]


# Stories ---------------------------------------------------------------------------------------------------------


def read_stories(path: Path, limit: int) -> list[Tensor]:
    """Read token ids, split them before every start token, and cut each story."""
    ids = torch.from_numpy(np.load(path).astype(np.int64))
    starts = (ids == START).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError(f"{path} does not begin with the start token {START}")
    return [story[:limit] for story in ids.tensor_split(starts[1:])]


def batches(stories: Sequence[Tensor], size: int) -> list[Batch]:
    """Make batches of stories of similar length, right-padded, in random order."""
    ordered = sorted(stories, key=len)
    groups = [ordered[k : k + size] for k in range(0, len(ordered), size)]
    return [padded(group) for group in random.Random(0).sample(groups, len(groups))]


def padded(stories: Sequence[Tensor]) -> Batch:
    """Stack stories, padded on the right by zeros that the mask leaves out."""
    mask = pad_sequence([torch.ones_like(story) for story in stories], batch_first=True)
    return {"input_ids": pad_sequence(list(stories), batch_first=True), "attention_mask": mask}


@torch.inference_mode()
def perplexity(model: nn.Module, found: Sequence[Batch]) -> float:
    """Compute exp of the mean negative log-likelihood over all predicted tokens."""
    total, count = 0.0, 0
    for batch in found:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return math.exp(total / count)


# One structure ---------------------------------------------------------------------------------------------------


def compress(
    dense: nn.Module, name: str, calibration: Sequence[Batch], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Compress a copy of the dense model and sum up the report; None if no layer can be made that small."""
    start = time.perf_counter()
    options: dict[str, Any] = {"ratio": args.ratio, "refine": args.refine}
    if name != "svd":
        options["calibration"] = calibration
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing was compressed")  # said below
        report = structlin.compress_model(copy.deepcopy(dense), "lowrank" if name == "svd" else name, **options)
    left = {}
    for layer in report.layers:
        if layer.structure is None and "tied" not in str(layer.reason):
            left.setdefault((layer.out_features, layer.in_features, layer.reason), layer.name)
    for (rows, columns, reason), first in left.items():
        say(f"    {first} and its like, {rows}x{columns}, stay dense: {reason}")
    changed = [layer for layer in report.layers if layer.structure is not None]
    if not changed:
        return None
    body = [layer for layer in report.layers if "tied" not in str(layer.reason)]
    before, after = (sum(getattr(layer, f"parameters_{when}") for layer in body) for when in ("before", "after"))
    summary = {"layers": len(changed), "kept": after / before, "parameters": after, "parameters_dense": before}
    return report.model, {**summary, "seconds": time.perf_counter() - start}


def heal(
    model: nn.Module, dense: nn.Module, training: Sequence[Batch], validation: Sequence[Batch], args: argparse.Namespace
) -> dict[str, Any]:
    """Train a compressed model towards the dense one, and sum up the report."""
    healing = structlin.heal(
        model, dense, training, validation=validation, steps=args.steps, lr=args.learning_rate,
        every=args.every, forward=lambda model, batch: model(**batch, use_cache=False),
    )  # fmt: skip
    return {"steps": healing.steps, "divergence": healing.loss_after, "seconds_healing": healing.seconds}


# The run ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder (or hub id) of the language model")
    parser.add_argument("--data", required=True, type=Path, help="folder of the tokenised stories")
    parser.add_argument("--structures", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ratio", type=float, default=0.5, help="parameters kept of each layer")
    parser.add_argument("--refine", type=int, help="steps of refinement of a layer (default: the structure's own)")
    parser.add_argument("--calibration", type=int, default=64, help="training stories to calibrate on")
    parser.add_argument("--training", type=int, help="stories to heal on (default: all others but --held)")
    parser.add_argument("--held", type=int, default=32, help="training stories that choose the best weights")
    parser.add_argument("--stories", type=int, help="validation stories (default: all)")
    parser.add_argument("--length", type=int, default=512, help="tokens after which a story is cut")
    parser.add_argument("--batch", type=int, default=4, help="stories of a healing step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the healing")
    parser.add_argument("--steps", type=int, default=200, help="of the healing of one structure")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements on the held-back stories")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args(argv)


def described(args: argparse.Namespace, argv: Sequence[str], without: Sequence[str]) -> dict[str, Any]:
    """What the table says about the run."""
    names = ("ratio", "calibration", "batch", "learning_rate", "steps")
    model = {"language model": Path(args.model).name, **{name: getattr(args, name) for name in names}}
    if without:
        model["no layer can be made that small by"] = ", ".join(without)
    return {**model, **environment(argv)}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dense = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    limit = min(args.length, getattr(dense.config, "max_position_embeddings", args.length))
    valid = batches(read_stories(args.data / "valid.tok512.npy", limit)[: args.stories], 16)
    stories = read_stories(args.data / "train.tok512.npy", limit)
    held, training = stories[: args.held], stories[args.held :][: args.training]
    calibration = batches(training[: args.calibration], 16)

    rows: list[dict[str, Any]] = [{"structure": "dense", "kept": 1.0, "perplexity": perplexity(dense, valid)}]
    say(f"dense: perplexity {rows[0]['perplexity']:.4f}")
    without: list[str] = []
    for k, name in enumerate(args.structures):
        say(f"[{k + 1}/{len(args.structures)}] {name} at ratio {args.ratio}")
        compressed = compress(dense, name, calibration, args)
        if compressed is None:
            without.append(name)
            continue
        model, row = compressed
        row["perplexity"] = perplexity(model, valid)
        say(f"    {row['layers']} layers, {row['seconds']:.0f} s, perplexity {row['perplexity']:.4f}; healing")
        row |= heal(model, dense, batches(training, args.batch), batches(held, 16), args)
        row["healed"] = perplexity(model, valid)
        say(f"    {row['steps']} steps, perplexity {row['healed']:.4f}")
        rows[0]["parameters"] = row["parameters_dense"]
        rows.append({"structure": name, **row})
    about = described(args, argv, without)
    title = f"{about['language model']}: compressed by every structure, then healed"
    store(args.results, "stories260k", title, NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
