"""Multi-head attention whose four projections are modules of their own, dense or structured."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from typing_extensions import Self

from structlin.layers.linear import StructuredLinear

Leaf = nn.Linear | StructuredLinear


class StructuredMultiheadAttention(nn.Module):
    """Compute what `nn.MultiheadAttention` computes, with the same call and outputs, by calling its projections.

    Modules of torch that hold it (`nn.TransformerEncoder`, say) call it in eval too: their fast path, which would read
    the weights instead, stays off.

    Args:
        q_proj, k_proj, v_proj: embed_dim, kdim and vdim -> embed_dim.
        out_proj: embed_dim -> embed_dim.
        num_heads: divides embed_dim.
        dropout: of the attention weights, in training.
        batch_first: 3-D inputs and outputs are (batch, sequence, features), else (sequence, batch, features).
        bias_k, bias_v: one more key and value for all sequences, each (1, 1, embed_dim); both or none.
        add_zero_attn: add one more key and value of zeros.
    Raises:
        ValueError: if the sizes do not fit together.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        q_proj: Leaf,
        k_proj: Leaf,
        v_proj: Leaf,
        out_proj: Leaf,
        *,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
        bias_k: Tensor | None = None,
        bias_v: Tensor | None = None,
        add_zero_attn: bool = False,
    ) -> None:
        super().__init__()
        size = q_proj.in_features
        widths = {size, *(leaf.out_features for leaf in (q_proj, k_proj, v_proj, out_proj)), out_proj.in_features}
        if len(widths) > 1 or num_heads < 1 or size % num_heads:
            raise ValueError(
                f"num_heads={num_heads}, projections of sizes {sorted(widths)}; the outputs, and the inputs of q_proj "
                "and out_proj, need one size, a multiple of num_heads"
            )
        if (bias_k is None) != (bias_v is None):
            raise ValueError("one of bias_k and bias_v is None; give both or none")
        self.embed_dim, self.kdim, self.vdim = size, k_proj.in_features, v_proj.in_features
        self.num_heads = num_heads
        self.head_dim = size // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.bias_k, self.bias_v = bias_k, bias_v

    # From and to nn.MultiheadAttention -------------------------------------------------------------------------------

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> Self:
        """Open an `nn.MultiheadAttention`: the projections become `nn.Linear` modules that share its storage."""
        if attention._qkv_same_embed_dim:
            weights = _unpack(attention.in_proj_weight)
        else:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        biases = [None] * 3 if attention.in_proj_bias is None else _unpack(attention.in_proj_bias)
        out = attention.out_proj
        opened = cls(
            *map(_linear, [*weights, out.weight], [*biases, out.bias]),
            num_heads=attention.num_heads,
            dropout=attention.dropout,
            batch_first=attention.batch_first,
            bias_k=attention.bias_k,
            bias_v=attention.bias_v,
            add_zero_attn=attention.add_zero_attn,
        )
        return opened.train(attention.training)

    def to_attention(self, shell: nn.MultiheadAttention) -> nn.MultiheadAttention:
        """Merge into an `nn.MultiheadAttention` with the same outputs.

        Args:
            shell: a module of the same options, filled and returned; its parameters are not read and may be on the meta
                device.
        """
        q, k, v, out = (
            leaf if isinstance(leaf, nn.Linear) else leaf.to_linear()
            for leaf in (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        )
        if shell._qkv_same_embed_dim:
            shell.in_proj_weight = _pack(q.weight, k.weight, v.weight)
        else:
            for name, leaf in (("q", q), ("k", k), ("v", v)):
                setattr(shell, f"{name}_proj_weight", leaf.weight)
        if shell.in_proj_bias is not None:
            shell.in_proj_bias = _pack(q.bias, k.bias, v.bias)
        shell.out_proj.weight, shell.out_proj.bias = out.weight, out.bias
        shell.bias_k, shell.bias_v = self.bias_k, self.bias_v
        return shell.train(self.training)

    # What the transformers of torch read -----------------------------------------------------------------------------

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    @property
    def in_proj_bias(self) -> None:
        """None, whatever the biases of the projections: so `nn.TransformerEncoderLayer` takes no fast path."""
        return None

    @property
    def in_proj_weight(self) -> _NoWeight:
        """A stand-in that refuses every use: torch sees its `__torch_function__` and takes no fast path."""
        return _NoWeight()

    # The forward pass ------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; arguments and outputs are described there.

        Returns:
            The output, in the layout of the query, and the attention weights (None without `need_weights`).
        Raises:
            ValueError: if shapes do not fit together, `is_causal` comes without a mask, or an input is nested.
            AssertionError: if a mask is neither boolean nor of a float dtype, as in torch.
        """
        _check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True says what attn_mask is; pass that mask too")
        batched = query.ndim == 3
        given, split = "l (h d)", "1 h l d"
        if batched:
            given, split = "b l (h d)" if self.batch_first else "l b (h d)", "b h l d"
        q, k, v = (
            rearrange(leaf(x), f"{given} -> {split}", h=self.num_heads)
            for leaf, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if k.shape != v.shape or k.shape[0] != q.shape[0]:
            raise ValueError(
                f"{_shapes(query, key, value)}; the batches, and the lengths of key and value, must be equal"
            )
        # As in torch, only SDPA trusts the hint, and only if there is nothing to merge the mask with.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = _merge(None if is_causal else attn_mask, key_padding_mask, q, k, batched)
        k, v, mask = self._extend(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self.out_proj(rearrange(attended, f"{split} -> {given}")), weights

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value, then those of zeros; no mask hides them."""
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, repeat(bias, "1 1 (h d) -> b h 1 d", b=x.shape[0], h=self.num_heads)], 2)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, F.pad(mask, (0, more)) if mask is not None and more else mask

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


class _NoWeight:
    """Stands where `nn.MultiheadAttention` has a packed weight."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "StructuredMultiheadAttention has no packed in_proj_weight; call the module, or q_proj, k_proj and v_proj"
        )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("an input is a nested tensor; pass padded tensors and key_padding_mask")
    if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(f"{_shapes(query, key, value)}; all need 2 axes, or all 3")


def _merge(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, batched: bool) -> Tensor | None:
    """Add up both masks, for scores (b, h, l, s); None if there are none."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    kind = None if attn_mask is None else attn_mask.dtype
    padding = F._canonical_mask(padding, "key_padding_mask", kind, "attn_mask", q.dtype)
    attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, check_other=False)
    if attn_mask is not None:
        allowed = (queries, keys), (batch * heads, queries, keys)
        if attn_mask.shape not in allowed:
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; use {allowed[0]} or {allowed[1]}")
        if attn_mask.ndim == 3:
            attn_mask = rearrange(attn_mask, "(b h) l s -> b h l s", h=heads)
    if padding is None:
        return attn_mask
    wanted = (batch, keys) if batched else (keys,)
    if padding.shape != wanted:
        raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)}; use {wanted}")
    padding = rearrange(padding, "b s -> b 1 1 s" if batched else "s -> 1 1 1 s")
    return padding if attn_mask is None else attn_mask + padding


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attend with weights (b, h, l, s) in memory; as in torch, those that dropout has left are returned."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights


def _unpack(packed: nn.Parameter) -> list[nn.Parameter]:
    """Split into query's, key's and value's part, which share the storage."""
    return [nn.Parameter(part, requires_grad=packed.requires_grad) for part in packed.detach().chunk(3)]


def _pack(*parts: Tensor) -> nn.Parameter:
    packed = torch.cat([part.detach() for part in parts])
    return nn.Parameter(packed, requires_grad=any(part.requires_grad for part in parts))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make an `nn.Linear` of parameters, without drawing any."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]  # the stub knows no layer without a bias
    return linear
