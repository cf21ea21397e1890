"""A matrix whose entries share values in a pattern of yours.

The usual patterns are structures (`circulant`, `toeplitz`, `diagonal`, `sparse`). One given by a table is no equation:
this layer has the surface of `StructuredLinear`, but neither rules nor checkpoints of `structlin.save` know it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from structlin.fitting.linalg import working_dtype

STEPS = 500  # of conjugate gradients, at most
CLOSE = 1e-12  # squared relative residual at which they stop


class PatternLinear(nn.Module):
    """Apply y = x W^T + b with W[o, i] = values[pattern[o, i]], or 0 where the pattern is -1.

    Cost: one parameter for each number in the pattern; the FLOPs of a dense product.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias.
        pattern: (out_features, in_features), whole numbers from -1.
        device: of parameters and buffers.
        dtype: of the parameters.
    Raises:
        ValueError: if the pattern has other sizes, or leaves out a number below its largest.
    Example:
        >>> layer = PatternLinear(2, 2, bias=False, pattern=torch.tensor([[0, 1], [1, -1]]))
        >>> layer.num_parameters
        2
    """

    pattern: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        used = pattern[pattern >= 0].unique()
        sizes = out_features, in_features
        if pattern.shape != sizes or pattern.min() < -1 or not torch.equal(used, torch.arange(len(used)).to(used)):
            raise ValueError(f"pattern must be {sizes}, of whole numbers from -1 that leave out none below the largest")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("pattern", pattern.to(device=device, dtype=torch.long), persistent=False)
        self.values = nn.Parameter(torch.empty(len(used), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw values that give the outputs the standard deviation of a fresh `nn.Linear`'s."""
        inputs = (self.pattern >= 0).sum().item() / self.out_features  # that an output reads
        nn.init.uniform_(self.values, -1 / math.sqrt(max(inputs, 1)), 1 / math.sqrt(max(inputs, 1)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    @property
    def num_parameters(self) -> int:
        """Learned values (the bias excluded)."""
        return self.values.numel()

    @property
    def weight(self) -> Tensor:
        """W, built at each access; not a parameter."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """Build W, shape (out_features, in_features), differentiable."""
        return F.pad(self.values, (0, 1))[self.pattern]  # -1 is the zero at the end

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., in_features)."""
        return F.linear(x, self.to_dense(), self.bias)

    def fit_(self, linear: nn.Linear, gram: Tensor | None = None) -> Self:
        """Take the bias and the nearest matrix of this pattern, in the Frobenius norm or that of a Gram.

        Without a Gram a value is the mean of its entries; with one, conjugate gradients solve for all values. Optimal.

        Args:
            linear: of the same sizes.
            gram: G = sum x x^T over the layer's inputs, (in, in).
        Raises:
            ValueError: if the sizes differ.
        """
        if linear.weight.shape != self.pattern.shape or (linear.bias is None) != (self.bias is None):
            raise ValueError(
                f"{linear} does not fit a pattern of {tuple(self.pattern.shape)}, or one of them has no bias"
            )
        with torch.no_grad():
            weight = linear.weight.to(working_dtype(linear.weight))
            metric = torch.eye(self.in_features).to(weight) if gram is None else gram.to(weight)
            self.values.copy_(self._solve(weight, metric))
            if self.bias is not None and linear.bias is not None:
                self.bias.copy_(linear.bias)
        return self

    def _solve(self, weight: Tensor, metric: Tensor) -> Tensor:
        places = torch.where(self.pattern < 0, len(self.values), self.pattern).flatten()

        def collected(matrix: Tensor) -> Tensor:
            return matrix.new_zeros(len(self.values) + 1).index_add_(0, places, matrix.flatten())[:-1]

        def normal(values: Tensor) -> Tensor:
            return collected(F.pad(values, (0, 1))[self.pattern] @ metric)

        counts = collected(torch.ones_like(weight) * metric.diagonal())
        wanted = collected(weight @ metric)
        scale = counts.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()  # Jacobi: exact where the metric is diagonal
        values, rest = torch.zeros_like(wanted), scale * wanted
        direction, size = rest, rest.square().sum()
        first = size
        for _ in range(STEPS):
            if size <= CLOSE * first:
                break
            image = scale * normal(scale * direction)
            step = size / (direction * image).sum()
            values, rest = values + step * direction, rest - step * image
            new = rest.square().sum()
            direction, size = rest + new / size * direction, new
        return scale * values

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, gram: Tensor | None = None, **options: Any) -> Self:
        """Build the layer of a dense one's sizes, and fit it; see `fit_`. Other options are those of the class."""
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        return cls(*sizes, device=linear.weight.device, dtype=linear.weight.dtype, **options).fit_(linear, gram)

    def extra_repr(self) -> str:
        """Sizes and number of parameters."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"parameters={self.num_parameters}"
        )
