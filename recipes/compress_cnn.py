"""Compress the convolutions of a trained network by tensor train, CP, Tucker and low rank, then fine-tune them.

    pip install "structlin[recipes]"
    python recipes/compress_cnn.py                       # scikit-learn's digits, 8 x 8
    python recipes/compress_cnn.py --data FOLDER         # MNIST: train-* and t10k-even-*, idx files by gzip

A small network is trained on handwritten digits; `compress_model` replaces its convolutions, calibrated on a few
batches of training images; the compressed network is trained on for a third of the epochs. Stores
benchmarks/results/cnn_<data>.jsonl (one line per structure) and .md (the table).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _digits import Data, accuracy, digits, train
from _results import RESULTS, environment, say, store
from torch import Tensor, nn

import structlin

COLUMNS = {
    "structure": ("structure", ""), "kept": ("kept", ".3f"), "compressed": ("compressed", ".4f"),
    "fine-tuned": ("tuned", ".4f"), "compression, s": ("seconds", ".1f"), "time, 64 images": ("batch", ".2f"),
    "time, 1 image": ("single", ".2f"), "second convolution": ("layer", ""),
}  # fmt: skip
NOTES = """\
Three convolutions of 3 x 3 (32, 64 and 128 channels) and a linear layer. *kept*: parameters / dense parameters of the
convolutions. *compressed*, *fine-tuned*: test accuracy; row `dense` is the trained network, and the same network
trained on as long. *time*: of a forward pass of the whole network, as a share of the dense network's in the same run,
medians of alternated calls."""
BATCHES, ROUNDS = 10, 15


def read(data: Path) -> tuple[Data, Data]:
    """Read MNIST's training images and the test images of even index, in 0..1."""

    def idx(name: str, head: int) -> Tensor:
        content = bytearray(gzip.decompress((data / f"{name}.gz").read_bytes()))
        return torch.frombuffer(content, dtype=torch.uint8, offset=head)

    def part(prefix: str) -> Data:
        images = idx(f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28).float() / 255
        return images, idx(f"{prefix}-labels-idx1-ubyte", 8).long()

    return part("train"), part("t10k-even")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 128, 10),
    )  # fmt: skip


@torch.inference_mode()
def ratio(found: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Return the median time of a call as a share of the dense network's."""

    def seconds(model: nn.Module) -> float:
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start

    pairs = [(seconds(found), seconds(dense)) for _ in range(ROUNDS + 2)][2:]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def measure(
    name: str,
    dense: nn.Module,
    training: Data,
    test: Data,
    args: argparse.Namespace,
    retrain: Callable[[nn.Module], None],
) -> dict[str, object]:
    model, row = copy.deepcopy(dense), {"structure": name, "kept": 1.0, "layer": "Conv2d"}
    if name != "dense":
        images = training[0][: 64 * BATCHES].split(64)
        start = time.perf_counter()
        # The output layer stays dense; so does the first convolution, of 288 parameters.
        structlin.compress_model(model, name, ratio=args.ratio, rules={"0": None}, calibration=images, progress=False)
        kept = sum(p.numel() for k in (0, 3, 6) for n, p in model[k].named_parameters() if not n.endswith("bias"))
        row |= {
            "seconds": time.perf_counter() - start, "layer": str(model[3].linear.structure),
            "kept": kept / sum(dense[k].weight.numel() for k in (0, 3, 6)),
        }  # fmt: skip
    row |= {"compressed": accuracy(model, test), "batch": ratio(model, dense, test[0][:64]),
            "single": ratio(model, dense, test[0][:1])}  # fmt: skip
    retrain(model)
    return row | {"tuned": accuracy(model, test)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MNIST; without it, scikit-learn's digits")
    parser.add_argument("--structures", nargs="+", default=["cp", "tucker", "tt", "lowrank", "auto"])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=20000, help="of MNIST, to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    if args.data is None:
        training, test = ((images.reshape(-1, 1, 8, 8), labels) for images, labels in digits())
    else:
        training, test = read(args.data)
        training = tuple(part[: args.images] for part in training)
    torch.manual_seed(0)
    dense = network()
    train(dense, training, args.epochs, args.learning_rate)
    dense.eval()
    rows = []

    def further(model: nn.Module) -> None:
        train(model, training, -(-args.epochs // 3), args.learning_rate / 4)

    for name in ("dense", *args.structures):
        torch.manual_seed(1)
        rows.append(measure(name, dense, training, test, args, further))
        say(f"{name}: {rows[-1]['compressed']:.4f}, fine-tuned {rows[-1]['tuned']:.4f}")
    title = "Convolutions compressed to a quarter" if args.ratio == 0.25 else f"Convolutions compressed to {args.ratio}"
    store(args.results, f"cnn_{'digits' if args.data is None else 'mnist'}", title, NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
