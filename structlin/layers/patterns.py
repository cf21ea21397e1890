"""Matrices whose entries share values in a pattern: circulant, Toeplitz, diagonal, sparse.

They are the baselines of the tables on K-matrices. A pattern is no equation of small factors: these layers stand beside
`StructuredLinear`, with the same surface, but neither rules nor checkpoints of `structlin.save` know them.
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

    Cost: one parameter for each number in the pattern; the FLOPs of a dense product, unless a subclass knows better.

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


class ToeplitzLinear(PatternLinear):
    """Apply a matrix that is constant along its diagonals, W[o, i] = values[o - i + in_features - 1], by FFT.

    Cost: in + out - 1 parameters; O(N log N) FLOPs per token, N = in + out - 1.

    Example:
        >>> ToeplitzLinear(64, 32).num_parameters
        95
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        rows, columns = torch.arange(out_features).unsqueeze(1), torch.arange(in_features)
        super().__init__(in_features, out_features, bias, pattern=rows - columns + in_features - 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., in_features)."""
        found = _convolved(x, self.values, self.in_features + self.out_features - 1)
        y = found[..., self.in_features - 1 :].to(x.dtype)  # places from in - 1 on do not wrap around
        return y.contiguous() if self.bias is None else y + self.bias


class CirculantLinear(PatternLinear):
    """Apply W[o, i] = values[(o - i) mod n], n the larger size, by FFT: diagonal in the Fourier basis.

    Cost: n parameters; O(n log n) FLOPs per token.

    Example:
        >>> CirculantLinear(64, 64).num_parameters
        64
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        rows, columns = torch.arange(out_features).unsqueeze(1), torch.arange(in_features)
        pattern = (rows - columns) % max(in_features, out_features)
        super().__init__(in_features, out_features, bias, pattern=pattern, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., in_features)."""
        y = _convolved(x, self.values, len(self.values))[..., : self.out_features].to(x.dtype)
        return y.contiguous() if self.bias is None else y + self.bias


class DiagonalLinear(PatternLinear):
    """Multiply each number by a learned one; where sizes differ, surplus inputs are dropped, surplus outputs zero.

    Cost: min(in, out) parameters and FLOPs per token.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        rows, columns = torch.arange(out_features).unsqueeze(1), torch.arange(in_features)
        pattern = torch.where(rows == columns, columns, -1)
        super().__init__(in_features, out_features, bias, pattern=pattern, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., in_features)."""
        count = len(self.values)
        y = F.pad(x[..., :count] * self.values, (0, self.out_features - count))
        return y if self.bias is None else y + self.bias


class SparseLinear(PatternLinear):
    """Apply a matrix with a share of entries in fixed places, the others zero.

    Cost: round(ratio in out) parameters; the FLOPs of a dense product. The places are drawn at random;
    `from_linear` takes those of the largest |W[o, i]| sqrt(G[i, i]).

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias.
        ratio: share of the entries, 0 to 1.
        places: (out_features, in_features), true where an entry is learned, in place of a ratio.
    Raises:
        ValueError: if there is neither ratio nor places, or both, or the ratio is out of range.
    Source: Sun et al. 2023, Wanda (the choice of places with a Gram).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float | None = None,
        places: Tensor | None = None,
        **options: Any,
    ) -> None:
        if (ratio is None) == (places is None) or not 0 < (1 if ratio is None else ratio) <= 1:
            raise ValueError(f"ratio={ratio}; give a share above 0 and up to 1, or places=, and not both")
        if places is None:
            places = _largest(torch.rand(out_features, in_features), ratio or 1)
        counted = places.flatten().long().cumsum(0).view_as(places) - 1
        super().__init__(in_features, out_features, bias, pattern=torch.where(places, counted, -1), **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, gram: Tensor | None = None, **options: Any) -> Self:
        """Take the entries of the largest scores, and fit them."""
        score = linear.weight.detach().abs()
        if gram is not None:
            score = score * gram.diagonal().to(score).sqrt()
        places = options.pop("places", None)
        places = _largest(score, options.pop("ratio")) if places is None else places
        return super().from_linear(linear, gram=gram, places=places.cpu(), **options)


def _convolved(x: Tensor, kernel: Tensor, n: int) -> Tensor:
    """Return the cyclic convolution of length n of the last axis with a real kernel."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.fft.irfft(torch.fft.rfft(x.to(wide), n) * torch.fft.rfft(kernel.to(wide), n), n)


def _largest(score: Tensor, ratio: float) -> Tensor:
    """Return true in the places of the largest scores, a share of all."""
    count = max(round(ratio * score.numel()), 1)
    places = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    places[score.flatten().topk(count).indices] = True
    return places.view_as(score)
