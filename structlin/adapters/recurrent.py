"""`nn.LSTM` and `nn.GRU`: a map of the inputs and one of the hidden state in each layer and direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.recurrent import StructuredGRU, StructuredLSTM


class Recurrent(Adapter):
    """`nn.LSTM` and `nn.GRU`, which read their weights themselves: they open to modules that call their maps."""

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is one of both, of no subclass."""
        return type(module) in (nn.LSTM, nn.GRU)

    def reason(self, module: nn.Module) -> str | None:
        """Refuse projections of the hidden state, and weights that are computed (weight norm, say)."""
        if getattr(module, "proj_size", 0):
            return f"it projects its hidden state to proj_size={module.proj_size}"
        held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        if not held.issuperset(weight for weight, _ in self.leaves(module).values()):
            return "its weight is computed by a hook (weight_norm, pruning); remove the hook first"
        return None

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The maps `ih_l0`, `hh_l0`, ..."""
        assert isinstance(module, nn.LSTM | nn.GRU)
        directions = ["", "_reverse"][: 1 + module.bidirectional]
        names = [f"{side}_l{k}{d}" for k in range(module.num_layers) for d in directions for side in ("ih", "hh")]
        return {name: (f"weight_{name}", f"bias_{name}" if module.bias else None) for name in names}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a network of dense maps."""
        if isinstance(module, nn.LSTM):
            return StructuredLSTM.from_lstm(module)
        assert isinstance(module, nn.GRU)
        return StructuredGRU.from_gru(module)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Merge into the shell."""
        if isinstance(opened, StructuredLSTM):
            assert isinstance(shell, nn.LSTM)
            return opened.to_lstm(shell)
        assert isinstance(opened, StructuredGRU)
        assert isinstance(shell, nn.GRU)
        return opened.to_gru(shell)
