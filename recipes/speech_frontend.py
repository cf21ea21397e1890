"""Learn the front end of a speech recogniser: a K-matrix in place of windowing, FFT and filter bank.

    pip install "structlin[recipes]"
    python recipes/speech_frontend.py                     # digits that the recipe synthesises: no real speech
    python recipes/speech_frontend.py --data FOLDER       # spoken digits (FSDD): a zip file of WAV files
    python recipes/speech_frontend.py --quick             # a tiny run, for a test

Raw audio is cut into frames of 256 samples. A linear map of a frame makes 256 numbers, two of which are one channel;
the logarithm of a channel's energy goes into an LSTM, and the mean of its outputs into ten classes. The maps: a
K-matrix, from random factors and from those of the discrete Fourier transform; the baselines of the paper's table 5,
sized like the K-matrix where they have a size; band-pass filters of two learned frequencies (SincNet-like); and, by
hand, the log energies of a mel filter bank (MFSC). Stores benchmarks/results/speech_<data>.jsonl and .md, draws
docs/figures/speech_<data>.svg and .png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _figures import draw, panels, style
from _findings import conclude, options
from _results import environment, say
from _speech import RATE, Spoken, recordings, synthetic
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from structlin import CirculantLinear, KMatrix, LowRankLinear, SparseLinear, exact, param_groups

FRAME, HOP = 256, 128  # samples
CHANNELS = FRAME // 2
COLUMNS = {
    "front end": ("front", ""), "its parameters": ("parameters", ","), "test accuracy": ("accuracy", ".4f"),
    "lowest": ("lowest", ".4f"), "highest": ("highest", ".4f"), "training, s": ("seconds", ".1f"),
}  # fmt: skip
NOTES = """\
{data}, {train} recordings for training and {test} for testing; frames of 256 samples (32 ms), every 16 ms; AdamW,
{epochs} epochs, the start of a recording and noise drawn anew in each, the K-matrix from the DFT at a tenth of the
learning rate. *test accuracy*: mean over {seeds} seeds, with
the lowest and the highest. *training*: median of a run. Low rank and sparse have the K-matrix's number of parameters;
circulant, dense, FFT and identity have one size only, and a complex number counts as two. The paper (Dao et al. 2020)
recognises phonemes of TIMIT with a deep recogniser and counts phoneme errors; here one LSTM of {hidden} tells ten words
apart, from far less speech; the SincNet-like filters are read once a frame, and the row from the DFT is ours."""


class Band(nn.Module):
    """Band-pass filters of two learned frequencies each, as pairs of a cosine and a sine under a sinc and a window."""

    def __init__(self) -> None:
        super().__init__()
        edges = hertz(torch.linspace(mel(60.0), mel(RATE / 2 - 100), CHANNELS + 2))
        self.centre = nn.Parameter(edges[1:-1] / RATE)  # in turns per sample
        self.width = nn.Parameter((edges[2:] - edges[:-2]) / RATE / 2)
        self.register_buffer("places", torch.arange(FRAME) - (FRAME - 1) / 2)
        self.register_buffer("window", torch.hann_window(FRAME))

    def forward(self, frames: Tensor) -> Tensor:
        turns = 2 * torch.pi * self.centre.unsqueeze(1) * self.places
        shape = torch.sinc(2 * self.width.unsqueeze(1) * self.places) * self.window
        filters = torch.stack([turns.cos(), turns.sin()], -1) * shape.unsqueeze(-1)  # (channels, samples, 2)
        return frames @ filters.transpose(0, 1).flatten(1)


class Fourier(nn.Module):
    """The frequencies below the middle as real and imaginary parts: of FFT, or of a K-matrix that begins as it."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        window = torch.hann_window(FRAME)
        self.transform = exact.dft(FRAME) if learned else torch.fft.fft
        self.window = nn.Parameter(window) if learned else nn.Buffer(window)

    def forward(self, frames: Tensor) -> Tensor:
        x = (frames * self.window).to(torch.complex64)
        return torch.view_as_real(self.transform(x)[:, :CHANNELS]).flatten(1) / math.sqrt(FRAME)


class MelBank(nn.Module):
    """The features by hand: Hann window, power spectrum, 40 triangles on the mel scale."""

    def __init__(self, bands: int = 40) -> None:
        super().__init__()
        edges = hertz(torch.linspace(mel(60.0), mel(RATE / 2), bands + 2)).unsqueeze(1)
        bins = torch.arange(FRAME // 2 + 1) * RATE / FRAME
        up, down = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
        self.register_buffer("bank", torch.minimum(up, down).clamp_min(0))
        self.register_buffer("window", torch.hann_window(FRAME))

    def forward(self, frames: Tensor) -> Tensor:
        return torch.fft.rfft(frames * self.window).abs().square() / FRAME @ self.bank.mT


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def hertz(mels: Tensor) -> Tensor:
    return 700 * (10 ** (mels / 2595) - 1)


def energies(y: Tensor) -> Tensor:
    """Add the squares of the two numbers of a channel."""
    return y.unflatten(-1, (-1, 2)).square().sum(-1)


class Front(NamedTuple):
    """A front end, frames (n, 256) to energies (n, channels): style in figures, maker, share of the learning rate."""

    style: str
    make: Callable[[], nn.Module]
    rate: float = 1.0


def fronts() -> dict[str, Front]:
    """Return the front ends; one that begins as a good map is moved by a tenth of the learning rate."""
    budget = KMatrix(FRAME, FRAME, bias=False).num_parameters

    def energy(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(make(), Lambda(energies))

    return {
        "MFSC, by hand": Front("dense", MelBank),
        "SincNet-like": Front("diagonal", energy(Band)),
        "K-matrix": Front("kmatrix", energy(lambda: KMatrix(FRAME, FRAME, bias=False))),
        "K-matrix from the DFT": Front("butterfly", energy(lambda: Fourier(learned=True)), 0.1),
        "dense": Front("dense", energy(lambda: nn.Linear(FRAME, FRAME, bias=False))),
        "low rank": Front(
            "lowrank", energy(lambda: LowRankLinear(FRAME, FRAME, bias=False, rank=budget // (2 * FRAME)))
        ),
        "sparse": Front("sparse", energy(lambda: SparseLinear(FRAME, FRAME, bias=False, ratio=budget / FRAME**2))),
        "circulant": Front("circulant", energy(lambda: CirculantLinear(FRAME, FRAME, bias=False))),
        "FFT": Front("fft", energy(lambda: Fourier(learned=False))),
        "identity": Front("identity", energy(nn.Identity)),
    }


class Lambda(nn.Module):
    """Apply a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Recogniser(nn.Module):
    """A front end, the logarithm, an LSTM, the mean of its outputs, and a linear layer."""

    def __init__(self, front: nn.Module, hidden: int) -> None:
        super().__init__()
        self.front = front
        channels = front(torch.zeros(1, FRAME)).shape[1]
        self.norm, self.lstm = nn.BatchNorm1d(channels), nn.LSTM(channels, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, sounds: Sequence[Tensor]) -> Tensor:
        frames = [sound.unfold(0, FRAME, HOP) for sound in sounds]
        channels = self.norm((self.front(torch.cat(frames)) + 1e-3).log())
        packed = pack_sequence(list(channels.split([len(f) for f in frames])), enforce_sorted=False)
        y, lengths = pad_packed_sequence(self.lstm(packed)[0])
        return self.head(y.sum(0) / lengths.unsqueeze(1))


def late(sound: Tensor) -> Tensor:
    """Drop up to a hop of samples, keep at least one frame, add noise."""
    begin = int(torch.randint(HOP, ()))
    heard = F.pad(sound[begin:], (0, max(0, FRAME + begin - len(sound))))
    return heard + 0.05 * torch.randn_like(heard)


def train(model: Recogniser, rows: Spoken, epochs: int, front_rate: float) -> None:
    """Train with AdamW and a cosine schedule on recordings that begin up to a hop later, with noise."""
    behind = nn.ModuleList([model.norm, model.lstm, model.head])
    groups = param_groups(model.front, front_rate * 3e-3, weight_decay=0.01) + param_groups(
        behind, 3e-3, weight_decay=0.01
    )
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(rows) // 32))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(32):
            found = model([late(rows[k][0]) for k in batch])
            optimizer.zero_grad()
            F.cross_entropy(found, torch.tensor([rows[k][1] for k in batch])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def run(args: argparse.Namespace, training: Spoken, test: Spoken) -> list[dict[str, Any]]:
    """Train a recogniser with each front end for every seed."""
    labels, rows = torch.tensor([label for _, label in test]), []
    for name, front in fronts().items():
        found, times = [], []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = Recogniser(front.make(), args.hidden)
            start = time.perf_counter()
            train(model, training, args.epochs, front.rate)
            times.append(time.perf_counter() - start)
            with torch.inference_mode():
                found.append((model([sound for sound, _ in test]).argmax(-1) == labels).double().mean().item())
        rows.append({
            "front": name, "accuracy": statistics.mean(found), "lowest": min(found), "highest": max(found),
            "seconds": statistics.median(times),
            "parameters": sum(p.numel() * (2 if p.is_complex() else 1) for p in model.front.parameters()),
        })  # fmt: skip
        say(f"{name}: {found}, {times[-1]:.1f} s")
    return rows


def findings(rows: Sequence[dict[str, Any]]) -> str:
    """Judge the paper's claims by mean accuracies."""
    mean = {row["front"]: row["accuracy"] for row in rows}
    by_hand, k = mean["MFSC, by hand"], mean["K-matrix"]
    others = {name: mean[name] for name in ("low rank", "sparse", "circulant", "dense", "FFT", "identity")}
    best = max(others, key=lambda name: others[name])
    lines = [
        ("A K-matrix comes within one point of features made by hand", by_hand - k <= 0.01,
         f"{100 * k:.1f} % against {100 * by_hand:.1f} %"),
        ("A K-matrix that begins as the DFT does", by_hand - mean["K-matrix from the DFT"] <= 0.01,
         f"{100 * mean['K-matrix from the DFT']:.1f} %"),
        ("All other baselines are behind the K-matrix", others[best] < k,
         f"the best of them, {best}: {100 * others[best]:.1f} %"),
    ]  # fmt: skip
    return "\n".join(f"- {claim}: {'confirmed' if held else 'refuted'} ({numbers})." for claim, held, numbers in lines)


def picture(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """Draw accuracy by parameters, the features by hand as a line."""
    figure, axes = panels(1, width=6.5, height=4)
    axis, styles = axes[0, 0], {name: front.style for name, front in fronts().items()}
    for row in sorted(rows, key=lambda row: row["accuracy"]):
        look = style(styles[row["front"]]) | {"linestyle": ""}
        if row["front"] in ("MFSC, by hand", "SincNet-like"):
            look |= {"color": "#555555", "marker": "*" if row["front"] == "SincNet-like" else "o", "markersize": 7}
        middle = 100 * row["accuracy"]
        spread = [[middle - 100 * row["lowest"]], [100 * row["highest"] - middle]]
        axis.errorbar(middle, row["front"], xerr=spread, **{**look, "marker": look["marker"] or "s"}, elinewidth=1.2)
        axis.text(101.5, row["front"], f"{row['parameters']:,}", va="center", fontsize=8)
    by_hand = 100 * next(row["accuracy"] for row in rows if row["front"] == "MFSC, by hand")
    axis.axvline(by_hand, color="#000000", linewidth=0.8, linestyle=":")
    axis.set_xlabel("test accuracy, % (mean and range over seeds; right: parameters of the front end)")
    axis.set_xlim(right=100.5)
    draw(figure, name, folder)


def main(argv: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder or zip file of FSDD; synthesised digits without it")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=64, help="size of the LSTM")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = environment(argv)
    sizes = (60, 20) if args.quick else (240, 240)
    if args.quick:
        args.epochs, args.seeds, args.hidden = 2, 1, 16
    training, test = synthetic(*sizes) if args.data is None else recordings(args.data)
    rows = run(args, training, test)
    kind = "Synthesised digits (no real speech)" if args.data is None else "Spoken digits (FSDD, six speakers)"
    notes = NOTES.format(
        data=kind, train=len(training), test=len(test), epochs=args.epochs, seeds=args.seeds, hidden=args.hidden
    )
    name, verdict = f"speech_{'synthetic' if args.data is None else 'fsdd'}", findings(rows)
    conclude(args.results, name, "Front ends for raw audio", notes, verdict, about, rows, COLUMNS)
    if not args.quick:
        picture(rows, name, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
