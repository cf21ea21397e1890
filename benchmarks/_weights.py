"""Weights of all-MiniLM-L6-v2 with the Grams of their inputs, and the error of a fit on any Gram."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor

from structlin.compress.calibrate import collect_statistics
from structlin.equation.spec import Spec
from structlin.runtime.contract import to_dense

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _minilm import docstring_sentences, model_path, tokenise
from _results import RESULTS, Columns, environment, say, store

__all__ = ["RESULTS", "Columns", "Layer", "environment", "output_error", "read_layers", "say", "side_by_side", "store"]

CALIBRATION = slice(0, 300)  # sentences
HELD_OUT = slice(400, 700)
MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
ATTENTION = tuple(MODULES)[:4]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer: its weight (out, in) in float32, and two Grams (in, in) of its inputs in float64.

    Args:
        name: such as "2 attention output".
        weight: (out, in).
        gram: of the calibration sentences.
        held_out: of other sentences.
    """

    name: str
    weight: Tensor
    gram: Tensor
    held_out: Tensor

    @property
    def shape(self) -> str:
        """Sizes as `out x in`."""
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"


def read_layers(chosen: Sequence[tuple[int, str]]) -> list[Layer]:
    """Load the model and collect the Grams of the layers (number, role); roles are the keys of MODULES."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = model_path(None)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    names = {key: f"encoder.layer.{key[0]}.{MODULES[key[1]]}" for key in chosen}
    sentences = docstring_sentences(HELD_OUT.stop)
    assert len(sentences) == HELD_OUT.stop
    grams = []
    for part in (CALIBRATION, HELD_OUT):
        batches = [inputs for _, inputs in tokenise(tokenizer, sentences[part], 256)]
        grams.append(collect_statistics(model, batches, names=names.values(), dtype=torch.float64).grams)
    return [
        Layer(f"{number} {role}", model.get_submodule(name).weight.detach(), *(each[name] for each in grams))
        for (number, role), name in names.items()
    ]


def output_error(weight: Tensor, spec: Spec, factors: Sequence[Tensor], gram: Tensor | None) -> float:
    """Compute sqrt(tr(D G D^T) / tr(W G W^T)), D the difference to the dense matrix, in float64; None is G = I."""
    exact = weight.double()
    difference = exact - to_dense(spec, [factor.double() for factor in factors])
    size, total = (((m if gram is None else m @ gram) * m).sum() for m in (difference, exact))
    return (size / total).clamp(min=0).sqrt().item()


def side_by_side(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """Yield work(item) in order, `threads` at a time, each of them computed with one thread."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, items)
