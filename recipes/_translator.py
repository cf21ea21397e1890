"""The Transformer of the translation recipe, whose decoder takes its linear layers from the caller."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _languages import BEGIN, END, PAD
from torch import Tensor, nn

Linear = Callable[[int, int], nn.Module]
Keys = tuple[Tensor, Tensor]  # keys and values, each (batch, heads, time, width / heads)

LONGEST = 128  # tokens


class Attention(nn.Module):
    """Attention with four linear maps that the caller chooses."""

    def __init__(self, width: int, heads: int, linear: Linear) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x: Tensor) -> Keys:
        return self._split(self.k(x)), self._split(self.v(x))

    def forward(self, x: Tensor, keys: Keys, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        y = F.scaled_dot_product_attention(self._split(self.q(x)), *keys, attn_mask=mask, is_causal=causal)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A decoder layer: attention to the past, attention to the source, two linear layers, each after its norm."""

    def __init__(self, width: int, inner: int, linear: Linear) -> None:
        super().__init__()
        self.own, self.across = (Attention(width, max(width // 64, 1), linear) for _ in range(2))
        self.up, self.down = linear(width, inner), linear(inner, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, memory: Keys, seen: Tensor | None, past: Keys | None = None) -> tuple[Tensor, Keys]:
        """Return the outputs for x, (batch, time, width), and the keys of the past with those of x."""
        y = self.norms[0](x)
        keys = self.own.keys(y)
        if past is not None:
            keys = torch.cat([past[0], keys[0]], 2), torch.cat([past[1], keys[1]], 2)
        x = x + self.drop(self.own(y, keys, causal=past is None))
        x = x + self.drop(self.across(self.norms[1](x), memory, seen))
        return x + self.drop(self.down(F.relu(self.up(self.norms[2](x))))), keys


class Translator(nn.Module):
    """A Transformer whose decoder takes its linear layers from the caller."""

    def __init__(self, vocabulary: int, width: int, inner: int, layers: int, linear: Linear) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(LONGEST, width)
        for table in (self.embedding, self.places):
            nn.init.normal_(table.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, max(width // 64, 1), inner, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(width), enable_nested_tensor=False)
        self.blocks = nn.ModuleList(Block(width, inner, linear) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        places = self.places.weight[start : start + tokens.shape[1]]
        return math.sqrt(self.embedding.embedding_dim) * (self.embedding(tokens) + places)

    def encode(self, source: Tensor) -> tuple[list[Keys], Tensor]:
        """Return keys of the source for each block, and which tokens are no padding."""
        padding = source == PAD
        memory = self.encoder(self.embed(source), src_key_padding_mask=padding)
        return [block.across.keys(memory) for block in self.blocks], ~padding[:, None, None, :]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (batch, time, vocabulary) of the token after each of the target's."""
        memory, seen = self.encode(source)
        x = self.embed(target)
        for block, keys in zip(self.blocks, memory, strict=True):
            x, _ = block(x, keys, seen)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.inference_mode()
    def translate(self, source: list[int], steps: int | None = None) -> list[int]:
        """Translate one sentence greedily, up to its end; or, to measure, for so many tokens."""
        memory, _ = self.encode(torch.tensor([source]))
        past: list[Keys | None] = [None] * len(self.blocks)
        token, found = torch.tensor([[BEGIN]]), []
        for k in range(steps or min(2 * len(source) + 10, LONGEST)):
            x = self.embed(token, k)
            for i, block in enumerate(self.blocks):
                x, past[i] = block(x, memory[i], None, past[i])
            token = F.linear(self.norm(x), self.embedding.weight).argmax(-1)
            found.append(int(token))
            if steps is None and found[-1] == END:
                return found[:-1]
        return found
