"""Mix the channels of a ShuffleNet by a shuffle, by Hadamard's matrix, or by a learned K-matrix, at three widths.

    pip install "structlin[recipes]"
    python recipes/channel_shuffle.py                     # scikit-learn's digits, 8 x 8
    python recipes/channel_shuffle.py --data FOLDER       # MNIST (train-*, t10k-even-*), pooled to 16 x 16
    python recipes/channel_shuffle.py --quick             # a tiny run, for a test

A unit is ShuffleNet's: a grouped convolution of 1 x 1, the mixing of channels, a depth-wise convolution of 3 x 3, a
second grouped convolution, all around a shortcut. Grouped convolutions never leave their group, so without mixing the
groups are separate networks. Beside the three: no mixing, and a dense matrix. Stores
benchmarks/results/shuffle_<data>.jsonl and .md, draws docs/figures/shuffle_<data>.svg and .png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _digits import Data, accuracy, train
from _figures import draw, legend, panels, style
from _findings import conclude, options
from _results import environment, say
from learn_permutation import load
from torch import Tensor, nn

from structlin import KMatrix, exact

GROUPS = 8
COLUMNS = {
    "mixing": ("mixing", ""), "channels": ("channels", ""), "test accuracy": ("accuracy", ".4f"),
    "lowest": ("lowest", ".4f"), "highest": ("highest", ".4f"), "parameters": ("parameters", ","),
    "of the mixing": ("mixed", ","), "training, s": ("seconds", ".1f"),
}  # fmt: skip
NOTES = """\
{train} training and {test} test images of {side} x {side} pixels; {units} units of {groups} groups behind a convolution
of 3 x 3, AdamW, {epochs} epochs. *test accuracy*: mean over {seeds} seeds, with the lowest and the highest. The
K-matrix is that of radix 2, as in the paper, and starts at random, the dense matrix too. The paper (Dao et al. 2020)
trains whole ShuffleNets of three widths on ImageNet for many epochs; this is a small network of small images."""
STYLES = {"none": "identity", "shuffle": "sparse", "Hadamard": "fft", "K-matrix": "kmatrix", "dense": "dense"}


class Mixed(nn.Module):
    """Apply a linear map to the channels of images (batch, channels, height, width)."""

    def __init__(self, channel_map: nn.Module) -> None:
        super().__init__()
        self.map = channel_map

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.movedim(1, -1)).movedim(-1, 1)


def mixings(channels: int) -> dict[str, Callable[[], nn.Module]]:
    """Return makers of the mixing of channels, the fixed ones without parameters."""
    return {
        "none": nn.Identity,
        "shuffle": lambda: nn.ChannelShuffle(GROUPS),
        "Hadamard": lambda: Mixed(hadamard(channels)),
        "K-matrix": lambda: Mixed(KMatrix(channels, channels, bias=False, radix=2)),
        "dense": lambda: Mixed(nn.Linear(channels, channels, bias=False)),
    }


def hadamard(channels: int) -> nn.Module:
    """Return Hadamard's matrix of orthonormal rows, fixed."""
    layer = nn.Linear(channels, channels, bias=False).requires_grad_(False)
    layer.weight.data = exact.hadamard(channels).to_dense().detach() / channels**0.5
    return layer


class Unit(nn.Module):
    """ShuffleNet's unit with a mixing of the caller's choice, around a shortcut."""

    def __init__(self, channels: int, mixing: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 1, groups=GROUPS, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            mixing,
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 1, groups=GROUPS, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


def network(channels: int, units: int, make: Callable[[], nn.Module]) -> nn.Sequential:
    """Stack units behind a convolution; images are halved before and after the first unit."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        Unit(channels, make()), nn.MaxPool2d(2), *(Unit(channels, make()) for _ in range(units - 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


def run(args: argparse.Namespace, training: Data, test: Data) -> list[dict[str, Any]]:
    """Train every mixing at every width for all seeds."""
    rows = []
    for channels in args.channels:
        for name, make in mixings(channels).items():
            found, times = [], []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = network(channels, args.units, make)
                start = time.perf_counter()
                train(model, training, args.epochs, 3e-3)
                times.append(time.perf_counter() - start)
                found.append(accuracy(model, test))
            rows.append({
                "mixing": name, "channels": channels, "accuracy": statistics.mean(found), "lowest": min(found),
                "highest": max(found), "seconds": statistics.median(times),
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "mixed": args.units * sum(p.numel() for p in make().parameters() if p.requires_grad),
            })  # fmt: skip
            say(f"{name}, {channels} channels: {found}, {times[-1]:.1f} s")
    return rows


def findings(rows: Sequence[dict[str, Any]]) -> str:
    """Judge the paper's claim at each width by mean accuracies."""
    mean = {(row["mixing"], row["channels"]): row["accuracy"] for row in rows}
    widths = sorted({row["channels"] for row in rows})
    lines = []
    for other in ("shuffle", "Hadamard", "dense"):
        gains = [100 * (mean["K-matrix", width] - mean[other, width]) for width in widths]
        better = sum(gain > 0 for gain in gains)
        word = "confirmed" if better == len(widths) else "refuted" if better == 0 else "confirmed in part"
        points = ", ".join(f"{gain:+.1f} at {width}" for gain, width in zip(gains, widths, strict=True))
        lines.append(
            f"- A K-matrix beats {other} at equal width: {word}, at {better} of {len(widths)} ({points} points)."
        )
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """Draw accuracy by width and by parameters."""
    figure, axes = panels(2)
    for axis, key, label in ((axes[0, 0], "channels", "channels"), (axes[0, 1], "parameters", "parameters")):
        for mixing, look in STYLES.items():
            chosen = [row for row in rows if row["mixing"] == mixing]
            x, y = [row[key] for row in chosen], [100 * row["accuracy"] for row in chosen]
            axis.plot(x, y, label=mixing, **style(look))
            axis.vlines(x, [100 * r["lowest"] for r in chosen], [100 * r["highest"] for r in chosen],
                        color=style(look)["color"], linewidth=0.8)  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel("test accuracy, %")
    widths = sorted({row["channels"] for row in rows})
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(widths, [str(width) for width in widths])
    legend(figure, axes)
    draw(figure, name, folder)


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of MNIST; scikit-learn's digits without it")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64], help="powers of two from 16")
    parser.add_argument("--units", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000, help="training images of MNIST")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    if args.quick:
        args.channels, args.units, args.epochs, args.seeds = [16], 2, 2, 1
    training, test = load(args.data, args.images)
    rows = run(args, training, test)
    notes, verdict = NOTES.format(
        train=len(training[1]), test=len(test[1]), side=training[0].shape[-1], units=args.units, groups=GROUPS,
        epochs=args.epochs, seeds=args.seeds,
    ), findings(rows)  # fmt: skip
    name = f"shuffle_{'digits' if args.data is None else 'mnist'}"
    conclude(args.results, name, "Channel shuffle against K-matrix", notes, verdict, about, rows, COLUMNS)
    if not args.quick:
        picture(rows, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
