"""Draw the pictures of docs/structures/: which entries of W move when one entry of a factor moves.

    python docs/patterns.py            # --check only compares

One grid per factor of a small member. The shaded entries of W depend on the marked entry of that factor, the one in
its middle; found by perturbing it in a layer with random factors, so the picture is the library's and not ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from structlin import StructuredLinear
from structlin.equation.structure import Structure
from structlin.structures import (
    CP,
    GLT,
    PHM,
    Blast,
    Butterfly,
    Circulant,
    ConvKernel,
    Dense,
    Diagonal,
    Kaleidoscope,
    Kronecker,
    KroneckerChain,
    LowRank,
    Monarch,
    Shapeshifter,
    Sparse,
    Sum,
    TensorTrain,
    Toeplitz,
    Tucker,
)

FOLDER = Path(__file__).parent / "structures"
# Page: the member that is drawn, in_features, out_features.
MEMBERS: dict[str, tuple[Structure, int, int]] = {
    "lowrank": (LowRank(rank=2), 16, 16),
    "kronecker": (Kronecker(terms=2, shape=((4, 4), (4, 4))), 16, 16),
    "phm": (PHM(n=4), 16, 16),
    "shapeshifter": (Shapeshifter(rank=2, order="reshape"), 8, 32),
    "tt": (TensorTrain(rank=2, in_modes=(4, 2, 2), out_modes=(4, 2, 2)), 16, 16),
    "cp": (CP(rank=2), 16, 16),
    "tucker": (Tucker(rank=2), 16, 16),
    "conv": (ConvKernel("tucker", (2, 2), (2, 2)), 16, 16),
    "kronchain": (KroneckerChain(terms=2), 16, 16),
    "glt": (GLT(groups=(2, 4), widths=(16,)), 16, 16),
    "butterfly": (Butterfly(radix=2), 16, 16),
    "kmatrix": (Kaleidoscope(), 16, 16),
    "monarch": (Monarch(blocks=4, rank=2), 16, 16),
    "blast": (Blast(blocks=4, rank=2), 16, 16),
    "circulant": (Circulant(block=8), 16, 16),
    "toeplitz": (Toeplitz(blocks=2), 16, 16),
    "diagonal": (Diagonal(blocks=4), 16, 16),
    "sparse": (Sparse(count=8, block=2), 16, 16),
    "dense": (Dense(), 16, 16),
    "sums": (Sum((LowRank(rank=2), Kaleidoscope())), 16, 16),
}
CELL, GAP, TOP = 6, 40, 34  # px
CHARACTER = 6.1  # px, of the caption


def reach(layer: StructuredLinear, factor: Tensor) -> Tensor:
    """Return which entries of W move with the middle entry of a factor, (out, in), boolean."""
    with torch.no_grad():
        before = layer.to_dense()
        entry = tuple(size // 2 for size in factor.shape)
        factor[entry] += 1.0
        after = layer.to_dense()
        factor[entry] -= 1.0
    return (after - before).abs() > 1e-9


def runs(row: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield start and length of each run of True."""
    start = None
    for k, value in enumerate([*row, False]):
        if value and start is None:
            start = k
        elif not value and start is not None:
            yield start, k - start
            start = None


def grid(pattern: Tensor, left: int, title: str, caption: str) -> list[str]:
    """Draw one pattern as an SVG grid, with a title and a caption above it."""
    rows, columns = pattern.shape
    width, height = columns * CELL, rows * CELL
    lines = [
        f'<text x="{left}" y="14" class="title">{title}</text>',
        f'<text x="{left}" y="27">{caption}</text>',
        f'<rect x="{left}" y="{TOP}" width="{width}" height="{height}" class="frame"/>',
    ]
    for k, row in enumerate(pattern.tolist()):
        lines += [
            f'<rect x="{left + start * CELL}" y="{TOP + k * CELL}" width="{length * CELL}" height="{CELL}"/>'
            for start, length in runs(row)
        ]
    return lines


def picture(structure: Structure, in_features: int, out_features: int) -> str:
    """Draw all factors of a member beside each other."""
    torch.manual_seed(0)
    layer = StructuredLinear(in_features, out_features, structure=structure, dtype=torch.float64)
    body, left = [], GAP // 2
    for part, shape, factor in zip(layer.spec.factors, layer.spec.shapes, layer.factors, strict=True):
        caption = f"{' '.join(part.modes)}: {'x'.join(map(str, shape))}"
        body += grid(reach(layer, factor), left, part.name, caption)
        left += max(in_features * CELL, round(CHARACTER * max(len(caption), len(part.name)))) + GAP
    width, height = left - GAP // 2, TOP + out_features * CELL + GAP // 4
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<style>text{font:10px monospace;fill:#444}.title{font-weight:bold;fill:#000}rect{fill:#2a6fb0}"
        ".frame{fill:#f3f3f3;stroke:#888}.paper{fill:#fff}</style>",
        f'<rect width="{width}" height="{height}" class="paper"/>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def main() -> int:
    stale = []
    for name, member in MEMBERS.items():
        path, drawn = FOLDER / f"{name}.svg", picture(*member)
        if not path.exists() or path.read_text(encoding="utf-8") != drawn:
            stale.append(path.name)
            if "--check" not in sys.argv[1:]:
                path.write_text(drawn, encoding="utf-8")
    print(f"{len(stale)} of {len(MEMBERS)} pictures {'differ' if '--check' in sys.argv[1:] else 'written'}", *stale)
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
