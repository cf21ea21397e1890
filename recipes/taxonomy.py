"""Compress one language model by every kind of factorisation: accuracy, fidelity and size as a Pareto plot.

    pip install "structlin[recipes]"
    python recipes/taxonomy.py                                          # trains a small model on docstrings first
    python recipes/taxonomy.py --model stories260k --data tinystories   # a folder or hub id; text in 512 tokens
    python recipes/taxonomy.py --model HUB_ID                           # docstrings in the model's own tokens

CP, Tucker, tensor trains, Kronecker sums, low ranks and sums of two structures at several sizes, in the terms of Xu,
Sharmin & Mandic 2024: each is a (delta_1, delta_2, eta)-compression, which `report.taxonomy()` measures. Stores
benchmarks/results/taxonomy.jsonl and .md, with --model taxonomy_<model>; draws a figure of that name in docs/figures.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _figures import draw, legend, panels, style
from _findings import conclude, options
from _results import environment, say
from _text import docstrings, next_token_loss, read, windows
from torch import Tensor, nn

import structlin
from structlin.equation.geometry import composition
from structlin.layers.factored import Factored

LENGTH, BATCH = 64, 16  # tokens of a window, windows of a batch
CALIBRATION, AGREEMENT, HELD = 8, 4, 16  # batches
NAMES = ("lowrank", "kronecker", "tt", "cp", "tucker", "lowrank+kmatrix", "lowrank+blast")
COLUMNS = {
    "structure": ("structure", ""), "ratio": ("ratio", ".2f"), "eta": ("eta", ".3f"), "accuracy": ("accuracy", ".4f"),
    "delta_1": ("delta_1", ".4f"), "lowest": ("delta_1_lowest", ".4f"), "highest": ("delta_1_highest", ".4f"),
    "delta_2": ("delta_2", ".4f"), "least": ("delta_2_lowest", ".4f"), "most": ("delta_2_highest", ".4f"),
    "dimension": ("dimension", ".3f"), "compression, s": ("seconds", ".1f"),
    "composition of the first layer": ("maps", ""),
}  # fmt: skip
NOTES = """\
{model}; every linear layer but the output, fitted to the inputs of {calibration} windows of {length} tokens; no other
stage of the pipeline, no training after it. *accuracy*: share of next tokens that are predicted right; *delta_1*: what
the dense model has more; *delta_2*: share of positions where the two prefer different tokens; *eta*: parameters of the
model / of the dense one; *dimension*: of the sets of structured matrices / of the spaces of the dense ones. Means over
{seeds} {what}, with the lowest and the highest.

Where this differs from Xu, Sharmin & Mandic 2024: the source defines the terms and sorts published methods by them;
the measurements are ours."""


# The model -------------------------------------------------------------------------------------------------------


def small_model(vocabulary: int, quick: bool) -> nn.Module:
    """Build a Llama of two layers with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32 if quick else 64, intermediate_size=64 if quick else 176,
        num_hidden_layers=1 if quick else 2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, ids: Tensor, steps: int, rate: float = 5e-3) -> None:
    """Train on random windows by the next-token loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = windows(ids, BATCH, LENGTH)
        optimizer.zero_grad()
        next_token_loss(model(batch).logits, batch).backward()
        optimizer.step()
        schedule.step()


def text_of(args: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Return training and held-out ids: characters, stories, or docstrings in the tokens of the model."""
    if args.model is None or args.data is not None:
        return read(args.data, args.quick)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    parts = (torch.tensor(tokenizer(part)["input_ids"]) for part in docstrings(args.quick))
    return *parts, len(tokenizer)


def batches(ids: Tensor, count: int, generator: torch.Generator | None = None) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in windows(ids, count * BATCH, LENGTH, generator).split(BATCH)]


# Measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(model: nn.Module, held: Sequence[dict[str, Tensor]]) -> float:
    """Compute the share of next tokens that the model predicts right."""
    ids = torch.cat([batch["input_ids"] for batch in held])
    found = torch.cat([model(**batch).logits.argmax(-1) for batch in held])
    return (found[:, :-1] == ids[:, 1:]).double().mean().item()


def compress(
    dense: nn.Module, name: str, ratio: float, ids: Tensor, held: Tensor, seed: int, refine: int | None
) -> dict[str, Any] | None:
    """Compress a copy; return its place in the taxonomy, or None where no layer can be made that small."""
    drawn = batches(ids, CALIBRATION, torch.Generator().manual_seed(seed))
    test, start = batches(held, HELD), time.perf_counter()
    report = structlin.compress_model(
        copy.deepcopy(dense), name, ratio=ratio, refine=refine, calibration=drawn, validation=batches(held, AGREEMENT),
        evaluate=lambda model: accuracy(model, test), allocation="uniform", block_epochs=0, sequential=False,
        output_metric=False, progress=False,
    )  # fmt: skip
    found = report.taxonomy()
    if not found.layers:
        return None
    first = next(module for module in report.model.modules() if isinstance(module, Factored))
    return {
        "eta": found.size, "accuracy": report.qualities[-1].task, "delta_1": found.accuracy_lost,
        "delta_2": found.fidelity_lost, "seconds": time.perf_counter() - start, "maps": composition(first.spec),
        "dimension": sum(row.dimension for row in found.layers) / sum(row.ambient for row in found.layers),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Compress by every structure and ratio, for each seed a model of its own or its own calibration text."""
    ids, held, vocabulary = text_of(args)
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        if args.model is None:
            dense = small_model(vocabulary, args.quick)
            train(dense, ids, args.steps)
        else:
            dense = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        dense.eval()
        start = {"eta": 1.0, "accuracy": accuracy(dense, batches(held, HELD)), "delta_1": 0.0, "delta_2": 0.0}
        found.setdefault(("dense", 1.0), []).append({**start, "dimension": 1.0})
        for name, ratio in itertools.product(args.structures, args.ratios):
            row = compress(dense, name, ratio, ids, held, seed, args.refine)
            if row is not None:
                found.setdefault((name, ratio), []).append(row)
                say(f"[{seed}] {name} at {ratio}: {row['delta_1']:.4f}, {row['delta_2']:.4f}, {row['eta']:.3f}")
    size = sum(parameter.numel() for parameter in dense.parameters())
    kind = "A small Llama, trained here," if args.model is None else Path(args.model).name
    return f"{kind} of {size:,} parameters", [summary(*key, rows) for key, rows in found.items()]


def summary(name: str, ratio: float, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take means over the seeds, and the lowest and highest losses."""
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key != "maps"}
    ends = {
        f"{key}_{end}": function(row[key] for row in rows)
        for key in ("delta_1", "delta_2") for end, function in (("lowest", min), ("highest", max))
    }  # fmt: skip
    return {"structure": name, "ratio": ratio, **means, **ends, "maps": rows[0].get("maps")}


# Report ----------------------------------------------------------------------------------------------------------


def front(rows: Sequence[dict[str, Any]], loss: str) -> list[dict[str, Any]]:
    """Return the compressions that no other one beats in both size and loss, the largest first."""
    ordered = sorted((row for row in rows if row["structure"] != "dense"), key=lambda row: (row["eta"], row[loss]))
    kept: list[dict[str, Any]] = []
    for row in ordered:
        if not kept or row[loss] < kept[-1][loss]:
            kept.append(row)
    return kept[::-1]


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """State who is on the front, and which of accuracy and fidelity is lost first."""
    others = [row for row in rows if row["structure"] != "dense"]
    lines = []
    for loss in ("delta_1", "delta_2"):
        best = ", ".join(f"{row['structure']} {row['eta']:.2f}" for row in front(rows, loss))
        lines.append(f"On the Pareto front of {loss} and eta: {best}.")
    earlier = sum(row["delta_2"] > row["delta_1"] for row in others)
    lines.append(
        f"Fidelity is lost before accuracy, delta_2 > delta_1: in {earlier} of {len(others)} compressions: "
        f"{'confirmed' if earlier == len(others) else 'refuted'}."
    )
    single = [row for row in front(rows, "delta_2") if "+" not in row["structure"]]
    lines.append(f"Sums of two structures hold the front of delta_2: {'refuted' if single else 'confirmed'}.")
    return "\n".join(f"- {line}" for line in lines)


def picture(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """Draw both losses by size, with the fronts."""
    figure, axes = panels(2)
    for axis, loss, title in zip(
        axes[0], ("delta_1", "delta_2"), ("accuracy lost, delta_1", "fidelity lost, delta_2"), strict=True
    ):
        axis.axhline(0, label="dense", **{**style("dense"), "marker": ""})
        for structure in dict.fromkeys(row["structure"] for row in rows if row["structure"] != "dense"):
            mine = sorted((row for row in rows if row["structure"] == structure), key=lambda row: row["eta"])
            look = style(structure) | ({"marker": "s", "linestyle": "--"} if structure == "lowrank+kmatrix" else {})
            spread = [[abs(row[f"{loss}_{end}"] - row[loss]) for row in mine] for end in ("lowest", "highest")]
            axis.errorbar(
                [row["eta"] for row in mine], [row[loss] for row in mine], spread, capsize=2, label=structure, **look
            )
        best = front(rows, loss)
        axis.plot([row["eta"] for row in best], [row[loss] for row in best], color="#000000", alpha=0.2, linewidth=7,
                  solid_capstyle="round", label="Pareto front", zorder=0)  # fmt: skip
        axis.set(xlabel="eta, parameters kept of the model", ylabel=title)
    legend(figure, axes)
    draw(figure, name, folder)


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--model", help="folder or hub id of a causal language model; without it, one is trained")
    parser.add_argument("--data", type=Path, help="folder of tokenised stories; without it, docstrings")
    parser.add_argument("--structures", nargs="+", default=list(NAMES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=400, help="of training the small model")
    parser.add_argument("--refine", type=int, help="steps of refinement of a layer (default: the structure's own)")
    args = parser.parse_args(argv)
    if args.quick:
        args.structures, args.ratios, args.steps, args.seeds = ["lowrank", "tt", "lowrank+blast"], [0.5], 30, 2
        args.refine = 10
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "nothing was compressed")  # a structure that is never so small has no row
    about = environment(argv)
    model, rows = measure(args)
    what = "models, trained from different seeds" if args.model is None else "samples of calibration text"
    notes = NOTES.format(model=model, calibration=CALIBRATION * BATCH, length=LENGTH, seeds=args.seeds, what=what)
    name = "taxonomy" if args.model is None else f"taxonomy_{Path(args.model).name.lower().replace('-', '_')}"
    conclude(args.results, name, "One language model through the taxonomy", notes, finding(rows), about, rows, COLUMNS)
    if not args.quick:
        picture(rows, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
