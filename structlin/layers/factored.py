"""What every module with a structured weight shares: its equation, the factors as parameters, their counts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from structlin.equation.structure import Structure, shown
from structlin.equation.unfolding import unfoldings
from structlin.layers.init import initial_factors
from structlin.layers.quantized import QuantizedFactor
from structlin.runtime import planner
from structlin.runtime.eager import has_values
from structlin.runtime.execution import Execution
from structlin.runtime.quantized import Format


class Factored(nn.Module):
    """Hold the factors of a structured matrix as parameters, under the names of the equation (abstract).

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        bias: learn an additive bias.
        structure: a Structure; open fields are filled in.
        stack: leading sizes of every learned factor and of the bias: () for one matrix, (experts,) for one each.
        device: of the parameters.
        dtype: of the parameters, any float or complex dtype.
    Raises:
        ValueError: if a size is below 1 or the structure does not fit the sizes.
        TypeError: if a size or a field of the structure is of the wrong kind.
    """

    in_features: int
    out_features: int
    structure: Structure

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        structure: Structure,
        stack: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = operator.index(in_features), operator.index(out_features)
        if min(in_features, out_features, *stack) < 1:
            sizes = f"in_features={in_features}, out_features={out_features}" + (f", stack={stack}" if stack else "")
            raise ValueError(f"{sizes}; sizes are whole numbers from 1")
        self.in_features = in_features
        self.out_features = out_features
        self.stack = stack
        self.structure = structure.resolve(in_features, out_features)
        self.spec = self.structure.spec(in_features, out_features)
        for factor, shape in zip(self.spec.factors, self.spec.shapes, strict=True):
            if factor.name == "bias" or hasattr(type(self), factor.name):
                raise ValueError(f"the factor name {factor.name!r} is an attribute of every layer; choose another name")
            if factor.learned:
                empty = torch.empty((*stack, *shape), device=device, dtype=dtype)
                self.register_parameter(factor.name, nn.Parameter(empty))
            else:
                self.register_buffer(factor.name, torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty((*stack, out_features), device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._execution = Execution(self.spec)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors that give the outputs the standard deviation of a fresh `nn.Linear`'s (`initial_factors`).

        Raises:
            ValueError: if factors are quantised.
        """
        if self.formats:
            raise ValueError(f"factors {[*self.formats]} are quantised and cannot be drawn; build a new layer")
        sample = self.factors[0]
        if has_values(sample):
            wide = sample.dtype if sample.is_complex() else torch.promote_types(sample.dtype, torch.float32)
            with torch.no_grad(), torch.device("cpu"):
                for factors in self._matrices():
                    for factor, value in zip(factors, initial_factors(self.spec, dtype=wide), strict=True):
                        factor.copy_(value)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            with torch.no_grad():
                real = torch.view_as_real(self.bias) if self.bias.is_complex() else self.bias
                real.uniform_(-bound, bound)

    def fill(self, factors: Sequence[Tensor], bias: Tensor | None, requires_grad: bool = True) -> None:
        """Put values in place of the parameters (of a layer on the meta device, say); the bias is copied."""
        for factor, value in zip(self.spec.factors, factors, strict=True):
            if factor.learned:
                setattr(self, factor.name, nn.Parameter(value, requires_grad=requires_grad))
            else:
                setattr(self, factor.name, value)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors of the equation, in its order; those that are quantised are computed anew."""
        held = (getattr(self, factor.name) for factor in self.spec.factors)
        return tuple(value() if isinstance(value, QuantizedFactor) else value for value in held)

    def factors_of(self, number: int) -> tuple[Tensor, ...]:
        """The tensors of the equation of one matrix of the stack."""
        held = [(factor, getattr(self, factor.name)) for factor in self.spec.factors]
        return tuple(
            value(number) if isinstance(value, QuantizedFactor) else value[number] if factor.learned else value
            for factor, value in held
        )

    @property
    def is_trained(self) -> bool:
        """Whether a dense weight in place of the factors is to be trained: one of them is, or is quantised."""
        return bool(self.formats) or any(factor.requires_grad for factor in self.factors)

    @property
    def formats(self) -> dict[str, Format]:
        """The integer formats of the factors that are quantised, by name."""
        return {name: held.form for name, held in self._modules.items() if isinstance(held, QuantizedFactor)}

    def hold(self, name: str, factor: Tensor | QuantizedFactor) -> None:
        """Put a parameter, a constant or a quantised factor in the place of a factor."""
        if isinstance(factor, QuantizedFactor) and name in self._parameters:
            delattr(self, name)  # torch refuses a module under the name of a parameter
        setattr(self, name, factor)
        self._execution.forget()

    def hold_unfilled(self, formats: Mapping[str, Format]) -> Self:
        """Put quantised factors without values in place of parameters, by name: for values that are loaded next.

        Raises:
            ValueError: if a name is no learned factor, or a format does not fit it.
        """
        learned = {f.name: u for f, u in zip(self.spec.factors, unfoldings(self.spec), strict=True) if f.learned}
        if unknown := formats.keys() - learned.keys():
            raise ValueError(f"{sorted(unknown)} are no learned factors of {self.structure}; it has {sorted(learned)}")
        for name, form in formats.items():
            old = self.get_parameter(name)
            options: Any = {"device": old.device, "dtype": old.dtype}
            self.hold(name, QuantizedFactor(form, learned[name], self.stack, **options))
        return self

    @property
    def weight_id(self) -> tuple[int, ...]:
        """What layers with one weight have in common: the identities of all factors that are learned.

        Constant factors are buffers, which a change of dtype replaces, and parametrised ones are computed anew.
        """
        codes = (held.codes for held in self._modules.values() if isinstance(held, QuantizedFactor))
        return (*(id(p) for name, p in self.named_parameters() if name != "bias"), *map(id, codes))

    def _matrices(self) -> list[tuple[Tensor, ...]]:
        """Return the factors of each matrix of the stack; constants are the same in all."""
        if not self.stack:
            return [self.factors]
        (count,) = self.stack
        columns = [
            tensor.unbind() if factor.learned else (tensor,) * count
            for factor, tensor in zip(self.spec.factors, self.factors, strict=True)
        ]
        return list(zip(*columns, strict=True))

    @property
    def num_parameters(self) -> int:
        """Learned entries of the factors (the bias excluded)."""
        return self.spec.num_parameters * math.prod(self.stack)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors as they are stored (the bias excluded)."""
        held = (getattr(self, factor.name) for factor in self.spec.factors if factor.learned)
        return sum(value.nbytes for value in held)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the cheaper sequential contraction for one row, a multiply and an add counted as 2."""
        return planner.flops_per_token(self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._execution.forget()  # dtype and device may change inside the same parameters
        return super()._apply(fn, recurse)

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"input has shape {tuple(x.shape)}; its last axis must be in_features={self.in_features}")

    def extra_repr(self) -> str:
        """Sizes, hyperparameters and the share of the dense parameters that is kept."""
        fields = "".join(f", {name}={value}" for name, value in shown(self.structure).items())
        if formats := sorted({str(form) for form in self.formats.values()}):
            fields += f", quantized={'+'.join(formats)}"
        stack = f"experts={self.stack[0]}, " if self.stack else ""
        return (
            f"{stack}in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{fields}, parameters={self.num_parameters} ({self.spec.ratio:.3g} of dense)"
        )
