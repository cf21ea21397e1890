"""Train a small language model from scratch with structured layers, with and without what papers found to be needed.

    python benchmarks/training.py --data tinystories

A decoder of four pre-norm blocks on token ids (train.tok512.npy, valid.tok512.npy), AdamW, warm-up and cosine, windows
of 128 tokens. All linear weights of the blocks are structured at a quarter of the parameters. Each method runs at every
learning rate; the table shows the best. Methods:

dense: `nn.Linear`.
one rate: structured, the same learning rate for all parameters.
rates: `structlin.param_groups`.
rates + guide: and a dense guide (Wei et al. 2024) over the first 40 % of the steps, which are fewer, so that all linear
    layers together cost the same FLOPs.
rates + normalised: and factors W g / max(1, rms(W) / rms_0), g learned (Qiu et al. 2024).

Stores results/training.jsonl (every run) and .md (the best rate of each method). Rows of other structures are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import structlin
from structlin.fitting.budget import within
from structlin.layers.init import factor_rms
from structlin.layers.linear import StructuredLinear, build
from structlin.structures import family

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, environment, say, store

WINDOW, WIDTH, HEADS, DEPTH, BATCH = 128, 128, 4, 4, 16
GUIDED = 0.4  # of the steps
METHODS = ("one rate", "rates", "rates + guide", "rates + normalised")
STRUCTURES = ("dense", "lowrank", "tt", "monarch")
COLUMNS = {
    "structure": ("structure", ""), "method": ("method", ""), "rate": ("lr", "g"), "steps": ("steps", ""),
    "validation loss": ("loss", ".4f"), "seeds from": ("lowest", ".4f"), "to": ("highest", ".4f"),
    "parameters of blocks": ("parameters", ","), "s": ("seconds", ".0f"),
}  # fmt: skip
NOTES = """\
A decoder of four blocks of width 128 on TinyStories (476,117 training tokens, 512 words of vocabulary), windows of 128,
batches of 16; linear weights of the blocks at a quarter of the parameters. *validation loss*: nats per token, mean over
the seeds, at the best of the rates {rates} for the method (chosen on the same text, for all methods alike). *rates +
guide* takes fewer steps, at equal FLOPs of the linear layers."""


class Block(nn.Module):
    """Attention and MLP behind layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(512, WIDTH), nn.Embedding(WINDOW, WIDTH)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 512, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Normalised(nn.Module):
    """W g / max(1, rms(W) / rms_0)."""

    def __init__(self, rms: float) -> None:
        super().__init__()
        self.rms = rms
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, factor: Tensor) -> Tensor:
        rms = factor.square().mean().sqrt()
        return factor * (self.scale / (rms / self.rms).clamp(min=1))


class Guide(nn.Module):
    """Blend structured layers with dense weights that fade: out = c W x + (1 - c) structured(x), c from 1 to 0.

    W is used with probability c only, which saves half of its cost. Source: Wei et al. 2024, Building on efficient
    foundations (self-guided training).
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
        self.steps, self.done = steps, 0
        self.weights = nn.ParameterList(nn.Parameter(layer.to_dense().detach().clone()) for layer in layers)
        self.handles = [layer.register_forward_hook(partial(self.blend, k)) for k, layer in enumerate(layers)]

    def step(self) -> None:
        self.done += 1
        if self.done >= self.steps:
            for handle in self.handles:
                handle.remove()

    def blend(self, k: int, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        share = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        if torch.rand(()).item() >= share:
            return output
        return torch.lerp(output, F.linear(inputs[0], self.weights[k], layer.bias), share)


def structure_(model: nn.Module, name: str) -> None:
    """Replace the linear layers of the blocks by the largest of a structure at a quarter of the parameters."""
    for block in model.get_submodule("blocks"):
        for key, dense in [(k, m) for k, m in block.named_children() if isinstance(m, nn.Linear)]:
            sizes = dense.in_features, dense.out_features
            members = within(family(name), *sizes, 0.25)
            setattr(block, key, build(max(members, key=lambda m: m.spec(*sizes).num_parameters), *sizes))


def normalise_(model: nn.Module) -> None:
    """Put the weight normalisation on every factor."""
    for layer in [m for m in model.modules() if isinstance(m, StructuredLinear)]:
        std = 1 / math.sqrt(3 * layer.in_features * len(layer.spec.equations))
        for eq in layer.spec.equations:
            for factor in eq.factors:
                parametrize.register_parametrization(layer, factor.name, Normalised(factor_rms(eq, std)))


def groups(model: nn.Module, method: str, lr: float, decay: float) -> list[dict[str, object]]:
    """Return the optimizer's groups; those of normalised factors are found by the names below them."""
    if method == "rates + normalised":
        plain = structlin.param_groups(unnormalised(model), lr, weight_decay=decay)
        scales = [p for name, p in model.named_parameters() if name.endswith(".scale")]
        return [*plain, {"params": scales, "lr": lr, "weight_decay": 0.0}]
    if method.startswith("rates"):
        return structlin.param_groups(model, lr, weight_decay=decay)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": matrices, "lr": lr, "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]


def unnormalised(model: nn.Module) -> nn.Module:
    """Return a view of the model whose layers hold the original factors under their own names."""
    held = nn.Module()
    for k, (_, module) in enumerate(model.named_modules()):
        if isinstance(module, StructuredLinear):
            plain = build(module.structure, module.in_features, module.out_features, module.bias is not None)
            for factor in plain.spec.factors:
                setattr(plain, factor.name, module.parametrizations[factor.name].original)
            plain.bias = module.bias
            held.add_module(str(k), plain)
        elif not isinstance(module, (Normalised, parametrize.ParametrizationList)):
            leaf = nn.Module()
            for name, parameter in module.named_parameters(recurse=False):
                leaf.register_parameter(name, parameter)
            held.add_module(str(k), leaf)
    return held


@torch.inference_mode()
def loss_on(model: nn.Module, rows: Tensor) -> float:
    total = sum(
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        for ids in rows.split(64)
    )
    return total / rows[:, 1:].numel()


def run(
    structure: str, method: str, lr: float, seed: int, steps: int, train: Tensor, valid: Tensor
) -> dict[str, object]:
    torch.manual_seed(seed)
    model = Decoder()
    if structure != "dense":
        structure_(model, structure)
    linear = [m for m in model.blocks.modules() if isinstance(m, (nn.Linear, StructuredLinear))]
    size = sum(p.numel() for m in linear for name, p in m.named_parameters() if name != "bias")
    guide = None
    if method == "rates + guide":
        ours = sum(m.flops_per_token for m in linear)
        dense = sum(2 * m.in_features * m.out_features for m in linear)
        steps = round(steps / (1 + GUIDED / 2 * dense / ours))  # the dense weights run in half of the guided steps
        guide = Guide(model, round(GUIDED * steps))
    if method == "rates + normalised":
        normalise_(model)
    parameters = groups(model, method, lr, 0.1)
    if guide is not None:
        parameters.append({"params": list(guide.parameters()), "lr": lr, "weight_decay": 0.1})
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95))
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, 0.5 * (1.05 + 0.95 * math.cos(math.pi * k / steps)))
    )
    order = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(steps):
        at = torch.randint(len(train) - WINDOW - 1, (BATCH,), generator=order)
        ids = torch.stack([train[k : k + WINDOW + 1] for k in at])
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if guide is not None:
            guide.step()
    seconds = time.perf_counter() - start
    return {
        "structure": structure, "method": method, "lr": lr, "seed": seed, "steps": steps,
        "loss": loss_on(model.eval(), valid), "parameters": size, "seconds": seconds,
    }  # fmt: skip


def best(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Return the row of the best rate of each structure and method, over the seeds."""
    cells: dict[tuple[object, object], dict[object, list[dict[str, object]]]] = {}
    for row in rows:
        cells.setdefault((row["structure"], row["method"]), {}).setdefault(row["lr"], []).append(row)
    found = []
    for by_rate in cells.values():
        means = {lr: statistics.mean(r["loss"] for r in runs) for lr, runs in by_rate.items()}
        lr = min(means, key=means.__getitem__)
        losses = [r["loss"] for r in by_rate[lr]]
        found.append({**by_rate[lr][0], "loss": means[lr], "lowest": min(losses), "highest": max(losses)})
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the tokens")
    parser.add_argument("--structures", nargs="+", default=STRUCTURES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    train, valid = (
        torch.from_numpy(np.load(args.data / f"{split}.tok512.npy").astype(np.int64)) for split in ("train", "valid")
    )
    valid = valid[: len(valid) // WINDOW * WINDOW].view(-1, WINDOW)
    cells = [
        (name, method) for name in args.structures for method in (("one rate",) if name == "dense" else args.methods)
    ]
    known = args.results / "training.jsonl"
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    rows: list[dict[str, object]] = [row for row in map(json.loads, lines) if row["structure"] not in args.structures]
    for structure, method in cells:
        for lr in args.rates:
            for seed in range(args.seeds):
                rows.append({**run(structure, method, lr, seed, args.steps, train, valid), **about})
                say(json.dumps({key: value for key, value in rows[-1].items() if key not in about}))
        notes = NOTES.format(rates=", ".join(f"{lr:g}" for lr in args.rates))
        store(args.results, "training", "Training from scratch", notes, about, best(rows), COLUMNS)
        known.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # each with its own command
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
