"""The DeLighT block: group linear transformations that expand and reduce, one head of attention, a light MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlin.layers.permutation import LearnedPermutation


class GroupLinear(nn.Module):
    """Map each of g groups of the features alone: a block-diagonal `nn.Linear`.

    Cost: in out / groups parameters, and twice as many FLOPs per token.

    Args:
        in_features: size of each input row, a multiple of groups.
        out_features: size of each output row, likewise.
        groups: number of blocks.
    Raises:
        ValueError: if groups does not divide both sizes.
    Source: Mehta et al. 2018, Pyramidal recurrent unit for language modeling.
    Example:
        >>> GroupLinear(8, 4, 2)(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(f"groups={groups} does not divide both {in_features} inputs and {out_features} outputs")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(groups, out_features // groups, in_features // groups))
        self.bias = nn.Parameter(torch.empty(out_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -math.sqrt(groups / in_features), math.sqrt(groups / in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., in_features)."""
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), self.weight)
        return y.flatten(-2) + self.bias

    def extra_repr(self) -> str:
        """Sizes and groups."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}"


class DeLighTTransform(nn.Module):
    """Expand features by group linear transformations, then reduce them; each but the first also reads the input.

    Layer l of N has min(2^(l-1), max_groups) groups up to the middle, then those of layer N - l. Its width grows
    linearly to expansion * features in the middle, then shrinks to out_features. Between two layers the features are
    shuffled over the groups, and the input's features are joined to each group.
    """

    def __init__(
        self, features: int, out_features: int, *, layers: int, expansion: float, max_groups: int, learned: bool
    ) -> None:
        super().__init__()
        middle = (layers + 1) // 2
        growing = [min(2**k, max_groups) for k in range(middle)]
        groups = [*growing, *(growing[max(layers - k - 2, 0)] for k in range(middle, layers))]
        widest = expansion * features
        sizes = [features + (widest - features) * (k + 1) / middle for k in range(middle)]
        sizes += [widest + (out_features - widest) * (k + 1) / (layers - middle) for k in range(layers - middle)]
        following = [*groups[1:], 1]
        steps = list(map(max, groups, following))[:-1]  # powers of two: both numbers of groups divide the width
        widths = [-(-round(size) // step) * step for size, step in zip(sizes, steps, strict=False)]
        if learned:
            widths = [max(2 ** round(math.log2(width)), step) for width, step in zip(widths, steps, strict=True)]
        if features % max_groups or max_groups & (max_groups - 1) or out_features % groups[-1]:
            raise ValueError(f"max_groups={max_groups} must be a power of two that divides features={features}")
        inputs = [features, *(features + width for width in widths)]
        self.layers = nn.ModuleList(map(GroupLinear, inputs, [*widths, out_features], groups))
        self.shuffles = nn.ModuleList(LearnedPermutation(width) for width in widths if learned)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., features), to (..., out_features)."""
        first, *others = self.layers
        y = first(x)
        for k, layer in enumerate(others):
            y = F.gelu(y)
            groups = int(layer.groups)  # type: ignore[arg-type]
            y = self.shuffles[k](y).unflatten(-1, (groups, -1)) if len(self.shuffles) else _dealt(y, groups)
            y = layer(torch.cat([y, x.unflatten(-1, (groups, -1))], -1).flatten(-2))
        return y


def _dealt(y: Tensor, groups: int) -> Tensor:
    """Deal features to groups in turn: (..., width) -> (..., groups, width / groups)."""
    return y.unflatten(-1, (-1, groups)).transpose(-1, -2)


class DeLighTBlock(nn.Module):
    """A transformer block of DeLighT: deep and light: x + attention(transform(norm x)), then x + mlp(norm x).

    The transform is a chain of group linear transformations that widens and narrows the features to half of them;
    attention has one head of that size; the MLP narrows to a quarter, where a transformer's widens fourfold.

    Args:
        features: d, the width of the model, a multiple of max_groups and of 4.
        layers: N, of the transform, 2 or more; the paper gives later blocks more.
        expansion: the widest layer / d; the paper goes with N.
        max_groups: the largest number of groups, a power of two.
        shuffle: "fixed" deals the features of each group to all groups of the next layer; "learned" has a
            `LearnedPermutation` there (inner widths become powers of two).
        causal: a position attends to itself and earlier ones only.
    Raises:
        ValueError: if sizes do not divide or a number is out of range.
    Source: Mehta et al. 2021, DeLighT: deep and light-weight transformer; norms stand first here.
    Example:
        >>> block = DeLighTBlock(64, layers=4, expansion=2.0)
        >>> block(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self, features: int, *, layers: int = 4, expansion: float = 2.0, max_groups: int = 4, shuffle: str = "fixed",
        causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if layers < 2 or expansion < 1 or max_groups < 1 or features % 4:
            raise ValueError(
                f"features={features}, layers={layers}, expansion={expansion}, max_groups={max_groups}; features are a "
                "multiple of 4, layers 2 or more, the others 1 or more"
            )
        if shuffle not in ("fixed", "learned"):
            raise ValueError(f'shuffle={shuffle!r}; use "fixed" or "learned"')
        half = features // 2
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))
        self.transform = DeLighTTransform(
            features, half, layers=layers, expansion=expansion, max_groups=max_groups, learned=shuffle == "learned"
        )
        self.qkv = nn.Linear(half, 3 * half)
        self.out = nn.Linear(half, features)
        self.mlp = nn.Sequential(nn.Linear(features, features // 4), nn.GELU(), nn.Linear(features // 4, features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (batch, positions, features)."""
        q, k, v = self.qkv(self.transform(self.norms[0](x))).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))
        return x + self.mlp(self.norms[1](x))
