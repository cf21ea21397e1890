"""Permuted images: learn the order of the pixels, or any linear map, in front of a convolutional network.

    pip install "structlin[recipes]"
    python recipes/learn_permutation.py                       # scikit-learn's digits, 8 x 8
    python recipes/learn_permutation.py --data FOLDER         # MNIST (train-*, t10k-even-*), pooled to 16 x 16

The pixels of all images are in one random order. A permutation is learned from the training images alone, without
labels: neighbours shall be alike, as they are in images. For a random order P the expected unlikeness is
sum_ab A_ab (P D P^T)_ab, A the pairs of neighbours and D = 1 - the correlation of two pixels. The best of a few starts
is hardened, and a convolutional network is trained behind it. Beside it: networks on the permuted and on the original
images, and networks whose first layer is a dense matrix or a K-matrix, trained with the rest.
Stores benchmarks/results/permuted_<data>.jsonl and .md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _digits import Data, accuracy, digits, train
from _results import RESULTS, environment, say, store
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
convolutions of 3 x 3 and a linear layer, *FC*: two linear layers. *learned permutation*: from unlabelled training
images, before the network is trained. *neighbours found*: share of the neighbouring pixels behind it that are
neighbours in the original image. Accuracy: mean over the seeds, with the lowest and the highest."""


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


def network(front: nn.Module, side: int, convolutional: bool = True) -> nn.Sequential:
    """Put a small network behind a map of the pixels."""
    n = side * side
    if not convolutional:
        return nn.Sequential(front, nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        front, nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * n, 10),
    )  # fmt: skip


def run(args: argparse.Namespace, training: Data, test: Data) -> list[dict[str, object]]:
    """Train every network once per seed."""
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
        plain: list[tuple[str, str, nn.Module, bool]] = [
            ("CNN", "original", nn.Identity(), True), ("CNN", "permuted", nn.Identity(), True),
            ("FC", "permuted", nn.Identity(), False), ("learned permutation + CNN", "permuted", hardened, True),
            ("dense + CNN", "permuted", nn.Linear(n, n, bias=False), True),
            ("K-matrix + CNN", "permuted", KMatrix(n, n, bias=False), True),
        ]  # fmt: skip
        for name, pixels, front, convolutional in plain:
            seen = torch.arange(n) if pixels == "original" else shuffle
            torch.manual_seed(seed)
            start = time.perf_counter()
            model = network(front, side, convolutional)
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
    rows: list[dict[str, object]] = []
    for (name, pixels), runs in found.items():
        values = [row["accuracy"] for row in runs]
        rows.append({
            "network": name, "pixels": pixels, "accuracy": statistics.mean(values), "lowest": min(values),
            "highest": max(values), "front": int(runs[0]["front"]),
            "found": statistics.mean(row["found"] for row in runs) if "found" in runs[0] else None,
            "seconds": statistics.median(row["seconds"] for row in runs),
        })  # fmt: skip
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MNIST; scikit-learn's digits without it")
    parser.add_argument("--images", type=int, default=4000, help="training images of MNIST")
    parser.add_argument("--steps", type=int, default=2000, help="of the learned permutation")
    parser.add_argument("--starts", type=int, default=4, help="of which the best is taken")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    training, test = load(args.data, args.images)
    rows = run(args, training, test)
    notes = NOTES.format(train=len(training[1]), test=len(test[1]), side=training[0].shape[-1])
    name = "permuted_" + ("digits" if args.data is None else "mnist")
    store(args.results, name, "Permuted images", notes, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
