"""Train small language models of DeLighT blocks and of transformer blocks at equal parameters: perplexity by steps.

    pip install "structlin[recipes]"
    python recipes/train_delight.py                        # docstrings of the standard library, character by character
    python recipes/train_delight.py --data tinystories     # train.tok512.npy and valid.tok512.npy

A transformer of three blocks is trained at each width, and a DeLighT of four blocks whose width and expansion give the
same number of parameters within a per cent or two: its blocks grow deeper and wider towards the output, as in the
paper. Each gets the learning rate that is best with the first seed. Stores
benchmarks/results/train_delight.jsonl and .md (one line per network, size and steps), with --data
train_delight_stories.jsonl and .md; draws a figure of that name in docs/figures.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _figures import draw, legend, panels, style
from _findings import conclude, options
from _results import environment, say
from _text import next_token_loss, perplexity, read, windows
from matplotlib import ticker
from torch import Tensor, nn

from structlin import DeLighTBlock

LENGTH, BATCH = 64, 16  # tokens of a window, windows of a step
POINTS = 6  # of a curve
HEADS, BLOCKS = 4, 3  # of the transformer
DEPTHS = (4, 5, 6, 8)  # group linear transformations of each DeLighT block
STYLES = {"transformer": "dense", "DeLighT": "glt"}
COLUMNS = {
    "network": ("network", ""), "width": ("width", ""), "parameters": ("parameters", ","), "rate": ("rate", ".0e"),
    "steps": ("steps", ","), "perplexity": ("perplexity", ".3f"), "lowest": ("lowest", ".3f"),
    "highest": ("highest", ".3f"),
}  # fmt: skip
NOTES = """\
Perplexity of held-out text by {unit}: mean over {seeds} seeds, with the lowest and the highest; AdamW, one-cycle rate
(*rate*: its peak, the best of {rates} by seed 0), {tokens:,} tokens a step, embeddings tied to the output.

Where this differs from Mehta et al. 2021: networks of ten thousands of parameters instead of 99 million, {text} instead
of WikiText-103, seconds instead of days, learned positions, no adaptive embeddings.

Finding of the source: DeLighT is as good as a transformer with 2 to 3 times its parameters. At equal parameters:"""


class TransformerBlock(nn.Module):
    """A transformer's block, norms first: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (batch, positions, features)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Embeddings of tokens and positions, blocks, a norm, and the embedding again as the output."""

    def __init__(self, vocabulary: int, features: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, features), nn.Embedding(LENGTH, features)
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(features)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (batch, positions) to logits (batch, positions, vocabulary)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def transformer(vocabulary: int, features: int) -> LanguageModel:
    return LanguageModel(vocabulary, features, [TransformerBlock(features) for _ in range(BLOCKS)])


def delight(vocabulary: int, features: int, expansion: float = 2.0) -> LanguageModel:
    """Scale the blocks as in the paper: of N layers each, N from 4 on, expansion e + (N - 4) / 4."""
    blocks = [DeLighTBlock(features, layers=n, expansion=expansion + (n - DEPTHS[0]) / DEPTHS[0]) for n in DEPTHS]
    return LanguageModel(vocabulary, features, blocks)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def delight_of(vocabulary: int, parameters: int) -> tuple[int, float]:
    """Find the width and expansion at which a DeLighT has closest to so many parameters."""
    with torch.device("meta"):
        shapes = [(width, e / 20) for width in range(12, 129, 4) for e in range(30, 51, 2)]
        return min(shapes, key=lambda shape: abs(size(delight(vocabulary, *shape)) - parameters))


# Training --------------------------------------------------------------------------------------------------------


def train(model: nn.Module, ids: Tensor, held: Tensor, rate: float, steps: int, seed: int) -> list[float]:
    """Train on random windows, the same for every network; return the perplexities at POINTS equal shares of steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    found = []
    for step in range(1, steps + 1):
        batch = windows(ids, BATCH, LENGTH, generator)
        optimizer.zero_grad()
        next_token_loss(model(batch), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // POINTS) == 0:
            found.append(perplexity(model, held))
    return found


def measure(
    ids: Tensor, held: Tensor, vocabulary: int, args: argparse.Namespace
) -> list[dict[str, Any]]:  # fmt: skip
    """Train both networks at each size; a row for each network, size and number of steps."""
    rows = []
    for width in args.widths:
        target = size(transformer(vocabulary, width))
        networks = {
            "transformer": functools.partial(transformer, vocabulary, width),
            "DeLighT": functools.partial(delight, vocabulary, *delight_of(vocabulary, target)),
        }
        for name, network in networks.items():

            def run(rate: float, seed: int, network: Callable[[], LanguageModel] = network) -> list[float]:
                torch.manual_seed(seed)
                return train(network(), ids, held, rate, args.steps, seed)

            found = {rate: run(rate, 0) for rate in args.rates}
            rate = min(found, key=lambda rate: found[rate][-1])
            say(f"{name}: " + ", ".join(f"{rate:.0e} {curve[-1]:.3f}" for rate, curve in found.items()))
            curves = [found[rate], *(run(rate, seed) for seed in range(1, args.seeds))]
            facts = {"network": name, "width": network().tokens.embedding_dim, "parameters": size(network()),
                     "size": width, "rate": rate}  # fmt: skip
            for k, values in enumerate(zip(*curves, strict=True)):
                steps = (k + 1) * (args.steps // POINTS)
                spread = {"perplexity": statistics.mean(values), "lowest": min(values), "highest": max(values)}
                rows.append({**facts, "steps": steps, **spread})
            say(f"{name} of {facts['parameters']:,} parameters: {rows[-1]['perplexity']:.3f}")
    return rows


# Report ----------------------------------------------------------------------------------------------------------


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """Compare the networks at equal parameters, and each DeLighT with transformers of twice as many or more."""
    last = {(row["network"], row["size"]): row for row in rows}  # rows of one network and size end with the last step
    sizes = sorted({row["size"] for row in rows})
    equal = [last["DeLighT", k]["perplexity"] < last["transformer", k]["perplexity"] for k in sizes]
    text = f"DeLighT is ahead at {sum(equal)} of {len(sizes)} sizes: {verdict(all(equal))}."
    light, dense = ([last[name, k] for k in sizes] for name in ("DeLighT", "transformer"))
    wins = [a["perplexity"] <= b["perplexity"] for a in light for b in dense if b["parameters"] >= 2 * a["parameters"]]
    if not wins:
        return text
    return (
        f"{text} Against a transformer of twice its parameters or more it is as good in {sum(wins)} of {len(wins)} "
        f"pairs: {verdict(all(wins))}."
    )


def verdict(holds: bool) -> str:
    return "confirmed" if holds else "refuted"


def picture(rows: Sequence[dict[str, Any]], unit: str, name: str, folder: Path) -> None:
    """Draw perplexity by steps at the largest size, and by parameters after all steps."""
    figure, axes = panels(2)
    (steps, sizes), largest, end = axes[0], max(row["size"] for row in rows), max(row["steps"] for row in rows)
    for network, colour in STYLES.items():
        mine = [row for row in rows if row["network"] == network]
        for axis, key, chosen in (
            (steps, "steps", [row for row in mine if row["size"] == largest]),
            (sizes, "parameters", [row for row in mine if row["steps"] == end]),
        ):
            x, y = ([row[column] for row in chosen] for column in (key, "perplexity"))
            axis.plot(x, y, label=network, **style(colour))
            lowest, highest = ([row[column] for row in chosen] for column in ("lowest", "highest"))
            axis.fill_between(x, lowest, highest, color=style(colour)["color"], alpha=0.15, linewidth=0)
    steps.set(xlabel="steps", ylabel=f"held-out perplexity by {unit}", title="largest size")
    sizes.set(xlabel="parameters", ylabel=f"held-out perplexity by {unit}", xscale="log", title=f"after {end} steps")
    sizes.set_xticks([row["parameters"] for row in rows if row["network"] == "transformer" and row["steps"] == end])
    sizes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x / 1000:.0f} k"))
    sizes.xaxis.set_minor_formatter(ticker.NullFormatter())
    legend(figure, axes)
    draw(figure, name, folder)


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of tokenised stories; without it, docstrings")
    parser.add_argument("--widths", nargs="+", type=int, default=[24, 32, 48], help="of the transformers")
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3, 4e-3], help="peak learning rates to try")
    parser.add_argument("--steps", type=int, default=420)
    args, count = parser.parse_args(argv), 256
    if args.quick:
        args.widths, args.rates, args.steps, args.seeds, count = [16, 24], [4e-3, 8e-3], 12, 2, 32
    torch.set_num_threads(args.threads)
    about = environment(argv)
    ids, held, vocabulary = read(args.data, args.quick)
    rows = measure(ids, windows(held, count, LENGTH), vocabulary, args)
    unit, text = ("character", "docstrings") if args.data is None else ("token of 512", "TinyStories")
    rates = ", ".join(f"{rate:.0e}" for rate in args.rates)
    notes = NOTES.format(
        unit=unit, text=text, seeds=args.seeds, rates=rates, tokens=BATCH * LENGTH
    )  # fmt: skip
    name = "train_delight" if args.data is None else "train_delight_stories"
    title = "DeLighT and transformers at equal parameters"
    conclude(args.results, name, title, notes, finding(rows), about, rows, COLUMNS)
    if not args.quick:
        picture(rows, unit, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
