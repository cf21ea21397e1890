"""Convolutions: a linear map of the patches, or with a kernel of 1 of the channels at each position."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.conv import CONVS, StructuredConv


class Conv(Adapter):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` in one group, with any kernel, stride, padding and dilation."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is such a convolution, of no subclass."""
        return isinstance(module, CONVS) and type(module) in CONVS and module.groups == 1

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The map of the patches."""
        return {"linear": ("weight", None if module.bias is None else "bias")}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a `StructuredConv` of a dense linear map."""
        assert isinstance(module, CONVS)
        return StructuredConv.from_conv(module)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Merge into a convolution."""
        assert isinstance(opened, StructuredConv)
        assert isinstance(shell, CONVS)
        return opened.to_conv(shell)
