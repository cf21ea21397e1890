"""The kernel from the distribution structlin-kernels: find the library for this CPU, load it, and differentiate it.

A wheel's library knows torch by its stable ABI alone, which has no autograd: what calls.cpp does in C++ for a local
build is done here in Python, and takes longer.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structlin.runtime.eager import below_autograd
from structlin.runtime.kernels import variants
from structlin.runtime.machines import processor

PACKAGE = "structlin_kernels"
EMPTY = "why-empty.txt"  # in the package: why it holds no library; kernels/setup.py writes it
AGAIN = "install structlin and structlin-kernels again, of one version"


def find() -> tuple[Path | None, list[str]]:
    """Return the library for this CPU; without one the reason, unless structlin-kernels is not installed."""
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None, []
    try:
        return _library(Path(package.submodule_search_locations[0])), []
    except OSError as error:
        return None, [str(error)]


def _library(folder: Path) -> Path:
    """Return the library for this CPU in the folder; OSError says why there is none."""
    if (folder / EMPTY).exists():
        raise OSError(f"structlin-kernels is empty: {(folder / EMPTY).read_text(encoding='utf-8').strip()}")
    variant = variants.fastest_for(platform.machine(), processor().split())
    if variant is None:
        raise OSError(f"structlin-kernels has no library for this {platform.machine()} processor")
    sources = variants.stamp(Path(__file__).parent)
    for path in sorted(folder.glob(f"chain-{variant.name}-{sources}-*.so")):
        if path.name != variants.file_name(variant.name, sources, path.read_bytes()):
            raise OSError(f"{path} is damaged: its content has another hash than its name; {AGAIN}")
        return path
    raise OSError(f"{folder} has no library for {variant.name} of this version's sources ({sources}); {AGAIN}")


def load(path: Path) -> torch.library.Library:
    """Load a library and register how its operator is differentiated; OSError if it does not load."""
    torch.ops.load_library(path)
    library = torch.library.Library("structlin", "FRAGMENT")
    library.impl("chain", chain, "Autograd")
    return library


def chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    """Call the operator `structlin::chain` with a graph where gradients are asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or any(factor.requires_grad for factor in factors)
    ):
        result: Tensor = _Differentiable.apply(x, bias, program, out_features, *factors)
        return result
    return _chain(x, factors, bias, program, out_features)


def _chain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, program: Tensor, out_features: int) -> Tensor:
    with below_autograd():
        result: Tensor = torch.ops.structlin.chain.default(x, factors, bias, program, out_features)
    return result


class _Differentiable(torch.autograd.Function):
    """`Function` of calls.cpp: saves the input and the factors only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, program: Tensor, out_features: int, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.program = program  # not saved as a variable: hooks may hand back a copy, see SPECS in operators.py
        return _chain(x, factors, bias, program, out_features)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *factors = ctx.saved_tensors
        of_x, of_bias, _, _, *of_factors = ctx.needs_input_grad
        wanted = [k for k, needed in enumerate(of_factors) if needed]
        # With create_graph=True the gradients must be differentiable themselves.
        operators = torch.ops.structlin
        backward = operators.chain_differentiable_backward if torch.is_grad_enabled() else operators.chain_backward
        found = iter(backward(dy, x, factors, ctx.program, of_x, wanted))
        dx = next(found) if of_x else None
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if of_bias else None
        return dx, d_bias, None, None, *(next(found) if needed else None for needed in of_factors)
