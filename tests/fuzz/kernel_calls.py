"""Random calls of the native kernel, forward and backward, against dense matrices in float64 (for tests/sanitize.sh).

python tests/fuzz/kernel_calls.py CALLS [--seed N] [--threads N] [--large] builds the kernel by $CXXFLAGS into
$STRUCTLIN_CACHE and prints how many calls there were and how many gave a wrong result; exit status 1 if any did.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES, SMALL_SIZES
from rounded import rounded

from structlin import kernels
from structlin.layers.linear import StructuredLinear, build
from structlin.structures import Blast, Kronecker, LowRank

CALLS = 10  # of one layer
# Single rows of these are shared out between threads: by rows of a factor, by outer indices, by runs of them.
LARGE = (LowRank(rank=1024), 1024), (Blast(blocks=4, rank=600), 1024), (Kronecker(terms=64), 1024)
# Relative to the same with absolute values throughout: sums of random weights cancel, which magnifies rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=3, help="of Python, each with layers of its own")
    parser.add_argument("--large", action="store_true", help="one call with over 2^31 entries; takes 9 GiB")
    given = parser.parse_args()
    kernels.build()
    if not kernels.available():
        sys.exit("the native kernel does not run here")
    if given.large:
        large()
    share = -(-given.calls // given.threads)
    with ThreadPoolExecutor(given.threads) as pool:
        seeds = range(given.seed, given.seed + given.threads)
        counts: Counter[str] = Counter()
        for found in pool.map(worker, [share] * given.threads, seeds):
            counts.update(found)
    print(f"seed {given.seed}:", ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    sys.exit(counts["wrong"] > 0)


def worker(calls: int, seed: int) -> Counter[str]:
    """Make so many calls; count them, and those with a wrong result."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts: Counter[str] = Counter(wrong=0)
    for layer in layers(numbers):
        for parameter in layer.parameters():  # of this thread's random numbers; strided as slices of larger ones are
            parameter.data = strided(parameter.shape, parameter.dtype, numbers, generator)
        wide = copy.deepcopy(layer).double()
        sizes = copy.deepcopy(wide)
        for tensor in (*sizes.parameters(), *sizes.buffers()):
            tensor.data.abs_()
        for _ in range(CALLS):
            counts["calls"] += 1
            counts[str(layer.factors[0].dtype).removeprefix("torch.")] += 1
            if problem := wrong(layer, wide, sizes, numbers, generator):
                counts["wrong"] += 1
                print(f"seed {seed}, call {counts['calls']}, {layer}: {problem}", file=sys.stderr)
        if counts["calls"] >= calls:
            return counts
    raise AssertionError("layers never end")


def layers(numbers: random.Random) -> Iterator[StructuredLinear]:
    """Layers of random structure, size and dtype."""
    while True:
        if numbers.random() < 0.02:
            structure, size = numbers.choice(LARGE)
            yield build(structure, size, size, dtype=numbers.choice(list(TOLERANCE)))
        case = CASES[numbers.choice(list(CASES))]
        if case.small and numbers.random() < 0.3:
            structures, sizes = case.small, numbers.choice(SMALL_SIZES)
        else:
            sizes = numbers.randint(1, 150), numbers.randint(1, 150)
            structures = tuple(case.at(*sizes))
        dtype = numbers.choice(list(TOLERANCE))
        try:
            yield build(numbers.choice(structures), *sizes, numbers.random() < 0.7, dtype=dtype)
        except ValueError:
            continue  # a small structure that does not fit this size


def strided(shape: tuple[int, ...], dtype: torch.dtype, numbers: random.Random, generator: torch.Generator) -> Tensor:
    """Random numbers, often as a slice of a larger tensor: with an offset, and gaps between the rows or the entries."""
    kind = numbers.choice(["whole", "columns", "steps", "transposed"])
    if kind == "whole" or not shape:
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "transposed":
        return torch.randn(shape[::-1], generator=generator).to(dtype).permute(*reversed(range(len(shape))))
    step = numbers.randint(2, 3) if kind == "steps" else 1
    before, after = numbers.randint(0, 5), numbers.randint(0, 5)
    larger = torch.randn(*shape[:-1], before + step * shape[-1] + after, generator=generator).to(dtype)
    return larger[..., before : before + step * shape[-1] : step]


def wrong(
    layer: StructuredLinear,
    wide: StructuredLinear,
    sizes: StructuredLinear,
    numbers: random.Random,
    generator: torch.Generator,
) -> str:
    """Run the layer by the kernel, forward and often backward; say what is wrong.

    Args:
        layer: its factors are the kernel's.
        wide: the same in float64.
        sizes: the same again, of absolute values.
        numbers: for rows, strides, and which gradients are asked for.
        generator: for inputs.
    """
    most = 40 if layer.in_features > 1000 else 400
    rows = numbers.choice([numbers.randint(0, 9), numbers.randint(0, most // 5), numbers.randint(0, most)])
    dtype = layer.factors[0].dtype
    x = strided((rows, layer.in_features), dtype, numbers, generator).requires_grad_(numbers.random() < 0.7)
    chain = kernels.chain_of(layer.spec)
    y = chain(x, tuple(layer.factors), layer.bias)
    found, of, dy = {"y": y}, {}, torch.zeros_like(y)
    if numbers.random() < 0.6:
        dy = strided(tuple(y.shape), dtype, numbers, generator)
        of = {"x": x} if x.requires_grad else {}
        of |= {name: p for name, p in layer.named_parameters() if p.requires_grad and numbers.random() < 0.8}
    if of:
        found |= dict(zip(of, torch.autograd.grad(y, list(of.values()), dy), strict=True))
    expected, scale = reference(wide, x, dy, of), reference(sizes, x.abs(), dy.abs(), of)
    for name, value in found.items():
        error = (value.detach().double() - expected[name]).abs().max().item() if value.numel() else 0.0
        largest = scale[name].max().item() if value.numel() else 1.0
        alike = value.dtype is dtype and value.shape == expected[name].shape
        if not (alike and error <= TOLERANCE[dtype] * largest):
            return f"{rows} rows: {name} {tuple(value.shape)} is off by {error:.2e} of {largest:.2e}"
    return "" if layer.spec.tied else wrong_integers(layer, x.detach(), numbers)  # tied factors are not quantised


def wrong_integers(layer: StructuredLinear, x: Tensor, numbers: random.Random) -> str:
    """Run the layer with factors rounded to integers; say what is wrong."""
    bits, group = numbers.choice([8, 4]), numbers.choice([5, 32, 128])
    chain, codes, scales = rounded(copy.deepcopy(layer).float(), bits, group, numbers.random() < 0.5)
    bias = None if layer.bias is None else layer.bias.detach()
    with torch.no_grad():
        y = chain(x, codes, scales, bias).double()
        expected = chain.plainly(x.double(), codes, scales, None if bias is None else bias.double())
        weight = chain.plainly(torch.eye(layer.in_features).double(), codes, scales, None)
    # Outputs may cancel: what random inputs of this norm give on average.
    typical = x.double().norm() * weight.norm() / layer.in_features**0.5
    error, size = (y - expected).norm().item(), max(expected.norm().item(), typical.item())
    if error <= 50 * TOLERANCE[x.dtype] * size + 1e-9:
        return ""
    return f"{len(x)} rows, int{bits} in groups of {group}: off by {error:.2e} of {size:.2e}"


def reference(wide: StructuredLinear, x: Tensor, dy: Tensor, of: Iterable[str]) -> dict[str, Tensor]:
    """The output and gradients through the dense matrix in float64."""
    x = x.detach().double().requires_grad_()
    y = F.linear(x, wide.to_dense(), wide.bias)
    given = {**dict(wide.named_parameters()), "x": x}
    wanted = [given[name] for name in of]
    found = torch.autograd.grad(y, wanted, dy.double()) if wanted else ()
    return {"y": y.detach(), **dict(zip(of, found, strict=True))}


def large() -> None:
    """Run 2^31 + 2^20 entries through a layer; offsets that wrap around would leave the tensors."""
    rows, size = (1 << 19) + 256, 4096
    layer = build(CASES["lowrank"].at(size, size)[0], size, size, dtype=torch.bfloat16)
    x = torch.zeros(rows, size, dtype=torch.bfloat16)
    x[-1] = torch.randn(size).bfloat16()
    with torch.no_grad():
        y = kernels.chain_of(layer.spec)(x, tuple(layer.factors), layer.bias)
        assert torch.equal(y[0], layer.bias)
        torch.testing.assert_close(y[-1], layer(x[-1]), rtol=2**-6, atol=2**-6)
    print(f"{x.numel()} entries in one call: right")


if __name__ == "__main__":
    main()
