"""The linear maps of all experts of a mixture in one module, dense or structured: the leaves of opened experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from structlin.equation.structure import Structure
from structlin.fitting.fit import Fit
from structlin.layers.factored import Factored
from structlin.runtime import contract


class ExpertLinear(nn.Module):
    """Apply the dense linear map of one of several experts: y = x weight[expert]^T + bias[expert].

    Args:
        weight: (experts, out_features, in_features); a parameter is held as it is.
        bias: (experts, out_features), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.num_experts, self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Compute the map of one expert for x of shape (..., in_features)."""
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])

    def extra_repr(self) -> str:
        """Sizes, and whether there is a bias."""
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class StructuredExpertLinear(Factored):
    """Apply the structured linear map of one of several experts, all of one structure.

    Each learned factor of the equation is one parameter with a leading mode of experts. `freeze_` does not reach this
    layer: nothing derived from the factors is kept between calls.

    Args:
        num_experts: number of experts.
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias for each expert.
        structure: a Structure; open fields are filled in.
        device: of the parameters.
        dtype: of the parameters.
    Raises:
        ValueError: if a size is below 1 or the structure does not fit the sizes.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        structure: Structure,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, structure=structure, stack=(num_experts,), device=device, dtype=dtype
        )
        self.num_experts = num_experts

    @classmethod
    def from_fits(cls, fits: Sequence[Fit], linear: ExpertLinear) -> Self:
        """Build the layer that holds one fit per expert, all of one structure, in place of a dense leaf."""
        layer = cls(
            linear.num_experts, linear.in_features, linear.out_features, linear.bias is not None,
            structure=fits[0].structure, device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        factors = [
            torch.stack(values) if factor.learned else values[0]
            for factor, *values in zip(layer.spec.factors, *(fit.factors for fit in fits), strict=True)
        ]
        layer.fill(factors, linear.bias, linear.weight.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Compute x W[expert]^T + bias[expert] for x of shape (..., in_features)."""
        self._check(x)
        return self._execution(x, (*self.factors_of(expert), None if self.bias is None else self.bias[expert]))

    def to_dense(self) -> Tensor:
        """Build all matrices, (experts, out_features, in_features), differentiable."""
        return torch.stack([contract.to_dense(self.spec, factors) for factors in self._matrices()])

    def to_linear(self) -> ExpertLinear:
        """Merge into the dense leaf with the same outputs, on the same device, in the same dtype."""
        weight = nn.Parameter(self.to_dense().detach(), requires_grad=self.is_trained)
        bias = None
        if self.bias is not None:
            bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return ExpertLinear(weight, bias).train(self.training)
