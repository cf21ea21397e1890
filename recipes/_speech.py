"""Spoken digits as raw audio for the speech recipe: recordings by path, or digits that are synthesised here."""

from __future__ import annotations

import io
import wave
import zipfile
from pathlib import Path

import torch
from torch import Tensor

Spoken = list[tuple[Tensor, int]]  # samples (time,) at 8 kHz, and the digit

RATE = 8000


def recordings(data: Path) -> tuple[Spoken, Spoken]:
    """Read WAV files {digit}_{speaker}_{index}.wav of a zip file, or of the one in a folder; the lowest 3 indices test.

    Returns:
        Recordings for training and for testing, each scaled to a mean square of 1.
    """
    path = data if data.is_file() else next(iter(sorted(data.glob("*.zip"))))
    parts: dict[int, Spoken] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".wav")):
            digit, _, index = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as sound:
                samples = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16)
            parts.setdefault(int(index), []).append((scaled(samples.float()), int(digit)))
    lowest = sorted(parts)[:3]
    training = [row for index, rows in sorted(parts.items()) if index not in lowest for row in rows]
    return training, [row for index in lowest for row in parts[index]]


def scaled(samples: Tensor) -> Tensor:
    return samples / samples.square().mean().sqrt().clamp_min(1e-6)


def synthetic(training: int, test: int) -> tuple[Spoken, Spoken]:
    """Synthesise digits: two or three vowels each, harmonics of a voice's pitch under two formants, with noise.

    Pitch (90 to 240 Hz), length of the vocal tract, tempo, phases and noise vary from recording to recording.
    """
    chance = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=chance)

    vowels = torch.stack([uniform(250, 800, 6), uniform(900, 2600, 6)], 1)  # formants in Hz
    words = [torch.randperm(6, generator=chance)[: 2 + digit % 2] for digit in range(10)]
    words = [word if k < 5 else word.flip(0) for k, word in enumerate(words)]

    def say(word: Tensor) -> Tensor:
        pitch, tract, tempo = (uniform(*span).item() for span in ((90, 240), (0.88, 1.12), (0.8, 1.25)))
        length = int(1300 * tempo)
        seconds = torch.arange(length * len(word)) / RATE
        harmonics = torch.arange(1, int(3800 / pitch) + 1).unsqueeze(1) * pitch  # (harmonics, 1), Hz
        peaks = vowels[word] * tract  # (vowels, formants)
        peaks = torch.nn.functional.interpolate(peaks.T.unsqueeze(0), len(seconds), mode="linear")[0]
        loud = sum(0.6**k / (1 + ((harmonics - peak) / 90).square()) for k, peak in enumerate(peaks))
        glide = 1 + 0.1 * (seconds / seconds[-1] - 0.5) * uniform(-1, 1)
        turns = harmonics * (glide.cumsum(0) / RATE) + uniform(0, 1, len(harmonics), 1)
        tone = scaled((loud * torch.sin(2 * torch.pi * turns)).sum(0))
        return scaled(tone + uniform(0.1, 0.6) * torch.randn(len(tone), generator=chance))

    rows = [(say(words[k % 10]), k % 10) for k in range(training + test)]
    return rows[test:], rows[:test]
