"""`nn.MultiheadAttention`: query, key and value packed into one parameter or apart, and the output projection."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from structlin.adapters.adapter import Adapter
from structlin.layers.attention import StructuredMultiheadAttention


class MultiheadAttention(Adapter):
    """`nn.MultiheadAttention`, which reads its weights itself: it opens to a module that calls its projections."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module runs the forward of `nn.MultiheadAttention`; subclasses with another one do not."""
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    def reason(self, module: nn.Module) -> str | None:
        """Refuse weights that are computed (pruned, say), and what else was put into the module."""
        if type(module.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
            return f"its out_proj is a {type(module.out_proj).__name__}"
        if set(module._modules) != {"out_proj"}:
            return "it holds modules besides out_proj"
        held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        if not held.issuperset(weight for weight, _ in self.leaves(module).values()):
            return "its weight is computed by a hook (weight_norm, pruning); remove the hook first"
        return None

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The four projections; three of them may share the packed parameters."""
        assert isinstance(module, nn.MultiheadAttention)
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        found: dict[str, tuple[str, str | None]] = {
            name: ("in_proj_weight" if module._qkv_same_embed_dim else f"{name}_weight", bias)
            for name in ("q_proj", "k_proj", "v_proj")
        }
        return found | {"out_proj": ("out_proj.weight", None if module.out_proj.bias is None else "out_proj.bias")}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a `StructuredMultiheadAttention` of dense projections."""
        assert isinstance(module, nn.MultiheadAttention)
        return StructuredMultiheadAttention.from_attention(module)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Pack the projections into the shell."""
        assert isinstance(opened, StructuredMultiheadAttention)
        assert isinstance(shell, nn.MultiheadAttention)
        return opened.to_attention(shell)
