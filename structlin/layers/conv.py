"""A convolution whose kernel is the weight of a linear map of patches: of all channels at all taps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from structlin.equation.structure import Structure
from structlin.fitting.fit import Families
from structlin.fitting.objective import InputGram
from structlin.layers.linear import StructuredLinear
from structlin.runtime.contract.convolve import Steps, convolve, convolve_dense, small_convolutions

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_AXES = "d h w"


class PatchLinear(nn.Linear):
    """The dense linear map of the patches of a convolution: (out, in * taps).

    Args:
        kernel_size: taps along each axis of space.
    """

    kernel_size: tuple[int, ...] = ()

    def extra_repr(self) -> str:
        """Sizes and taps."""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}"


class StructuredConv(nn.Module):
    """Convolve with a structured kernel: (..., in, space) -> (..., out, space), as `nn.Conv1d` to `nn.Conv3d` do.

    Space has one to three axes; one axis before the channels is optional. With one tap, the linear map runs at each
    position. With more, factors over the channels and taps (low rank, `structlin.structures.ConvKernel`) run as a chain
    of small convolutions; any other structure, or a chain that costs more, builds the dense kernel at each call.

    Args:
        linear: the map of patches (in * taps, channel first) to channels, an `nn.Linear` or a `StructuredLinear`.
        dims: axes of space.
        kernel_size: taps along each axis of space; None is one each.
        stride: step along each axis.
        padding: positions added at both ends of each axis, "same" or "valid".
        dilation: distance of the taps along each axis.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    Raises:
        ValueError: if one of them has not one number for each axis, or the map no whole number of channels.
    """

    def __init__(
        self, linear: nn.Linear | StructuredLinear, dims: int, *, kernel_size: Sequence[int] | None = None,
        stride: Sequence[int] | None = None, padding: Sequence[int] | str | None = None,
        dilation: Sequence[int] | None = None, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        ones = (1,) * dims
        self.linear = linear
        self.kernel_size = tuple(kernel_size or ones)
        self.stride, self.dilation, self.groups = tuple(stride or ones), tuple(dilation or ones), 1
        self.padding = padding if isinstance(padding, str) else tuple(padding or (0,) * dims)
        self.padding_mode = padding_mode
        numbers = [
            self.kernel_size,
            self.stride,
            self.dilation,
            *([] if isinstance(self.padding, str) else [self.padding]),
        ]
        if any(len(each) != dims for each in numbers):
            raise ValueError(
                f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}; give {dims} numbers each"
            )
        taps = math.prod(self.kernel_size)
        self.in_channels, self.out_channels = linear.in_features // taps, linear.out_features
        if self.in_channels * taps != linear.in_features:
            raise ValueError(
                f"in_features={linear.in_features} is no multiple of the {taps} taps of {self.kernel_size}"
            )

    @classmethod
    def from_conv(
        cls, conv: Conv, *, structure: Structure | Families | None = None, ratio: float | None = None,
        gram: Tensor | InputGram | None = None, output_gram: Tensor | None = None, refine: int | None = None,
    ) -> StructuredConv:  # fmt: skip
        """Decompose the kernel of a convolution, or only open it: without a structure, `linear` is an `nn.Linear`.

        The weight of that is a view of the convolution's where its memory allows it.

        Args:
            conv: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` in one group; it is not changed.
            structure: as for `StructuredLinear.from_linear`, like the other settings.
            ratio: parameters kept / dense parameters (bias excluded).
            gram: of the patches, (in * taps, in * taps).
            output_gram: of the output channels.
            refine: steps of refinement.
        Raises:
            TypeError: if it is no `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
            ValueError: if it has groups, or the settings do not fit its kernel.
        """
        check_conv(conv)
        sizes = conv.in_channels * math.prod(conv.kernel_size), conv.out_channels
        if set(conv.kernel_size) == {1}:
            linear = nn.Linear(*sizes, False, device="meta")
        else:
            linear = PatchLinear(*sizes, False, device="meta")
            linear.kernel_size = conv.kernel_size
        linear.weight = nn.Parameter(rearrange(conv.weight.detach(), "o i ... -> o (i ...)"), conv.weight.requires_grad)
        linear.bias = conv.bias  # type: ignore[assignment] # torch annotates it as any tensor
        found = StructuredConv(
            linear, len(conv.kernel_size), kernel_size=conv.kernel_size, stride=conv.stride,
            padding=conv.padding, dilation=conv.dilation, padding_mode=conv.padding_mode,
        )  # fmt: skip
        if structure is not None:
            found.linear = StructuredLinear.from_linear(
                linear, structure=structure, ratio=ratio, gram=gram, output_gram=output_gram, refine=refine
            )
        return found.train(conv.training)

    def to_conv(self, shell: Conv) -> Conv:
        """Merge into a copy of a convolution, whose own parameters are not read (they may be on the meta device)."""
        linear = self.linear.to_linear() if isinstance(self.linear, StructuredLinear) else self.linear
        conv = copy.deepcopy(shell)
        weight = linear.weight.detach().reshape(self.out_channels, self.in_channels, *self.kernel_size)
        conv.weight = nn.Parameter(weight, linear.weight.requires_grad)
        conv.bias = linear.bias
        return conv.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution, (out, in, *taps), from that of `linear`; not a parameter."""
        return self.linear.weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The bias of `linear`."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (batch, in, space) or (in, space).

        Raises:
            ValueError: if the input has other axes or another number of channels.
        """
        dims = len(self.kernel_size)
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            axes = f"{self.in_channels}, {_axes(dims).replace(' ', ', ')}"
            raise ValueError(f"input has shape {tuple(x.shape)}; it must be (batch, {axes}) or ({axes})")
        ends = self._ends()
        linear, taps = self.linear, set(self.kernel_size) != {1}
        small = taps and isinstance(linear, StructuredLinear) and not _is_watched(linear)
        even = small and self.padding_mode == "zeros" and all(left == right for left, right in ends)
        if any(map(any, ends)) and not even:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, ends = F.pad(x, [size for pair in reversed(ends) for size in pair], mode=mode), [(0, 0)] * dims
        if small:
            return self._convolved(x, Steps(self.stride, tuple(left for left, _ in ends), self.dilation))
        return self._mapped(x)

    def _convolved(self, x: Tensor, steps: Steps) -> Tensor:
        """Run factors as small convolutions, or convolve with the dense kernel."""
        linear = self.linear
        assert isinstance(linear, StructuredLinear)
        chains = small_convolutions(linear.spec, self.kernel_size)
        if chains is not None:
            return convolve(linear.spec, linear.factors, chains, x, linear.bias, steps)
        kernel = linear._execution.dense(linear.factors).reshape(self.out_channels, self.in_channels, *self.kernel_size)
        return convolve_dense(x, kernel, linear.bias, steps)

    def _mapped(self, x: Tensor) -> Tensor:
        """Apply the linear map at each position: of the channels, or of a patch."""
        dims = len(self.kernel_size)
        axes, taps = _axes(dims), " ".join(f"k{k}" for k in range(dims))
        if set(self.kernel_size) == {1}:
            steps: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
            last = rearrange(x[steps] if set(self.stride) != {1} else x, f"... c {axes} -> ... {axes} c")
        else:
            patches = x
            for size, step, gap in zip(self.kernel_size, self.stride, self.dilation, strict=True):
                patches = patches.unfold(-dims, gap * (size - 1) + 1, step)[..., ::gap]
            last = rearrange(patches, f"... c {axes} {taps} -> ... {axes} (c {taps})")
        y = rearrange(self.linear(last), f"... {axes} c -> ... c {axes}")
        # As nn.Conv2d does, keep channels_last; any other result is contiguous, for code that views it.
        return y if dims > 1 and last.is_contiguous() and not x.is_contiguous() else y.contiguous()

    def _ends(self) -> list[tuple[int, int]]:
        """Return the positions added before and after each axis."""
        if isinstance(self.padding, str):
            spans = [gap * (size - 1) for size, gap in zip(self.kernel_size, self.dilation, strict=True)]
            return [(span // 2, span - span // 2) if self.padding == "same" else (0, 0) for span in spans]
        return [(size, size) for size in self.padding]

    def extra_repr(self) -> str:
        """Channels, taps, stride, padding and dilation."""
        padding = f", padding={self.padding}, padding_mode={self.padding_mode}" if any(map(any, self._ends())) else ""
        dilation = f", dilation={self.dilation}" if set(self.dilation) != {1} else ""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}{padding}{dilation}"


def check_conv(conv: nn.Module) -> None:
    """Refuse what is no convolution of one group.

    Raises:
        TypeError: if it is no `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        ValueError: if it has groups.
    """
    if not isinstance(conv, CONVS):
        raise TypeError(f"from_conv takes an nn.Conv1d, nn.Conv2d or nn.Conv3d, not {type(conv).__name__}")
    if conv.groups != 1:
        raise ValueError(f"groups={conv.groups}; only convolutions in one group are linear maps of all channels")


def _is_watched(linear: nn.Module) -> bool:
    """Whether hooks or a replaced forward wait for the calls of a layer."""
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)


def _axes(dims: int) -> str:
    return " ".join(_AXES.split()[3 - dims :])
