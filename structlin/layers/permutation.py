"""A permutation that is learned: the switches of a Benes network, relaxed while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedPermutation(nn.Module):
    """Reorder the last axis: a K-matrix of width 1 whose 2 x 2 blocks are [[p, 1 - p], [1 - p, p]], p learned.

    In training p = sigmoid((logit + noise) / temperature), noise logistic (a binary concrete variable), so the matrix
    is doubly stochastic; lower the temperature as training goes on. In eval each switch is straight where its logit is
    above 0, else crossed: a permutation, and every permutation can be had.
    Cost: n (2 log2(n) - 1) / 2 parameters, O(n log n) FLOPs per token.

    Args:
        features: n, a power of two from 2.
        temperature: of the relaxation, above 0; an attribute, to be changed while training.
        noise: scale of the noise, 0 for none.
        device: of the parameters.
        dtype: of the parameters.
    Raises:
        ValueError: if features is no power of two from 2, or the temperature is not positive.
    Source: Dao et al. 2020, Kaleidoscope (learned permutations); Maddison, Mnih & Teh 2017, Jang, Gu & Poole 2017 (the
        noise).
    Example:
        >>> layer = LearnedPermutation(8).eval()
        >>> sorted(layer(torch.arange(8.0)).tolist()) == list(range(8))
        True
    """

    def __init__(
        self,
        features: int,
        *,
        temperature: float = 1.0,
        noise: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        depth = features.bit_length() - 1
        if features != 2**depth or depth < 1:
            raise ValueError(f"features={features}; a network of switches needs a power of two from 2")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} is not above 0")
        self.in_features = self.out_features = features
        self.temperature, self.noise = temperature, noise
        self.stages = [*range(depth), *range(depth - 2, -1, -1)]  # the binary digit that each maps
        self.logits = nn.Parameter(torch.empty(len(self.stages), features // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw logits near 0, where a switch is neither straight nor crossed."""
        nn.init.normal_(self.logits, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (training) or permute (eval) the last axis of x, (..., n)."""
        return self._route(x, self._straight()) if self.training else x.index_select(-1, self.order())

    def _straight(self) -> Tensor:
        if not self.training:
            return (self.logits > 0).to(self.logits)
        drawn = torch.rand_like(self.logits).clamp(1e-6, 1 - 1e-6) if self.noise else torch.full_like(self.logits, 0.5)
        return torch.sigmoid((self.logits + self.noise * torch.logit(drawn)) / self.temperature)

    def _route(self, x: Tensor, straight: Tensor) -> Tensor:
        shape = x.shape
        for digit, switches in zip(self.stages, straight, strict=True):
            pairs = x.reshape(*shape[:-1], 2**digit, 2, shape[-1] >> (digit + 1))
            p = switches.to(x.dtype).view(2**digit, 1, -1)
            x = p * pairs + (1 - p) * pairs.flip(-2)
        return x.reshape(shape)

    def to_dense(self) -> Tensor:
        """Build the matrix of the present mode (with its noise, in training), (n, n), differentiable."""
        return self._route(torch.eye(self.in_features).to(self.logits), self._straight()).mT

    def order(self) -> Tensor:
        """Return the hardened permutation: outputs are x[..., order]; `exact.permutation` makes a K-matrix of it."""
        places = torch.arange(self.in_features, device=self.logits.device, dtype=torch.float64)
        return self._route(places, (self.logits > 0).double()).long()

    def extra_repr(self) -> str:
        """Size and temperature."""
        return f"features={self.in_features}, temperature={self.temperature:g}, noise={self.noise:g}"
