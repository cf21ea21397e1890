"""A convolution with kernel 1: a linear map of the channels at each position."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from structlin.layers.linear import StructuredLinear

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_AXES = "d h w"


class StructuredConv(nn.Module):
    """Apply a linear map to the channels at each position: (..., in, *space) -> (..., out, *space / stride).

    The same as `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with a kernel of ones and groups=1; space has one to three axes,
    one axis before the channels is optional. Padded positions give what the padding mode puts there (zeros: the bias).

    Args:
        linear: the map of the channels, an `nn.Linear` or a `StructuredLinear`.
        dims: axes of space.
        stride: step along each axis of space.
        padding: positions added at both ends of each axis, before the stride.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    def __init__(
        self, linear: nn.Linear | StructuredLinear, dims: int, *, stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        ones = (1,) * dims
        self.linear = linear
        self.in_channels, self.out_channels = linear.in_features, linear.out_features
        self.kernel_size, self.dilation, self.groups = ones, ones, 1
        self.stride = tuple(stride or ones)
        self.padding = tuple(padding or (0,) * dims)
        self.padding_mode = padding_mode
        if (len(self.stride), len(self.padding)) != (dims, dims):
            raise ValueError(f"stride={self.stride}, padding={self.padding}; give {dims} numbers each")

    @classmethod
    def from_conv(cls, conv: Conv) -> StructuredConv:
        """Open a convolution: `linear` is an `nn.Linear` whose weight is a view of the convolution's.

        Raises:
            TypeError: if it is no `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
            ValueError: if its kernel is larger than 1 or it has groups.
        """
        if not isinstance(conv, CONVS):
            raise TypeError(f"from_conv takes an nn.Conv1d, nn.Conv2d or nn.Conv3d, not {type(conv).__name__}")
        if set(conv.kernel_size) != {1} or conv.groups != 1:
            raise ValueError(
                f"kernel_size={conv.kernel_size}, groups={conv.groups}; only kernels of 1 in one group are linear maps "
                "of the channels"
            )
        linear = nn.Linear(conv.in_channels, conv.out_channels, False, device="meta")
        linear.weight = nn.Parameter(rearrange(conv.weight.detach(), "o i ... -> o (i ...)"), conv.weight.requires_grad)
        linear.bias = conv.bias  # type: ignore[assignment] # torch annotates it as any tensor
        padding = (
            None if isinstance(conv.padding, str) else conv.padding
        )  # "same" and "valid" add none to a kernel of 1
        opened = cls(linear, len(conv.kernel_size), stride=conv.stride, padding=padding, padding_mode=conv.padding_mode)
        return opened.train(conv.training)

    def to_conv(self, shell: Conv) -> Conv:
        """Merge into a copy of a convolution, whose own parameters are not read (they may be on the meta device)."""
        linear = self.linear.to_linear() if isinstance(self.linear, StructuredLinear) else self.linear
        conv = copy.deepcopy(shell)
        weight = linear.weight.detach().reshape(*linear.weight.shape, *self.kernel_size)
        conv.weight = nn.Parameter(weight, linear.weight.requires_grad)
        conv.bias = linear.bias
        return conv.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution, (out, in, 1, ...), from that of `linear`; not a parameter."""
        return self.linear.weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The bias of `linear`."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (batch, in, *space) or (in, *space).

        Raises:
            ValueError: if the input has other axes or another number of channels.
        """
        dims = len(self.kernel_size)
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            axes = f"{self.in_channels}, {_axes(dims).replace(' ', ', ')}"
            raise ValueError(f"input has shape {tuple(x.shape)}; it must be (batch, {axes}) or ({axes})")
        if any(self.padding):
            ends = [size for size in reversed(self.padding) for _ in range(2)]
            x = F.pad(x, ends, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if set(self.stride) != {1}:
            steps: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
            x = x[steps]
        axes = _axes(dims)
        last = rearrange(x, f"... c {axes} -> ... {axes} c")
        y = rearrange(self.linear(last), f"... {axes} c -> ... c {axes}")
        # As nn.Conv2d does, keep channels_last; any other result is contiguous, for code that views it.
        return y if dims > 1 and last.is_contiguous() and not x.is_contiguous() else y.contiguous()

    def extra_repr(self) -> str:
        """Channels, stride and padding."""
        padding = f", padding={self.padding}, padding_mode={self.padding_mode}" if any(self.padding) else ""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}{padding}"


def _axes(dims: int) -> str:
    return " ".join(_AXES.split()[3 - dims :])
