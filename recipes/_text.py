"""What recipes on small language models share: text as token ids, windows of it, perplexity of next tokens."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _minilm import docstring_sentences, library_sentences
from torch import Tensor, nn

FEW = 2000  # sentences of a quick run
HELD = 20  # one sentence in so many is held out


def docstrings(quick: bool) -> tuple[str, str]:
    """Return sentences of the standard library's docstrings, a line each in random order, to train on and held out."""
    sentences = [text for text in (docstring_sentences(FEW) if quick else library_sentences()) if text.isascii()]
    random.Random(0).shuffle(sentences)
    cut = len(sentences) // HELD
    return "\n".join(sentences[cut:]), "\n".join(sentences[:cut])


def read(data: Path | None, quick: bool) -> tuple[Tensor, Tensor, int]:
    """Return training ids, held-out ids and the size of the vocabulary.

    Without a folder: docstrings, character by character. With one: its train.tok512.npy and valid.tok512.npy, stories
    in 512 tokens.
    """
    if data is not None:
        found = (torch.from_numpy(np.load(data / f"{part}.tok512.npy").astype(np.int64)) for part in ("train", "valid"))
        return *found, 512
    parts = docstrings(quick)
    alphabet = {letter: k for k, letter in enumerate(sorted({*parts[0], *parts[1]}))}
    return *(torch.tensor([alphabet[letter] for letter in part]) for part in parts), len(alphabet)


def windows(ids: Tensor, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Cut windows (count, length) from ids: at random places, or spread evenly without a generator."""
    last = len(ids) - length
    if generator is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(last + 1, (count,), generator=generator)
    return ids[starts.unsqueeze(1) + torch.arange(length)]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of each token but the first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: nn.Module, held: Tensor, batch: int = 32) -> float:
    """Compute exp of the mean loss over windows (count, length), of a model that maps ids to logits."""
    losses = [next_token_loss(model(part), part) * len(part) for part in held.split(batch)]
    return math.exp(sum(losses).item() / len(held))
