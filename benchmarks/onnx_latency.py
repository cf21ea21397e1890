"""Time structures in ONNX Runtime beside a dense `nn.Linear` exported the same way, on one thread.

    python benchmarks/onnx_latency.py
    python benchmarks/onnx_latency.py --quick

Each layer, and a BERT of MiniLM's size compressed by one structure, is exported with a dynamic number of rows. Outputs
are compared with those here before anything is timed; then short samples of the dense and the structured session
alternate, by the thread's time on the processor. Needs onnx, onnxscript and onnxruntime. Stored as
results/onnx_latency.jsonl and .md; `--quick` (two structures, few samples, a small BERT) goes to out/.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
import transformers
from _speed import Row
from quantized_speed import RATIO, medians, structure_of
from torch import Tensor, nn
from transformers.exporters import OnnxConfig, OnnxExporter

import structlin
from structlin.layers.linear import build
from structlin.structures import families

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, ROOT, Columns, environment, say, store

SIZES = ((768, 768), (768, 3072))  # (in_features, out_features)
TOKENS = (1, 128)
BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
TOLERANCE = 1e-4  # of the largest entry
ROWS = ({0: torch.export.Dim("rows", min=1, max=4096)},)
COLUMNS: Columns = {
    "structure": ("structure", ""),
    "what": ("what", ""),
    "tokens": ("tokens", ""),
    "kept": ("kept", ".3f"),
    "operators": ("operators", ""),
    "dense, us": ("dense_us", ",.0f"),
    "us": ("us", ",.0f"),
    "/ dense": ("ratio", ".3f"),
    "difference": ("difference", ".1e"),
}
NOTES = f"""Structures at {RATIO} of the parameters (Kronecker: 4 terms in single layers), exported by `torch.onnx` or
by transformers, in ONNX Runtime's CPU provider on one thread, float32; medians of alternating samples of processor
time. *dense*: the same module with `nn.Linear`, exported the same way. *operators*: nodes of the optimised graph. BERT
is of MiniLM's size with random weights, one sequence. *difference*: largest of the outputs here and there / largest
entry, at most {TOLERANCE} (checked)."""

Inputs = Mapping[str, Tensor]
Session = onnxruntime.InferenceSession


def session_of(model: nn.Module, inputs: Inputs, folder: Path) -> tuple[Session, int]:
    """Export a model; return its session and the number of its operators once they are optimised."""
    path, optimised = folder / "model.onnx", folder / "optimised.onnx"
    if isinstance(model, transformers.PreTrainedModel):
        program = OnnxExporter().export(model, dict(inputs), OnnxConfig(dynamic=True)).program
        onnx_ir.save(program, path)
    else:
        torch.onnx.export(
            model, tuple(inputs.values()), dynamic_shapes=ROWS, dynamo=True, verbose=False, input_names=list(inputs)
        ).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, len(list(onnx_ir.load(optimised).graph))


def run(session: Session, inputs: Inputs) -> np.ndarray:
    found: np.ndarray = session.run(None, {e.name: inputs[e.name].numpy() for e in session.get_inputs()})[0]
    return found


def compared(dense: nn.Module, model: nn.Module, examples: list[Inputs], rounds: int) -> Iterator[Row]:
    """Time a model beside the dense one on each example; the last one serves for the export."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        theirs, _ = session_of(dense, examples[-1], Path(first))
        ours, operators = session_of(model, examples[-1], Path(second))
        for inputs in examples:
            output: Any = (
                model(**inputs) if isinstance(model, transformers.PreTrainedModel) else model(*inputs.values())
            )
            expected = (output if isinstance(output, Tensor) else output[0]).numpy()
            difference = np.abs(run(ours, inputs) - expected).max() / np.abs(expected).max()
            if not difference <= TOLERANCE:  # NaN included
                raise ValueError(f"{model}: outputs differ by {difference:.2g}, more than {TOLERANCE}")
            calls: Any = {name: partial(run, s, inputs) for name, s in (("dense", theirs), ("ours", ours))}
            seconds = medians(calls, rounds)
            us = {"dense_us": 1e6 * seconds["dense"], "us": 1e6 * seconds["ours"]}
            yield us | {
                "ratio": us["us"] / us["dense_us"], "operators": operators, "difference": float(difference),
                "tokens": next(iter(inputs.values())).numel() // (1 if "input_ids" in inputs else inputs["x"].shape[1]),
            }  # fmt: skip


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layers(names: list[str], rounds: int) -> Iterator[Row]:
    for in_features, out_features in SIZES:
        dense = nn.Linear(in_features, out_features).eval()
        examples = [{"x": torch.randn(tokens, in_features)} for tokens in TOKENS]
        for name in names:
            layer = build(structure_of(name, (in_features, out_features)), in_features, out_features).eval()
            about = {"structure": name, "what": f"{out_features} x {in_features}", "kept": size(layer) / size(dense)}
            yield from (about | row for row in compared(dense, layer, examples, rounds))


def berts(names: list[str], sizes: Mapping[str, int], rounds: int) -> Iterator[Row]:
    dense = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=1000), add_pooling_layer=False).eval()
    examples = []
    for tokens in TOKENS:
        ids = torch.arange(tokens)[None] % 1000
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for name in names:
        model = copy.deepcopy(dense)
        structlin.compress_model(model, name, ratio=RATIO, refine=1, progress=False)
        about = {"structure": name, "what": "BERT", "kept": size(model) / size(dense)}
        yield from (about | row for row in compared(dense, model, examples, rounds))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="*", default=sorted(families()), help="of single layers")
    parser.add_argument("--berts", nargs="*", default=["lowrank", "monarch", "kronecker"], help="of the whole model")
    parser.add_argument("--quick", action="store_true", help="little of everything, stored in out/")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # of the exporters
    names, models = (["lowrank", "monarch"], ["lowrank"]) if given.quick else (given.structures, given.berts)
    rounds = 3 if given.quick else 15
    rows = []
    for row in itertools.chain(layers(names, rounds), berts(models, SMALL if given.quick else BERT, rounds)):
        say(f"  {row['structure']}, {row['what']}, {row['tokens']} tokens: {row['ratio']:.2f} of dense")
        rows.append(row)
    about = environment(sys.argv[1:]) | {"onnxruntime": onnxruntime.__version__}
    store(ROOT / "out" if given.quick else RESULTS, "onnx_latency", "ONNX Runtime", NOTES, about, rows, COLUMNS)


if __name__ == "__main__":
    main()
