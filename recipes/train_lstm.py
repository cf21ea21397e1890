"""Train an LSTM on spoken digits, dense and with structured maps of the inputs, and measure one for inputs of 57,600.

    pip install "structlin[recipes]"
    python recipes/train_lstm.py --data recordings.zip         # WAV files {digit}_{speaker}_{index}.wav (FSDD)
    python recipes/train_lstm.py                               # the measurement only

Training: log spectrograms, eight frames of 128 bins to a step (1,024 numbers), one LSTM layer, the mean of its outputs
into ten classes. Recordings of the three lowest indices are the test set. Measurement: input 57,600 (a video frame of
160 x 120 x 3), hidden 256, as in Yang, Krompass & Tresp 2017. Stores benchmarks/results/lstm_digits.jsonl and .md,
lstm_video.jsonl and .md.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
import wave
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _results import RESULTS, environment, say, store
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from structlin import StructuredLSTM, param_groups
from structlin.equation.structure import Structure
from structlin.structures import Kronecker, LowRank, Monarch, TensorTrain

Rows = list[tuple[Tensor, int]]  # sequence (time, features), label

BINS, FRAMES = 128, 8  # of a step
HIDDEN = 128
DIGITS: dict[str, Structure | None] = {
    "nn.LSTM": None,
    "tt, three cores": TensorTrain(rank=8, in_modes=(8, 16, 8), out_modes=(8, 8, 8)),
    "tt, two cores": TensorTrain(rank=16, in_modes=(32, 32), out_modes=(16, 32)),
    "kronecker": Kronecker(terms=8),
    "monarch": Monarch(blocks=16),
    "lowrank": LowRank(rank=16),
}
# The tensor train of the paper's size, whose first core holds the four gates.
VIDEO: dict[str, Structure | None] = {
    "nn.LSTM": None,
    "tt": TensorTrain(rank=4, in_modes=(8, 20, 20, 18), out_modes=(16, 2, 2, 16)),
    "tt, paper's modes": TensorTrain(rank=4, in_modes=(8, 20, 20, 18), out_modes=(16, 4, 4, 4)),
    "lowrank": LowRank(rank=1),
}
DIGIT_COLUMNS = {
    "input map": ("map", ""), "its parameters": ("parameters", ","), "test accuracy": ("accuracy", ".4f"),
    "lowest": ("lowest", ".4f"), "highest": ("highest", ".4f"), "training, s": ("seconds", ".1f"),
}  # fmt: skip
VIDEO_COLUMNS = {
    "input map": ("map", ""), "its parameters": ("parameters", ","), "parameters, MB": ("megabytes", ".2f"),
    "forward": ("forward", ".3f"), "forward and backward": ("both", ".3f"),
}  # fmt: skip
DIGIT_NOTES = """\
Spoken digits, {train} recordings for training and {test} for testing, AdamW with `param_groups`, equal epochs; *test
accuracy*: mean over the seeds, with the lowest and the highest. The maps from the hidden state are dense. *training*:
median of a run."""
VIDEO_NOTES = """\
Input 57,600, hidden 256, six steps of a batch of 16. *forward*, *forward and backward*: time of a call as a share of
`nn.LSTM`'s in the same run, medians of alternated calls."""


def read(path: Path) -> tuple[Rows, Rows]:
    """Read the recordings: steps (time, 1024) and the digit, for training and for testing."""
    parts: dict[int, Rows] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".wav"):
                continue
            digit, _, index = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as sound:
                samples = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16)
            parts.setdefault(int(index), []).append((steps(samples.float() / 2**15), int(digit)))
    lowest = sorted(parts)[:3]
    test = [row for index in lowest for row in parts[index]]
    return [row for index, rows in sorted(parts.items()) if index not in lowest for row in rows], test


def steps(samples: Tensor) -> Tensor:
    window = torch.hann_window(2 * BINS)
    spectrum = torch.stft(samples, 2 * BINS, BINS // 2, window=window, return_complex=True).abs()[:BINS].mT
    logs = (spectrum + 1e-3).log()
    logs = (logs - logs.mean()) / logs.std()
    return F.pad(logs, (0, 0, 0, -len(logs) % FRAMES)).reshape(-1, FRAMES * BINS)


class Classifier(nn.Module):
    """A recurrent layer, the mean of its outputs, and a linear layer."""

    def __init__(self, layer: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(int(layer.hidden_size), classes)  # type: ignore[arg-type]

    def forward(self, recordings: Sequence[Tensor]) -> Tensor:
        y, lengths = pad_packed_sequence(self.layer(pack_sequence(list(recordings), enforce_sorted=False))[0])
        return self.head(y.sum(0) / lengths.unsqueeze(1))


def train(
    model: Classifier, rows: Rows, epochs: int, groups: Sequence[dict[str, Any]] | None = None, noise: float = 0.1
) -> None:  # fmt: skip
    """Train by AdamW with a cosine schedule, with `param_groups` where no groups are given."""
    optimizer = torch.optim.AdamW(groups or param_groups(model, 3e-3, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(rows) // 32))
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(32):
            optimizer.zero_grad()
            found = model([rows[k][0] + noise * torch.randn(rows[k][0].shape) for k in batch])
            F.cross_entropy(found, torch.tensor([rows[k][1] for k in batch])).backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: Classifier, rows: Rows) -> float:
    """Compute the share of recordings that are classified right."""
    found = model.eval()([recording for recording, _ in rows]).argmax(-1)
    return (found == torch.tensor([label for _, label in rows])).double().mean().item()


def layer(structure: Structure | None) -> nn.Module:
    size = FRAMES * BINS
    return nn.LSTM(size, HIDDEN) if structure is None else StructuredLSTM(size, HIDDEN, structure=structure)


def digits(path: Path, epochs: int, seeds: int) -> tuple[str, list[dict[str, object]]]:
    (training, test), table = read(path), []
    for name, structure in DIGITS.items():
        accuracies, times = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = Classifier(layer(structure))
            start = time.perf_counter()
            train(model, training, epochs)
            times.append(time.perf_counter() - start)
            accuracies.append(accuracy(model, test))
        table.append({
            "map": name, "parameters": input_parameters(model.layer), "accuracy": statistics.mean(accuracies),
            "lowest": min(accuracies), "highest": max(accuracies), "seconds": statistics.median(times),
        })  # fmt: skip
        say(f"{name}: {table[-1]['accuracy']:.4f}")
    return DIGIT_NOTES.format(train=len(training), test=len(test)), table


def input_parameters(lstm: nn.Module) -> int:
    if isinstance(lstm, StructuredLSTM):
        return sum(p.numel() for name, p in lstm.ih_l0.named_parameters() if name != "bias")
    return lstm.weight_ih_l0.numel()


def video(rounds: int) -> list[dict[str, object]]:
    x = torch.randn(6, 16, 57600)
    models = {
        name: nn.LSTM(57600, 256) if structure is None else StructuredLSTM(57600, 256, structure=structure)
        for name, structure in VIDEO.items()
    }

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(x)

    def both(model: nn.Module) -> None:
        model.zero_grad()
        model(x)[0].sum().backward()

    def seconds(call: Callable[[nn.Module], None], model: nn.Module) -> float:
        start = time.perf_counter()
        call(model)
        return time.perf_counter() - start

    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for key, call in (("forward", forward), ("both", both)):
        samples = [[seconds(call, model) for model in models.values()] for _ in range(rounds + 1)][1:]
        for name, column in zip(models, zip(*samples, strict=True), strict=True):
            found[name][key] = statistics.median(column)
    dense = found["nn.LSTM"]
    return [
        {
            "map": name, "parameters": input_parameters(model),
            "megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
            **{key: value / dense[key] for key, value in found[name].items()},
        }
        for name, model in models.items()
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="zip file of the recordings")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    torch.manual_seed(0)
    store(
        args.results,
        "lstm_video",
        "An LSTM for inputs of 57,600",
        VIDEO_NOTES,
        about,
        video(args.rounds),
        VIDEO_COLUMNS,
    )
    if args.data is not None:
        notes, rows = digits(args.data, args.epochs, args.seeds)
        store(args.results, "lstm_digits", "LSTMs on spoken digits", notes, about, rows, DIGIT_COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
