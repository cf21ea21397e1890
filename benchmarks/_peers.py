"""Layers of other libraries that apply the very same matrix as one of ours, from copies of its factors.

Each library is imported only when asked for; one that is not installed is left out with a line that says so. All of
them are given float32 and unpadded sizes; pyfaust has no gradients.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from _speed import Subject
from einops import rearrange
from torch import Tensor, nn

from structlin.equation.structure import Structure
from structlin.layers.linear import StructuredLinear
from structlin.structures import PHM, Butterfly, Kaleidoscope, Kronecker, TensorTrain


class Applied(nn.Module):
    """Add a bias to what a function, prepared once from copies of the factors, makes of the input."""

    def __init__(
        self, prepare: Callable[[Sequence[Tensor]], Callable[[Tensor], Tensor]], factors: Sequence[Tensor], bias: Tensor
    ) -> None:  # fmt: skip
        super().__init__()
        self.factors = nn.ParameterList(factor.detach().clone().contiguous() for factor in factors)
        self.bias = nn.Parameter(bias.detach().clone())
        self.run = prepare(tuple(self.factors))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + self.bias


# Tensor trains ---------------------------------------------------------------------------------------------------


def tt_cores(layer: StructuredLinear) -> list[Tensor]:
    """Cores (r, o, i, r'), the outer ranks 1."""
    first, *middle, last = (core.detach() for core in layer.factors)
    return [first.unsqueeze(0), *middle, last.unsqueeze(-1)]


def tltorch_layer(layer: StructuredLinear, tltorch: Any) -> nn.Module:
    assert isinstance(layer.structure, TensorTrain)
    ranks, out_modes, in_modes = layer.structure.sizes()
    module = tltorch.FactorizedLinear(in_modes, out_modes, factorization="blocktt", rank=(1, *ranks, 1))
    assert module.implementation == "factorized"
    with torch.no_grad():
        for factor, core in zip(module.weight.factors, tt_cores(layer), strict=True):
            factor.copy_(core)
        module.bias.copy_(layer.bias)
    return module


class TorchTT(nn.Module):
    """`torchtt.nn.LinearLayerTT` on rows instead of tensors."""

    def __init__(self, inner: nn.Module, in_modes: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        self.in_modes = in_modes

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, *self.in_modes)).reshape(len(x), -1)


def torchtt_layer(layer: StructuredLinear, torchtt: Any) -> nn.Module:
    assert isinstance(layer.structure, TensorTrain)
    ranks, out_modes, in_modes = layer.structure.sizes()
    inner = torchtt.LinearLayerTT(list(in_modes), list(out_modes), [1, *ranks, 1])
    with torch.no_grad():
        for parameter, core in zip(inner.cores, tt_cores(layer), strict=True):
            parameter.copy_(core)
        inner.bias.copy_(layer.bias.reshape(out_modes))
    return TorchTT(inner, in_modes)


# Kronecker -------------------------------------------------------------------------------------------------------


def linear_operator_layer(layer: StructuredLinear, operators: Any) -> nn.Module:
    def prepare(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        terms = operators.KroneckerProductLinearOperator(*map(operators.DenseLinearOperator, factors))
        return lambda x: (terms @ x.mT).sum(0).mT

    return Applied(prepare, layer.factors, layer.bias)


def fastkron_layer(layer: StructuredLinear, fastkron: Any) -> nn.Module:
    def prepare(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: sum(fastkron.gemkm(x, list(pair)) for pair in zip(*factors, strict=True))

    return Applied(prepare, [factor.mT for factor in layer.factors], layer.bias)  # (terms, i, o)


# Butterflies -----------------------------------------------------------------------------------------------------


def kronecker_sparse(layer: StructuredLinear) -> list[Tensor]:
    """Stages as values (a, new, old, d) of matrices with the support I_a (x) ones (x) I_d, the last applied first."""
    (eq,) = layer.spec.equations
    current = list(eq.inputs)
    stages: list[Tensor] = []
    for factor, values in zip(eq.factors, layer.factors, strict=True):
        *_, new, old = factor.modes
        position = current.index(old)
        sizes = values.shape[-2:]
        stage = values.detach().reshape(eq.numel(current[:position]), eq.numel(current[position + 1 :]), *sizes)
        stages.insert(0, rearrange(stage, "a d new old -> a new old d").contiguous())
        current[position] = new
    return stages


def lazylinop_layer(layer: StructuredLinear, butterfly: Any) -> nn.Module:
    def prepare(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        product = butterfly.ksm(list(factors))
        return lambda x: (product @ x.mT).mT

    return Applied(prepare, kronecker_sparse(layer), layer.bias)


def stage_matrix(stage: Tensor) -> Tensor:
    """The dense matrix of a stage (a, new, old, d), shape (a new d, a old d)."""
    a, new, old, d = stage.shape
    dense = stage.new_zeros(a, new, d, a, old, d)
    dense.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).copy_(rearrange(stage, "a new old d -> new old a d"))
    return rearrange(dense, "a1 new d1 a2 old d2 -> (a1 new d1) (a2 old d2)")


class Faust(nn.Module):
    """A product of sparse matrices in numpy; it has no gradients and refuses inputs that need them."""

    def __init__(self, product: Any, entries: int, bias: Tensor) -> None:
        super().__init__()
        self.product = product
        self.entries = nn.Parameter(torch.empty(entries), requires_grad=False)  # to be counted only
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.product @ x.numpy().T).mT + self.bias


def faust_layer(layer: StructuredLinear, pyfaust: Any, sparse: Any) -> nn.Module:
    stages = kronecker_sparse(layer)
    matrices = [sparse.csr_matrix(stage_matrix(stage).numpy()) for stage in stages]
    return Faust(pyfaust.Faust(matrices), sum(stage.numel() for stage in stages), layer.bias)


# All of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """How a library applies the matrix of some of our structures.

    Args:
        structures: those.
        modules: what it imports.
        build: from a layer of ours and the imported modules.
    """

    structures: tuple[type[Structure], ...]
    modules: tuple[str, ...]
    build: Callable[..., nn.Module]


PEERS = {
    "tensorly-torch": Peer((TensorTrain,), ("tltorch",), tltorch_layer),
    "torchTT": Peer((TensorTrain,), ("torchtt.nn",), torchtt_layer),
    "linear_operator": Peer((Kronecker, PHM), ("linear_operator.operators",), linear_operator_layer),
    "pyfastkron": Peer((Kronecker, PHM), ("pyfastkron.fastkrontorch",), fastkron_layer),
    "lazylinop": Peer((Butterfly, Kaleidoscope), ("lazylinop.butterfly",), lazylinop_layer),
    "pyfaust": Peer((Butterfly, Kaleidoscope), ("pyfaust", "scipy.sparse"), faust_layer),
}


@cache
def imported(library: str) -> tuple[Any, ...] | str:
    """The modules of a library, or why there are none."""
    try:
        return tuple(map(importlib.import_module, PEERS[library].modules))
    except (ImportError, AttributeError) as error:  # lazylinop without pandas has the latter
        return f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
    """Versions of the libraries that can be imported."""
    return {library: importlib.metadata.version(library) for library in PEERS if not isinstance(imported(library), str)}


def counterparts(layer: StructuredLinear, say: Callable[[str], None]) -> dict[str, Subject]:
    """Layers that apply the same matrix, by library; what is left out is said."""
    found = {}
    for library, peer in PEERS.items():
        modules = imported(library)
        if not isinstance(layer.structure, peer.structures):
            continue
        if isinstance(modules, str):
            say(f"  {library} left out: {modules}")
        elif layer.factors[0].dtype != torch.float32 or padded(layer) or not all(f.learned for f in layer.spec.factors):
            say(f"  {library} left out: only float32, unpadded and learned factors have a counterpart there")
        else:
            found[library] = Subject.of(library, layer, module=peer.build(layer, *modules))
    return found


def padded(layer: StructuredLinear) -> bool:
    """Whether an equation covers more than the layer."""
    sizes = (layer.in_features, layer.out_features)
    return any((eq.padded_in, eq.padded_out) != sizes for eq in layer.spec.equations)
