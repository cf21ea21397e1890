"""Fit weights of one block together: what it brings over a whitened SVD of each weight, at equal parameters.

    python benchmarks/joint.py stories --model stories260k --data tinystories --off tinyshakespeare/valid.txt
    python benchmarks/joint.py minilm --data stsb

Models, texts and measures are those of ladder.py. Fits are in closed form, from the input Grams of the dense model.
Stores results/joint_<model>.jsonl and .md; rows of an earlier run are kept, unless they are run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from ladder import OFF, compare, minilm, parser_of, stories
from torch import Tensor, nn

import structlin
from structlin.compress.data import Data
from structlin.compress.statistics import SHRINKAGE, Statistics
from structlin.compress.units import removed
from structlin.structures import LowRank

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _minilm import embed
from _results import environment, say, store

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
NOTES = """\
Grams of the inputs of the dense model, no output metric, no refinement. Rows:

- whitened SVD: every linear map of the blocks by low rank.
- gauge-fixed low rank: ranks as if a product of rank r had r^2 parameters fewer: its gauge makes them redundant.
- joint value-output: the value map and the part of the output map of each head as one product of lower rank, in the
  Gram of the head's outputs; then the output map solved for all heads together. *inputs' Gram*: of the inputs of value
  instead, each head on its own. *any ranks*: heads of one layer share its ranks by the singular values.
- MLP hidden units: a share of them stays (*units*), the others go one after the other, the least harmful next, and the
  down projection makes up for them; then a whitened SVD of what remains. Held-back batches choose the share.
- both: the two together. All other maps are those of the whitened SVD, or of `auto` where the row says so.

*on*: text of the kind that calibration saw; *off*: other text. *kept*: parameters / dense parameters of all linear maps
but the output layer."""
COLUMNS = {
    "ratio": ("ratio", ""),
    "fit": ("fit", ""),
    "units": ("units", ".3g"),
    "kept": ("kept", ".3f"),
    "held back": ("held_back", ".4f"),
    "perplexity, on": ("on", ".2f"),
    "perplexity, off": ("off", ".1f"),
    "cosine, docstrings": ("docstrings", ".4f"),
    "cosine, STS-B": ("stsb", ".4f"),
    "STS-B dev": ("task", ".4f"),
    "s": ("seconds", ".0f"),
}


@dataclass(frozen=True)
class Names:
    """Names of the linear maps in each block, and the attention's sizes."""

    blocks: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    groups: int  # heads of value

    def of(self, model: nn.Module) -> list[str]:
        return [f"{self.blocks}.{number}" for number in range(len(model.get_submodule(self.blocks)))]


@dataclass
class Part:
    """A model with some of its maps fitted, the Grams of the others, and what the others are to become."""

    model: nn.Module
    known: Statistics
    rules: dict[str, Any] = field(default_factory=dict)
    fitted: dict[str, int] = field(default_factory=dict)  # parameters of maps whose count is not that of their shape


# Value and output projection -----------------------------------------------------------------------------------------


def folded(model: nn.Module, names: Names) -> nn.Module:
    """Move the value bias into the output bias: attention weights sum to 1."""
    result = copy.deepcopy(model)
    for block in names.of(result):
        value, output = (result.get_submodule(f"{block}.{name}") for name in (names.value, names.output))
        if value.bias is not None:
            repeats = output.in_features // value.out_features  # query heads per value head
            bias = value.bias.data.view(names.groups, 1, -1).expand(-1, repeats, -1).flatten()
            output.bias.data += output.weight.data @ bias
            value.bias.data.zero_()
    return result


def shrunk(gram: Tensor) -> Tensor:
    """Return the shrunken Gram in float64, as the library's fits see it."""
    gram = gram.double()
    return gram + SHRINKAGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def solved(weight: Tensor, gram: Tensor, basis: Tensor) -> Tensor:
    """Find W' (out, rank) with the least error of W' basis towards W, in the Gram of the inputs of W."""
    return torch.linalg.solve(basis @ gram @ basis.T, basis @ gram @ weight.T).T


def joint_heads(part: Part, names: Names, ratio: float, inputs: bool = False, uniform: bool = True) -> Part:
    """Lower the rank of each head's product of output and value map; what is cut of a head becomes zeros."""
    part = replace(part, model=copy.deepcopy(part.model), rules=dict(part.rules), fitted={})
    for block in names.of(part.model):
        value, output = (part.model.get_submodule(f"{block}.{name}") for name in (names.value, names.output))
        v = value.weight.data.double().unflatten(0, (names.groups, -1))  # (groups, size, in)
        size = v.shape[1]
        o = output.weight.data.double().unflatten(1, (names.groups, -1, size))  # (out, groups, heads, size)
        gram = shrunk(part.known.grams[f"{block}.{names.output}"])
        if inputs:
            outer = shrunk(part.known.grams[f"{block}.{names.value}"])
            grams = [head @ outer @ head.T for head in v]
        else:
            squares = gram.unflatten(0, o.shape[1:]).unflatten(3, o.shape[1:])  # (groups, heads, size) twice
            grams = [torch.stack([squares[g, h, :, g, h] for h in range(o.shape[2])]).sum(0) for g in range(len(v))]
        roots = [torch.linalg.cholesky(g) for g in grams]
        products = [o[:, g].transpose(0, 1).flatten(0, 1) @ root for g, root in enumerate(roots)]  # (heads out, size)
        spectra = [torch.linalg.svd(product, full_matrices=False) for product in products]
        total = round(ratio * names.groups * size)
        energies = torch.stack([s for _, s, _ in spectra])  # (groups, size)
        least = energies.flatten().sort(descending=True).values[total - 1]
        ranks = [total // names.groups] * names.groups if uniform else (energies >= least).sum(1).tolist()
        cuts = [vh[:r] @ torch.linalg.inv(root) for (_, _, vh), root, r in zip(spectra, roots, ranks, strict=True)]
        basis = torch.block_diag(*(cut for cut in cuts for _ in range(o.shape[2])))
        if inputs:
            gram = torch.block_diag(*(g for g in grams for _ in range(o.shape[2])))
        found = solved(output.weight.data.double(), gram, basis).split([r for r in ranks for _ in range(o.shape[2])], 1)
        padded = [nn.functional.pad(columns, (0, size - columns.shape[1])) for columns in found]
        rows = [nn.functional.pad(cut @ head, (0, 0, 0, size - len(cut))) for cut, head in zip(cuts, v, strict=True)]
        value.weight.data, output.weight.data = torch.cat(rows).float(), torch.cat(padded, 1).float()
        part.fitted[f"{block}.{names.value}"] = total * value.in_features
        part.fitted[f"{block}.{names.output}"] = total * o.shape[2] * output.out_features
    part.rules |= dict.fromkeys(part.fitted)
    return part


# Hidden units of the MLP ---------------------------------------------------------------------------------------------


def orders(model: nn.Module, names: Names, known: Statistics) -> dict[str, Tensor]:
    """Find for each block the units to remove, first to last, down to the least share."""
    result = {}
    for block in names.of(model):
        weight = model.get_submodule(f"{block}.{names.down}").weight.data.double()
        gram = shrunk(known.grams[f"{block}.{names.down}"])
        result[block] = torch.tensor(removed(weight, gram, len(gram) - round(SHARES[-1] * len(gram))))
    return result


def fewer_units(part: Part, names: Names, order: Mapping[str, Tensor], ratio: float, share: float) -> Part:
    """Keep a share of the hidden units; the maps that remain get the ratio that their total leaves."""
    part = replace(part, model=copy.deepcopy(part.model), rules=dict(part.rules))
    grams = dict(part.known.grams)
    for block in names.of(part.model):
        down_name = f"{block}.{names.down}"
        down, gram = part.model.get_submodule(down_name), shrunk(grams[down_name])
        count = round(share * len(gram))
        kept = torch.ones(len(gram), dtype=torch.bool)
        kept[order[block][: len(gram) - count]] = False
        down.weight.data = solved(down.weight.data.double(), gram, torch.eye(len(gram)).double()[kept]).float()
        down.in_features = count
        grams[down_name] = grams[down_name][kept][:, kept]
        rest = ratio * len(gram) / count
        for name in names.up:
            up = part.model.get_submodule(f"{block}.{name}")
            up.weight.data, up.out_features = up.weight.data[kept], count
            if up.bias is not None:
                up.bias.data = up.bias.data[kept]
        for name in (*names.up, names.down):
            part.rules[f"{block}.{name}"] = {"ratio": rest} if rest < 0.999 else None
    return replace(part, known=Statistics(grams, part.known.tokens))


# The run -------------------------------------------------------------------------------------------------------------


def gauge_fixed(part: Part, ratio: float) -> Part:
    """Give each map the largest rank r with r (in + out - r) parameters within the ratio."""
    rules, fitted = {}, {}
    for name in part.known.tokens:
        layer = part.model.get_submodule(name)
        total, size = layer.in_features + layer.out_features, layer.in_features * layer.out_features
        rank = max(r for r in range(1, min(layer.weight.shape) + 1) if r * (total - r) <= ratio * size)
        rules[name] = LowRank(rank=rank)
        fitted[name] = rank * (total - rank)
    return replace(part, rules=rules, fitted=fitted)


class Run:
    """A dense model, its statistics with and without the value bias, and the fits."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dense, batches, self.measure, self.options = (stories if args.kind == "stories" else minilm)(args)
        data = Data.gather(batches, None, None, 0.1)
        self.held_back = data.held_back
        config: Any = self.dense.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.names = {
            "stories": Names(
                "model.layers", "self_attn.v_proj", "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"),
                "mlp.down_proj", heads,
            ),
            "minilm": Names(
                "encoder.layer", "attention.self.value", "attention.output.dense", ("intermediate.dense",),
                "output.dense", heads,
            ),
        }[args.kind]  # fmt: skip
        self.plain, self.folded = (
            Part(model, structlin.collect_statistics(model, data.batches, **self.options))
            for model in (self.dense, folded(self.dense, self.names))
        )
        self.body = sum(self.dense.get_submodule(name).weight.numel() for name in self.plain.known.tokens)
        self.order = orders(self.folded.model, self.names, self.folded.known)
        self.fits: dict[str, tuple[str, Callable[[float], list[tuple[float | None, Part]]]]] = {
            "whitened SVD": ("lowrank", lambda ratio: [(None, self.start(False))]),
            "gauge-fixed low rank": ("lowrank", lambda ratio: [(None, gauge_fixed(self.start(False), ratio))]),
            "joint value-output": ("lowrank", lambda ratio: [(None, self.joint(ratio))]),
            "joint value-output, inputs' Gram": ("lowrank", lambda ratio: [(None, self.joint(ratio, inputs=True))]),
            "joint value-output, any ranks": ("lowrank", lambda ratio: [(None, self.joint(ratio, uniform=False))]),
            "MLP hidden units": ("lowrank", lambda ratio: self.units(self.start(False), ratio)),
            "both": ("lowrank", lambda ratio: self.units(self.joint(ratio), ratio)),
            "auto": ("auto", lambda ratio: [(None, self.start(False))]),
            "auto, both": ("auto", lambda ratio: self.units(self.joint(ratio), ratio, (0.75, ratio))),
        }

    def start(self, fold: bool) -> Part:
        return replace(self.folded if fold else self.plain)

    def joint(self, ratio: float, **options: bool) -> Part:
        return joint_heads(self.start(True), self.names, ratio, **options)

    def units(self, part: Part, ratio: float, shares: Sequence[float] = SHARES) -> list[tuple[float | None, Part]]:
        chosen = [share for share in shares if share >= ratio]
        return [(share, fewer_units(part, self.names, self.order, ratio, share)) for share in chosen]

    def loss(self, model: nn.Module) -> float:
        """Compute the log perplexity, or 1 - the mean cosine to the dense embeddings, on held-back batches."""
        if "forward" not in self.options:
            return math.log(compare(model, self.dense, torch.cat([b["input_ids"] for b in self.held_back]))[0])
        batches = [(list(range(len(batch["input_ids"]))), batch) for batch in self.held_back]
        losses = [1 - (embed(model, [b]) * embed(self.dense, [b])).sum(-1) for b in batches]
        return torch.cat(losses).mean().item()

    def finished(self, part: Part, structure: str, ratio: float) -> tuple[nn.Module, float]:
        """Fit the other maps; return the model and the share of parameters kept."""
        model = copy.deepcopy(part.model)
        report = structlin.compress_model(
            model, structure, ratio=ratio, rules=part.rules, calibration=part.known, progress=False, **OFF
        )
        rows = [row for row in report.layers if row.name in part.known.tokens]
        counts = {row.name: row.parameters_after for row in rows} | part.fitted
        return model, sum(counts.values()) / self.body

    def row(self, fit: str, ratio: float) -> dict[str, Any]:
        """Fit, choose among several shares by held-back batches, and measure."""
        structure, parts = self.fits[fit]
        start, tried = time.perf_counter(), []
        for share, part in parts(ratio):
            model, kept = self.finished(part, structure, ratio)
            tried.append((self.loss(model), share, kept, model))
            say(f"  {fit} at {ratio}, units {share}: kept {kept:.4f}, held back {tried[-1][0]:.4f}")
        loss, share, kept, model = min(tried, key=lambda found: found[0])
        seconds = time.perf_counter() - start
        facts = {"ratio": ratio, "fit": fit, "units": share, "kept": kept, "held_back": loss, "seconds": seconds}
        return facts | {"tried": {found[1]: found[0] for found in tried if found[1]}} | self.measure(model)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about = environment(argv)
    run = Run(args)
    path = args.results / f"joint_{args.kind}.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = {(row["ratio"], row["fit"]): row for row in known}
    rows[1.0, "dense"] = {"ratio": 1.0, "fit": "dense", "kept": 1.0, **about, **run.measure(run.dense)}
    order = ["dense", *run.fits]
    for ratio in args.ratios:
        for fit in args.fits or [name for name, (structure, _) in run.fits.items() if structure == "lowrank"]:
            rows[ratio, fit] = run.row(fit, ratio) | about
            say(json.dumps({key: value for key, value in rows[ratio, fit].items() if key not in about}))
            ordered = [rows[cell] for cell in sorted(rows, key=lambda cell: (-cell[0], order.index(cell[1])))]
            store(args.results, path.stem, f"Joint fits: {args.kind}", NOTES, about, ordered, COLUMNS)
            path.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")  # own commands
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--fits", nargs="+", help="rows of the table; default all without auto")
    parser.set_defaults(calibrate="docstrings")  # of ladder.py
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
