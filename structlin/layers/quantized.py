"""A factor that is stored as integers and scales, in the place of a parameter of a structured layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from structlin.equation.unfolding import Unfolding
from structlin.runtime.kernels import quantized_chain_of
from structlin.runtime.quantized import Format, check_format, dequantize


class QuantizedFactor(nn.Module):
    """Hold a factor as integers and scales; calling it returns the factor, in the dtype of the scales.

    Both are buffers: an optimizer does not see them, `state_dict` does. `train_scales_` makes the scales parameters.

    Args:
        form: of the integers.
        unfolding: of the factor.
        stack: leading sizes, as of the layer.
        device: of the buffers.
        dtype: of the scales.
    Raises:
        ValueError: if the format does not fit the factor.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, form: Format, unfolding: Unfolding, stack: tuple[int, ...] = (), *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_format(form, unfolding)
        self.form, self.unfolding, self.stack = form, unfolding, stack
        codes = torch.zeros(*stack, *form.codes_shape(unfolding), dtype=form.dtype, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(*stack, *form.scale_shape(unfolding), dtype=dtype, device=device))

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, form: Format, unfolding: Unfolding) -> QuantizedFactor:
        """Hold these tensors."""
        found = cls(form, unfolding, tuple(codes.shape[:-2]), device="meta", dtype=scale.dtype)
        found.codes, found.scale = codes, scale
        return found

    def forward(self, index: Any = ...) -> Tensor:
        """Return the factor, or that of one matrix of a stack."""
        return dequantize(self.codes[index], self.scale[index], self.form, self.unfolding)

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def extra_repr(self) -> str:
        """Format, and the sizes of the matrix."""
        return f"{self.form}, {self.unfolding.rows} x {self.unfolding.columns}, scale of {self.form.rows} rows x " + (
            f"{self.form.columns} columns"
        )


def forward_quantized(layer: Any, x: Tensor) -> Tensor:
    """Apply a `StructuredLinear` with quantised factors: the one place that decides how.

    The native kernel reads the integers as they are; it runs calls that ask for no gradient and are not compiled. In
    plain torch the factors are computed in every call, and contracted as others are; a layer that is frozen
    (`structlin.freeze_`) keeps them as floats, unless their scales are trained.
    """
    if is_compiling():  # the kernel's tables are not traced
        return _plainly(layer, x)
    names = [factor.name for factor in layer.spec.factors]
    held = [layer._modules.get(name) for name in names]
    chain = quantized_chain_of(layer.spec, tuple(each.form if each else None for each in held))
    codes = [each.codes if each else getattr(layer, name) for name, each in zip(names, held, strict=True)]
    scales = [each.scale if each else None for each in held]
    if chain.suits(x, codes, scales, layer.bias):
        return chain(x, codes, scales, layer.bias)
    return _plainly(layer, x)


def _plainly(layer: Any, x: Tensor) -> Tensor:
    execution, source = layer._execution, stored(layer)
    usable = (
        execution.frozen is not None
        and not any(tensor.requires_grad for tensor in source)
        # `train_scales_` and functional_call put other tensors in the place of those that were frozen.
        and all(now is then for now, then in zip(source, execution.source, strict=True))
    )
    result: Tensor = execution(x, (*(execution.frozen if usable else layer.factors), layer.bias))
    return result


def stored(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return the integers and scales that factors of a layer are computed from."""
    held = [each for each in layer._modules.values() if isinstance(each, QuantizedFactor)]
    return tuple(tensor for each in held for tensor in (each.codes, each.scale))


def train_scales_(model: nn.Module, train: bool = True) -> nn.Module:
    """Make the scales of quantised factors parameters that are trained, or buffers again, in place.

    The integers never change in training. Checkpoints are the same in both forms, and load as buffers.

    Args:
        model: any module.
        train: False makes buffers of them.
    Returns:
        The model.
    Example:
        >>> import structlin
        >>> model = structlin.LowRankLinear(64, 64, rank=16)
        >>> report = structlin.quantize_(model, "int8")
        >>> [name for name, _ in train_scales_(model).named_parameters()]
        ['bias', 'left.scale', 'right.scale']
    """
    for module in model.modules():
        if isinstance(module, QuantizedFactor):
            scale = module.scale.detach()
            del module.scale
            if train:
                module.scale = nn.Parameter(scale)
            else:
                module.register_buffer("scale", scale)
    return model
