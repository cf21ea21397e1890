"""An embedding whose table is the weight of a structured layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from structlin.layers.linear import StructuredLinear


class StructuredEmbedding(nn.Module):
    """Look up rows in the weight of a structured layer, so that a tied input embedding and output layer stay tied.

    Cost: every call builds the dense table, so this saves storage, not time.

    Args:
        linear: the layer whose weight is the table, often the output layer.
        padding_idx: row that gets no gradient, as in `nn.Embedding`.
    """

    def __init__(self, linear: StructuredLinear | nn.Linear, padding_idx: int | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.linear.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.linear.in_features

    @property
    def weight(self) -> Tensor:
        """The table, rebuilt at each access."""
        return self.linear.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: (...) -> (..., embedding_dim)."""
        return F.embedding(ids, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        """Sizes of the table."""
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
