"""Permuted images: learn the order of the pixels, or any linear map, in front of a convolutional network.

    pip install "structlin[recipes]"
    python recipes/learn_permutation.py                       # scikit-learn's digits, 8 x 8
    python recipes/learn_permutation.py --data FOLDER         # MNIST (train-*, t10k-even-*), pooled to 16 x 16
    python recipes/learn_permutation.py --quick               # a tiny run, for a test

The pixels of all images are in one random order. A permutation is learned from the training images alone, without
labels: neighbours shall be alike, as they are in images. For a random order P the expected unlikeness is
sum_ab A_ab (P D P^T)_ab, A the pairs of neighbours and D = 1 - the correlation of two pixels. The best of a few starts
is hardened, and a convolutional network is trained behind it. Beside it: networks on the permuted and on the original
images, and networks whose first layer is a dense matrix or a K-matrix, trained with the rest. Stores
benchmarks/results/permuted_<data>.jsonl and .md, draws docs/figures/permuted_<data>.svg and .png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import Data, accuracy, digits, train
from _figures import draw, panels, style
from _findings import conclude, options
from _results import environment, say
from compress_cnn import read
from torch import Tensor, nn

from structlin import KMatrix, LearnedPermutation, exact

COLUMNS = {
    "network": ("network", ""), "pixels": ("pixels", ""), "test accuracy": ("accuracy", ".4f"),
    "lowest": ("lowest", ".4f"), "highest": ("highest", ".4f"), "parameters in front": ("front", ","),
    "neighbours found": ("found", ".2f"), "s": ("seconds", ".0f"),
}  # fmt: skip
NOTES = """\
{train} training and {test} test images of {side} x {side} pixels, in one random order for each seed. *CNN*: two
convolutions of 3 x 3 and a linear layer, *FC*: two linear layers, *RNN*: an LSTM that reads the image row by row.
*learned permutation*: from unlabelled training images, before the network is trained. *neighbours found*: share of the
neighbouring pixels behind it that are neighbours in the original image. Accuracy: mean over the seeds, with the lowest
and the highest. The paper (Dao et al. 2020) permutes CIFAR-10 and calls the learned permutation in front of a ResNet
K + CNN; here the images are small and grey, and *K-matrix + CNN* is a free K-matrix trained by the labels."""


def load(folder: Path | None, count: int) -> tuple[Data, Data]:
    """Return images (n, 1, side, side), a power of two on each side, for training and testing."""
    if folder is None:
        (images, labels), test = digits()
        return (images.unflatten(1, (1, 8, 8)), labels), (test[0].unflatten(1, (1, 8, 8)), test[1])
    (images, labels), (test, wanted) = read(folder)
    return tuple(
        (F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 2), y) for x, y in ((images[:count], labels[:count]), (test, wanted))
    )  # type: ignore[return-value]


def neighbours(side: int) -> Tensor:
    """Return A, (n, n): 1 for each pair of neighbouring places."""
    places = torch.arange(side * side).view(side, side)
    found = torch.zeros(side * side, side * side)
    for first, second in ((places[:, 1:], places[:, :-1]), (places[1:], places[:-1])):
        found[first.flatten(), second.flatten()] = 1
    return found + found.mT


def learn(images: Tensor, steps: int, starts: int) -> LearnedPermutation:
    """Learn an order of pixels (count, n) in which neighbours are alike; keep the best of several starts."""
    n = images.shape[1]
    pairs = neighbours(int(n**0.5))
    levels = (images - images.mean(0)) / (images.std(0) + 0.05)
    unlike = 1 - levels.mT @ levels / len(levels)

    def cost(layer: LearnedPermutation) -> Tensor:
        mixed = layer.to_dense()
        return (pairs * (mixed @ unlike @ mixed.mT)).sum()

    found = []
    for _ in range(starts):
        layer = LearnedPermutation(n)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for step in range(steps):
            layer.temperature = 0.05 ** (step / steps)
            optimizer.zero_grad()
            cost(layer).backward()
            optimizer.step()
        found.append(layer.eval())
    return min(found, key=lambda layer: cost(layer).item())


def together(places: Tensor) -> float:
    """Return the share of neighbouring pixels that come from neighbouring places of the original image."""
    pairs = neighbours(int(len(places) ** 0.5))
    return (pairs * pairs[places][:, places]).sum().item() / pairs.sum().item()


class Rows(nn.Module):
    """An LSTM over the rows of an image, and a linear layer on its last output."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.lstm, self.head = side, nn.LSTM(side, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (self.side, self.side)))[0][:, -1])


def network(front: nn.Module, side: int, kind: str = "CNN") -> nn.Sequential:
    """Put a small network (CNN, FC or RNN) behind a map of the pixels."""
    n = side * side
    if kind == "RNN":
        return nn.Sequential(front, Rows(side))
    if kind == "FC":
        return nn.Sequential(front, nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        front, nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * n, 10),
    )  # fmt: skip


def run(args: argparse.Namespace, training: Data, test: Data) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Train every network once per seed; return rows, and the random and the learned order of the first seed."""
    side = training[0].shape[-1]
    n = side * side
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        shuffle = torch.randperm(n)
        (original, labels), (unseen, wanted) = ((x.flatten(1), y) for x, y in (training, test))
        start = time.perf_counter()
        learned = learn(original[:, shuffle], args.steps, args.starts)
        seconds = time.perf_counter() - start
        hardened = exact.permutation(learned.order()).requires_grad_(False)
        if seed == 0:
            orders = shuffle, learned.order()
        plain: list[tuple[str, str, nn.Module]] = [
            ("CNN", "original", nn.Identity()), ("CNN", "permuted", nn.Identity()),
            ("FC", "permuted", nn.Identity()), ("RNN", "permuted", nn.Identity()),
            ("learned permutation + CNN", "permuted", hardened),
            ("dense + CNN", "permuted", nn.Linear(n, n, bias=False)),
            ("K-matrix + CNN", "permuted", KMatrix(n, n, bias=False)),
        ]  # fmt: skip
        for name, pixels, front in plain:
            seen = torch.arange(n) if pixels == "original" else shuffle
            torch.manual_seed(seed)
            start = time.perf_counter()
            model = network(front, side, name.split()[-1])
            train(model, (original[:, seen], labels), args.epochs, 2e-3)
            took = time.perf_counter() - start
            row = {
                "accuracy": accuracy(model, (unseen[:, seen], wanted)),
                "front": sum(p.numel() for p in front.parameters())
                if "learned" not in name
                else learned.logits.numel(),
                "seconds": took + (seconds if "learned" in name else 0),
            }
            if front is hardened:
                row["found"] = together(shuffle[learned.order()])
            found.setdefault((name, pixels), []).append(row)
            say(f"{name}, {pixels}, seed {seed}: {row}")
    rows: list[dict[str, Any]] = []
    for (name, pixels), runs in found.items():
        values = [row["accuracy"] for row in runs]
        rows.append({
            "network": name, "pixels": pixels, "accuracy": statistics.mean(values), "lowest": min(values),
            "highest": max(values), "front": int(runs[0]["front"]),
            "found": statistics.mean(row["found"] for row in runs) if "found" in runs[0] else None,
            "seconds": statistics.median(row["seconds"] for row in runs),
        })  # fmt: skip
    return rows, *orders


def findings(rows: Sequence[dict[str, Any]]) -> str:
    """Judge the paper's claims: what part of the accuracy that permuting costs a CNN comes back."""
    mean = {(row["network"], row["pixels"]): row["accuracy"] for row in rows}
    permuted, lost = mean["CNN", "permuted"], mean["CNN", "original"] - mean["CNN", "permuted"]
    lines = [f"- Permuting costs the CNN {100 * lost:.1f} points."]
    for name in ("K-matrix + CNN", "learned permutation + CNN", "dense + CNN"):
        back = mean[name, "permuted"] - permuted
        word = "confirmed" if lost > 0 and back > lost / 2 else "refuted"
        lines.append(f"- {name} recovers most of it: {word} ({100 * back:+.1f} points).")
    return "\n".join(lines)


def picture(
    rows: Sequence[dict[str, Any]], image: Tensor, shuffle: Tensor, order: Tensor, name: str, folder: Path
) -> None:
    """Draw the accuracies, and an image before and after the random and the learned order, with their product."""
    figure, axes = panels(5, width=2.6, height=2.8)
    bars, *shown = axes[0]
    colours = {"K-matrix + CNN": "kmatrix", "dense + CNN": "dense", "learned permutation + CNN": "monarch"}
    for k, row in enumerate(reversed(rows)):
        look = style(colours[row["network"]]) if row["network"] in colours else {"color": "#555555", "marker": "o"}
        middle = 100 * row["accuracy"]
        spread = [[middle - 100 * row["lowest"]], [100 * row["highest"] - middle]]
        bars.errorbar(middle, k, xerr=spread, color=look["color"], marker=look["marker"] or "s", markersize=5)
    bars.set_yticks(range(len(rows)), [f"{r['network']}, {r['pixels']}" for r in reversed(rows)], fontsize=8)
    bars.set_xlabel("test accuracy, %")
    side = int(len(order) ** 0.5)
    restored = shuffle[order]
    titles = {"original": image, "permuted": image[shuffle], "learned order": image[restored]}
    for axis, (title, pixels) in zip(shown, titles.items(), strict=False):
        axis.imshow(pixels.view(side, side).numpy(), cmap="gray_r")
        axis.set_title(title, fontsize=9)
    shown[3].imshow(torch.eye(len(order))[restored].numpy(), cmap="gray_r")
    shown[3].set_title("learned x random permutation", fontsize=9)
    for axis in shown:
        axis.grid(False)
        axis.set_xticks([])
        axis.set_yticks([])
    draw(figure, name, folder)


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder of MNIST; scikit-learn's digits without it")
    parser.add_argument("--images", type=int, default=4000, help="training images of MNIST")
    parser.add_argument("--steps", type=int, default=2000, help="of the learned permutation")
    parser.add_argument("--starts", type=int, default=4, help="of which the best is taken")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    if args.quick:
        args.steps, args.starts, args.epochs, args.seeds = 100, 1, 3, 1
    training, test = load(args.data, args.images)
    rows, shuffle, order = run(args, training, test)
    notes = NOTES.format(train=len(training[1]), test=len(test[1]), side=training[0].shape[-1])
    name = "permuted_" + ("digits" if args.data is None else "mnist")
    verdict = findings(rows)
    conclude(args.results, name, "Permuted images", notes, verdict, about, rows, COLUMNS)
    if not args.quick:
        picture(rows, test[0][0].flatten(), shuffle, order, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
