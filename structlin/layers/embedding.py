"""An embedding whose table is the weight of a structured layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlin.equation.structure import Structure
from structlin.fitting.fit import Families
from structlin.layers.linear import StructuredLinear, build
from structlin.runtime import contract


class StructuredEmbedding(nn.Module):
    """Look up rows in the weight of a structured layer: (...) -> (..., embedding_dim).

    A tied input embedding and output layer stay tied: both use the factors of `linear`; its bias plays no part here.

    Cost for a token: the entries of the factors that its row depends on, and their contraction. Low rank reads one row
    of its left factor and multiplies it with the right one. A Kronecker sum reads terms * (i1 + i2) entries. In a chain
    of stages (butterfly, K-matrix, Monarch) the last stage is read at all digits of the row, earlier ones at fewer:
    the first reads up to as many entries as a dense row times the size of its digit.

    Args:
        linear: the layer that holds the table, often the output layer; a dense `nn.Linear` does too.
        padding_idx: row that gets no gradient, as in `nn.Embedding`; negative ones count from the end.
        scale: number that multiplies the rows.
        round_scale: round it to the dtype of the rows first, as Gemma does.
    Raises:
        ValueError: if padding_idx is no row of the table.
    Example:
        >>> from structlin import LowRankLinear
        >>> StructuredEmbedding(LowRankLinear(64, 1000, bias=False, rank=8))(torch.tensor([[3, 999]])).shape
        torch.Size([1, 2, 64])
    """

    def __init__(
        self, linear: StructuredLinear | nn.Linear, padding_idx: int | None = None, *, scale: float = 1.0,
        round_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        rows = linear.out_features
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise ValueError(f"padding_idx={padding_idx} is no row of the table; use {-rows} to {rows - 1}, or None")
        self.linear = linear
        self.num_embeddings = rows  # an attribute: transformers assigns it
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % rows
        self.scale, self.round_scale = scale, round_scale

    @staticmethod
    def from_structure(
        num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, structure: Structure,
        std: float = 1.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> StructuredEmbedding:  # fmt: skip
        """Draw a table of any structure; its entries have a standard deviation, by default that of `nn.Embedding`.

        Raises:
            ValueError: if the structure does not fit the table.
        """
        linear = build(structure, embedding_dim, num_embeddings, False, device=device, dtype=dtype)
        # A layer's entries have a standard deviation of 1 / sqrt(3 in_features).
        gain = std * math.sqrt(3 * embedding_dim)
        with torch.no_grad():
            for eq, factors in linear.spec.split(linear.factors):
                learned = [factor for factor, named in zip(factors, eq.factors, strict=True) if named.learned]
                for factor in learned:
                    factor.mul_(gain ** (1 / len(learned)))
        return StructuredEmbedding(linear, padding_idx)

    @staticmethod
    def from_embedding(
        embedding: nn.Embedding, *, structure: Structure | Families, ratio: float | None = None,
        row_weights: Tensor | None = None, refine: int | None = None,
    ) -> StructuredEmbedding:  # fmt: skip
        """Decompose the table of a trained embedding, which is not changed.

        Args:
            embedding: the dense table.
            structure: of the table (rows, columns), as for `StructuredLinear.from_linear`.
            ratio: parameters kept / dense parameters, for a class or a family.
            row_weights: how much the squared error of each row counts, (rows,): how often it is looked up, say.
            refine: steps of refinement.
        Raises:
            TypeError: if it is no `nn.Embedding`.
            ValueError: if it renormalises its rows or has sparse gradients, or the structure does not fit.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"from_embedding takes an nn.Embedding, not {type(embedding).__name__}")
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise ValueError(f"{embedding} has max_norm, sparse or scale_grad_by_freq, which factors have not")
        dense = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        dense.weight = embedding.weight
        linear = StructuredLinear.from_linear(
            dense, structure=structure, ratio=ratio, output_gram=row_weights, refine=refine
        )
        return StructuredEmbedding(linear, embedding.padding_idx).train(embedding.training)

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.linear.in_features

    @property
    def weight(self) -> Tensor:
        """The table without the scale, as by `linear.weight`."""
        return self.linear.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: (...) -> (..., embedding_dim).

        Args:
            ids: numbers of rows, int32 or int64.
        Raises:
            TypeError: if ids are of another dtype.
            IndexError: if an id is no row of the table.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids are {ids.dtype}; look rows up by torch.int32 or torch.int64")
        rows = self._rows(ids, self.linear) if isinstance(self.linear, StructuredLinear) else self._dense_rows(ids)
        if self.scale == 1:
            return rows
        rounded = torch.full((), self.scale, dtype=rows.dtype, device=rows.device) if self.round_scale else self.scale
        return rows * rounded

    def _dense_rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.linear.weight, self.padding_idx)

    def _rows(self, ids: Tensor, linear: StructuredLinear) -> Tensor:
        factors = linear.factors
        device = factors[0].device.type
        # As in nn.Embedding, the rows have the dtype of the table under autocast too.
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            try:
                rows = contract.look_up(linear.spec, factors, ids.reshape(-1))
            except IndexError as error:
                raise IndexError(f"an id lies outside 0 to {linear.out_features - 1}, the rows of the table") from error
        rows = rows.reshape(*ids.shape, linear.in_features)
        if self.padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    def extra_repr(self) -> str:
        """Sizes of the table, padding row and scale."""
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}{scale}"
