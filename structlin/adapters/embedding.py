"""`nn.Embedding` and subclasses that scale its rows: on request, or as part of a tie with the output layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from structlin.adapters.adapter import Adapter, shell_of
from structlin.layers.embedding import StructuredEmbedding
from structlin.layers.linear import StructuredLinear

_PROBED_ROWS = 5


class Embedding(Adapter):
    """Tables whose rows are looked up: the table is the weight of a linear map from columns to rows.

    A probe tells whether a subclass multiplies the rows by a number, as Gemma's does.
    """

    on_request = True

    def recognise(self, module: nn.Module) -> bool:
        """Whether the module looks rows up, perhaps scaled."""
        return isinstance(module, nn.Embedding) and not module._modules and _scale(module) is not None

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
        opened = StructuredEmbedding(linear, module.padding_idx, scale=_scale(module) or 1.0)
        return opened.train(module.training)

    def close(self, opened: nn.Module, shell: nn.Module) -> nn.Module:
        """Fill the shell with the table."""
        assert isinstance(opened, StructuredEmbedding)
        linear = opened.linear
        shell.weight = (linear.to_linear() if isinstance(linear, StructuredLinear) else linear).weight
        return shell


def _scale(module: nn.Embedding) -> float | None:
    """Return the number by which a module multiplies its rows, None if it does anything else with them."""
    if type(module) is nn.Embedding:
        return 1.0
    if "forward" in vars(module):
        return None
    copy = shell_of(module).eval()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_PROBED_ROWS, 1, generator=generator).repeat(1, module.embedding_dim)
    table[0] = 1  # its row is the scale, to the last bit
    copy.weight = nn.Parameter(table)
    copy.padding_idx = None
    ids = torch.arange(_PROBED_ROWS)[None]
    for name, value in copy._buffers.items():  # the scale, which may be on the meta device with the table
        if value is not None and value.is_meta:
            attribute = getattr(module, f"scalar_{name}", None)
            if attribute is None:
                return None
            copy._buffers[name] = torch.tensor(attribute)
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = copy(ids)
    except Exception:  # it takes more than ids
        return None
    if not isinstance(found, Tensor) or found.shape != (1, *table.shape):
        return None
    scale = found[0, 0, 0].item()
    return scale if torch.allclose(found[0].float(), scale * table, rtol=1e-5) else None
