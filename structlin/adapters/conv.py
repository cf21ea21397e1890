"""Convolutions with kernel 1: a linear map of the channels at each position."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.conv import CONVS, StructuredConv


class PointwiseConv(Adapter):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with a kernel of ones and groups=1."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is one of them, of no subclass, with such a kernel."""
        return (
            isinstance(module, CONVS)
            and type(module) in CONVS
            and set(module.kernel_size) == {1}
            and module.groups == 1
            and "forward" not in vars(module)
        )

    def reason(self, module: nn.Module) -> str | None:
        """Refuse a weight that is computed."""
        if module._parameters.get("weight") is None:
            return "its weight is computed by a hook (weight_norm, pruning); remove the hook first"
        return None

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The map of the channels, as `linear`."""
        return {"linear": ("weight", "bias" if module._parameters.get("bias") is not None else None)}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a `StructuredConv` of a dense linear map."""
        assert isinstance(module, CONVS)
        return StructuredConv.from_conv(module)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Fill the shell with the weight and bias."""
        assert isinstance(opened, StructuredConv)
        assert isinstance(shell, CONVS)
        return opened.to_conv(shell)
