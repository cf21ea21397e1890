"""One row per structure: adding a structure adds one row here, and all laws hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from structlin.equation.structure import Structure
from structlin.runtime import kernels
from structlin.runtime.kernels import native
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

SIZES = (1, 7, 64, 97, 384, 1000, 1021, 1536)
SMALL_SIZES = ((12, 20), (16, 16), (7, 64), (97, 13))  # (in, out), small enough for every law


@contextmanager
def naming(*case: object) -> Iterator[None]:
    """Name the case in whatever fails inside: for tests that hold several cases in a loop."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{', '.join(map(str, case))}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Case:
    """What the laws need to know about a structure.

    Args:
        families: constructors by a number (rank, terms, ...); at each size the laws take the largest up to 3.
        fixed: members that every size allows.
        small: further members that the small sizes allow.
        nested: whether each family's matrices are among those of the next number, so that the error never grows.
    """

    families: tuple[Callable[[int], Structure], ...] = ()
    fixed: tuple[Structure, ...] = ()
    small: tuple[Structure, ...] = ()
    nested: bool = True

    def at(self, in_features: int, out_features: int) -> list[Structure]:
        """Members for this size, resolved."""
        found = [largest(make, 3, in_features, out_features) for make in self.families]
        return [*found, *(member.resolve(in_features, out_features) for member in self.fixed)]


def largest(make: Callable[[int], Structure], at_most: int, in_features: int, out_features: int) -> Structure:
    """The member with the largest number that the size allows."""
    for number in range(at_most, 1, -1):
        try:
            return make(number).resolve(in_features, out_features)
        except ValueError:
            continue
    return make(1).resolve(in_features, out_features)


CASES = {
    "lowrank": Case((lambda k: LowRank(rank=k),)),
    "kronecker": Case((lambda k: Kronecker(terms=k),), small=(Kronecker(terms=3, shape=((13, 2), (5, 50))),)),
    "phm": Case((lambda k: PHM(n=k),), small=(PHM(n=2), PHM(n=4), PHM(algebra="hamilton")), nested=False),
    "shapeshifter": Case((lambda k: Shapeshifter(rank=k), lambda k: Shapeshifter(rank=k, order="reshape"))),
    "tt": Case(
        (lambda k: TensorTrain(rank=k), lambda k: TensorTrain(rank=k, cores=2), lambda k: TensorTrain(rank=k, cores=4)),
        small=(TensorTrain(rank=(2, 3, 2), cores=4),),
    ),
    "butterfly": Case(fixed=(Butterfly(), Butterfly(radix=2), Butterfly(radix=8))),
    "kmatrix": Case(
        fixed=(Kaleidoscope(), Kaleidoscope(width=2, expansion=2), Kaleidoscope(radix=2), Kaleidoscope(width=1.5))
    ),
    "monarch": Case(
        (lambda k: Monarch(blocks=1, rank=k), lambda k: Monarch(blocks=2**k // 2)),
        small=(Monarch(blocks=4, rank=2),),
        nested=False,
    ),
    "blast": Case((lambda k: Blast(blocks=1, rank=k), lambda k: Blast(blocks=k, rank=1)), nested=False),
    "cp": Case((lambda k: CP(rank=k),)),
    "tucker": Case((lambda k: Tucker(rank=k),), small=(Tucker(rank=3, in_modes=(2, 7, 7), out_modes=(4, 4, 4)),)),
    "conv": Case(
        (
            lambda k: ConvKernel("cp", (2, 2), k),
            lambda k: ConvKernel("tt", (3, 1), k),
            lambda k: ConvKernel("tucker", (2, 3), k),
        ),
        small=(
            ConvKernel("tucker", (2, 2), (3, 2)),
            ConvKernel("cp", (3, 2, 2), 2),
            ConvKernel("tt", (2, 2), (2, 4, 2)),
        ),
    ),
    "kronchain": Case(
        (lambda k: KroneckerChain(terms=k),),
        small=(KroneckerChain(terms=2, depth=3, in_modes=(5, 20), out_modes=(25, 4)),),
        nested=False,
    ),
    "glt": Case(
        fixed=(GLT(groups=(1, 1)),),
        small=(GLT(groups=(1, 2)), GLT(groups=(2, 3, 2), widths=(24, 6)), GLT(groups=(1, 2, 4))),
    ),
    "dense": Case(fixed=(Dense(),)),
    "circulant": Case(fixed=(Circulant(), Circulant(block=1)), small=(Circulant(block=4), Circulant(block=5))),
    "toeplitz": Case((lambda k: Toeplitz(blocks=k),), nested=False),
    "diagonal": Case((lambda k: Diagonal(blocks=k),), fixed=(Diagonal(),), nested=False),
    "sparse": Case((lambda k: Sparse(count=k),), small=(Sparse(count=2, block=4), Sparse(count=40))),
    "sum": Case(
        (lambda k: Sum((LowRank(rank=1), LowRank(rank=k))),),
        fixed=(Sum((LowRank(rank=1), Kaleidoscope())), Sum((LowRank(rank=1), Blast(blocks=1, rank=1)))),
        small=(Sum((LowRank(rank=2), Monarch(blocks=2), Kronecker(terms=2))),),
    ),
}

# (structure, in, out) for the laws that are held at small sizes only.
SMALL = [
    (member, in_features, out_features)
    for case in CASES.values()
    for in_features, out_features in SMALL_SIZES
    for member in (*case.at(in_features, out_features), *case.small)
]
# Members with a closed form, for one ordinary size each.
CLOSED = [member for member, in_features, _ in SMALL if in_features == 12 and not member.refine_steps]
# One member per structure, sizes open.
ONE = {name: (case.small or case.fixed or tuple(make(2) for make in case.families))[-1] for name, case in CASES.items()}


def switch_on(monkeypatch):
    """Build the kernel (once) and switch it on; without a compiler take the one of structlin-kernels, if installed."""
    monkeypatch.setenv(native.SWITCH, "")
    monkeypatch.setattr(native._State, "usable", None)
    try:
        kernels.build()
    except RuntimeError as error:
        if not kernels.available():
            pytest.skip(str(error).splitlines()[0])
    assert kernels.available()
