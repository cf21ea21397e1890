"""Time the butterfly projection on one thread and check what it recovers: `python benchmarks/projection.py`.

Stores results/butterfly_projection.jsonl, one line per case: the error of float32 factors, and the least, median and
largest of 20 times. Hadamard matrices are true butterflies of radix 2; a dense SVD of the same size is the yardstick.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import torch

from structlin.fitting.fit import fit
from structlin.fitting.linalg import butterfly_projection
from structlin.structures import Butterfly

RESULT = Path(__file__).resolve().parent / "results" / "butterfly_projection.jsonl"
RUNS = 20


def hadamard(n: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def case(n: int) -> dict[str, object]:
    weight, modes = hadamard(n), (2,) * (n.bit_length() - 1)
    error = fit(weight, Butterfly(radix=2)).error
    assert error < 1e-6, error
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        butterfly_projection(weight, modes, modes)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    if n <= 1024:
        torch.linalg.svd(weight)
    svd = time.perf_counter() - start if n <= 1024 else None
    times = {"least_s": min(seconds), "median_s": statistics.median(seconds), "largest_s": max(seconds), "svd_s": svd}
    return {"n": n, "radix": 2, "error": error, **times}


def main() -> None:
    torch.set_num_threads(1)
    about = {
        "command": "python benchmarks/projection.py", "date": time.strftime("%Y-%m-%d"), "threads": 1, "runs": RUNS,
        "dtype": "float32", "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    lines = [json.dumps(case(n) | about) for n in (1024, 4096)]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
