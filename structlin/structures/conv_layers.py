"""Convolutions whose kernel is a tensor train, a sum of rank-1 kernels, or Tucker's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from structlin.equation.structure import Structure
from structlin.fitting.fit import Families
from structlin.fitting.objective import InputGram
from structlin.layers.conv import Conv, StructuredConv, check_conv
from structlin.layers.linear import StructuredLinear
from structlin.structures.conv import ConvKernel, Form, KernelFamily

Sizes = int | Sequence[int]


class FormConv(StructuredConv):
    """Base of the convolutions with one form of kernel; the arguments are those of `nn.Conv2d`, and the rank."""

    form: ClassVar[Form]
    dims: ClassVar[int]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes | str = 0,
        dilation: Sizes = 1, bias: bool = True, padding_mode: str = "zeros", *, rank: int | tuple[int, ...],
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        kernel = self._each(kernel_size)
        structure = ConvKernel(self.form, kernel, rank)
        sizes = in_channels * math.prod(kernel), out_channels
        super().__init__(
            StructuredLinear(*sizes, bias, structure=structure, device=device, dtype=dtype), self.dims,
            kernel_size=kernel, stride=self._each(stride), dilation=self._each(dilation), padding_mode=padding_mode,
            padding=padding if isinstance(padding, str) else self._each(padding),
        )  # fmt: skip

    @classmethod
    def _each(cls, value: Sizes) -> tuple[int, ...]:
        return (value,) * cls.dims if isinstance(value, int) else tuple(value)

    @classmethod
    def from_conv(
        cls, conv: Conv, *, structure: Structure | Families | None = None, ratio: float | None = None,
        rank: int | tuple[int, ...] | None = None, gram: Tensor | InputGram | None = None,
        output_gram: Tensor | None = None, refine: int | None = None,
    ) -> StructuredConv:  # fmt: skip
        """Decompose the kernel of a trained convolution; strides, padding, dilation, bias, dtype and flags are kept.

        Args:
            conv: the dense layer, of as many axes of space; it is not changed.
            structure: none; the class knows it.
            ratio: parameters kept / dense parameters (bias excluded); ranks are searched. Give this or a rank.
            rank: see the class.
            gram: of the patches, (in * taps, in * taps), at any scale.
            output_gram: of the output channels, (out, out) or (out,).
            refine: steps of refinement; None takes the default.
        Raises:
            TypeError: if it is no convolution, or one of other axes.
            ValueError: if it has groups, or the ranks do not fit.
        """
        if structure is not None or (rank is None) == (ratio is None):
            raise ValueError(f"structure={structure}, rank={rank}, ratio={ratio}; give a rank or a ratio")
        check_conv(conv)
        if len(conv.kernel_size) != cls.dims:
            raise TypeError(f"{cls.__name__}.from_conv takes an nn.Conv{cls.dims}d, not {type(conv).__name__}")
        wanted = (
            KernelFamily(cls.form, conv.kernel_size) if rank is None else ConvKernel(cls.form, conv.kernel_size, rank)
        )
        made = StructuredConv.from_conv(
            conv, structure=wanted, ratio=ratio, gram=gram, output_gram=output_gram, refine=refine
        )
        fitted = made.linear.structure
        assert isinstance(fitted, ConvKernel)
        found = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.bias is not None, conv.padding_mode, rank=fitted.rank, device="meta",
        )  # fmt: skip
        found.linear = made.linear
        return found.train(conv.training)


class TTConv2d(FormConv):
    """Convolve with W[o, i, k1, k2] = A[o, r1] B[r1, k1, r2] C[r2, k2, r3] D[r3, i], the kernel as a tensor train.

    Runs as four convolutions: 1 x 1 to r3 channels, 1 x k2, k1 x 1, 1 x 1. Axes with one tap are left out.

    Cost: out r1 + r1 k1 r2 + r2 k2 r3 + r3 in parameters, twice that in FLOPs per position.

    Args:
        in_channels: as for `nn.Conv2d`, as kernel_size, stride, padding, dilation, bias and padding_mode are.
        rank: one number, lowered to what each bond can have, or one per bond, r1 first.
    Raises:
        ValueError: if a rank is out of range.
    Source: Garipov et al. 2016, Ultimate tensorization; here over channels and taps, as in Lebedev et al. 2015.
    Example:
        >>> TTConv2d(16, 32, 3, padding=1, rank=4)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    form, dims = "tt", 2


class TTConv1d(FormConv):
    """Convolve with W[o, i, k] = A[o, r1] B[r1, k, r2] C[r2, i]; see `TTConv2d`."""

    form, dims = "tt", 1


class CPConv2d(FormConv):
    """Convolve with W[o, i, k1, k2] = sum_r a[o, r] b[k1, r] c[k2, r] d[i, r], a sum of rank-1 kernels.

    Runs as four convolutions: 1 x 1 to r channels, k1 x 1 and 1 x k2 of each channel alone, 1 x 1.

    Cost: r (out + in + k1 + k2) parameters, twice that in FLOPs per position.

    Args:
        in_channels: as for `nn.Conv2d`, as kernel_size, stride, padding, dilation, bias and padding_mode are.
        rank: the number of terms r.
    Raises:
        ValueError: if the rank is out of range.
    Source: Lebedev et al. 2015, Speeding-up convolutional neural networks using fine-tuned CP-decomposition.
    Example:
        >>> CPConv2d(16, 32, 3, padding=1, rank=4).linear.num_parameters
        216
    """

    form, dims = "cp", 2


class CPConv1d(FormConv):
    """Convolve with W[o, i, k] = sum_r a[o, r] b[k, r] c[i, r]; see `CPConv2d`."""

    form, dims = "cp", 1


class TuckerConv2d(FormConv):
    """Convolve with W[o, i, k1, k2] = A[o, p] K[p, q, k1, k2] B[q, i], a small kernel between two maps of channels.

    Runs as three convolutions: 1 x 1 to q channels, k1 x k2 to p, 1 x 1.

    Cost: out p + p q k1 k2 + q in parameters, twice that in FLOPs per position.

    Args:
        in_channels: as for `nn.Conv2d`, as kernel_size, stride, padding, dilation, bias and padding_mode are.
        rank: (p, q), or one number for both.
    Raises:
        ValueError: if a rank is out of range.
    Source: Kim et al. 2016, Compression of deep convolutional neural networks (Tucker-2).
    Example:
        >>> TuckerConv2d(16, 32, 3, padding=1, rank=(8, 4)).linear.num_parameters
        608
    """

    form, dims = "tucker", 2


class TuckerConv1d(FormConv):
    """Convolve with W[o, i, k] = A[o, p] K[p, q, k] B[q, i]; see `TuckerConv2d`."""

    form, dims = "tucker", 1
