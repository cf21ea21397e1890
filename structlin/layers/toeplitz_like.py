"""Matrices of low displacement rank: sums of products of circulant and skew-circulant matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Self

from structlin.fitting.linalg import working_dtype


class ToeplitzLikeLinear(nn.Module):
    """Apply a matrix of low displacement rank: the sum of r products of a circulant and a skew-circulant matrix.

    W = sum_k C(left_k) S(right_k), C(a)[o, i] = a[(o - i) mod n], S(b) the same with the sign of b turned where it
    wraps around; all matrices whose displacement Z(1) W - W Z(-1) has rank r or less are of this form (Z(f): the cyclic
    shift with f in the corner). Products, inverses and sums of Toeplitz matrices have a small r.
    Cost: 2 n r parameters and O(r n log n) FLOPs per token.

    Args:
        features: n, the size of input and output.
        bias: learn an additive bias.
        rank: r.
        device: of the parameters.
        dtype: of the parameters, any float dtype; computed in float32 or float64.
    Raises:
        ValueError: if rank is not in 1..n.
    Source: Pan 2001, Structured matrices and polynomials; Thomas et al. 2018, Learning compressed transforms with low
        displacement rank.
    Example:
        >>> ToeplitzLikeLinear(64, rank=2).num_parameters
        256
    """

    def __init__(
        self,
        features: int,
        bias: bool = True,
        *,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= features:
            raise ValueError(f"rank={rank} is outside 1..{features}")
        self.in_features = self.out_features = features
        self.rank = rank
        self.left = nn.Parameter(torch.empty(rank, features, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(rank, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors that give the outputs the standard deviation of a fresh `nn.Linear`'s."""
        n = self.in_features
        std = (3 * n * n * self.rank) ** -0.25  # an entry of the product is a sum over n places and r terms
        nn.init.normal_(self.left, std=std)
        nn.init.normal_(self.right, std=std)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(n), 1 / math.sqrt(n))

    @property
    def num_parameters(self) -> int:
        """Entries of the factors (the bias excluded)."""
        return self.left.numel() + self.right.numel()

    @property
    def weight(self) -> Tensor:
        """W, built at each access; not a parameter."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """Build W, differentiable."""
        return self._apply_to(torch.eye(self.in_features).to(self.left)).mT

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x of shape (..., n)."""
        y = self._apply_to(x)
        return y if self.bias is None else y + self.bias

    def _apply_to(self, x: Tensor) -> Tensor:
        n = self.in_features
        if x.numel() == 0:  # FFTs of no rows fail in MKL: one row, cut to none
            return self._apply_to(x.new_zeros(1, n))[:0].reshape(x.shape) + x
        turn = torch.polar(torch.ones(n, dtype=torch.float64), math.pi * torch.arange(n, dtype=torch.float64) / n)
        turn = turn.to(torch.promote_types(x.dtype, torch.complex64)).to(x.device)  # skew-circulant = turned circulant
        inner = torch.fft.ifft(torch.fft.fft(x.unsqueeze(-2) * turn) * torch.fft.fft(self.right * turn)) * turn.conj()
        summed = (torch.fft.fft(inner.real) * torch.fft.fft(self.left.to(inner.real.dtype))).sum(-2)
        return torch.fft.ifft(summed).real.to(x.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int) -> Self:
        """Take the leading singular vectors of the displacement of a square weight: exact if it has rank r or less.

        Raises:
            ValueError: if the weight is not square.
        """
        n = linear.in_features
        if linear.out_features != n:
            raise ValueError(f"{linear} is not square; a displacement of this kind needs as many outputs as inputs")
        layer = cls(n, linear.bias is not None, rank=rank, device=linear.weight.device, dtype=linear.weight.dtype)
        with torch.no_grad():
            weight = linear.weight.to(working_dtype(linear.weight))
            turned = weight.roll(-1, 1)
            turned[:, -1] = -turned[:, -1]  # W Z_-1
            u, s, v = torch.linalg.svd(weight.roll(1, 0) - turned, full_matrices=False)
            # Z_1 W - W Z_-1 = sum_k g_k h_k^T  <=>  W = sum_k C(g_k) S(J h_k) / 2, J the reversal.
            scale = (s[:rank] / 2).sqrt()
            layer.left.copy_((u[:, :rank] * scale).mT)
            layer.right.copy_((v[:rank] * scale.unsqueeze(1)).flip(1))
            if layer.bias is not None and linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def extra_repr(self) -> str:
        """Size, rank and number of parameters."""
        return (
            f"features={self.in_features}, rank={self.rank}, bias={self.bias is not None}, "
            f"parameters={self.num_parameters}"
        )
