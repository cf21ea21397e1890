"""Well-known maps as K-matrices (`structlin.exact`): error, parameters, and time beside `nn.Linear` and `torch.fft`.

    python benchmarks/exact.py

*error*: largest difference from the map in float64, relative to its largest entry of the output, on 8 random rows, of
factors in single and in double precision. *share*: entries of all factors / entries of the matrix. *time*: one forward
pass of 32 rows with frozen factors in single precision, on one thread; medians of alternated calls, as a share of
`nn.Linear` with the same matrix in the same dtype; *torch.fft* likewise, where torch has the transform. Stores
results/exact.jsonl and .md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _speed import median_seconds
from _weights import RESULTS, environment, say, store
from torch import Tensor, nn

from structlin import StructuredLinear, exact
from structlin.layers.freeze import freeze_

SIZES = [2**k for k in range(3, 13)]
ROWS, LEAST, ROUNDS = 32, 5e-3, 9  # of a timed call; seconds of a sample; samples
COLUMNS = {
    "map": ("map", ""), "n": ("n", ","), "width": ("width", ""), "expansion": ("expansion", ""),
    "parameters": ("parameters", ","), "share": ("share", ".3f"), "error, single": ("single", ".1e"),
    "error, double": ("double", ".1e"), "time": ("time", ".2f"), "torch.fft": ("fft", ".2f"),
    "nn.Linear": ("dense", ".2f"),
}  # fmt: skip

Make = Callable[[int, bool], StructuredLinear]  # size, whether in double precision


def vectors(n: int, wide: bool, count: int) -> Tensor:
    """Draw vectors that are the same in both precisions."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(8, n, generator=generator)[:count].to(torch.float64 if wide else torch.float32)


def order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def kind(wide: bool) -> torch.dtype:
    return torch.complex128 if wide else torch.complex64


MAPS: dict[str, Make] = {
    "dft": lambda n, wide: exact.dft(n, dtype=kind(wide)),
    "idft": lambda n, wide: exact.idft(n, dtype=kind(wide)),
    "dct": lambda n, wide: exact.dct(n, dtype=kind(wide)),
    "dst": lambda n, wide: exact.dst(n, dtype=kind(wide)),
    "hadamard": lambda n, wide: exact.hadamard(n, dtype=torch.float64 if wide else torch.float32),
    "circulant": lambda n, wide: exact.circulant(*vectors(n, wide, 1)),
    "toeplitz": lambda n, wide: exact.toeplitz(*vectors(n, wide, 2)),
    "convolution": lambda n, wide: exact.convolution(vectors(n, wide, 1)[0, :5], n),
    "permutation": lambda n, wide: exact.permutation(order(n), dtype=torch.float64 if wide else torch.float32),
    "fastfood": lambda n, wide: exact.fastfood(*vectors(n, wide, 2), order(n), vectors(n, wide, 3)[2]),
    "acdc": lambda n, wide: exact.acdc(*vectors(n, wide, 2)),
    "low_rank": lambda n, wide: exact.low_rank(*vectors(n, wide, 8).view(2, 4, n).mT),
}


def matrix(name: str, n: int) -> Tensor:
    """Write the map's matrix by its definition in double precision."""
    j = torch.arange(n).double()
    k, eye = j.unsqueeze(1), torch.eye(n, dtype=torch.float64)
    a, b, c = vectors(n, True, 3)
    scale = ((j > 0) + 1.0).double().div(n).sqrt()
    cosine = torch.cos(torch.pi * ((2 * j + 1) * k % (4 * n)) / (2 * n)) * scale.unsqueeze(1)
    signs = 1.0 - 2 * (sum((j.long() >> s) & (k.long() >> s) for s in range(n.bit_length())) % 2).double()
    distance = (k - j).long()
    if name in ("dft", "idft"):
        turn = torch.polar(torch.ones(()).double(), 2 * torch.pi * (j * k % n) / n)
        return turn.conj() if name == "dft" else turn / n
    if name == "dst":
        return torch.sin(torch.pi * ((2 * j + 1) * (k + 1) % (4 * n)) / (2 * n)) * scale.flip(0).unsqueeze(1)
    kernel = torch.zeros(2 * n - 1, dtype=torch.float64)
    kernel[n - 3 : n + 2] = a[:5].flip(0)
    left, right = vectors(n, True, 8).view(2, 4, n).mT
    found = {
        "dct": lambda: cosine,
        "hadamard": lambda: signs,
        "circulant": lambda: a[distance % n],
        "toeplitz": lambda: torch.where(distance >= 0, a[distance.clamp_min(0)], b[(-distance).clamp_min(0)]),
        "convolution": lambda: kernel[distance + n - 1],
        "permutation": lambda: eye[order(n)],
        "fastfood": lambda: a.unsqueeze(1) * (signs @ (b.unsqueeze(1) * (signs * c)[order(n)])),
        "acdc": lambda: cosine.T @ (b.unsqueeze(1) * (cosine * a)),
        "low_rank": lambda: left @ right.T,
    }
    return found[name]()


def error(layer: StructuredLinear, wanted: Tensor) -> float:
    dtype = next(layer.parameters()).dtype
    x = torch.randn(8, len(wanted), dtype=torch.float64)
    right = x.to(torch.promote_types(wanted.dtype, x.dtype)) @ wanted.mT
    found = layer(x.to(dtype)).to(torch.complex128)
    return ((found - right).abs().max() / right.abs().max()).item()


@torch.no_grad()
def measure(name: str, n: int) -> dict[str, Any]:
    layer, double = (MAPS[name](n, wide) for wide in (False, True))
    wanted = matrix(name, n)
    dtype = next(layer.parameters()).dtype
    row = {
        "map": name, "n": n, "width": getattr(layer.structure, "width", None),
        "expansion": getattr(layer.structure, "expansion", None), "parameters": layer.num_parameters,
        "share": layer.num_parameters / n**2, "single": error(layer, wanted), "double": error(double, wanted),
    }  # fmt: skip
    dense = nn.Linear(n, n, bias=False, dtype=dtype)
    dense.weight.copy_(wanted.to(dtype))
    x = torch.randn(ROWS, n, dtype=dtype)
    freeze_(layer.eval())
    calls = [lambda: dense(x), lambda: layer(x)]
    if name in ("dft", "idft"):
        transform = torch.fft.fft if name == "dft" else torch.fft.ifft
        calls.append(lambda: transform(x))
    base, ours, *fft = median_seconds(calls, LEAST, ROUNDS)
    return row | {"dense": 1.0, "time": ours / base, "fft": fft[0] / base if fft else None}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about, rows = environment(argv), []
    for name in args.maps:
        for n in args.sizes:
            say(f"{name} {n}")
            rows.append(measure(name, n))
    notes = __doc__.rpartition("benchmarks/exact.py\n\n")[2].strip()
    store(RESULTS, "exact", "Well-known maps as K-matrices", notes, about, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
