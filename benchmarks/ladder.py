"""What each stage of the pipeline brings: a whole model compressed with one stage after the other switched on.

    python benchmarks/ladder.py stories --model stories260k --data tinystories --off tinyshakespeare/valid.txt
    python benchmarks/ladder.py minilm --data stsb

`stories`: a causal language model and tokens of its own kind (train.tok512.npy, valid.tok512.npy), calibrated on the
first 256 windows of 256 training tokens in batches of 4; perplexity, and divergence from the dense model, on all
validation windows and on other text.
`minilm`: a sentence encoder, calibrated on 300 docstring sentences in batches of 8, or (--calibrate stsb) on 400 STS-B
training sentences; cosine to the dense embeddings on 500 other docstring sentences and on the STS-B dev sentences, and
the rank correlation on STS-B dev. All texts are disjoint. Rows of an earlier run are kept, unless they are run again.
Stores results/ladder_<model>.jsonl and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import structlin
from structlin.compress.gradients import sampled_loss
from structlin.compress.output import vocabulary_of
from structlin.compress.scramble import widened

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _minilm import Stsb, docstring_sentences, embed, length, model_path, pooled, read_stsb, tokenise
from _results import RESULTS, environment, say, store

OFF: dict[str, Any] = {
    "output_metric": False, "hidden_units": False, "sequential": False, "block_epochs": 0, "allocation": "uniform",
}  # fmt: skip
METRIC = OFF | {"output_metric": True}
BEHIND = METRIC | {"sequential": True}
DIVIDED = BEHIND | {"allocation": "auto"}
UNITS, BLOCKS, ALL = "+ hidden units", "+ block refinement", "+ end to end (defaults)"
KNOWN = "from known statistics"
PLAIN = "defaults, without the kernel"
SVD = "SVD"
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    SVD: ("lowrank", OFF),
    "whitened SVD": ("lowrank", OFF),
    "auto": ("auto", OFF),
    "+ output metric": ("auto", METRIC),
    "+ sequential": ("auto", BEHIND),
    "+ allocation": ("auto", DIVIDED),
    UNITS: ("auto", DIVIDED | {"hidden_units": True}),
    BLOCKS: ("auto", {"model_epochs": 0}),
    ALL: ("auto", {}),
    "without hidden units": ("auto", {"hidden_units": False}),
    "refinement without the metric": ("auto", {"output_metric": False}),
    "refinement, uniform": ("auto", {"allocation": "uniform"}),
    "low rank, all stages": ("lowrank", {}),
    "sparse, all stages": ("sparse", {}),
    KNOWN: ("auto", {}),
    PLAIN: ("auto", {}),
}
HEALED, COPIES = "+ heal, 2 min", "+ heal with copies, 2 min"
MORE = "+ heal on all training text, 2 min"
AFTER = HEALED, COPIES, MORE
ALONE = "heal in place of refinement"
WINDOW = 256
NOTES = """\
Each row switches one stage on more than the row above, from the SVD of the weights to the defaults; rows below that
leave one out, or use low rank alone, or entries in places chosen one by one (*sparse*: smaller, but no faster than
dense, and a bit more for each place). *from known statistics* is given the Grams of both sides, which its seconds leave
out: nothing runs but the checks on held-back batches. *without the kernel* is the defaults in plain torch
(STRUCTLIN_KERNELS=off), where all other rows have the native kernel. *heal with copies*: on the batches and three
copies of them with 30 % of the tokens exchanged. *heal on all training text*: on all windows, not the first 256. *heal
in place of refinement* trains the whole model from end to end, not blocks, for as long as all refinement took in the
row of all stages. *on*: text of the kind that calibration saw; *off*: other text. *divergence*: KL(dense || compressed)
of the next token, in nats; on other text it says more than perplexity, which a damaged model can have lower than the
dense one.
*kept*: parameters / dense parameters of all linear weights but the output layer. Seconds include the checks on
held-back batches."""
COLUMNS = {
    "ratio": ("ratio", ""),
    "stage": ("stage", ""),
    "calibrated on": ("calibrated", ""),
    "kept": ("kept", ".3f"),
    "perplexity, on": ("on", ".2f"),
    "perplexity, off": ("off", ".1f"),
    "divergence, on": ("divergence_on", ".3f"),
    "divergence, off": ("divergence_off", ".3f"),
    "cosine, docstrings": ("docstrings", ".4f"),
    "cosine, STS-B": ("stsb", ".4f"),
    "STS-B dev": ("task", ".4f"),
    "seed": ("seed", ""),
    "threads": ("threads", ""),
    "s": ("seconds", ".0f"),
    "commit": ("commit", ""),
}

Measure = Callable[[nn.Module], dict[str, float]]


# The language model --------------------------------------------------------------------------------------------------


def windows(ids: Tensor) -> Tensor:
    """Cut tokens into rows of one window each."""
    count = len(ids) // WINDOW
    return ids[: count * WINDOW].view(count, WINDOW)


@torch.inference_mode()
def compare(model: nn.Module, dense: nn.Module, rows: Tensor) -> tuple[float, float]:
    """Compute the perplexity of all tokens but the first of each window, and the mean KL(dense || model) in nats."""
    likelihood, apart = 0.0, 0.0
    for ids in rows.split(16):
        found, wanted = (m(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for m in (model, dense))
        likelihood += found[:, :-1].gather(-1, ids[:, 1:, None]).double().sum().item()
        apart += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
    return math.exp(-likelihood / rows[:, 1:].numel()), apart / rows.numel()


def read_windows(args: argparse.Namespace, split: str) -> Tensor:
    """Read the windows of the tokens of a split."""
    return windows(torch.from_numpy(np.load(args.data / f"{split}.tok512.npy").astype(np.int64)))


def batched(rows: Tensor) -> list[dict[str, Tensor]]:
    """Return batches of four windows."""
    return [{"input_ids": ids} for ids in rows.split(4)]


def stories(args: argparse.Namespace) -> tuple[nn.Module, list[Any], Measure, dict[str, Any]]:
    """Load the language model, its batches and its measure."""
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    valid = read_windows(args, "valid")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(args.model)
    other = windows(torch.tensor(tokenizer(args.off.read_text(encoding="utf-8")[:40000])["input_ids"]))
    batches = batched(read_windows(args, "train")[:256])

    def measure(found: nn.Module) -> dict[str, float]:
        (on, divergence_on), (off, divergence_off) = (compare(found, model, text) for text in (valid, other))
        return {"on": on, "off": off, "divergence_on": divergence_on, "divergence_off": divergence_off}

    return model, batches, measure, {}


# The sentence encoder ------------------------------------------------------------------------------------------------


def minilm(args: argparse.Namespace) -> tuple[nn.Module, list[Any], Measure, dict[str, Any]]:
    """Load the encoder, its batches and its measure."""
    path = model_path(args.model)
    model: nn.Module = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    limit = length(256, model)
    texts = docstring_sentences(800)
    calibration, unseen = texts[:300], texts[300:]
    if args.calibrate == "stsb":
        calibration = list(dict.fromkeys(read_stsb(args.data / "sts-train.csv")[1]))[:400]
    batches = [inputs for _, inputs in tokenise(tokenizer, calibration, limit, 8)]
    dev = Stsb(args.data / "sts-dev.csv", tokenizer, limit)
    held_out = tokenise(tokenizer, unseen, limit)
    wanted = embed(model, held_out), embed(model, dev.batches)

    def measure(found: nn.Module) -> dict[str, float]:
        ours, dev_ours = embed(found, held_out), embed(found, dev.batches)
        cosines = [(a * b).sum(-1).mean().item() for a, b in zip((ours, dev_ours), wanted, strict=True)]
        return {"docstrings": cosines[0], "stsb": cosines[1], "task": dev.spearman(dev_ours)}

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return pooled(model(**batch), batch["attention_mask"])

    return model, batches, measure, {"forward": forward}


# The run -------------------------------------------------------------------------------------------------------------


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark on these two models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("stories", "minilm"))
    parser.add_argument("--model", help="folder (or hub id); minilm: default the one of the PyPI package")
    parser.add_argument("--data", required=True, type=Path, help="folder of the tokens, or of STS-B")
    parser.add_argument("--off", type=Path, help="stories: a text of another kind")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--calibrate", choices=("docstrings", "stsb"), default="docstrings")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, *AFTER, ALONE], default=list(STAGES)[:10])
    parser.add_argument("--heal-lr", type=float, default=3e-3, help="peak learning rate of the rows that heal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder of the models of all stages, one for each ratio")
    args = parser.parse_args(argv)
    for stage in {*AFTER, ALONE}.intersection(args.stages):
        if ALL not in args.stages[: args.stages.index(stage)]:
            parser.error(f"{stage!r} goes on from, or takes as long as, {ALL!r}; give that stage before it")
    if MORE in args.stages and args.kind != "stories":
        parser.error(f"{MORE!r} is a stage of stories, which has more text than it calibrates on")
    plain = [stage == PLAIN for stage in args.stages]
    if any(plain) if structlin.kernels.available() else not all(plain):
        parser.error(f"the stage {PLAIN!r}, and no other, runs without the native kernel (STRUCTLIN_KERNELS=off)")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dense, batches, measure, options = (stories if args.kind == "stories" else minilm)(args)
    name = f"ladder_{args.kind}"
    about = environment(argv)
    calibrated = "stories" if args.kind == "stories" else args.calibrate
    common = {"calibrated": calibrated, "seed": args.seed, **about}
    rows = [{"ratio": 1.0, "stage": "dense", "kept": 1.0, **common, "seed": 0, **measure(dense)}]
    for ratio in args.ratios:
        refined: tuple[nn.Module, Any, float] | None = None
        for stage in args.stages:
            say(f"{stage} at {ratio}")
            data: dict[str, Any] = {} if stage == SVD else {"calibration": batches}
            if stage == KNOWN:
                learned = [batch for number, batch in enumerate(batches) if number % 10 != 5]
                known = structlin.collect_statistics(dense, learned, loss=sampled_loss, output="auto", **options)
                data = {"calibration": known, "validation": batches[5::10]}
            start = time.perf_counter()
            if stage in AFTER:
                assert refined is not None
                model, report, limit = copy.deepcopy(refined[0]), refined[1], 120.0
                start -= refined[2]
            else:
                model = copy.deepcopy(dense)
                structure, settings = STAGES[UNITS if stage == ALONE else stage]
                report = structlin.compress_model(
                    model, structure, ratio=ratio, seed=args.seed, progress=False, **data, **options, **settings,
                )  # fmt: skip
            if stage == ALL:
                refined = model, report, time.perf_counter() - start
                if args.save is not None:
                    structlin.save(model, args.save / str(ratio))
            elif stage == ALONE:
                assert refined is not None
                limit = sum(block.seconds for block in refined[1].blocks)
            if stage in (*AFTER, ALONE):
                texts: Sequence[Any] = batches
                if stage == COPIES:
                    texts = widened(batches, args.seed, vocabulary_of(dense), few=False)
                elif stage == MORE:
                    texts = batched(read_windows(args, "train"))
                structlin.heal(model, dense, texts, seconds=limit, lr=args.heal_lr, progress=False, **options)
            seconds = time.perf_counter() - start
            others = ("output layer", "tied", "embedding")
            body = [row for row in report.layers if not any(word in str(row.reason) for word in others)]
            before, after = (sum(getattr(row, f"parameters_{when}") for row in body) for when in ("before", "after"))
            row = {
                "ratio": ratio,
                "stage": stage,
                "kept": after / before,
                "seconds": seconds,
                **common,
                **measure(model),
            }
            rows.append(row)
            say(json.dumps({key: value for key, value in row.items() if key not in about}))
            save(args.results, name, rows, about)
    return 0


def save(folder: Path, name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put rows into the table, in the place of those of the same cell."""

    def cell(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("calibrated", "ratio", "stage", "seed"))

    path = folder / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    found = {cell(row): row for row in known} | {cell(row): row for row in rows}
    order = ["dense", *STAGES, *AFTER, ALONE]
    ordered = sorted(found.values(), key=lambda r: (r["calibrated"], -r["ratio"], order.index(r["stage"]), r["seed"]))
    store(folder, name, f"Ladder of stages: {name.removeprefix('ladder_')}", NOTES, about, ordered, COLUMNS)
    path.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")  # each with its own command


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
