"""Time layers whose factors are integers beside `nn.Linear`, the float32 kernel, and dense int8, on one thread.

    python benchmarks/quantized_speed.py
    python benchmarks/quantized_speed.py --tokens 1
    python benchmarks/quantized_speed.py --quick

Outputs are compared with plain torch on the decoded factors before anything is timed. Then short samples of all
contenders alternate; times are those of the thread on the processor, which other processes disturb least. The dense
peers are `nn.Linear` in float32 and bfloat16, torch's own int8 product (`torch._weight_int8pack_mm`, bfloat16
activations), and, where torchao is installed, its int8 weight-only layer (bfloat16). Stored as
results/quantized_speed.jsonl and .md, with some numbers of tokens only as quantized_speed_TOKENS; `--quick` (few
samples) goes to out/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from _speed import Row, relative_error
from speed import lowrank_beside
from torch import Tensor, nn

import structlin
from structlin.equation.structure import Structure
from structlin.fitting.budget import within
from structlin.layers.linear import StructuredLinear, build
from structlin.runtime.kernels import chain_of
from structlin.structures import Kaleidoscope, Kronecker, family

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("recipes", "tests")]

from _results import RESULTS, ROOT, Columns, environment, say, store
from rounded import Rounded, rounded

SIZES = ((384, 1536), (768, 3072), (4096, 4096))  # (in_features, out_features)
TOKENS = (1, 32, 512)
NAMES = ("lowrank", "kmatrix", "monarch", "blast", "kronecker", "lowrank+kmatrix")
RATIO = 0.5
TOLERANCE = 2e-4  # activations are rounded to 16 bits
DENSE, HALF, PEER, FLOAT, INT8, INT4, TORCHAO = "dense", "bf16", "dense_int8", "float32", "int8", "int4", "torchao"
COLUMNS: Columns = {
    "structure": ("structure", ""),
    "out x in": ("shape", ""),
    "tokens": ("tokens", ""),
    "nn.Linear, us": ("dense_us", ",.0f"),
    "int8 / nn.Linear": ("int8_dense", ".3f"),
    "/ bfloat16": ("int8_bf16", ".3f"),
    "/ dense int8": ("int8_dense_int8", ".3f"),
    "/ torchao": ("int8_torchao", ".3f"),
    "/ float32 kernel": ("int8_float32", ".3f"),
    "int4 / nn.Linear": ("int4_dense", ".3f"),
    "/ bfloat16 ": ("int4_bf16", ".3f"),
    "/ dense int8 ": ("int4_dense_int8", ".3f"),
    "/ float32 kernel ": ("int4_float32", ".3f"),
    "bytes int8 / dense int8": ("int8_bytes", ".3f"),
    "error int8": ("int8_error", ".1e"),
    "error int4": ("int4_error", ".1e"),
}
NOTES = """Structures at half the parameters (Kronecker: 4 terms), one thread, x float32; medians of alternating
samples of processor time. The float32 kernel runs the same structure with float32 factors; dense int8 is
`torch._weight_int8pack_mm`, torchao a dense layer by its Int8WeightOnlyConfig, both on bfloat16. Errors are
relative to plain torch on the decoded factors."""


def structure_of(name: str, sizes: tuple[int, int]) -> Structure:
    if name == "kronecker":
        return Kronecker(terms=4)
    if name == "lowrank+kmatrix":
        return lowrank_beside(Kaleidoscope(width=2), sizes, RATIO)
    return within(family(name), *sizes, RATIO)[0]


def medians(calls: dict[str, Callable[[], Tensor]], rounds: int, seconds: float = 4e-3) -> dict[str, float]:
    """The median processor time of each call in s, sampled in turn."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, round(seconds / _sample(call, 1)))
    samples = [{name: _sample(call, counts[name]) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(sample[name] for sample in samples) for name in calls}


def _sample(call: Callable[[], Tensor], count: int) -> float:
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def contenders(layer: StructuredLinear, integers: dict[str, Rounded], tokens: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, on one input."""
    sizes = layer.in_features, layer.out_features
    x, bias = torch.randn(tokens, sizes[0]), layer.bias
    half, dense, halves = x.bfloat16(), nn.Linear(*sizes), nn.Linear(*sizes).bfloat16()
    codes = torch.randint(-127, 128, sizes[::-1], dtype=torch.int8)
    scales, shift = torch.rand(sizes[1]).bfloat16(), torch.rand(sizes[1]).bfloat16()
    chain = chain_of(layer.spec)
    found: dict[str, Callable[[], Tensor]] = {
        DENSE: lambda: dense(x),
        HALF: lambda: halves(half),
        PEER: lambda: torch._weight_int8pack_mm(half, codes, scales) + shift,
        FLOAT: lambda: chain(x, layer.factors, bias),
    }
    if find_spec("torchao"):
        theirs = torchao_layer(*sizes)
        found[TORCHAO] = lambda: theirs(half)
    for name, (quantized, *tensors) in integers.items():
        found[name] = lambda quantized=quantized, tensors=tensors: quantized(x, *tensors, bias)
    return found


def torchao_layer(in_features: int, out_features: int) -> nn.Module:
    torchao = import_module("torchao.quantization")
    model = nn.Sequential(nn.Linear(in_features, out_features)).bfloat16()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def cells(rounds: int, numbers: Sequence[int]) -> Iterator[Row]:
    for in_features, out_features in SIZES:
        for name in NAMES:
            layer = build(structure_of(name, (in_features, out_features)), in_features, out_features)
            integers = {INT8: rounded(layer, 8), INT4: rounded(layer, 4)}
            for tokens in numbers:
                row = measure(layer, integers, tokens, rounds)
                yield {"structure": name, "shape": f"{out_features} x {in_features}", "tokens": tokens, **row}


def measure(layer: StructuredLinear, integers: dict[str, Rounded], tokens: int, rounds: int) -> Row:
    """Check both roundings, then time all contenders."""
    row: Row = {"cell_structure": str(layer.structure)}
    x = torch.randn(tokens, layer.in_features)
    for name, (chain, codes, scales) in integers.items():
        error = relative_error(chain(x, codes, scales, layer.bias), chain.plainly(x, codes, scales, layer.bias))
        if not error <= TOLERANCE:  # NaN included
            raise ValueError(f"{name} of {layer}, {tokens} tokens: error={error:.2g} exceeds {TOLERANCE}")
        row[f"{name}_error"] = error
        stored = sum(t.nbytes for t in (*codes, *scales) if t is not None)
        row[f"{name}_bytes"] = stored / (layer.in_features * layer.out_features + 2 * layer.out_features)
    seconds = medians(contenders(layer, integers, tokens), rounds if tokens < 512 else max(3, rounds // 5))
    row |= {f"{name}_us": 1e6 * value for name, value in seconds.items()}
    for name in integers:
        row |= {
            f"{name}_{other}": seconds[name] / seconds[other]
            for other in (DENSE, HALF, PEER, FLOAT, TORCHAO)
            if other in seconds
        }
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--quick", action="store_true", help="few samples, stored in out/")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    structlin.kernels.build()
    if not structlin.kernels.available():
        sys.exit("the native kernel does not run here")
    rows = []
    for row in cells(3 if given.quick else 9, given.tokens):
        say(f"  {row['structure']}, {row['shape']}, {row['tokens']} tokens: int8 / float32 {row['int8_float32']:.2f}")
        rows.append(row)
    directory = ROOT / "out" if given.quick else RESULTS
    name = "_".join(["quantized_speed", *(map(str, given.tokens) if given.tokens != TOKENS else ())])
    store(directory, name, "Integer factors", NOTES, environment(sys.argv[1:]), rows, COLUMNS)


if __name__ == "__main__":
    main()
