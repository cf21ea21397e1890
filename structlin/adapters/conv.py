"""Convolutions with a kernel of 1: a linear map of the channels at each position."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.conv import CONVS, StructuredConv


class Conv(Adapter):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with a kernel of 1, in one group, with any stride and padding."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is such a convolution, of no subclass."""
        if not isinstance(module, CONVS) or type(module) not in CONVS:
            return False
        return set(module.kernel_size) == {1} and module.groups == 1

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The map of the channels."""
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
