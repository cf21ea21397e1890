"""Bytes against quality: dense and compressed models in bf16, int8 and int4, and int4 with a structure beside it.

    python benchmarks/quantized.py stories --model stories260k --data tinystories --off tinyshakespeare/valid.txt
    python benchmarks/quantized.py minilm --data stsb

`stories`: model, texts and measures of ladder.py. `minilm`: calibrated on 300 docstring sentences; cosine to the dense
embeddings on 300 others, rank correlation on the first 500 pairs of STS-B dev.
Compressions: low rank at each ratio, calibrated (whitened SVD), with --epochs passes of block refinement; and models
of all stages that ladder.py wrote (--compressed). With torchao installed (--torchao) its weight-only
configs are rows too. Stores results/quantized_<model>.jsonl and .md.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from ladder import OFF, parser_of, stories
from torch import Tensor, nn

import structlin
from structlin.compress.output import last_target
from structlin.compress.targets import find_targets
from structlin.layers.factored import Factored
from structlin.structures import Kaleidoscope, LowRank

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _minilm import docstring_sentences, embed, length, model_path, pooled, read_stsb, spearman, tokenise
from _results import environment, say, store

COLUMNS = {
    "model": ("model", ""),
    "format": ("format", ""),
    "KiB, linears": ("kib", ",.1f"),
    "bytes / dense bf16": ("share", ".3f"),
    "perplexity, on": ("on", ".3f"),
    "perplexity, off": ("off", ".1f"),
    "cosine, docstrings": ("docstrings", ".4f"),
    "STS-B dev": ("task", ".4f"),
    "loss": ("loss", ".4f"),
    "loss added": ("added", "+.2%"),
    "s": ("seconds", ".0f"),
}
NOTES = """\
*KiB, linears*: the linear weights but the output layer, as stored, with scales; biases and embeddings are not counted.
Scales and unquantised factors are bf16; all models compute in float32. int8 has a scale a row, int4 (and int8 rows
with one large entry) one for {group} entries. *loss*: {loss}. *loss added*: by the integers, relative to the loss of
the same compression in bf16. Low rank: whitened SVD{refined}. *all stages*: the defaults, from ladder.py.
`int4 + LowRank`: the dense weights in int4, what rounding lost fitted by a structure in int8. *s*: to compress (or to
read the compressed model), or to quantise.

{verdict}"""

Row = dict[str, Any]


def weights_of(dense: nn.Module) -> dict[str, int]:
    """Return the entries of each linear weight of a dense model but the output layer."""
    targets = find_targets(dense)
    last = last_target(dense, targets)
    chosen = (t for t in targets if t is not last and t.reason is None and not t.on_request)
    return {target.name: target.linear.weight.numel() for target in chosen}


def bytes_of(model: nn.Module, weights: Iterable[str]) -> int:
    """Count the bytes of weights, structured or dense; compression may have taken units out of dense ones."""
    found = (model.get_submodule(name) for name in weights)
    return sum(m.nbytes if isinstance(m, Factored) else m.weight.nbytes for m in found)


BEST = "all stages"
WEIGHTS: dict[str, int] = {}  # of the dense model: name -> entries


def row_of(name: str, form: str, model: nn.Module, measure: Callable[[nn.Module], Row], seconds: float = 0.0) -> Row:
    """Measure a model stored as it is: merged and computed in float32."""
    size = bytes_of(model, WEIGHTS)
    merged = structlin.to_dense_(copy.deepcopy(model)).float()
    row = {
        "model": name,
        "format": form,
        "kib": size / 2**10,
        "share": size / (2 * sum(WEIGHTS.values())),
        "seconds": seconds,
    }
    return row | measure(merged)


def loss_of(row: Row, dense: Row) -> float:
    """Perplexity in nats per token above the dense model, or 1 - cosine."""
    if "on" in row:
        return torch.log(torch.tensor(row["on"] / dense["on"], dtype=torch.float64)).item()
    return float(1 - row["docstrings"])


def minilm(args: Any) -> tuple[nn.Module, list[Any], Callable[[nn.Module], Row], Row]:
    """Load the encoder, its batches and its measure."""
    path = model_path(args.model)
    model: nn.Module = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    limit, texts = length(128, model), docstring_sentences(600)
    batches = [inputs for _, inputs in tokenise(tokenizer, texts[:300], limit, 8)]
    held_out = tokenise(tokenizer, texts[300:], limit)
    scores, first, second = (part[:500] for part in read_stsb(args.data / "sts-dev.csv"))
    pairs = tokenise(tokenizer, [*first, *second], limit)
    wanted = embed(model, held_out)

    def measure(found: nn.Module) -> Row:
        left, right = embed(found, pairs).chunk(2)
        return {
            "docstrings": (embed(found, held_out) * wanted).sum(-1).mean().item(),
            "task": spearman((left * right).sum(-1), scores),
        }

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return pooled(model(**batch), batch["attention_mask"])

    return model, batches, measure, {"forward": forward}


# The models ----------------------------------------------------------------------------------------------------------


PLANS: dict[str, tuple[str, Any]] = {
    "int8": ("int8", True),
    "int4": ("int4", True),
    "int4 + LowRank(8)": ("int4", LowRank(rank=8)),
    "int4 + LowRank(32)": ("int4", LowRank(rank=32)),
    "int4 + Kaleidoscope": ("int4", Kaleidoscope()),
}


def dense_rows(dense: nn.Module, measure: Any, statistics: Any, text: str, group: int) -> Iterator[Row]:
    """The dense model in one format, perhaps with a structure for what int4 lost."""
    half, start = copy.deepcopy(dense).bfloat16(), time.perf_counter()
    if text == "float32":
        half = copy.deepcopy(dense)
    elif text in PLANS:
        to, extra = PLANS[text]
        structlin.quantize_(half, to, group=group, dense=extra, statistics=statistics)
    yield row_of("dense", text, half, measure, time.perf_counter() - start)


def torchao_rows(dense: nn.Module, measure: Any, group: int) -> Iterator[Row]:
    """The dense model by torchao's weight-only configs."""
    ao = importlib.import_module("torchao.quantization")
    # torchao holds the codes of its int4 in int8 on a CPU, which is not counted here.
    int4 = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(group))
    for text, config, size in (
        ("int8, torchao", ao.Int8WeightOnlyConfig(), lambda o, i: o * i + 2 * o),
        ("int4, torchao", int4, lambda o, i: o * i / 2 + 2 * o * i / group),
    ):
        model = copy.deepcopy(dense).bfloat16()
        names, start = set(WEIGHTS), time.perf_counter()
        shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ao.quantize_(model, config, filter_fn=lambda module, name, names=names: name in names)
            seconds = time.perf_counter() - start
            for name in names:
                linear = model.get_submodule(name)
                linear.weight = nn.Parameter(linear.weight.dequantize().detach(), requires_grad=False)
        except Exception as error:  # a shape that it does not take, say
            say(f"    {text}: {type(error).__name__}: {error}")
            continue
        bytes_ = sum(size(*shape) for shape in shapes)
        row = row_of("dense", text, model, measure, seconds)
        yield row | {"kib": bytes_ / 2**10, "share": bytes_ / sum(2 * o * i for o, i in shapes)}


def low_rank(dense: nn.Module, batches: Any, ratio: float, epochs: int, options: Any) -> nn.Module:
    """Compress by the whitened SVD, refined for so many passes."""
    settings = OFF | {"block_epochs": epochs}
    return structlin.compress_model(
        copy.deepcopy(dense), "lowrank", ratio=ratio, calibration=batches, progress=False, **settings, **options
    ).model


def compressed_rows(name: str, make: Callable[[], nn.Module], measure: Any, batches: Any, group: int) -> Iterator[Row]:
    """A compressed model in every format."""
    start = time.perf_counter()
    model = make()
    half = copy.deepcopy(model).bfloat16()
    yield row_of(name, "bf16", half, measure, time.perf_counter() - start)
    statistics = structlin.collect_statistics(model, batches)
    for to in ("int8", "int4"):
        quantised, start = copy.deepcopy(half), time.perf_counter()
        structlin.quantize_(quantised, to, group=group, statistics=statistics, dense=True)
        yield row_of(name, to, quantised, measure, time.perf_counter() - start)


# The run -------------------------------------------------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """Compare with dense int8 and int4 at their bytes: ours are the rows with a structure."""
    lines = []
    ours = [row for row in rows if row["model"] != "dense" or "+" in row["format"]]
    for row in rows:
        if row["model"] != "dense" or not row["format"].startswith("int") or "+" in row["format"]:
            continue
        near = [other for other in ours if other["kib"] <= 1.02 * row["kib"]]
        if not near:
            lines.append(f"- Nothing of ours has as few bytes as dense {row['format']}.")
            continue
        best = min(near, key=lambda other: other["loss"])
        word = "beats" if best["loss"] < row["loss"] else "loses to"
        lines.append(
            f"- At most the bytes of dense {row['format']} ({row['kib']:,.1f} KiB, loss {row['loss']:.4f}): our best, "
            f"{best['model']} in {best['format']} ({best['kib']:,.1f} KiB, loss {best['loss']:.4f}), {word} it."
        )
    return "\n".join(lines)


def complete(rows: list[Row]) -> None:
    """Add the losses to the rows; the dense float32 row is the reference, and bf16 that of a compression."""
    dense = next(row for row in rows if row["format"] == "float32")
    plain = {row["model"]: loss_of(row, dense) for row in rows if row["format"] == "bf16"}
    for row in rows:
        row["loss"] = loss_of(row, dense)
        if row["model"] != "dense":
            row["added"] = row["loss"] / plain[row["model"]] - 1


def main(argv: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of block refinement of the compressions")
    parser.add_argument("--group", type=int, default=128, help="entries that share an int4 scale")
    parser.add_argument("--torchao", action="store_true", help="rows of torchao, which must be installed")
    parser.add_argument("--compressed", nargs="+", type=Path, default=[], help="folders that ladder.py --save wrote")
    parser.add_argument("--only", nargs="+", help="formats or ratios to run; other rows of an earlier run are kept")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dense, batches, measure, options = (stories if args.kind == "stories" else minilm)(args)
    WEIGHTS.update(weights_of(dense))
    statistics = structlin.collect_statistics(dense, batches)
    about = {"block epochs": args.epochs, "group": args.group, **environment(argv)}
    tasks: dict[str, Callable[[], Iterator[Row]]] = {
        text: partial(dense_rows, dense, measure, statistics, text, args.group) for text in ("float32", "bf16", *PLANS)
    }
    if args.torchao:
        tasks["torchao"] = partial(torchao_rows, dense, measure, args.group)
    makers = {str(r): partial(low_rank, dense, batches, r, args.epochs, options) for r in args.ratios}
    for folder in args.compressed:
        makers[f"{BEST}, {folder.name}"] = partial(structlin.load, copy.deepcopy(dense), folder)
    for part, make in makers.items():
        name = part if part.startswith(BEST) else f"lowrank, {part}"
        tasks[part] = partial(compressed_rows, name, make, measure, batches, args.group)
    chosen = [name for name in tasks if args.only is None or name in args.only]
    path = args.results / f"quantized_{args.kind}.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    ratios = ["0.75", "0.5", "0.25"]
    order = ["float32", "bf16", *PLANS, "torchao", *ratios, *(f"{BEST}, {ratio}" for ratio in ratios)]
    rows = [row for row in known if args.only is not None and row["part"] not in chosen]
    loss = "log of perplexity / dense" if args.kind == "stories" else "1 - cosine on the docstrings"
    refined = f", and {args.epochs} passes of block refinement" if args.epochs else ""
    for name in chosen:
        for row in tasks[name]():
            rows.append({**row, **about, "part": name})
            say(str(row))
            rows.sort(key=lambda row: order.index(row["part"]))
            complete(rows)
            notes = NOTES.format(group=args.group, loss=loss, refined=refined, verdict=verdict(rows))
            store(args.results, path.stem, f"Bytes against quality: {args.kind}", notes, about, rows, COLUMNS)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(text, encoding="utf-8")  # each with its own command
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
