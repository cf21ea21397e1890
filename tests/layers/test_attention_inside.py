"""StructuredMultiheadAttention inside torch's transformers, compiled and exported, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from test_attention import HEADS, PROJECTIONS, SIZE, dense, low_rank, mask
from torch import nn

from structlin import StructuredLinear
from structlin.layers.attention import StructuredMultiheadAttention
from structlin.testing import assert_close

# Inside the transformers of torch ------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The structured layers that are called; a hook would switch the fast path off by itself."""
    layers = []
    forward = StructuredLinear.forward
    monkeypatch.setattr(StructuredLinear, "forward", lambda layer, x: layers.append(layer) or forward(layer, x))
    return layers


def replace(module):
    """Replace the attentions by structured ones in a copy, by their dense twins in another."""
    structured, twin = copy.deepcopy(module), copy.deepcopy(module)
    for name, attention in module.named_modules():
        if isinstance(attention, nn.MultiheadAttention):
            opened, closed = low_rank(attention)
            parent, _, child = name.rpartition(".")
            setattr(structured.get_submodule(parent), child, opened)
            setattr(twin.get_submodule(parent), child, closed)
    return structured, twin


LAYER = {"d_model": SIZE, "nhead": HEADS, "dim_feedforward": 12, "dropout": 0.0, "dtype": torch.float64}
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_runs_its_projections_and_builds_no_weight(ran, monkeypatch, norm_first, training):
    block = nn.TransformerEncoderLayer(**LAYER, batch_first=True, norm_first=norm_first).train(training)
    structured, twin = replace(block)
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(StructuredLinear, "to_dense", lambda layer: pytest.fail("a dense weight was built"))
        results = structured(x), structured(x, causal, is_causal=True), structured(x, src_key_padding_mask=PADDED)
    assert len(ran) == 3 * len(PROJECTIONS)
    assert_close(results[0], twin(x), "encoder layer")
    assert_close(results[1], twin(x, causal, is_causal=True), "encoder layer, causal")
    assert_close(results[2], twin(x, src_key_padding_mask=PADDED), "encoder layer, padded")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
def test_encoder_with_padding_makes_no_nested_tensors(ran, mask_check, training):
    block = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    structured, twin = replace(nn.TransformerEncoder(block, 2, mask_check=mask_check).train(training))
    assert structured.use_nested_tensor
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    with torch.no_grad():
        y = structured(x, src_key_padding_mask=PADDED)
    assert len(ran) == 2 * len(PROJECTIONS)
    assert_close(y[~PADDED], twin(x, src_key_padding_mask=PADDED)[~PADDED], "encoder")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer_runs_its_projections(ran, batch_first, training):
    block = nn.TransformerDecoderLayer(**LAYER, batch_first=batch_first).train(training)
    structured, twin = replace(block)
    x, memory = torch.randn(3, 3, SIZE, dtype=torch.float64), torch.randn(3, 3, SIZE, dtype=torch.float64)
    y = structured(x, memory)
    assert len(ran) == 2 * len(PROJECTIONS)
    assert_close(y, twin(x, memory), "decoder layer")
    y.sum().backward()
    assert all(p.grad is not None for p in structured.parameters())


# Compiled and exported -----------------------------------------------------------------------------------------------


def test_compile_and_export():
    opened, _ = low_rank(dense(batch_first=True).float())
    compiled = torch.compile(opened, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, SIZE)
    for kwargs in ({}, {"need_weights": False}, {"key_padding_mask": PADDED, "need_weights": False}):
        assert_close(compiled(x, x, x, **kwargs)[0], opened(x, x, x, **kwargs)[0], f"compiled, {list(kwargs)}")
    compiled(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in opened.parameters())
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {name: {0: batch, 1: length} for name in ("query", "key", "value", "key_padding_mask")}
    exported = torch.export.export(opened, (x, x, x), {"key_padding_mask": PADDED}, dynamic_shapes=shapes).module()
    x, hidden = torch.randn(3, 7, SIZE), mask(bool, 3, 7)
    assert_close(exported(x, x, x, key_padding_mask=hidden)[0], opened(x, x, x, hidden)[0], "exported")


# What is refused -----------------------------------------------------------------------------------------------------


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


X = zeros(4, 3, 8)
CALLS = {  # message -> query, key, value, and options
    "query, key and value have shapes (4, 3, 8), (5, 8) and (4, 3, 8); all need 2 axes, or all 3": (
        X,
        zeros(5, 8),
        X,
        {},
    ),
    "shapes (8,), (8,) and (8,); all need 2": (*[zeros(8)] * 3, {}),
    "the batches, and the lengths of key and value, must be equal": (X, X, zeros(6, 3, 8), {}),
    "(4, 3, 8), (5, 1, 8) and (5, 1, 8); the batches": (X, *[zeros(5, 1, 8)] * 2, {}),
    "attn_mask has shape (1, 4); use (4, 4) or (6, 4, 4)": (X, X, X, {"attn_mask": zeros(1, 4)}),
    "attn_mask has shape (3, 4, 4); use (4, 4) or (6, 4, 4)": (X, X, X, {"attn_mask": zeros(3, 4, 4)}),
    "key_padding_mask has shape (1, 4); use (3, 4)": (X, X, X, {"key_padding_mask": zeros(1, 4)}),
    "key_padding_mask has shape (3,); use (4,)": (*[zeros(4, 8)] * 3, {"key_padding_mask": zeros(3)}),
    "key_padding_mask has shape (1, 4); use (4,)": (*[zeros(4, 8)] * 3, {"key_padding_mask": zeros(1, 4)}),
    "is_causal=True says what attn_mask is; pass that mask too": (X, X, X, {"is_causal": True}),
    "only bool and floating types of attn_mask": (X, X, X, {"attn_mask": torch.zeros(4, 4, dtype=torch.int)}),
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_torch_refuses_too(message):
    attention = dense()
    *x, kwargs = CALLS[message]
    with pytest.raises((AssertionError, RuntimeError)):
        attention(*x, **kwargs)
    with pytest.raises((ValueError, AssertionError), match=re.escape(message)):
        StructuredMultiheadAttention.from_attention(attention)(*x, **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    opened = StructuredMultiheadAttention.from_attention(dense(batch_first=True))
    x = torch.nested.nested_tensor([zeros(4, 8), zeros(3, 8)])
    with pytest.raises(ValueError, match="an input is a nested tensor; pass padded tensors and key_padding_mask"):
        opened(x, x, x)


def test_the_packed_weight_refuses_every_use():
    opened = StructuredMultiheadAttention.from_attention(dense())
    with pytest.raises(TypeError, match=r"has no packed in_proj_weight; call the module, or q_proj, k_proj and v_proj"):
        nn.functional.linear(zeros(2, 8), opened.in_proj_weight)


def test_projections_that_do_not_fit_together():
    square, wide = nn.Linear(8, 8), nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"num_heads=2, projections of sizes \[6, 8\]; the outputs, and the inputs"):
        StructuredMultiheadAttention(square, wide, square, square, num_heads=2)
    for heads in (3, 0):
        with pytest.raises(
            ValueError, match=rf"num_heads={heads}, projections of sizes \[8\].* a multiple of num_heads"
        ):
            StructuredMultiheadAttention(square, square, square, square, num_heads=heads)
    with pytest.raises(ValueError, match="one of bias_k and bias_v is None; give both or none"):
        StructuredMultiheadAttention(square, square, square, square, num_heads=2, bias_k=nn.Parameter(zeros(1, 1, 8)))
