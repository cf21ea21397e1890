"""`nn.Embedding`: on request, or as part of a tie with the output layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structlin.adapters.adapter import Adapter
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear


class Embedding(Adapter):
    """`nn.Embedding`: its table is the weight of a linear map from columns to rows."""

    on_request = True

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module is an `nn.Embedding` and of no subclass."""
        return type(module) is nn.Embedding

    def reason(self, module: nn.Module) -> str | None:
        """Refuse tables that lookups write into, and sparse gradients."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm writes into the table at each lookup"
        return "its gradient is sparse" if module.sparse else None

    def leaves(self, module: nn.Module) -> Mapping[str, tuple[str, str | None]]:
        """The table, as the weight of `linear`."""
        return {"linear": ("weight", None)}

    def open(self, module: nn.Module) -> nn.Module:
        """Return a `StructuredEmbedding` of a dense linear map."""
        assert isinstance(module, nn.Embedding)
        linear = nn.Linear(module.embedding_dim, module.num_embeddings, bias=False, device="meta")
        linear.weight = module.weight
        return StructuredEmbedding(linear, module.padding_idx).train(module.training)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Fill the shell with the table."""
        assert isinstance(opened, StructuredEmbedding)
        linear = opened.linear
        shell.weight = (linear.to_linear() if isinstance(linear, StructuredLinear) else linear).weight
        return shell
