"""The first fully-connected layer of VGG, 25,088 x 4,096, as a tensor train of rank 4: table 3 of the source.

    python benchmarks/vgg_layer.py

Parameters, memory of building the layer and passing 1 or 100 images forward (growth of the peak resident set of a
fresh process, weights included), and time of a forward pass as a share of `nn.Linear`'s, medians of alternated calls.
Equality with the dense matrix is checked first. Stores results/vgg_layer.jsonl and .md.
Source: Novikov et al. 2015, Tensorizing neural networks, table 3 (modes 2 7 8 8 7 4 and 4 4 4 4 4 4).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structlin

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # scripts, not a package

from _results import RESULTS, environment, store

SIZES = 25088, 4096
IN_MODES, OUT_MODES, RANK = (2, 7, 8, 8, 7, 4), (4, 4, 4, 4, 4, 4), 4
IMAGES = 1, 100
COLUMNS = {
    "layer": ("layer", ""), "parameters": ("parameters", ","), "memory, 1 image, MB": ("memory_1", ".1f"),
    "100 images, MB": ("memory_100", ".1f"), "time, 1 image": ("time_1", ".4f"), "100 images": ("time_100", ".4f"),
    "ms, 1 image": ("ms_1", ".2f"), "100 images, ms": ("ms_100", ".2f"),
}  # fmt: skip
NOTES = """\
Modes 2 x 7 x 8 x 8 x 7 x 4 and 4^6, all TT ranks 4. *memory*: growth of the peak resident set of a fresh process that
builds the layer and passes images forward. *time*: share of the dense layer's in the same run. The source has, on a
CPU, for 1 / 100 images: dense 16.1 / 97.2 ms, TT 1.2 / 94.7 ms; and 392 MB of dense weights against .766 MB."""


def layer(kind: str) -> nn.Module:
    if kind == "dense":
        return nn.Linear(*SIZES)
    return structlin.TTLinear(*SIZES, rank=RANK, in_modes=IN_MODES, out_modes=OUT_MODES)


def megabytes() -> float:
    """Return the peak resident set of this process (Linux; getrusage would inherit that of the parent)."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 1024


def memory(kind: str, images: int) -> float:
    """Return the growth of the peak resident set, of this fresh process, in MB."""
    warm = structlin.TTLinear(64, 64, rank=2) if kind == "tt" else nn.Linear(64, 64)  # code is loaded before
    with torch.inference_mode():
        warm(torch.randn(2, 64))
        x = torch.randn(images, SIZES[0])
        before = megabytes()
        layer(kind)(x)
    return megabytes() - before


def memory_of_fresh_process(kind: str, images: int) -> float:
    """Run `memory` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--memory", kind, str(images)]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def measure(layers: Mapping[str, nn.Module], rounds: int) -> list[dict[str, Any]]:
    """Check the layer `tt` against its dense matrix, then time both for one and for 100 images in turn."""
    rows: dict[str, dict[str, Any]] = {
        kind: {"layer": kind, "parameters": sum(p.numel() for name, p in module.named_parameters() if name != "bias")}
        for kind, module in layers.items()
    }
    inputs = layers["tt"].in_features
    with torch.inference_mode():
        x = torch.randn(4, inputs)
        expected = nn.functional.linear(x, layers["tt"].to_dense(), layers["tt"].bias)
        assert (layers["tt"](x) - expected).norm() <= 1e-4 * expected.norm()
        for images in IMAGES:
            x, times = torch.randn(images, inputs), {kind: list[float]() for kind in layers}
            for _ in range(rounds + 3):
                for kind, module in layers.items():
                    start = time.perf_counter()
                    module(x)
                    times[kind].append(time.perf_counter() - start)
            medians = {kind: statistics.median(column[3:]) for kind, column in times.items()}
            for kind in layers:
                rows[kind][f"time_{images}"] = medians[kind] / medians["dense"]
                rows[kind][f"ms_{images}"] = 1000 * medians[kind]
    return list(rows.values())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # kind and images, in a process of their own
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        print(memory(args.memory[0], int(args.memory[1])))
        return 0
    about = environment(argv)
    rows = measure({kind: layer(kind).eval() for kind in ("dense", "tt")}, args.rounds)
    for row, images in itertools.product(rows, IMAGES):
        row[f"memory_{images}"] = memory_of_fresh_process(row["layer"], images)
    store(args.results, "vgg_layer", "A layer of 25,088 x 4,096", NOTES, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
