"""Which structure when: the Pareto fronts of all that was measured, from the stored results.

    pip install "structlin[recipes]"
    python recipes/which_structure.py                 # reads benchmarks/results
    python recipes/which_structure.py --read FOLDER   # or other results
    python recipes/which_structure.py --quick         # the smallest set only

Nothing is trained or timed here. Each model has its loss and its parameters from its own results; FLOPs and times at 1
and 512 tokens are those of the layer benchmarks (speed_*.jsonl) for the same structure at a size within a quarter, the
median over the layers. What cannot be read, and what was never timed, is listed.
Stores benchmarks/results/which_structure.jsonl and .md, and draws docs/figures/which_structure (SVG and PNG).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _figures import FIGURES, STYLES, draw, legend, panels, style
from _results import RESULTS, environment, say, store

from structlin.fitting.budget import NoMemberError, within
from structlin.layers.linear import build
from structlin.structures import families, family

Row = dict[str, Any]
Unread = defaultdict[str, Counter[str]]  # reason: file: rows

LAYER = 384  # features in and out of the layer whose FLOPs stand for others
NEAR = 1.25  # a layer this much larger or smaller stands for another
SPEED = ("compressors", "simple", "kronecker", "butterfly", "tt")
AXES = {
    "kept": "parameters / dense", "flops": "FLOPs / dense", "time_1": "time of 1 token / dense",
    "time_512": "time of 512 tokens / dense",
}  # fmt: skip
COLUMNS = {
    "model": ("model", ""), "structure": ("structure", ""), "loss": ("loss", ".4f"), "kept": ("kept", ".3g"),
    "FLOPs": ("flops", ".3g"), "time, 1 token": ("time_1", ".2f"), "512 tokens": ("time_512", ".2f"),
    "on the front of": ("fronts", ""),
}  # fmt: skip
NOTES = """\
Rows that no other of the same model beats in both the loss and the size in the last column, dense included. *kept*,
*FLOPs*, *time*: shares of dense. FLOPs that a result does not hold are those of the largest such structure with as many
parameters on a layer of {layer} x {layer}. Times are medians over the measured layers of the same structure, of any
shape, whose parameters are within a factor of {near}: one thread, float32, inference. Losses of different models do not
compare, and some fits took far more time than others.

{winners}

*loss*: {losses}.

Read: {read}.

Not timed near their size, so absent from the fronts of time: {untimed}.

Not read: {unread}."""

ALIASES = {
    "svd": "lowrank", "whitened svd": "lowrank", "low rank": "lowrank", "nn.lstm": "dense", "matrix rank": "lowrank",
    "+ refinement": "auto", "+ allocation": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """How one set of results is read.

    Args:
        files: pattern of the files' names, without .jsonl.
        model: what was measured; a row of panels.
        loss_name: of the loss, for the axis.
        loss: makes the loss of a row, lower is better.
        structure: key of the structure's name.
        kept: key of parameters / dense parameters, or of the parameters where the file has a dense row.
        flops: key of FLOPs / dense FLOPs, where they were counted.
    """

    files: str
    model: str
    loss_name: str
    loss: Callable[[Row], float]
    structure: str = "structure"
    kept: str = "kept"
    flops: str | None = None


NATS = "loss, nats"
OUTPUT = "relative output error"
COSINE = "1 - cosine of embeddings"
ERROR = "test error"
SOURCES = (
    Source("minilm_compression*", "MiniLM, weights alone", COSINE, lambda row: 1 - row["cosine"], flops="flops_ratio"),
    Source("minilm_calibrated*", "MiniLM, calibrated", COSINE, lambda row: 1 - row["cosine"], "method"),
    Source("ladder_minilm", "MiniLM, all stages", COSINE, lambda row: 1 - row["docstrings"], "stage"),
    Source("fits_weighted", "MiniLM, single weights", OUTPUT, lambda row: row["weighted error"], kept="weighted kept"),
    Source("structures_tried", "MiniLM, one weight", OUTPUT, lambda row: row["error"]),
    Source("stories260k", "stories260k, healed", NATS, lambda row: math.log(row.get("healed") or row["perplexity"])),
    Source("ladder_stories", "stories260k, all stages", NATS, lambda row: math.log(row["on"]), "stage"),
    Source("lora_stories", "stories260k, with adapters", NATS, lambda row: math.log(row["adapted"])),
    Source("training", "small language model, from scratch", NATS, lambda row: row["loss"], kept="parameters"),
    Source("train_digits", "digits, from scratch", ERROR, lambda row: 1 - row["accuracy"], kept="parameters"),
    Source("finetune_digits", "digits, fine-tuned", ERROR, lambda row: 1 - row["finetuned"]),
    Source("cnn_*", "convolutions, fine-tuned", ERROR, lambda row: 1 - row["tuned"]),
    Source("lstm_digits", "LSTM on spoken digits", ERROR, lambda row: 1 - row["accuracy"], "map", "parameters"),
    Source("tensorizing_digits", "digits, first layer", ERROR, lambda row: row["error"] / 100, "layer", "parameters"),
    Source("tensorizing_mnist", "MNIST, first layer", ERROR, lambda row: row["error"] / 100, "layer", "parameters"),
    Source("kronecker_shapeshifter_*", "digits, 1050 x 1050", ERROR, lambda row: 1 - row["scratch"], kept="parameters"),
)  # fmt: skip
QUICK = ("digits, from scratch",)


# Reading ---------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def name_of(text: str) -> str | None:
    """Reduce a name or a printed structure to one of the palette's, or to a sum of two; None if it is neither."""
    while text != (text := re.sub(r"\([^()]*\)", "", text)):
        pass
    text = text.strip().lower().partition(",")[0].strip()
    text = ALIASES.get(text, text).replace(" ", "")
    return text if text and all(part in STYLES for part in text.split("+")) else None


def read(source: Source, folder: Path, unread: Unread) -> Iterator[Row]:
    """Read the rows of a source; count those that name no structure, no size or no loss."""
    for path in sorted(folder.glob(f"{source.files}.jsonl")):
        rows = lines(path)
        full = next((row.get(source.kept) for row in rows if name_of(str(row.get(source.structure))) == "dense"), None)
        for row in rows:
            structure = name_of(str(row.get(source.structure)))
            dense = structure == "dense"
            kept = row.get(source.kept)
            if structure is None:
                unread[f"no single structure ({row.get(source.structure)})"][path.stem] += 1
            elif kept is None and not dense:
                unread["no size"][path.stem] += 1
            else:
                try:
                    loss = source.loss(row)
                except (KeyError, TypeError):
                    unread["no loss"][path.stem] += 1
                    continue
                share = 1.0 if dense else kept / full if source.kept == "parameters" else kept
                flops = 1.0 if dense else row.get(source.flops) if source.flops else None
                yield {"model": source.model, "structure": structure, "loss": loss, "kept": share, "flops": flops,
                       "file": path.stem}  # fmt: skip


def timings(folder: Path) -> list[Row]:
    """Read the layer benchmarks: structure, parameters and time as shares of dense."""
    rows = []
    for path in (folder / f"speed_{suite}.jsonl" for suite in SPEED):
        for row in lines(path) if path.exists() else ():
            structure = name_of(row["structure"])
            if structure and row["library"] == "structlin" and row["mode"] == "inference" and row["cell_threads"] == 1:
                share = {"kept": row["parameters_ratio"], f"time_{row['tokens']}": row["ratio"]}
                rows.append({"structure": structure, **share})
    return rows


@cache
def flops_of(structure: str, kept: float) -> float | None:
    """FLOPs / dense FLOPs of the largest member of a family within a share of the parameters; None without one."""
    if structure not in families():
        return None
    try:
        members = within(family(structure), LAYER, LAYER, kept)
    except NoMemberError:
        return None
    largest = max(members, key=lambda member: member.spec(LAYER, LAYER).num_parameters)
    return build(largest, LAYER, LAYER, device="meta").flops_per_token / (2 * LAYER**2)


def add_speed(row: Row, timed: Sequence[Row]) -> None:
    """Set FLOPs and times of a row; None where they are not known."""
    if row["structure"] == "dense":
        row |= {"flops": 1.0, "time_1": 1.0, "time_512": 1.0}
        return
    row["flops"] = row["flops"] or flops_of(row["structure"], float(f"{row['kept']:.3g}"))
    near = [one for one in timed if one["structure"] == row["structure"]
            and abs(math.log(one["kept"] / row["kept"])) <= math.log(NEAR)]  # fmt: skip
    for key in ("time_1", "time_512"):
        values = [one[key] for one in near if key in one]
        row[key] = statistics.median(values) if values else None


def front(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the rows that no other beats in both this size and the loss, small ones first."""
    best, found = math.inf, []
    for row in sorted((row for row in rows if row[key] is not None), key=lambda row: (row[key], row["loss"])):
        if row["loss"] < best:
            best = row["loss"]
            found.append(row)
    return found


# Showing ---------------------------------------------------------------------------------------------------------


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["model"] == name] for name in dict.fromkeys(row["model"] for row in rows)}


def counted(files: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(files.items()))


def untimed(rows: Sequence[Row]) -> str:
    """Name the structures without a time, and between which sizes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["time_1"] is None or row["time_512"] is None:
            found.setdefault(row["structure"], []).append(row["kept"])
    return ", ".join(f"{name} ({min(kept):.2g} to {max(kept):.2g})" for name, kept in sorted(found.items()))


def winners(rows: Sequence[Row]) -> str:
    """For each size, say on the fronts of how many models each structure is; dense is left out."""
    models = by_model(rows)
    texts = []
    for key, title in AXES.items():
        count = Counter(name for found in models.values() for name in {row["structure"] for row in front(found, key)})
        del count["dense"]
        order = sorted(count.items(), key=lambda item: (-item[1], item[0]))
        texts.append(f"- {title.removesuffix(' / dense')}: {', '.join(f'{name} {n}' for name, n in order)}")
    return "\n".join([f"Fronts that each structure is on, of {len(models)} models:", "", *texts])


def picture(models: dict[str, list[Row]], names: dict[str, str], folder: Path) -> None:
    """Draw loss against each size, one row of panels for each model; the front is a thin black line of steps."""
    figure, axes = panels(len(AXES), len(models), width=2.5, height=1.9)
    for line, (model, rows) in zip(axes, models.items(), strict=True):
        for axis, key in zip(line, AXES, strict=True):
            steps = front(rows, key)
            axis.step([row[key] for row in steps], [row["loss"] for row in steps], where="post", color="black", lw=0.7)
            for row in rows:
                if row["structure"] == "dense":
                    axis.axhline(row["loss"], label="dense", **style("dense"))
                elif row[key] is not None:
                    name = "sum of several" if "+" in row["structure"] else row["structure"]
                    axis.plot(row[key], row["loss"], label=name, **style(row["structure"]) | {"linestyle": ""})
        line[0].set_ylabel(f"{model}\n{names[model]}")
    for column, (key, title) in zip(axes.T, AXES.items(), strict=True):
        sizes = [row[key] for rows in models.values() for row in rows if row[key] is not None]
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
            axis.set_xlim(0.85 * min(sizes), 1.2 * max(sizes))
            axis.xaxis.set_major_formatter("{x:g}")
        column[-1].set_xlabel(title)
    legend(figure, axes)
    draw(figure, "which_structure", folder)


def collect(args: argparse.Namespace) -> tuple[list[Row], Unread]:
    """Read every source, and note the files that none of them reads."""
    unread: Unread = defaultdict(Counter)
    sources = [source for source in SOURCES if not args.quick or source.model in QUICK]
    rows = [row for source in sources for row in read(source, args.read, unread)]
    timed = timings(args.read)
    for row in rows:
        add_speed(row, timed)
    seen = {row["file"] for row in rows} | {f"speed_{suite}" for suite in SPEED}
    for path in sorted(args.read.glob("*.jsonl")):
        if path.stem not in seen and not path.stem.startswith("which_structure"):
            other = "times of other settings" if path.stem.startswith("speed_") else "no loss of structures by size"
            unread[other][path.stem] += len(lines(path))
    return rows, unread


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--panels", type=int, default=4, help="models drawn: those with the most structures")
    parser.add_argument("--quick", action="store_true", help="the digits only")
    parser.add_argument("--threads", type=int, default=1, help="for the record: nothing is computed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    rows, unread = collect(args)
    if not rows:
        sys.exit(f"{args.read} holds no results that this recipe reads; run other recipes first, or give --read")
    models = by_model(rows)
    for members in models.values():
        for key in AXES:
            for row in front(members, key):
                row["fronts"] = ", ".join(filter(None, (row.get("fronts"), key.replace("_", " "))))
    names = {source.model: source.loss_name for source in SOURCES}
    losses = {loss: [model for model in models if names[model] == loss] for loss in map(names.get, models)}
    notes = NOTES.format(
        near=NEAR, layer=LAYER, losses="; ".join(f"{loss} ({', '.join(found)})" for loss, found in losses.items()),
        read=counted(Counter(row["file"] for row in rows)), untimed=untimed(rows) or "none", winners=winners(rows),
        unread="; ".join(f"{reason}: {counted(files)}" for reason, files in sorted(unread.items())) or "nothing",
    )  # fmt: skip
    best = [row for row in rows if "fronts" in row]
    store(args.results, "which_structure", "Which structure when", notes, about, best, COLUMNS)
    print(winners(rows))
    say("Not read: " + notes.rpartition("Not read: ")[2])
    most = sorted(models, key=lambda model: -len({row["structure"] for row in models[model]}))[: args.panels]
    picture({model: found for model, found in models.items() if model in most}, names, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
