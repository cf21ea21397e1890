"""Tensorizing Neural Networks (Novikov et al. 2015), run again: tensor trains against low rank, on handwritten digits.

    pip install "structlin[recipes]"
    python recipes/tensorizing.py                          # scikit-learn's digits, 8 x 8, enlarged to 32 x 32
    python recipes/tensorizing.py --mnist FOLDER           # MNIST (train-*, t10k-even-*, idx files by gzip), padded
    python recipes/tensorizing.py --quick                  # a few seconds, tiny layers

(a) Figure 1 of the source: test error of a network 1024 - 1024 - 10 against the parameters of its first layer, which is
a tensor train of five shapes or a low rank ("matrix rank" there). (b) Table 2: a layer of VGG's size, 25,088 x 4,096,
as tensor trains of ranks 1, 2 and 4 and as matrices of rank 1, 5 and 50. (c) Table 3: time and memory of that layer at
1 and 100 images, by benchmarks/vgg_layer.py. Every layer is drawn from scratch.
Stores benchmarks/results/tensorizing_<data>, tensorizing_vgg_<data> and tensorizing_time (jsonl and md), and draws
docs/figures/tensorizing_<data> (SVG and PNG).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import Data, accuracy, digits, train
from _figures import draw, legend, panels, style
from _findings import conclude, options, settle
from _results import ROOT, environment, say, store
from compress_cnn import read
from torch import nn

from structlin.equation.structure import Structure
from structlin.layers.linear import build
from structlin.structures import LowRank, TensorTrain

sys.path.append(str(ROOT / "benchmarks"))  # scripts, not a package

import vgg_layer

Row = dict[str, Any]

DENSE, MATRIX = "dense", "matrix rank"
Shapes = dict[str, tuple[int, ...]]
# The source finds that shapes in the middle beat many tiny modes, and too few large ones.
BALANCED: Shapes = {"4 x 8 x 8 x 4": (4, 8, 8, 4), "4^5": (4,) * 5}
EXTREME: Shapes = {"2 x 2 x 8 x 8 x 2 x 2": (2, 2, 8, 8, 2, 2), "2^10": (2,) * 10, "32 x 32": (32, 32)}
SMALL_BALANCED: Shapes = {"4^3": (4,) * 3}
SMALL_EXTREME: Shapes = {"2^6": (2,) * 6, "8 x 8": (8, 8)}
MARKS = ("D", "-"), ("o", "-"), ("s", ":"), ("^", "--"), ("P", "-.")
TICKS = 1, 2, 5, 10, 20, 50, 100  # percent
RATES = 1e-3, 3e-3, 1e-2

COLUMNS = {
    "first layer": ("layer", ""), "modes": ("shape", ""), "parameters": ("parameters", ","),
    "test error, %": ("error", ".2f"), "lowest": ("lowest", ".2f"), "highest": ("highest", ".2f"),
    "learning rate": ("rate", "g"),
}  # fmt: skip
VGG_COLUMNS = {
    "layer": ("layer", ""), "parameters": ("parameters", ","), "compression": ("compression", ",.0f"),
    "test error, %": ("error", ".2f"), "lowest": ("lowest", ".2f"), "highest": ("highest", ".2f"),
    "epochs": ("epochs", ""), "learning rate": ("rate", "g"),
}  # fmt: skip
NOTES = """\
{data}: {train} training and {test} test images, {side} x {side}, one hidden layer of {n}, ReLU, AdamW, {epochs} epochs.
Mean, lowest and highest test error of {seeds} seeds; *parameters*: of the first layer without its bias. The largest
uniform rank within each size. Learning rate: for each shape, of {rates} the best on every fifth training image at its
largest size. The source trains on all of MNIST, by stochastic gradient descent."""
VGG_NOTES = """\
{data}: {train} training and {test} test images, random projection to {inputs:,} features, ReLU (in place of VGG's
convolutions on ImageNet), the layer, ReLU, ten classes; AdamW, mean, lowest and highest of {seeds} seeds. Modes and
ranks of the source; *compression*: dense parameters / parameters, without bias. The dense layer has fewer epochs, for
its time, and its learning rate is not searched."""


# Data and networks -----------------------------------------------------------------------------------------------


def load(mnist: Path | None, count: int, side: int = 32) -> tuple[Data, Data]:
    """Return flat images (n, side^2) for training and testing: digits enlarged, or MNIST padded and pooled."""
    if mnist is None:
        parts = [(F.interpolate(x.view(-1, 1, 8, 8), size=side, mode="bilinear"), y) for x, y in digits()]
    else:
        (images, labels), (test, wanted) = read(mnist)
        pairs = ((images[:count], labels[:count]), (test, wanted))
        parts = [(F.adaptive_avg_pool2d(F.pad(x, (2, 2, 2, 2)), side), y) for x, y in pairs]
    (images, labels), (test, wanted) = parts
    return (images.flatten(1), labels), (test.flatten(1), wanted)


def within(modes: tuple[int, ...], budget: int) -> TensorTrain | None:
    """Return the square tensor train of the largest uniform rank with at most so many parameters."""
    n, found = math.prod(modes), None
    for rank in range(1, n):
        member = TensorTrain(rank=rank, in_modes=modes, out_modes=modes).resolve(n, n)
        if member.spec(n, n).num_parameters > budget:
            break
        found = member
    return found


def families(sizes: Sequence[int], n: int, shapes: Shapes) -> Iterator[tuple[str, list[Structure | None]]]:
    """Name each family and its members, small ones first; None is dense."""
    yield DENSE, [None]
    yield MATRIX, [LowRank(rank=size // (2 * n)) for size in sizes if size >= 2 * n]
    for shape, modes in shapes.items():
        yield shape, [member for size in sizes if (member := within(modes, size))]


def layer(structure: Structure | None, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs) if structure is None else build(structure, inputs, outputs)


def network(structure: Structure | None, n: int) -> nn.Module:
    """Build the network of figure 1."""
    return nn.Sequential(layer(structure, n, n), nn.ReLU(), nn.Linear(n, 10))


def weights(module: nn.Module) -> int:
    """Count the parameters without the bias."""
    return sum(p.numel() for name, p in module.named_parameters() if name != "bias")


def search(make: Callable[[], nn.Module], data: Data, epochs: int) -> float:
    """Return the learning rate with the fewest errors on every fifth training image."""
    images, labels = data
    held = torch.arange(len(labels)) % 5 == 0
    found = {}
    for rate in RATES:
        torch.manual_seed(0)
        model = make()
        train(model, (images[~held], labels[~held]), epochs, rate)
        found[rate] = accuracy(model, (images[held], labels[held]))
    return max(found, key=lambda rate: found[rate])


def errors(make: Callable[[], nn.Module], training: Data, test: Data, epochs: int, rate: float, seeds: int) -> Row:
    """Train once per seed: test errors in percent, their mean, lowest and highest."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = make()
        train(model, training, epochs, rate)
        found.append(100 * (1 - accuracy(model, test)))
    return {"errors": found, "error": statistics.mean(found), "lowest": min(found), "highest": max(found)}


# The experiments -------------------------------------------------------------------------------------------------


def first_layer(args: argparse.Namespace, training: Data, test: Data) -> list[Row]:
    """(a) The test error against the parameters of the first layer."""
    n, rows = training[0].shape[1], []
    for family, members in families(args.sizes, n, args.balanced | args.extreme):
        rate = search(partial(network, members[-1], n), training, args.epochs)
        for structure in members:
            make = partial(network, structure, n)
            count = weights(make()[0])
            rows.append({
                "layer": "dense" if structure is None else structure.name, "shape": family, "parameters": count,
                "size": next((size for size in args.sizes if count <= size), None), "rate": rate,
                "structure": "Linear" if structure is None else str(structure),
                **errors(make, training, test, args.epochs, rate, args.seeds),
            })  # fmt: skip
            say(f"{family}, {count:,} parameters: {rows[-1]['error']:.2f} %")
    return rows


def large_layer(args: argparse.Namespace, training: Data, test: Data) -> list[Row]:
    """(b) A layer of VGG's size behind a random projection."""
    in_modes, out_modes = args.modes
    inputs, outputs = math.prod(in_modes), math.prod(out_modes)
    kinds: dict[str, Structure | None] = {"dense": None}
    kinds |= {f"TT{r}": TensorTrain(rank=r, in_modes=in_modes, out_modes=out_modes) for r in (4, 2, 1)}
    kinds |= {f"MR{r}": LowRank(rank=r) for r in (50, 5, 1)}
    pixels = training[0].shape[1]
    front = nn.Linear(pixels, inputs, bias=False).requires_grad_(False)
    nn.init.normal_(front.weight, std=2 / pixels**0.5, generator=torch.Generator().manual_seed(0))

    def make(structure: Structure | None) -> nn.Module:
        return nn.Sequential(front, nn.ReLU(), layer(structure, inputs, outputs), nn.ReLU(), nn.Linear(outputs, 10))

    rows = []
    for kind, structure in kinds.items():
        if structure is None:
            count, epochs, rate = inputs * outputs, args.dense_epochs, 1e-4
        else:
            count, epochs = weights(layer(structure, inputs, outputs)), args.vgg_epochs
            rate = search(partial(make, structure), training, epochs)
        rows.append({
            "layer": kind, "parameters": count, "compression": inputs * outputs / count, "inputs": inputs,
            "epochs": epochs, "rate": rate,
            **errors(partial(make, structure), training, test, epochs, rate, args.seeds),
        })  # fmt: skip
        say(f"{kind}: {rows[-1]['error']:.2f} %")
    return rows


def times(args: argparse.Namespace) -> list[Row]:
    """(c) Time and memory of that layer; in a quick run the time of a small one."""
    if args.quick:
        return vgg_layer.measure({"dense": nn.Linear(112, 64), "tt": build(TensorTrain(rank=4), 112, 64)}, 1)
    rows = vgg_layer.measure({kind: vgg_layer.layer(kind).eval() for kind in ("dense", "tt")}, args.rounds)
    for row in rows:
        for images in vgg_layer.IMAGES:
            row[f"memory_{images}"] = vgg_layer.memory_of_fresh_process(row["layer"], images)
    return rows


# What it shows ---------------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row], balanced: Shapes, extreme: Shapes) -> str:
    """Settle the source's two claims on figure 1."""
    found = {(row["shape"], row["size"]): row for row in rows}
    sizes = sorted({row["size"] for row in rows if row["size"]})
    ranks = []
    for size in sizes:
        trains = [found[shape, size] for shape in balanced | extreme if (shape, size) in found]
        if trains and (MATRIX, size) in found:
            worst = max(trains, key=lambda row: row["error"])
            ranks.append((f"{size:,} parameters", worst["errors"], found[MATRIX, size]["errors"]))
    shapes = []
    for other in extreme:
        common = [size for size in sizes if all((shape, size) in found for shape in (*balanced, other))]
        middle = [e for shape in balanced for size in common for e in found[shape, size]["errors"]]
        shapes.append((other, middle, [e for size in common for e in found[other, size]["errors"]]))
    return "\n".join([
        settle("every tensor train (the worst is shown) has a lower test error than the matrix rank, %", ranks),
        settle(f"{' and '.join(balanced)} have a lower test error, %, than other shapes (over all sizes)", shapes),
    ])  # fmt: skip


def vgg_findings(rows: Sequence[Row]) -> str:
    """Settle the claim on table 2: a tensor train of fewer parameters beats every low rank."""
    found = {row["layer"]: row["errors"] for row in rows}
    cases = [(f"TT{t}, MR{m}", found[f"TT{t}"], found[f"MR{m}"]) for t in (1, 2, 4) for m in (1, 5, 50)]
    return settle("tensor trains beat the matrix rank with fewer parameters (test error, %)", cases)


def points(axis: Any, rows: Sequence[Row], x: str, label: str | None, **looks: Any) -> None:
    """Draw mean errors with a bar from the lowest to the highest."""
    low, high = ([abs(row["error"] - row[key]) for row in rows] for key in ("lowest", "highest"))
    axis.errorbar([row[x] for row in rows], [row["error"] for row in rows], [low, high], label=label,
                  elinewidth=0.8, **looks)  # fmt: skip


def draw_first(axis: Any, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Draw test error against the parameters of the first layer."""
    points(axis, [row for row in rows if row["shape"] == MATRIX], "parameters", MATRIX, **style("lowrank"))
    for shape, (marker, line) in zip(args.balanced | args.extreme, MARKS, strict=False):
        looks = style("tt") | {"marker": marker, "linestyle": line}
        looks |= {"markerfacecolor": "white"} if shape in args.extreme else {}
        points(axis, [row for row in rows if row["shape"] == shape], "parameters", f"TT {shape}", **looks)
    dense = next(row for row in rows if row["shape"] == DENSE)
    axis.axhline(dense["error"], label="dense", **style("dense"))
    axis.set(
        xscale="log", xlabel="parameters of the first layer", title=f"a layer of {dense['parameters']:,} parameters"
    )
    axis.set_xticks(args.sizes, labels=[f"{size:,}" for size in args.sizes])


def draw_large(axis: Any, rows: Sequence[Row]) -> None:
    """Draw test error against the compression of the large layer."""
    for kind, structure in (("TT", "tt"), ("MR", "lowrank")):
        members = [row for row in rows if row["layer"].startswith(kind)]
        points(axis, members, "compression", None, **style(structure))
        for row in members:
            axis.annotate(row["layer"], (row["compression"], row["error"]), xytext=(5, 5), textcoords="offset points")
    axis.axhline(rows[0]["error"], **style("dense"))
    axis.set(
        xscale="log", xlabel="compression of the layer, times", title=f"a layer of {rows[0]['parameters']:,} parameters"
    )


def picture(name: str, rows: Sequence[Row], vgg: Sequence[Row], args: argparse.Namespace) -> None:
    """Draw one panel for each of the two experiments."""
    figure, axes = panels(2 if vgg else 1, width=4.8)
    draw_first(axes[0][0], rows, args)
    if vgg:
        draw_large(axes[0][1], vgg)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.set_yticks(TICKS, labels=map(str, TICKS))
        axis.minorticks_off()
        axis.set(ylim=(0.8 * min(row["lowest"] for row in (*rows, *vgg)), 150), ylabel="test error, %")
    legend(figure, axes)
    draw(figure, name, args.figures)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; scikit-learn's digits without it")
    parser.add_argument("--images", type=int, default=6000, help="training images of MNIST")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="parameters")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=True, help="the layer of VGG's size")
    parser.add_argument("--vgg-images", type=int, default=1347, help="training images of the large layer")
    parser.add_argument("--vgg-epochs", type=int, default=5)
    parser.add_argument("--dense-epochs", type=int, default=2, help="of the large dense layer, two seconds a step")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    args = parser.parse_args(argv)
    args.balanced, args.extreme, args.modes = BALANCED, EXTREME, (vgg_layer.IN_MODES, vgg_layer.OUT_MODES)
    if args.quick:
        args.sizes, args.epochs, args.vgg_epochs, args.dense_epochs = [128, 256], 2, 2, 2
        args.balanced, args.extreme, args.modes = SMALL_BALANCED, SMALL_EXTREME, ((2, 7, 8), (4, 4, 4))
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    training, test = load(args.mnist, args.images, 8 if args.quick else 32)
    some = (training[0][: args.vgg_images], training[1][: args.vgg_images])
    rows, vgg = first_layer(args, training, test), large_layer(args, some, test) if args.large else []
    name, data = ("digits", "Scikit-learn's digits, enlarged") if args.mnist is None else ("mnist", "MNIST, padded")
    claims = findings(rows, args.balanced, args.extreme)
    facts = {"data": data, "test": len(test[1]), "epochs": args.epochs, "seeds": args.seeds,
             "rates": ", ".join(map(str, RATES)), "n": training[0].shape[1],
             "side": math.isqrt(training[0].shape[1])}  # fmt: skip
    notes = NOTES.format(train=len(training[1]), **facts)
    title = "A first layer as a tensor train"
    conclude(args.results, f"tensorizing_{name}", title, notes, claims, about, rows, COLUMNS)
    if vgg:
        notes = VGG_NOTES.format(train=len(some[1]), inputs=vgg[0]["inputs"], **facts)
        title = "A layer of VGG's size"
        conclude(args.results, f"tensorizing_vgg_{name}", title, notes, vgg_findings(vgg), about, vgg, VGG_COLUMNS)
    if vgg and args.mnist is None:  # the data do not matter
        title = "Time and memory of a layer of VGG's size"
        store(args.results, "tensorizing_time", title, vgg_layer.NOTES, about, times(args), vgg_layer.COLUMNS)
    picture(f"tensorizing_{name}", rows, vgg, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
