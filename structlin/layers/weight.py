"""The weight of a structured layer as other code reads it: a tensor that is built only where it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from structlin.equation.spec import Spec
from structlin.runtime import contract

_PROPERTIES = (
    "device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu",
    "itemsize", "layout", "nbytes", "ndim", "shape",
)  # fmt: skip
_METHODS = (
    "__len__", "dim", "element_size", "get_device", "is_complex", "is_floating_point", "ndimension", "nelement",
    "numel", "size",
)  # fmt: skip
# What is known of a weight without building it.
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_complex, torch.is_floating_point, torch.numel]
)
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class LazyWeight(Tensor):
    """Stand for the dense matrix of factors: shape, dtype, device and the like cost nothing.

    Every other operation builds the matrix (`to_dense`, differentiable), works on it and returns plain tensors; nothing
    is kept, so that a later operation sees the factors as they are then. Writes go to a temporary and are lost.
    `torch.overrides.has_torch_function` is true of it: fast paths that read weights in place of calling layers
    (`nn.TransformerEncoderLayer` in eval) leave it alone and call the layers.
    `nn.Parameter` takes only what `to_dense().detach()` returns.

    Args:
        spec: the structured matrix.
        factors: one tensor per factor of `spec`, in its order.
    """

    _spec: Spec
    _factors: Sequence[Tensor]

    def __new__(cls, spec: Spec, factors: Sequence[Tensor]) -> Self:
        """Make a tensor without storage."""
        like = factors[0]
        shape = spec.out_features, spec.in_features
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device, layout=like.layout)
        weight._spec, weight._factors = spec, factors
        return weight

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """Build the matrix, as by `StructuredLinear.to_dense`."""
        return contract.to_dense(self._spec, self._factors)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer from the metadata, or run the function on the dense matrix."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func == _REQUIRES_GRAD:
            return torch.is_grad_enabled() and any(factor.requires_grad for factor in args[0]._factors)
        return func(*_built(args), **_built(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse operators that come past `__torch_function__`, where a gradient would be lost."""
        raise TypeError(
            f"{func} got the weight of a structured layer where functions of torch are not overridden; "
            "pass layer.to_dense()"
        )


def _built(value: Any) -> Any:
    """Put the dense matrix in place of every lazy weight in nested arguments."""
    if isinstance(value, LazyWeight):
        return value.to_dense()
    if type(value) in (list, tuple):
        return type(value)(map(_built, value))
    return {key: _built(item) for key, item in value.items()} if type(value) is dict else value
