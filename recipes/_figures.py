"""Figures of recipes and benchmarks: one colour, marker and line for each structure everywhere, SVG and PNG.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and line styles tell the same in black
and white. Dense is a black dashed line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from _results import ROOT, say

mpl.use("Agg")  # no window

from matplotlib import pyplot
from matplotlib.figure import Figure

FIGURES = ROOT / "docs" / "figures"

# name: colour, marker, line style. A structure that is missing here is an error: add it.
STYLES = {
    "dense": ("#000000", "", (0, (5, 3))),
    "lowrank": ("#0072B2", "o", "-"),
    "kronecker": ("#D55E00", "s", "-"),
    "shapeshifter": ("#009E73", "^", "-"),
    "phm": ("#CC79A7", "v", "-"),
    "tt": ("#E69F00", "D", "-"),
    "butterfly": ("#56B4E9", "<", "-"),
    "kmatrix": ("#56B4E9", ">", "--"),
    "monarch": ("#882255", "P", "-"),
    "blast": ("#882255", "X", "--"),
    "cp": ("#999933", "p", "-"),
    "tucker": ("#999933", "h", "--"),
    "glt": ("#44AA99", "*", "-"),
    "kronchain": ("#D55E00", "d", "--"),
    "circulant": ("#888888", "1", "-"),
    "toeplitz": ("#888888", "2", "--"),
    "sparse": ("#888888", "x", ":"),
    "diagonal": ("#BBBBBB", "|", "-"),
    "identity": ("#BBBBBB", "_", "--"),
    "fft": ("#BBBBBB", "+", ":"),
    "sum": ("#332288", "8", "-"),
    "auto": ("#332288", "H", "--"),
}


def style(name: str) -> dict[str, Any]:
    """Return colour, marker and line style of a structure, for `axes.plot`; a sum of two has one style for all."""
    colour, marker, line = STYLES["sum" if "+" in name else name]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.4}


def panels(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.4) -> tuple[Figure, Any]:
    """Return a figure and its axes, (rows, columns), each of width x height inches."""
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.grid(True, linewidth=0.4, color="#DDDDDD")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: Any) -> None:
    """Put one legend for all axes under the figure."""
    found: Mapping[str, Any] = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = min(6, len(found))
    figure.legend(
        found.values(), found.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False
    )


def draw(figure: Figure, name: str, folder: Path = FIGURES) -> None:
    """Write name.svg and name.png, the same bytes for the same figure, and close it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            figure.savefig(folder / f"{name}.{suffix}", dpi=120, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)
    say(f"drawn in {folder / name}.svg and .png")
