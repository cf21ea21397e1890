"""The algebra of tensors in the TT format (`structlin.tensor_train`): results and times beside other libraries, growth.

    pip install torchTT tntorch tensorly && python benchmarks/tensor_train.py

Random tensors of `d` modes of size `n` and rank `r`, matrices of `d` modes n x n, in float64 on one thread. *ours*:
median milliseconds of processor time of alternated calls; the other columns are that of a library, and of the same
operation on full tensors where they have at most 2^22 entries (`--entries`), as multiples of ours. *difference*:
largest relative difference (Frobenius norm of the full tensors, or of the entries at 1,000 random places of large ones)
between our result and the others'.
*round* is of a sum of two, back to the ranks of the sum at 1e-10 (`+` itself not counted). A library that is not
installed, or has no such operation, is left out.

*growth*: the time of our operation at d, n, r = 8, 16, 12, and the factor by which it grows when one of them doubles;
in brackets that of the leading term of its cost. Stores results/<name>.jsonl, .md, and <name>_growth.*.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _speed import median_seconds
from _weights import RESULTS, environment, say, store
from torch import Tensor

from structlin.tensor_train import TT, TTMatrix

CASES = [(3, 16, 4), (4, 10, 8), (6, 10, 8), (6, 32, 16), (10, 4, 8), (10, 16, 12), (20, 2, 16), (40, 8, 8)]
BASE = (8, 16, 12)
LEAST, ROUNDS = 1e-2, 7  # seconds of a sample; samples
COLUMNS = {
    "operation": ("operation", ""), "d": ("d", ""), "n": ("n", ""), "r": ("r", ""), "ours, ms": ("ours", ".3f"),
    "torchTT": ("torchtt", ".2f"), "tntorch": ("tntorch", ".2f"), "tensorly": ("tensorly", ".2f"),
    "full tensors": ("full", ".2f"), "difference": ("difference", ".1e"),
}  # fmt: skip
# operation -> (how the leading term of its cost grows when d, n or r doubles)
GROWTH = {
    "+": (2, 2, 4), "*": (2, 2, 16), "sum": (2, 2, 4), "dot": (2, 2, 8), "norm": (2, 2, 8), "round": (2, 2, 8),
    "matrix @ vector": (2, 4, 16),
}  # fmt: skip

Call = Callable[[], Any]


def drawn(d: int, n: int, r: int, seed: int) -> TT:
    return TT.randn(*[n] * d, rank=r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_matrix(d: int, n: int, r: int) -> TTMatrix:
    cores = drawn(d, n * n, r, 3).cores
    return TTMatrix([core.reshape(core.shape[0], n, n, core.shape[-1]) / n**0.5 for core in cores])


def ours(a: TT, b: TT, m: TTMatrix, dense: Tensor | None) -> dict[str, Call]:
    both, double = a + b, a + a * 0.5
    calls: dict[str, Call] = {
        "+": lambda: a + b, "*": lambda: a * b, "sum": a.sum, "dot": lambda: a.dot(b), "norm": both.norm,
        "round": lambda: double.round(tolerance=1e-10), "matrix @ vector": lambda: m @ a,
    }  # fmt: skip
    if dense is not None:
        calls["full"] = a.full
        calls["TT-SVD"] = lambda: TT.from_full(dense, tolerance=1e-10)
        calls["matrix @ full vector"] = lambda: m @ dense.flatten()
    return calls


def torchtt(a: TT, b: TT, m: TTMatrix, dense: Tensor | None) -> dict[str, Call]:
    tt = importlib.import_module("torchtt")
    x, y, w = (tt.TT(list(each.cores)) for each in (a, b, m))
    both, double = x + y, x + x * 0.5
    calls: dict[str, Call] = {
        "+": lambda: x + y, "*": lambda: x * y, "sum": x.sum, "dot": lambda: tt.dot(x, y), "norm": both.norm,
        "round": lambda: double.round(1e-10), "matrix @ vector": lambda: w @ x,
    }  # fmt: skip
    if dense is not None:
        calls["full"] = x.full
        calls["TT-SVD"] = lambda: tt.TT(dense, eps=1e-10)
        calls["matrix @ full vector"] = lambda: w @ dense
    return calls


def tntorch(a: TT, b: TT, m: TTMatrix, dense: Tensor | None) -> dict[str, Call]:
    tn = importlib.import_module("tntorch")
    x, y = (tn.Tensor(list(each.cores)) for each in (a, b))
    both, double = x + y, x + x * 0.5

    def rounded() -> Any:
        found = double.clone()  # it works in place
        found.round_tt(eps=1e-10)
        return found

    calls: dict[str, Call] = {
        "+": lambda: x + y, "*": lambda: x * y, "sum": lambda: tn.sum(x), "dot": lambda: tn.dot(x, y),
        "norm": lambda: tn.norm(both), "round": rounded,
    }  # fmt: skip
    if dense is not None:
        calls["full"] = x.torch
        calls["TT-SVD"] = lambda: tn.Tensor(dense, ranks_tt=max(a.ranks))
    return calls


def tensorly(a: TT, b: TT, m: TTMatrix, dense: Tensor | None) -> dict[str, Call]:
    tl = importlib.import_module("tensorly")
    tl.set_backend("pytorch")
    decompose = importlib.import_module("tensorly.decomposition").tensor_train
    if dense is None:
        return {}
    x = importlib.import_module("tensorly.tt_tensor").TTTensor(list(a.cores))
    return {"full": x.to_tensor, "TT-SVD": lambda: decompose(dense, [1, *a.ranks, 1])}


def full(a: TT, b: TT, m: TTMatrix, dense: Tensor | None) -> dict[str, Call]:
    if dense is None:
        return {}
    x, y = a.full(), b.full()
    return {
        "+": lambda: x + y, "*": lambda: x * y, "sum": x.sum, "dot": lambda: torch.dot(x.flatten(), y.flatten()),
        "norm": (x + y).norm,
    }  # fmt: skip


LIBRARIES: dict[str, Callable[..., dict[str, Call]]] = {
    "torchtt": torchtt, "tntorch": tntorch, "tensorly": tensorly, "full": full,
}  # fmt: skip


def cores_of(result: Any) -> TT | None:
    """Read another library's tensor; None for what is full."""
    cores = getattr(result, "cores", getattr(result, "factors", None))
    return (
        result
        if isinstance(result, TT)
        else None
        if cores is None
        else TT([c.reshape(c.shape[0], -1, c.shape[-1]) for c in cores])
    )


def difference(found: Any, wanted: Any) -> float:
    """Compare two results, which may be full or in the format."""
    a, b = cores_of(found), cores_of(wanted)
    if a is not None and b is not None:  # at random places: full tensors may be too large
        generator = torch.Generator().manual_seed(0)
        places = tuple(torch.randint(n, (1000,), generator=generator) for n in a.shape)
        found, wanted = a[places], b[places]
    else:
        found, wanted = (
            torch.as_tensor(x if t is None else t.full(), dtype=torch.float64).flatten()
            for x, t in ((found, a), (wanted, b))
        )
    return ((found - wanted).norm() / wanted.norm()).item()


def measure(
    d: int, n: int, r: int, libraries: Mapping[str, Callable[..., dict[str, Call]]], entries: int
) -> list[dict[str, Any]]:  # fmt: skip
    a, b, m = drawn(d, n, r, 1), drawn(d, n, r, 2), as_matrix(d, n, r)
    dense = a.full() if n**d <= entries else None
    mine = ours(a, b, m, dense)
    others = {name: make(a, b, m, dense) for name, make in libraries.items()}
    rows = []
    for operation, call in mine.items():
        theirs = {name: calls[operation] for name, calls in others.items() if operation in calls}
        apart = [difference(call(), other()) for other in theirs.values()]
        base, *seconds = median_seconds([call, *theirs.values()], LEAST, ROUNDS, time.process_time)
        ratios = {name: each / base for name, each in zip(theirs, seconds, strict=True)}
        rows.append({"operation": operation, "d": d, "n": n, "r": r, "ours": 1e3 * base,
                     "difference": max(apart, default=None)} | ratios)  # fmt: skip
    return rows


def growth() -> list[dict[str, Any]]:
    sizes = [BASE, *(tuple(2 * s if k == j else s for k, s in enumerate(BASE)) for j in range(3))]
    found = []
    for d, n, r in sizes:
        calls = ours(drawn(d, n, r, 1), drawn(d, n, r, 2), as_matrix(d, n, r // 4), None)
        seconds = median_seconds([calls[name] for name in GROWTH], LEAST, ROUNDS, time.process_time)
        found.append(dict(zip(GROWTH, seconds, strict=True)))
    base, *doubled = found
    return [
        {"operation": name, "ours": 1e3 * base[name]}
        | {
            key: f"{each[name] / base[name]:.1f} ({power})"
            for key, each, power in zip("dnr", doubled, GROWTH[name], strict=True)
        }
        for name in GROWTH
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2**22, help="of the largest full tensor")
    parser.add_argument("--name", default="tensor_train", help="of the stored tables")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about, libraries = environment(argv), {"full": full}
    for name in ("torchtt", "tntorch", "tensorly"):
        try:
            importlib.import_module(name)
            libraries[name] = LIBRARIES[name]
        except ImportError as error:
            say(f"{name} is left out: {error}")
    rows = []
    for case in CASES:
        say(str(case))
        rows += measure(*case, libraries, args.entries)
    notes = __doc__.partition("tensor_train.py\n\n")[2].strip()
    store(RESULTS, args.name, "Algebra of tensor trains", notes, about, rows, COLUMNS)
    head = {"operation": ("operation", ""), "ours, ms": ("ours", ".3f")} | {f"2 {k}": (k, "") for k in "dnr"}
    store(RESULTS, f"{args.name}_growth", "Growth of the costs", notes, about, growth(), head)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
